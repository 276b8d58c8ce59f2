"""What a policy keeps of its training data, and the check of the first batch against it."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.configuration_pi0 import ActionLimits, Pi0Config, Statistics, TrainingData
from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.data.frames import data_files, episode_borders, read_columns
from lerobot_pi0.data.normalization import NormalizationStatistics, affine, dimension_name
from lerobot_pi0.data.relative_actions import make_reference_state, reference_state_of
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import dataset_key, normalize_by, trained_episodes, training_setting

logger = logging.getLogger(__name__)

MOST_TASKS = 500  # instructions that a policy keeps of its data


def check_first_batch(
    config: Pi0Config, statistics: NormalizationStatistics, dataset: Any, batch: dict[str, Any]
) -> None:
    """Check that a processed batch is normalized by these statistics, against the dataset's raw frames.

    `dataset` is its metadata. Without data on disk (streaming), or without `batch["index"]`, nothing can be
    checked. Raises UserError that names the dimension that differs most and both of its values, or the frame
    that is NaN or infinite in the dataset itself.
    """
    if batch.get("index") is None or not data_files(dataset):
        return
    indices = batch["index"].flatten().cpu().numpy()
    keys = [key for key in (OBS_STATE, ACTION) if dataset_key(key, dataset.features) in dataset.features]
    frames = policy_columns(config, read_columns(dataset, keys, indices))
    if not frames:
        return
    rows = np.searchsorted(frames["index"], indices).clip(max=len(frames["index"]) - 1)
    known = frames["index"][rows] == indices
    worst, message = 0.0, ""
    for key in keys:
        gain, offset = affine(config, statistics, key)
        values = frames[key][rows].astype(np.float64)
        for i, j in np.argwhere(~np.isfinite(values) & known[:, None])[:1]:
            raise UserError(
                f"frame {indices[i]} of the dataset has {values[i, j]} in "
                f"'{dimension_name(config, key, int(j))}' of '{key}'. `lerobot-pi0 doctor` names all such "
                "frames: correct them, or delete their episodes "
                "(lerobot-edit-dataset --operation.type=delete_episodes)"
            )
        raw = values * gain
        wanted = raw + offset
        found = batch[key].detach().cpu().double().numpy()  # Apple's GPUs have no float64
        found = found[:, 0] if found.ndim == 3 else found
        # As close as float32 comes to it, and a little.
        tolerance = 1e-4 + 1e-6 * (np.abs(raw) + np.abs(offset))
        # What is no number differs most.
        error = np.nan_to_num(np.abs(found - wanted) / tolerance, nan=np.inf, posinf=np.inf)
        error[~known] = 0
        if error.max() > max(worst, 1.0):
            worst = error.max()
            i, j = np.unravel_index(error.argmax(), error.shape)
            message = (
                f"frame {indices[i]} has {found[i, j]:.6g} in '{dimension_name(config, key, int(j))}' of "
                f"'{key}'; "
                f"by this run's statistics it is {wanted[i, j]:.6g}"
            )
    if message:
        raise UserError(
            f"the batch is not normalized by the statistics that this run computed: {message}. A resumed run "
            "needs the dataset and the settings that it began with. To go on with others, start a run from "
            "its last checkpoint: --policy.path=…/checkpoints/last/pretrained_model"
        )


def describe_training(
    config: Pi0Config, dataset_stats: Statistics | None, dataset: Any, checkpoint: str | Path | None
) -> NormalizationStatistics | None:
    """Write into the config what a run takes from its dataset, and into the dataset's metadata the statistics
    that the run normalizes by, which are returned. The arguments are those of `prepare_statistics`.

    Without a dataset nothing trains, and nothing is written. Raises UserError for settings of the other case.
    """
    if dataset_stats is None and dataset is None:
        if config.relative_actions != (config.reference_state is not None):
            raise UserError(
                f"--policy.relative_actions={str(config.relative_actions).lower()}, but the policy was not "
                "trained so: leave the flag out to run a checkpoint, or give a dataset to train"
            )
        return None
    if config.backend in ("int8", "fp8"):
        raise UserError(f"--policy.backend={config.backend} is for running a policy: train without it")
    if config.normalization_mapping["VISUAL"] is not NormalizationMode.IDENTITY:
        raise UserError(
            "--policy.normalization_mapping normalizes images (VISUAL), but the vision tower takes them in "
            "[-1, 1], as the policy scales them: set VISUAL to IDENTITY, or leave it out"
        )
    if config.ema_decay and training_setting("ema.enable"):
        raise UserError(
            "--ema.enable=true is LeRobot's EMA of the weights, and this policy keeps one of its own "
            f"(--policy.ema_decay={config.ema_decay:g}), which it evaluates and saves: leave --ema.enable "
            "out, or set --policy.ema_decay=0"
        )
    if dataset is not None and dataset_stats:
        names = {dataset_key(key, getattr(dataset, "features", {})): key for key in (OBS_STATE, ACTION)}
        if any(old != new for old, new in names.items()):
            dataset_stats = {names.get(key, key): of for key, of in dataset_stats.items()}
    if (episodes := trained_episodes(dataset)) is not None:
        logger.info(
            "action limits, instructions and statistics of relative actions are those of the %d episodes "
            "that are trained on. The other statistics are the dataset's own, of all %d episodes: to leave "
            "some out of them, delete these (lerobot-edit-dataset --operation.type=delete_episodes)",
            len(episodes),
            dataset.total_episodes,
        )
    # Weights that LeRobot puts in later, of shards, are from there.
    checkpoint = checkpoint or config.pretrained_path
    statistics = prepare_statistics(
        config, dataset_stats, dataset, checkpoint, config.pretrained_revision, episodes
    )
    config.reference_state = make_reference_state(config, statistics)
    config.action_limits = make_limits(config, statistics, dataset, episodes)
    config.training_data = describe_data(dataset, episodes)
    if dataset is not None:
        normalize_by(dataset, statistics)
    return statistics


def make_limits(
    config: Pi0Config,
    statistics: NormalizationStatistics,
    dataset: Any,
    episodes: Sequence[int] | None = None,
) -> ActionLimits | None:
    """What actions the dataset has, for the chunk guard: from its frames on disk, all or those of `episodes`,
    or else its statistics, which say nothing of steps. None where neither says.
    """
    columns = [ACTION, "episode_index", *([OBS_STATE] if _called_alike(config) else [])]
    frames = {} if dataset is None else read_columns(dataset, columns, episodes=episodes)
    frames = policy_columns(config, frames)
    step = pose = None
    if frames:
        actions, successive = frames[ACTION].astype(np.float64), ~episode_borders(frames)[1:]
        finite = np.isfinite(actions).all(1)
        if not finite.all():
            logger.warning(
                "%d actions of the dataset are NaN or infinite, the first one at index %d: the action limits "
                "leave them out, and training on them stops",
                (~finite).sum(),
                frames["index"].ravel()[~finite][0],
            )
        if not finite.any():
            return None
        low, high = actions[finite].min(0), actions[finite].max(0)
        successive &= finite[1:] & finite[:-1]
        if successive.any():
            step = np.abs(np.diff(actions, axis=0)[successive]).max(0).tolist()
        if positions := _positions(config, frames, finite):
            relative = reference_state_of(config, statistics, positions)
            offset = affine(config, statistics, ACTION)[1][relative.actions] + relative.offset
            pose = replace(relative, offset=offset.tolist())
    elif {"min", "max"} <= statistics.raw.get(ACTION, {}).keys():
        ends = np.stack([np.ravel(statistics.raw[ACTION][name]) for name in ("min", "max")])
        ends = policy_columns(config, {ACTION: ends.astype(np.float64)})[ACTION]
        low, high = ends.min(0), ends.max(0)  # some joints turn the other way
    else:
        return None
    gain, offset = affine(config, statistics, ACTION)
    return ActionLimits(low.tolist(), high.tolist(), step, gain.tolist(), offset.tolist(), pose)


def _called_alike(config: Pi0Config) -> list[tuple[int, int]]:
    """The dimensions of actions that have the name of one of the state, with that one."""
    actions, states = config.action_feature_names or [], config.state_feature_names or []
    return [(i, states.index(name)) for i, name in enumerate(actions) if states.count(name) == 1]


def _positions(config: Pi0Config, frames: dict[str, np.ndarray], finite: np.ndarray) -> list[tuple[int, int]]:
    """Those of `_called_alike` whose actions are positions of the state: in half of the finite frames they
    are as near to it as a quarter of their range. Changes of a position may be called like it.
    """
    near = []
    for action, state in _called_alike(config):
        actions = frames[ACTION][finite, action].astype(np.float64)
        distance = np.median(np.abs(actions - frames[OBS_STATE][finite, state]))
        if distance <= np.ptp(actions) / 4:
            near.append((action, state))
    return near


def describe_data(dataset: Any, episodes: Sequence[int] | None = None) -> TrainingData | None:
    """What a policy keeps of the dataset, or of the episodes of it, that it is trained on; None if it is not
    at hand.
    """
    if getattr(dataset, "tasks", None) is None:
        return None
    tasks = [str(task) for task in dataset.tasks.index]
    if episodes is not None:
        trained = {task for episode in episodes for task in dataset.episodes[episode]["tasks"]}
        tasks = [task for task in tasks if task in trained]
    return TrainingData(float(dataset.fps), tasks if len(tasks) <= MOST_TASKS else [])
