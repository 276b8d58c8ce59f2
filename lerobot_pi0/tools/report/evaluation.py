"""`lerobot-pi0 report`: errors of a policy's chunks against recorded actions and open-loop baselines.

Every chunk is predicted from a recorded observation (open loop), so errors do not accumulate as on a robot. A
policy that does well here may fail there; one that does not beat the baselines has not learnt the task yet.
"""

from dataclasses import dataclass

import numpy as np

from lerobot_pi0.data.normalization import NEARLY_CONSTANT
from lerobot_pi0.tools.bootstrap import ratio_interval
from lerobot_pi0.tools.columns import named_grippers
from lerobot_pi0.tools.open_loop import (
    HOLD,
    Recording,
    baselines,
)

PHASES = ("start", "middle", "end")  # thirds of an episode


@dataclass(frozen=True)
class Comparison:
    """The policy's error over a baseline's: mean, and the 95 % interval over resampled episodes."""

    baseline: str
    error: float  # of the baseline, in standard deviations of the data
    ratio: float
    low: float | None  # None for a single episode
    high: float | None

    @property
    def is_beaten(self) -> bool:
        """Whether the policy is better beyond chance, and by more than a thousandth."""
        return (self.ratio if self.high is None else self.high) < 0.999

    @property
    def is_undecided(self) -> bool:
        """Whether the policy may be better or no better: the interval has ratios of both."""
        return self.low is not None and self.low < 0.999 and not self.is_beaten


@dataclass(frozen=True)
class Joint:
    """Errors of one joint: mean absolute, over all steps within the episode."""

    name: str
    error: float  # robot units
    normalized: float  # in standard deviations of the data
    by_phase: list[float | None]  # normalized
    baselines: dict[str, float]  # normalized
    discontinuity: float | None  # mean at chunk boundaries, normalized


@dataclass(frozen=True)
class Discontinuity:
    """Discontinuity at chunk boundaries: from a chunk's last executed action to the next one's first."""

    count: int
    mean: float  # over boundaries and joints, in standard deviations of the data
    step: float  # the same for steps within a chunk
    recorded: float  # the same for the recorded actions at the boundaries
    worst_episode: int
    worst_frame: int  # within the episode
    worst_joint: str
    worst: float  # robot units


@dataclass(frozen=True)
class Gripper:
    """When a gripper opens and closes: recorded events, and the policy's nearest of the same direction."""

    name: str
    recorded: int
    offsets: list[float]  # seconds, positive where the policy is late
    missed: int
    extra: int


@dataclass(frozen=True)
class Report:
    """All that the page says in numbers. Errors are mean absolute, averaged over the noise samples."""

    num_chunks: int
    episodes: list[int]
    stride: int
    error: float  # in standard deviations of the data, mean over joints and steps
    comparisons: list[Comparison]
    joints: list[Joint]
    horizon: dict[str, list[float | None]]  # normalized error at each step of a chunk, by who made it
    phases: dict[str, list[float | None]]  # at the start, middle and end of an episode
    spread: float  # standard deviation over noise samples, in those of the data
    spread_by_step: list[float | None]
    discontinuity: Discontinuity | None
    grippers: list[Gripper]

    @property
    def worst_joint(self) -> Joint:
        """The joint with the largest normalized error."""
        return max(self.joints, key=lambda joint: joint.normalized)

    def verdict(self) -> list[str]:
        """The findings as sentences, the most important first."""
        beaten = [c.baseline for c in self.comparisons if c.is_beaten]
        undecided = [c.baseline for c in self.comparisons if c.is_undecided]
        others = [c.baseline for c in self.comparisons if not (c.is_beaten or c.is_undecided)]
        others.sort(key=lambda name: name != HOLD)  # not to move is what any policy should beat
        found = [f"is no better than {_listed(others, 'or')}"] if others else []
        if undecided:
            found.append(
                f"is not distinguishable from {_listed(undecided, 'or')} by {len(self.episodes)} episodes"
            )
        found += [f"beats {_listed(beaten)}"] if beaten else []
        lines = [f"This policy {'. It '.join(found)}."]
        for c in self.comparisons:
            interval = "" if c.low is None else f" (95 % interval {c.low:.2f} to {c.high:.2f})"
            lines.append(f"Its error is {c.ratio:.2f} times that of {c.baseline}{interval}.")
        worst = self.worst_joint
        lines.append(
            f"Worst joint: {worst.name}, off by {worst.error:.3g} on average, "
            f"{worst.normalized:.2f} of its standard deviation in the data."
        )
        if self.discontinuity:
            d = self.discontinuity
            lines.append(
                f"Discontinuity at chunk boundaries: {d.mean:.2f} standard deviations; a step within a chunk "
                f"is {d.step:.2f}, a recorded one at the boundaries {d.recorded:.2f}. The largest: "
                f"{d.worst:.3g} of {d.worst_joint} at frame {d.worst_frame} of episode {d.worst_episode}."
            )
        else:
            lines.append(
                f"Chunk boundaries were not evaluated: chunks are {self.stride} frames apart and have "
                f"{len(self.horizon['policy'])} actions. Set --stride to the number of actions that the "
                "robot executes of each chunk."
            )
        for g in self.grippers:
            if g.recorded or g.extra:
                late = f", median {np.median(g.offsets):+.2f} s" if g.offsets else ""
                lines.append(
                    f"{g.name}: of {g.recorded} recorded openings and closings the policy makes "
                    f"{len(g.offsets)}{late}, and {g.extra} that were not recorded."
                )
        return lines


def evaluate(recording: Recording, frames: np.ndarray, planned: np.ndarray, stride: int) -> Report:
    """Compare chunks (N, K, C, D), planned at rows (N,) of a recording, with what was recorded there.

    Steps beyond the end of an episode do not count.
    """
    length = planned.shape[2]
    truth, valid = recording.following(frames, length)
    guesses = baselines(recording, frames, length)
    errors = {"policy": np.abs(planned - truth[:, None]).mean(1)}
    errors |= {name: np.abs(guess - truth) for name, guess in guesses.items()}
    errors = {name: error / recording.scale for name, error in errors.items()}
    spread = planned.std(1) / recording.scale
    # Where each step stands in its episode, in thirds.
    lengths = np.bincount(recording.episode)[recording.episode[frames]]
    starts = recording.end(frames) - lengths
    at = frames[:, None] + np.arange(length) - starts[:, None]
    phases = np.minimum(at * len(PHASES) // lengths[:, None], len(PHASES) - 1)
    inside = [valid & (phases == phase) for phase in range(len(PHASES))]
    steps = [valid & (np.arange(length) == step) for step in range(length)]
    episodes = recording.episode[frames]
    per_chunk = {name: _per_chunk(error, valid) for name, error in errors.items()}
    boundary_steps = _boundary_steps(recording, frames, planned, stride)
    joints = [
        Joint(
            name=name,
            error=float(errors["policy"][valid][:, j].mean() * recording.scale[j]),
            normalized=float(errors["policy"][valid][:, j].mean()),
            by_phase=[_mean(errors["policy"][..., j], where) for where in inside],
            baselines={guess: float(errors[guess][valid][:, j].mean()) for guess in guesses},
            discontinuity=float(boundary_steps[:, j].mean() / recording.scale[j])
            if len(boundary_steps)
            else None,
        )
        for j, name in enumerate(recording.joints)
    ]
    return Report(
        num_chunks=len(frames),
        episodes=sorted({int(episode) for episode in episodes}),
        stride=stride,
        error=float(per_chunk["policy"].mean()),
        comparisons=[_compare(name, per_chunk["policy"], per_chunk[name], episodes) for name in guesses],
        joints=joints,
        horizon={name: [_mean(error, where) for where in steps] for name, error in errors.items()},
        phases={name: [_mean(error, where) for where in inside] for name, error in errors.items()},
        spread=float(spread[valid].mean()),
        spread_by_step=[_mean(spread, where) for where in steps],
        discontinuity=_discontinuity(recording, frames, planned, stride, boundary_steps),
        grippers=[_gripper(recording, frames, planned, stride, j) for j in named_grippers(recording.joints)],
    )


def executed(
    recording: Recording, frames: np.ndarray, planned: np.ndarray, episode: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a robot would be sent in an episode: of each chunk, as planned from the first noise, the actions
    until the next one. Rows of the recording (n,) and actions (n, D)."""
    end, length = recording.frames(episode)[-1] + 1, min(stride, planned.shape[2])
    rows, actions = [], []
    for i in np.flatnonzero(recording.episode[frames] == episode):
        count = min(length, end - frames[i])
        rows.append(frames[i] + np.arange(count))
        actions.append(planned[i, 0, :count])
    return np.concatenate(rows), np.concatenate(actions)


def _per_chunk(error: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the valid steps and all joints, (N,)."""
    return (error.mean(2) * valid).sum(1) / valid.sum(1)


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
    return float(values[where].mean()) if where.any() else None


def _compare(name: str, policy: np.ndarray, baseline: np.ndarray, episodes: np.ndarray) -> Comparison:
    """Ratio of two mean errors per chunk (N,), with its interval."""
    of_episode = [episodes == episode for episode in np.unique(episodes)]
    sums = np.array([(policy[own].sum(), baseline[own].sum()) for own in of_episode])
    return Comparison(name, float(baseline.mean()), *ratio_interval(sums))


def _followed(recording: Recording, frames: np.ndarray, stride: int) -> np.ndarray:
    """Which of the chunks are followed by the next one of the same episode, `stride` frames later."""
    same = recording.episode[frames[1:]] == recording.episode[frames[:-1]]
    return np.flatnonzero(same & (np.diff(frames) == stride))


def _boundary_steps(recording: Recording, frames: np.ndarray, planned: np.ndarray, stride: int) -> np.ndarray:
    """From the last executed action of each chunk to the first of the next, absolute, (boundaries, D).

    As planned from the first noise: on a robot no two chunks share it either.
    """
    if stride > planned.shape[2]:
        return np.empty((0, planned.shape[3]))
    at = _followed(recording, frames, stride)
    return np.abs(planned[at + 1, 0, 0] - planned[at, 0, stride - 1])


def _discontinuity(
    recording: Recording, frames: np.ndarray, planned: np.ndarray, stride: int, boundary_steps: np.ndarray
) -> Discontinuity | None:
    if not len(boundary_steps):
        return None
    at, scale = _followed(recording, frames, stride), recording.scale
    steps = np.abs(np.diff(planned[:, 0, : max(stride, 2)], axis=1))
    after = frames[at + 1]
    largest, joint = np.unravel_index((boundary_steps / scale).argmax(), boundary_steps.shape)
    episode = int(recording.episode[after[largest]])
    return Discontinuity(
        count=len(boundary_steps),
        mean=float((boundary_steps / scale).mean()),
        step=float((steps / scale).mean()) if steps.size else 0.0,
        recorded=float((np.abs(recording.actions[after] - recording.actions[after - 1]) / scale).mean()),
        worst_episode=episode,
        worst_frame=int(after[largest] - recording.frames(episode)[0]),
        worst_joint=recording.joints[int(joint)],
        worst=float(boundary_steps[largest, joint]),
    )


def _gripper(
    recording: Recording, frames: np.ndarray, planned: np.ndarray, stride: int, joint: int
) -> Gripper:
    """Openings and closings are crossings of the middle of the recorded range, by a tenth of it to each side.

    One of the policy's belongs to a recorded one of the same direction at most a chunk away.
    """
    low, high = recording.actions[:, joint].min(), recording.actions[:, joint].max()
    reach, offsets, missed, extra, count = planned.shape[2], [], 0, 0, 0
    for episode in np.unique(recording.episode[frames]):
        rows, actions = executed(recording, frames, planned, int(episode), stride)
        made = [(rows[at], up) for at, up in _events(actions[:, joint], low, high)]
        recorded = _events(recording.actions[rows, joint], low, high)
        count += len(recorded)
        for at, up in recorded:
            near = [event for event in made if event[1] == up and abs(event[0] - rows[at]) <= reach]
            if not near:
                missed += 1
                continue
            chosen = min(near, key=lambda event: abs(event[0] - rows[at]))
            made.remove(chosen)
            offsets.append(float(chosen[0] - rows[at]) / recording.fps)
        extra += len(made)
    return Gripper(recording.joints[joint], count, offsets, missed, extra)


def _events(values: np.ndarray, low: float, high: float) -> list[tuple[int, bool]]:
    """Where a series passes the middle of a range for good, and whether upwards."""
    if high - low < NEARLY_CONSTANT:
        return []
    share = (values - low) / (high - low)
    is_high, events = share[0] > 0.5, []
    for at, value in enumerate(share):
        if value > 0.6 if not is_high else value < 0.4:
            is_high = not is_high
            events.append((at, bool(is_high)))
    return events


def _listed(names: list[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
