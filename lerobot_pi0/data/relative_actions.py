"""Actions relative to the state that a chunk is predicted from: joints, offsets, statistics."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.configuration_pi0 import ABSOLUTE_JOINTS, Pi0Config, ReferenceState
from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.data.frames import episode_borders, read_columns
from lerobot_pi0.data.normalization import QUANTILES, NormalizationStatistics, affine, dimension_name
from lerobot_pi0.errors import UserError

logger = logging.getLogger(__name__)


_SAMPLES = 2**19  # that quantiles of relative actions are taken from


_BLOCK = 8192  # frames at once: what is computed of them stays in the processor's cache


def relative_joints(config: Pi0Config) -> list[tuple[int, int]]:
    """The dimensions of actions that are relative, each with the state's dimension of the same name.

    Raises ValueError for a joint that the state does not have, and for names that are not there.
    """
    actions, states = config.action_feature_names, config.state_feature_names
    if not actions or not states:
        raise UserError(
            "--policy.relative_actions=true finds each joint of the action in the state by its name, but the "
            f"dataset does not name each dimension of '{OBS_STATE if actions else ACTION}': write the names "
            "into its meta/info.json, or set --policy.relative_actions=false"
        )
    words = config.absolute_joints
    unknown = [word for word in words if not any(word.lower() in name.lower() for name in actions)]
    if unknown and words != list(ABSOLUTE_JOINTS):
        raise UserError(f"--policy.absolute_joints names {unknown}, but the joints are {actions}")
    relative = [name for name in actions if not any(word.lower() in name.lower() for word in words)]
    if not relative:
        raise UserError(
            f"--policy.relative_actions=true, but all joints are absolute: {actions} with "
            f"--policy.absolute_joints='{json.dumps(words)}'"
        )
    strangers = [name for name in relative if states.count(name) != 1 or actions.count(name) != 1]
    if strangers:
        everything = json.dumps([*(word for word in words if word not in unknown), *strangers])
        raise UserError(
            f"--policy.relative_actions=true, but {strangers} of the action cannot be found in the state, "
            f"which is {states}. To let them be absolute: --policy.absolute_joints='{everything}'"
        )
    return [(actions.index(name), states.index(name)) for name in relative]


def make_reference_state(config: Pi0Config, statistics: NormalizationStatistics) -> ReferenceState | None:
    """What makes this config's relative actions absolute in normalized units; None if they are absolute."""
    return (
        reference_state_of(config, statistics, relative_joints(config)) if config.relative_actions else None
    )


def reference_state_of(
    config: Pi0Config, statistics: NormalizationStatistics, joints: Sequence[tuple[int, int]]
) -> ReferenceState:
    """What makes these dimensions of actions absolute, each relative to one of the state.

    With actions normalized as a · gain_a + offset_a, and offset_a of the relative ones, the normalized
    relative action is the normalized absolute one minus (raw state) · gain_a.
    """
    actions, states = [a for a, _ in joints], [s for _, s in joints]
    gain_of_action, _ = affine(config, statistics, ACTION)
    gain_of_state, offset_of_state = affine(config, statistics, OBS_STATE)
    gain = gain_of_action[actions] / gain_of_state[states]
    return ReferenceState(actions, states, gain.tolist(), (-offset_of_state[states] * gain).tolist())


def relative_statistics(
    actions: np.ndarray, states: np.ndarray, borders: np.ndarray, chunk_size: int
) -> dict[str, np.ndarray]:
    """Statistics (dims,) of all actions of all chunks, each minus the state that its chunk starts from.

    Actions and states (dims, frames), dimension i of the one belonging to dimension i of the other; `borders`
    are the frames at which an episode starts. Steps beyond an episode's end do not count. Exact, but for
    quantiles of more than about a million actions, which are those of evenly spread ones.
    """
    frames = actions.shape[1]
    starts = np.arange(frames)
    ends = np.append(borders, frames)[np.searchsorted(borders, starts, side="right")]
    total = int(np.minimum(ends - starts, chunk_size).sum())
    stride = -(-total // _SAMPLES)
    # Near the mean, so that sums of squares lose no digits.
    centre = (actions.mean(1, dtype=np.float64) - states.mean(1, dtype=np.float64))[:, None]
    sums, squares = np.zeros(len(actions)), np.zeros(len(actions))
    low, high = np.full(len(actions), np.inf), np.full(len(actions), -np.inf)
    samples, seen = [], 0
    for start in range(0, frames, _BLOCK):
        for step in range(chunk_size):
            stop = min(start + _BLOCK, frames - step)
            if start >= stop:
                break
            x = np.subtract(actions[:, start + step : stop + step], states[:, start:stop], dtype=np.float64)
            x -= centre
            inside = starts[start:stop] + step < ends[start:stop]
            x = x if inside.all() else x[:, inside]
            if not x.size:
                continue
            sums += x.sum(1)
            squares += np.einsum("ij,ij->i", x, x)
            np.minimum(low, x.min(1), out=low)
            np.maximum(high, x.max(1), out=high)
            samples.append(x[:, -seen % stride :: stride].copy())  # a view would keep all of x
            seen += x.shape[1]
    mean, centre = sums / total, centre[:, 0]
    quantiles = np.quantile(np.concatenate(samples, 1), list(QUANTILES.values()), axis=1) + centre
    return {
        "mean": mean + centre,
        "std": np.sqrt(np.maximum(squares / total - mean**2, 0)),
        "min": low + centre,
        "max": high + centre,
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def relative_action_statistics(
    config: Pi0Config, absolute: dict[str, Any], dataset: Any, episodes: Sequence[int] | None = None
) -> dict[str, Any]:
    """The statistics of actions, those of relative joints computed from the dataset's frames, all or those of
    `episodes`.
    """
    joints, columns = relative_joints(config), [ACTION, OBS_STATE, "episode_index"]
    frames = {} if dataset is None else read_columns(dataset, columns, episodes=episodes)
    frames = policy_columns(config, frames)
    if not frames:
        raise UserError(
            "--policy.relative_actions=true needs the statistics of relative actions, which are computed "
            "from the dataset's actions and states, and there are none on this disk: train without "
            "--dataset.streaming, or take the statistics of a checkpoint that was trained on relative "
            "actions (--policy.statistics=checkpoint)"
        )
    actions, states = (
        np.ascontiguousarray(frames[key][:, [joint[i] for joint in joints]].T)
        for i, key in enumerate((ACTION, OBS_STATE))
    )
    borders = np.flatnonzero(episode_borders(frames))
    logger.info(
        "relative actions: %s; their statistics are computed from %d frames",
        ", ".join(dimension_name(config, ACTION, action) for action, _ in joints),
        actions.shape[1],
    )
    found = {name: np.array(value, np.float64).ravel() for name, value in absolute.items()}
    size = frames[ACTION].shape[1]
    for name, values in relative_statistics(actions, states, borders, config.chunk_size).items():
        if name in found:
            found[name][[action for action, _ in joints]] = values
        elif len(joints) == size:
            found[name] = np.empty(size)
            found[name][[action for action, _ in joints]] = values
    return found
