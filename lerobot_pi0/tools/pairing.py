"""Pairs of actions and joints of the state: absolute or relative, and their lag, inferred from the data."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lerobot_pi0.tools.columns import Columns

# Absolute: target positions. Relative: displacements. Unknown: the data shows neither.
Kind = Literal["absolute", "relative", "unknown"]

FRAMES = 20_000  # as many are enough for correlations
SMOOTH = 20  # different values; fewer are an open-or-shut gripper, which says nothing of times
SAME, MOVES = 0.9, 0.4  # correlations of an action with a position, and with a movement
SOON, LATE = 0.3, 1.0  # seconds in which a joint reaches its target; longest lag considered


@dataclass(frozen=True)
class Pairing:
    """p actions, each beside a joint of the state: by names, or by places if no name is shared."""

    names: list[str]  # (p,) of the actions
    actions: list[int]  # (p,) which dimension of the dataset's action
    states: list[int]  # (p,) which one of its state
    by_name: bool
    action: np.ndarray  # (n, p)
    state: np.ndarray  # (n, p)
    episode: np.ndarray  # (n,)
    fps: float

    @classmethod
    def of(
        cls, columns: Columns, states: Sequence[str] | None, actions: Sequence[str] | None, fps: float
    ) -> "Pairing":
        """The pairs in the data: of some episodes, if there are many frames."""
        pairs = []
        if states and actions:
            pairs = [(i, states.index(name)) for i, name in enumerate(actions) if name in states]
        by_name = bool(pairs)
        if not pairs and columns.action.shape[1] == columns.state.shape[1]:
            pairs = [(i, i) for i in range(columns.action.shape[1])]
        stride = -(-len(columns.episode) // FRAMES)
        # Random, because every n-th episode could miss tasks that alternate.
        order = np.random.default_rng(0).permutation(len(columns.episodes))
        drawn = sorted(order[: -(-len(order) // stride)].tolist())
        rows = np.concatenate([np.r_[columns.episodes[i]] for i in drawn])
        of_action, of_state = [i for i, _ in pairs], [j for _, j in pairs]
        return cls(
            [actions[i] if actions else str(i) for i in of_action],
            of_action,
            of_state,
            by_name,
            columns.action[rows][:, of_action].astype(np.float64),
            columns.state[rows][:, of_state].astype(np.float64),
            columns.episode[rows],
            fps,
        )

    @cached_property
    def smooth(self) -> np.ndarray:
        """Which pairs (p,) take many values and move."""
        return np.array(
            [
                len(np.unique(action)) > SMOOTH and len(np.unique(state)) > SMOOTH
                for action, state in zip(self.action.T, self.state.T, strict=True)
            ],
            dtype=bool,
        )

    @cached_property
    def kind(self) -> Kind:
        """What most of the smooth joints' actions are."""
        if not self.smooth.any():
            return "unknown"
        reach = max(1, round(SOON * self.fps))
        soon = range(-reach, reach + 1)
        kinds: list[Kind] = []
        for joint in np.flatnonzero(self.smooth):
            a, s = self.action[:, joint], self.state[:, joint]
            same = max(_correlation(*self._aligned(a, s, k)) for k in soon)
            moves = max(_correlation(*self._aligned(a, _ahead(s), k)) for k in soon)
            kinds.append("absolute" if same > SAME else "relative" if moves > MOVES else "unknown")
        return max(kinds, key=kinds.count)

    @cached_property
    def lag(self) -> int:
        """Frames from an action to the movement of its joint, where the two correlate most.

        0: from the frame of the action to the next one.
        """
        return max(self.agreements, key=lambda lag: self.agreements[lag])

    @cached_property
    def agreements(self) -> dict[int, float]:
        """Lag in frames → mean correlation of actions with the movement of their joints that much later."""
        longest = np.bincount(self.episode - self.episode.min()).max() // 3
        reach = int(min(round(LATE * self.fps), longest))
        return {lag: self._agreement(lag) for lag in sorted(range(-reach, reach + 1), key=abs)}

    @cached_property
    def table(self) -> np.ndarray:
        """Correlation of each smooth action with each smooth joint (joints, joints), be it with where the
        joint is next or with how it moves there."""
        joints = np.flatnonzero(self.smooth)
        found = np.zeros((len(joints), len(joints)))
        for (i, action), (j, joint) in itertools.product(enumerate(joints), repeat=2):
            a, s = self.action[:, action], self.state[:, joint]
            found[i, j] = max(abs(_correlation(*self._aligned(a, of, 1))) for of in (s, _ahead(s)))
        return found

    def signals(self, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """Commanded changes, and the changes of the joints `lag` frames later, each (rows, p)."""
        said = _ahead(self.action) if self.kind == "absolute" else self.action
        return self._aligned(said, _ahead(self.state), lag)

    def _agreement(self, lag: int) -> float:
        action, state = self.signals(lag)
        found = [_correlation(action[:, j], state[:, j]) for j in np.flatnonzero(self.smooth)]
        return float(np.mean(found)) if found else 0.0

    def _aligned(self, first: np.ndarray, second: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the first and, `lag` frames later in the same episode, of the second; no last frames."""
        rows = np.arange(len(self.episode))
        rows = rows[(rows + lag >= 0) & (rows + lag + 1 < len(rows)) & (rows + 1 < len(rows))]
        rows = rows[
            (self.episode[rows] == self.episode[rows + lag])
            & (self.episode[rows] == self.episode[rows + lag + 1])
            & (self.episode[rows] == self.episode[rows + 1])
        ]
        return first[rows], second[rows + lag]


def _ahead(values: np.ndarray) -> np.ndarray:
    """The change from each frame to the next one; the last has none."""
    return np.diff(values, axis=0, append=values[-1:])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return 0.0
    found = float(np.corrcoef(a, b)[0, 1])
    return found if np.isfinite(found) else 0.0  # the data may hold NaN
