"""A dataset's frames without their pictures."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np


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
