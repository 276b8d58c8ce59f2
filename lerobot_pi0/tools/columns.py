"""A dataset's frames without their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

GRIPPERS = ("gripper", "jaw", "finger", "claw")  # words in the names of joints that open and close
# Without names: at most a fifth of its range from either end, in nearly all frames, and at both in some.
END, AT_ENDS, USED = 0.2, 0.9, 0.02


def named_grippers(names: Sequence[str]) -> list[int]:
    """The dimensions whose names say that they open and close."""
    return [i for i, name in enumerate(names) if any(word in name.lower() for word in GRIPPERS)]


def grippers(actions: np.ndarray, names: Sequence[str] | None) -> list[int]:
    """Which dimensions of actions (n, dims) open and close something: by name, or as they have two values."""
    moving = np.ptp(actions, axis=0) > 0
    if names and (named := named_grippers(names)):
        return [i for i in named if moving[i]]
    at = (actions - actions.min(0)) / np.where(moving, np.ptp(actions, axis=0), 1)
    low, high = (at < END).mean(0), (at > 1 - END).mean(0)
    return np.flatnonzero(moving & (low + high > AT_ENDS) & (np.minimum(low, high) > USED)).tolist()


@dataclass(frozen=True)
class Columns:
    """What all frames on this disk hold beside pictures; n of them, in order."""

    episode: np.ndarray  # (n,)
    frame: np.ndarray  # (n,) its number in the episode
    timestamp: np.ndarray  # (n,) seconds
    task: np.ndarray  # (n,)
    state: np.ndarray  # (n, dims), in the robot's units
    action: np.ndarray  # (n, dims)

    @cached_property
    def episodes(self) -> list[slice]:
        """The frames of each episode."""
        borders = np.flatnonzero(np.diff(self.episode)) + 1
        ends = [0, *borders.tolist(), len(self.episode)]
        return [slice(start, stop) for start, stop in pairwise(ends) if stop > start]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames of each episode."""
        return np.array([episode.stop - episode.start for episode in self.episodes])

    def place(self, row: int) -> str:
        """A frame as people look for it."""
        return f"episode {self.episode[row]}, frame {self.frame[row]}"
