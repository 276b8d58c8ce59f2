"""Actions of a dataset, to be tried in an environment."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lerobot_pi0.tools.columns import Columns, grippers
from lerobot_pi0.tools.pairing import Kind

SECONDS, FEWEST, MOST = 0.5, 8, 40  # of a demonstration's beginning; steps


@dataclass(frozen=True)
class Tries:
    """The first actions of a demonstration, and the gripper at one end and then at the other."""

    replayed: slice  # rows of the dataset
    gripper: int | None  # dimension of the action
    ends: tuple[float, float]  # its least value and its largest
    steps: int  # at either end
    actions: list[np.ndarray]  # (steps, dims), for one reset each

    @classmethod
    def of(cls, columns: Columns, names: Sequence[str] | None, kind: Kind, fps: float) -> "Tries":
        """While the gripper is tried, positions are those of the first action, displacements are zero."""
        first = columns.episodes[0]
        steps = int(np.clip(round(SECONDS * fps), FEWEST, MOST))
        replayed = slice(first.start, min(first.start + steps, first.stop - 1))
        actions = [columns.action[replayed]]
        found = grippers(columns.action, names)
        if not found:
            return cls(replayed, None, (0.0, 0.0), steps, actions)
        low, high = float(columns.action[:, found[0]].min()), float(columns.action[:, found[0]].max())
        held = np.tile(columns.action[first.start] * (kind == "absolute"), (2 * steps, 1))
        held[:steps, found[0]], held[steps:, found[0]] = high, low
        return cls(replayed, found[0], (low, high), steps, [*actions, held])
