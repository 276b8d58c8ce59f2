"""Chunks predicted at recorded observations, the recorded actions, and three open-loop baselines.

Letters in shapes: F frames of a dataset, N of them looked at, K noise samples, C steps of a chunk, D joints
(dimensions of an action). Actions are in the robot's units.
"""

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from tqdm import tqdm

from lerobot_pi0.checkpoints.reading import read_json
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.frames import read_columns
from lerobot_pi0.data.normalization import FLOOR, NEARLY_CONSTANT
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.inputs.dataset import check_episodes
from lerobot_pi0.inputs.policy import LoadedPolicy
from lerobot_pi0.lerobot_compat import dataset_key
from lerobot_pi0.tools.columns import Columns
from lerobot_pi0.tools.pairing import Pairing

HOLD, MEAN, NEAREST = "holding still", "the mean action", "the nearest demonstration"


@dataclass(frozen=True)
class Recording:
    """The frames of a dataset without their pictures."""

    index: np.ndarray  # (F,) as the dataset counts them, ascending
    actions: np.ndarray  # (F, D)
    states: np.ndarray  # (F, S)
    episode: np.ndarray  # (F,)
    task: np.ndarray  # (F,)
    instructions: dict[int, str]  # of each task
    joints: list[str]  # D names
    displaces: np.ndarray  # (D,) which actions say how far to go from here, and not where: 0 is to stay
    mean: np.ndarray  # (D,) of the dataset's actions
    scale: np.ndarray  # (D,) their standard deviation: errors are compared between joints in it
    fps: float

    def frames(self, episode: int) -> np.ndarray:
        """The rows of an episode."""
        return np.flatnonzero(self.episode == episode)

    def end(self, frames: np.ndarray) -> np.ndarray:
        """The row behind the last one of each frame's episode, (N,)."""
        ends = np.append(np.flatnonzero(np.diff(self.episode)) + 1, len(self.episode))
        return ends[np.searchsorted(ends, frames, side="right")]

    def following(self, frames: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The `length` actions from each frame on, (N, length, D), and which of them are within its episode.

        Beyond the episode's end stands its last action.
        """
        rows = frames[:, None] + np.arange(length)
        last = self.end(frames)[:, None] - 1
        return self.actions[np.minimum(rows, last)], rows <= last

    def last_action(self, frames: np.ndarray) -> np.ndarray:
        """The action before each frame, (N, D); in an episode's first frame its own, for want of another."""
        is_first = np.isin(frames, [0, *self.end(np.arange(len(self.episode)))])
        return self.actions[np.where(is_first, frames, frames - 1)]

    def nearest(self, frames: np.ndarray, task: int | None = None) -> np.ndarray | None:
        """For each frame the one with the nearest state, (N,), in another episode of its task (or `task`).

        Where its task has no other episode, in one of any task. None when the dataset has one episode.
        """
        spread = self.states.std(0)
        states = self.states / np.where(spread < NEARLY_CONSTANT, FLOOR, spread)
        found = np.empty(len(frames), np.int64)
        for i, frame in enumerate(frames):
            others = self.episode != self.episode[frame]
            of_task = others & (self.task == (self.task[frame] if task is None else task))
            rows = np.flatnonzero(of_task if of_task.any() else others)
            if not len(rows):
                return None
            found[i] = rows[np.square(states[rows] - states[frame]).sum(1).argmin()]
        return found


def read_recording(
    metadata: LeRobotDatasetMetadata, config: Pi0Config, episodes: Sequence[int] = ()
) -> Recording:
    """A dataset's frames on this disk, without the episodes that hold NaN or infinite values.

    Raises UserError where one of `episodes` does, where the actions are not the policy's, or where states or
    actions have other names than LeRobot's.
    """
    features = metadata.features
    if missing := [name for name in (ACTION, OBS_STATE) if dataset_key(name, features) not in features]:
        raise UserError(
            f"the dataset has no '{missing[0]}' among {list(features)}: write it again under LeRobot's "
            'names, by the script in docs/finetuning.md ("Datasets with other names")'
        )
    columns = read_columns(metadata, [ACTION, OBS_STATE, "episode_index", "task_index"])
    size = config.action_feature.shape[0] if config.action_feature else 0
    if not columns or columns[ACTION].shape[1] != size:
        found = columns[ACTION].shape[1] if columns else "no"
        raise UserError(
            f"the dataset has actions of {found} dimensions, the policy was made for {size}: name a dataset "
            "of its robot with --dataset.repo_id and --dataset.root"
        )
    finite = np.isfinite(columns[ACTION]).all(1) & np.isfinite(columns[OBS_STATE]).all(1)
    damaged = np.unique(columns["episode_index"][~finite])
    if wanted := sorted({*damaged.tolist()} & {*episodes}):
        raise UserError(
            f"episodes {wanted} of the dataset hold NaN or infinite values in '{ACTION}' or '{OBS_STATE}': "
            "choose others with --dataset.episodes, or delete these (lerobot-edit-dataset "
            f"--operation.type=delete_episodes --operation.episode_indices='{damaged.tolist()}')"
        )
    keep = ~np.isin(columns["episode_index"][:, 0], damaged)
    columns = {key: column[keep] for key, column in columns.items()}
    stats: Any = (metadata.stats or {}).get(ACTION, {})
    actions = columns[ACTION].astype(np.float32)

    def statistic(name: str, computed: np.ndarray) -> np.ndarray:
        recorded = np.asarray(stats.get(name, computed), np.float64).ravel()
        return np.where(np.isfinite(recorded), recorded, computed)

    spread = statistic("std", actions.std(0))
    states = columns[OBS_STATE].astype(np.float32)
    episode, task = columns["episode_index"][:, 0], columns["task_index"][:, 0]
    return Recording(
        index=columns["index"],
        actions=actions,
        states=states,
        episode=episode,
        task=task,
        displaces=displacements(metadata, config, states, actions, episode),
        instructions=read_instructions(metadata),
        joints=config.action_feature_names or [f"joint {i}" for i in range(size)],
        mean=statistic("mean", actions.mean(0)),
        scale=np.where(spread < NEARLY_CONSTANT, FLOOR, spread),
        fps=float(metadata.fps),
    )


def displacements(
    metadata: LeRobotDatasetMetadata,
    config: Pi0Config,
    states: np.ndarray,
    actions: np.ndarray,
    episode: np.ndarray,
) -> np.ndarray:
    """Which actions (D,) are displacements of a joint, as the data shows; two-state grippers are none."""
    nothing = np.zeros(len(episode))
    columns = Columns(episode, frame=nothing, timestamp=nothing, task=nothing, state=states, action=actions)
    pairing = Pairing.of(
        columns, config.state_feature_names, config.action_feature_names, float(metadata.fps)
    )
    found = np.zeros(actions.shape[1], bool)
    if pairing.kind == "relative":
        found[pairing.actions] = pairing.smooth
    return found


def read_instructions(metadata: LeRobotDatasetMetadata) -> dict[int, str]:
    """The instructions of a dataset by their task_index."""
    return {int(row["task_index"]): str(text) for text, row in cast(Any, metadata.tasks).iterrows()}


def baselines(recording: Recording, frames: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Open-loop baselines, predictions that need no policy: {name: (N, length, D)}.

    Holding still repeats the last action, or is zero where actions are displacements. The nearest
    demonstration is what followed the nearest state in another episode; it is left out when there is no other
    episode.
    """
    hold = np.where(recording.displaces, 0, recording.last_action(frames))
    shape = (len(frames), length, len(recording.joints))
    guesses = {
        HOLD: np.broadcast_to(hold[:, None], shape),
        MEAN: np.broadcast_to(recording.mean, shape),
    }
    nearest = recording.nearest(frames)
    return guesses if nearest is None else guesses | {NEAREST: recording.following(nearest, length)[0]}


@dataclass(frozen=True)
class Selection:
    """The episodes that a tool looks at, and whether the policy was trained on them, where that is known."""

    episodes: list[int]
    trained_on: bool | None
    note: str


def select_episodes(
    chosen: list[int] | None,
    metadata: LeRobotDatasetMetadata,
    checkpoint: Path,
    count: int,
    instructions: Container[str] | None = None,
) -> Selection:
    """`chosen`, or up to `count` episodes: the first of each task, then the second, held-out ones if any.

    `instructions`: of these tasks alone. Raises ValueError for an episode that does not exist.
    """
    trained, everything = trained_episodes(checkpoint, metadata), range(metadata.total_episodes)
    if chosen is not None:
        check_episodes(chosen, metadata)
        episodes = list(dict.fromkeys(chosen))
    else:
        tasks = _first_tasks(metadata)
        wanted = [e for e in everything if instructions is None or tasks[e] in instructions]
        of_task: dict[str, list[int]] = {}
        for episode in [e for e in wanted if e not in (trained or ())] or wanted:
            of_task.setdefault(tasks[episode], []).append(episode)
        rounds = itertools.zip_longest(*of_task.values())
        episodes = sorted([e for turn in rounds for e in turn if e is not None][:count])
    if trained is None:
        return Selection(
            episodes,
            None,
            "The checkpoint does not say whether it was trained on these episodes: it has no "
            "train_config.json, or one that names another dataset. If it was, memorized actions "
            "count as skill here.",
        )
    seen = [episode for episode in episodes if episode in trained]
    if not seen:
        return Selection(episodes, False, "The policy was not trained on these episodes.")
    how_many = "all" if len(seen) == len(episodes) else f"{len(seen)} of {len(episodes)}"
    return Selection(
        episodes,
        True,
        f"The policy was trained on {how_many} of these episodes: memorized actions count as skill here. "
        "Train with --dataset.eval_split=0.1 to keep some episodes out.",
    )


def trained_episodes(checkpoint: Path, metadata: LeRobotDatasetMetadata) -> set[int] | None:
    """The episodes of a dataset that a checkpoint was trained on, as its train_config.json has them.

    None where it does not say, or names another dataset, which may be the same one elsewhere. Raises
    CheckpointError where it is damaged.
    """
    file = checkpoint / "train_config.json"
    if not file.is_file():
        return None
    try:
        dataset = read_json(file)["dataset"]
        repo_id, episodes = dataset["repo_id"], dataset["episodes"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}, which says what was trained on, is damaged ({error!r}): copy or download it again, or "
            "delete it"
        ) from error
    root = dataset.get("root")
    same_root = root is not None and Path(root).resolve() == Path(metadata.root).resolve()
    if repo_id != metadata.repo_id and not same_root:
        return None
    everything = range(metadata.total_episodes)
    # Of a dataset that has fewer by now, those that it has.
    episodes = list(everything) if episodes is None else [e for e in episodes if e in everything]
    # As lerobot-train splits: the last ones of each task are held out.
    of_task: dict[str, list[int]] = {}
    tasks = _first_tasks(metadata)
    for episode in episodes:
        of_task.setdefault(tasks[episode], []).append(episode)
    share = dataset.get("eval_split", 0.0)
    return {e for of in of_task.values() for e in of[: len(of) - math.ceil(len(of) * share)]}


def observations(
    dataset: LeRobotDataset, indices: Sequence[int] | np.ndarray, progress: str
) -> Iterator[dict[str, Any]]:
    """The dataset's items at some of its frames, with a bar on standard error if they are many."""
    rows = {int(index): row for row, index in enumerate(dataset.hf_dataset.data.column("index").to_numpy())}
    for index in tqdm(indices, desc=progress, unit="frame", disable=len(indices) == 1):
        yield cast(dict[str, Any], dataset[rows[int(index)]])


def prepare(loaded: LoadedPolicy, item: dict[str, Any], task: str | None = None) -> dict[str, Any]:
    """A dataset's item as the policy takes it; `task` replaces the item's own instruction."""
    observation = {key: value for key, value in item.items() if key.startswith("observation.")}
    return loaded.preprocess(observation | {"task": item["task"] if task is None else task})


def plan(loaded: LoadedPolicy, batch: dict[str, Any], noise: torch.Tensor) -> np.ndarray:
    """The chunks that a policy plans at a prepared item, (K, C, D), from noise (K, C, padded size).

    Raises ValueError when they are not finite.
    """
    context = loaded.policy.encode(batch)
    chunks = loaded.policy.plan(context, noise.to(batch[OBS_STATE].device), num_samples=len(noise))
    actions = loaded.postprocess(chunks).float().cpu().numpy()
    if not np.isfinite(actions).all():
        raise UserError(
            "the policy predicts NaN or infinite actions: its weights or its statistics are damaged. Try an "
            "earlier checkpoint; `lerobot-pi0 doctor` names the cause"
        )
    return actions


def draw_noise(config: Pi0Config, num_samples: int, seed: int) -> torch.Tensor:
    """Noise (K, C, padded size) that is the same on all machines."""
    shape = (num_samples, config.chunk_size, config.max_action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _first_tasks(metadata: LeRobotDatasetMetadata) -> list[str]:
    """The instruction that each episode begins with."""
    return [tasks[0] if tasks else "" for tasks in cast(Any, metadata.episodes)["tasks"]]
