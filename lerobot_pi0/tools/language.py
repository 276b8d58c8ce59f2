"""`lerobot-pi0 language`: does a policy follow its instruction, or does it act on what it sees alone?

At recorded frames the policy is given another instruction of the dataset, with the same pictures and the same
noise. The change of its actions is compared with the difference to demonstrations of the other task:

    followed = ⟨change of the actions, change of the demonstration⟩ / |change of the demonstration|²

0: the instruction makes no difference, or none towards the other task; 1: the actions become those of the
other task. Frames where both tasks are demonstrated alike have little weight. A policy trained on several
tasks can have a low loss and still ignore its instruction, if the scene determines the task.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import dataset_metadata, open_dataset
from lerobot_pi0.inputs.policy import load_policy, read_config
from lerobot_pi0.tables import format_table
from lerobot_pi0.tools.bootstrap import ratio_interval
from lerobot_pi0.tools.flags import LanguageConfig
from lerobot_pi0.tools.open_loop import (
    Recording,
    draw_noise,
    observations,
    plan,
    prepare,
    read_instructions,
    read_recording,
    select_episodes,
)

MOST_TASKS = 6  # compared, unless --tasks names them: costs grow with their square
NOTICEABLE = 0.15  # untrained policies come to ±0.1
ALIKE = 1.5  # demonstrations of two tasks this many times as far apart as those of one are of different tasks

ONE_TASK = (
    "there is no other instruction to compare with: the dataset has one task, or no demonstration of another "
    "one on this disk"
)
FOLLOWS, IGNORES, UNCLEAR, SAME = "follows", "ignores", "unclear", "done alike"


@dataclass(frozen=True)
class Swap:
    """One frame at which the instruction was swapped; everything in standard deviations of the data."""

    task: int
    given: int  # the task whose instruction the policy was given
    episode: int
    change: float  # mean absolute difference of the actions, same noise
    noise: float  # of the actions between two noise samples
    along: float  # scalar product of the actions' and the demonstrations' change
    square: float  # of the demonstrations' change
    apart: float  # mean absolute difference of the demonstrations of the two tasks
    within: float | None  # the same of two demonstrations of this task
    is_nearer: bool  # whether the swapped actions are nearer to the other task's demonstration


@dataclass(frozen=True)
class Pair:
    """What swapping two instructions with one another does."""

    tasks: tuple[int, int]
    followed: float
    low: float | None  # 95 % interval over resampled episodes; None where there is one episode
    high: float | None
    change: float
    noise: float
    nearer: float  # share of frames
    verdict: str
    frames: int


def main(config: LanguageConfig) -> str:
    """Run `lerobot-pi0 language`."""
    policy_config, folder = read_config(config.policy)
    metadata = dataset_metadata(config.dataset)
    instructions = read_instructions(metadata)
    if len(instructions) < 2:
        raise UserError(ONE_TASK)
    tasks = _tasks(config.tasks, instructions)
    compared = [instructions[task] for task in tasks]
    count = config.episodes_per_task * len(tasks)
    selection = select_episodes(config.dataset.episodes, metadata, folder, count, compared)
    dataset = open_dataset(config.dataset, episodes=selection.episodes)
    recording = read_recording(dataset.meta, policy_config, selection.episodes)
    loaded = load_policy(config.policy)
    frames = np.concatenate(
        [_spread(recording.frames(episode), config.frames_per_episode) for episode in selection.episodes]
    )
    swaps = []
    for i, item in enumerate(observations(dataset, recording.index[frames], "swapping instructions")):
        noise = draw_noise(loaded.config, config.num_samples, seed=i)
        own = int(recording.task[frames[i]])
        planned = {
            task: plan(loaded, prepare(loaded, item, instructions[task]), noise) for task in {own, *tasks}
        }
        swaps += compare(recording, int(frames[i]), planned)
    pairs = summarize(swaps)
    lines = verdict(pairs, everything := pooled(swaps))
    if config.json:
        numbers = {
            "policy": config.policy.path,
            "dataset": metadata.repo_id,
            "verdict": lines,
            "instructions": {task: instructions[task] for task in tasks},
            **dict(zip(("followed", "low", "high"), everything, strict=True)),
            "pairs": [asdict(pair) for pair in pairs],
            **asdict(selection),
        }
        return json.dumps(numbers, indent=1)
    warning = [] if selection.trained_on is False else [f"Note: {selection.note}"]
    return "\n".join([*lines, "", *_table(pairs, instructions), "", *_legend(), *warning])


def compare(recording: Recording, frame: int, planned: dict[int, np.ndarray]) -> list[Swap]:
    """What each other instruction does at a row of a recording.

    `planned`: chunks (K, C, D) by the task whose instruction was given, its own among them. Steps beyond the
    end of the episode do not count.
    """
    own, scale = int(recording.task[frame]), recording.scale
    at, length = np.array([frame]), planned[own].shape[1]
    truth, valid = (x[0] for x in recording.following(at, length))
    truth, valid = truth / scale, valid.astype(bool)
    original = planned[own][:, valid] / scale
    noise = float(np.abs(original - np.roll(original, 1, axis=0)).mean())
    twin = recording.nearest(at)
    within = None
    if twin is not None and recording.task[twin[0]] == own:
        within = float(np.abs(recording.following(twin, length)[0][0] / scale - truth)[valid].mean())
    swaps = []
    for task, chunks in planned.items():
        nearest = recording.nearest(at, task)
        if task == own or nearest is None or recording.task[nearest[0]] != task:
            continue
        other = (recording.following(nearest, length)[0][0] / scale)[valid]
        swapped = chunks[:, valid] / scale
        demonstrated = other - truth[valid]
        swaps.append(
            Swap(
                task=own,
                given=task,
                episode=int(recording.episode[frame]),
                change=float(np.abs(swapped - original).mean()),
                noise=noise,
                along=float(((swapped - original).mean(0) * demonstrated).sum()),
                square=float(np.square(demonstrated).sum()),
                apart=float(np.abs(demonstrated).mean()),
                within=within,
                is_nearer=bool(np.abs(swapped - other).mean() < np.abs(swapped - truth[valid]).mean()),
            )
        )
    return swaps


def summarize(swaps: list[Swap]) -> list[Pair]:
    """Both directions of each pair of instructions together. Raises ValueError if there was none to swap."""
    if not swaps:
        raise UserError(ONE_TASK)
    groups: dict[tuple[int, int], list[Swap]] = {}
    for swap in swaps:
        groups.setdefault((min(swap.task, swap.given), max(swap.task, swap.given)), []).append(swap)
    pairs = []
    for tasks, group in sorted(groups.items()):
        followed, low, high = pooled(group)
        within = [swap.within for swap in group if swap.within is not None]
        apart = np.mean([swap.apart for swap in group])
        if within and apart < ALIKE * np.mean(within):
            kind = SAME
        elif (followed if low is None else low) > NOTICEABLE:
            kind = FOLLOWS
        elif (followed if high is None else high) < NOTICEABLE:
            kind = IGNORES
        else:
            kind = UNCLEAR
        pairs.append(
            Pair(
                tasks=tasks,
                followed=followed,
                low=low,
                high=high,
                change=float(np.mean([swap.change for swap in group])),
                noise=float(np.mean([swap.noise for swap in group])),
                nearer=float(np.mean([swap.is_nearer for swap in group])),
                verdict=kind,
                frames=len(group),
            )
        )
    return pairs


def pooled(swaps: list[Swap]) -> tuple[float, float | None, float | None]:
    """`followed` over many frames, and its 95 % interval over resampled episodes."""
    of_episode: dict[int, np.ndarray] = {}
    for swap in swaps:
        of_episode.setdefault(swap.episode, np.zeros(2))
        of_episode[swap.episode] += (swap.along, swap.square)
    sums = np.stack(list(of_episode.values()))
    return ratio_interval(sums) if sums[:, 1].any() else (0.0, None, None)


def verdict(pairs: list[Pair], everything: tuple[float, float | None, float | None]) -> list[str]:
    """Whether the policy follows its instruction, as sentences."""
    followed, low, high = everything
    interval = "" if low is None or high is None else f" (95 % interval {low:.0%} to {high:.0%})"
    how_far = (
        f"Given another instruction with the same pictures, its actions go {followed:.0%} of the way to that "
        f"task's demonstrations{interval}."
    )
    kinds = {pair.verdict for pair in pairs if pair.verdict != SAME}
    if not kinds:
        return ["All tasks are demonstrated alike: there is nothing that an instruction could change."]
    if kinds == {FOLLOWS}:
        first = "This policy follows its instruction."
    elif kinds == {IGNORES}:
        first = "This policy ignores its instruction."
    elif FOLLOWS in kinds:
        first = (
            "This policy follows its instruction between some tasks; between others it does not, or that is "
            "not clear: see the table."
        )
    else:
        first = "It is not clear whether this policy follows its instruction: look at more episodes."
    return [first, how_far]


def _table(pairs: list[Pair], instructions: dict[int, str]) -> list[str]:
    tasks = sorted({task for pair in pairs for task in pair.tasks})
    rows = [("tasks", "verdict", "followed", "95 %", "change", "noise", "nearer to the other", "frames")]
    for pair in pairs:
        interval = "" if pair.low is None else f"{pair.low:.2f} to {pair.high:.2f}"
        rows.append(
            (
                f"{pair.tasks[0]} and {pair.tasks[1]}",
                pair.verdict,
                f"{pair.followed:.2f}",
                interval,
                f"{pair.change:.2f}",
                f"{pair.noise:.2f}",
                f"{pair.nearer:.0%}",
                str(pair.frames),
            )
        )
    return [*(f"{task}: {instructions[task]}" for task in tasks), "", format_table(rows)]


def _legend() -> list[str]:
    return [
        "followed: 0, the words make no difference; 1, the actions become the other task's",
        "change: of the actions by the instruction, in standard deviations of the data",
        "noise: the same by another noise sample",
        "nearer to the other: share of frames where the actions are nearer to the other task's",
    ]


def _tasks(chosen: list[int] | None, instructions: dict[int, str]) -> list[int]:
    present = sorted(instructions)
    if chosen is None:
        return present[:MOST_TASKS]
    unknown = sorted(set(chosen) - set(present))
    if unknown:
        listed = ", ".join(f"{task}: {instructions[task]!r}" for task in present[:20])
        raise UserError(f"--tasks={chosen}, but the dataset has no task {unknown[0]}. It has {listed}")
    return sorted(set(chosen))


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows, evenly spread, the first among them."""
    return rows[np.unique(np.arange(count) * len(rows) // count)]
