"""Conventions: an environment's states and actions are in the units, signs and order of the policy's.

What does not fit is tried again as if it was meant otherwise: the first reading that fits is named.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.data.normalization import NEARLY_CONSTANT
from lerobot_pi0.tools.columns import named_grippers
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

MARGIN = 0.25  # of a dimension's range, on either side
NARROWEST = 0.05  # of the median range: a dimension that hardly moves may be off by as much as others
DEVIATIONS = 4  # that stand for the range where the least and the largest value are not known
UNIT = 0.02  # of a quaternion's length
TURN = 1.1 * np.pi  # an angle beyond it is in degrees
BEYOND, TINY = 3.0, 0.05  # actions of as many times what the environment takes; of its range
SLACK = 0.05  # of a gripper's limit: actions of 0 to 1 for −1 to 1
# Where x, y, z and w stand in a quaternion.
QUATERNIONS = {"x, y, z, w": [0, 1, 2, 3], "w, x, y, z": [1, 2, 3, 0]}

Read = Callable[[np.ndarray], np.ndarray]  # states (n, dims) → (n, other dims)


@dataclass(frozen=True)
class Range:
    """What values each dimension had."""

    low: np.ndarray  # (dims,)
    high: np.ndarray

    @classmethod
    def of(cls, statistics: Mapping[str, Any]) -> "Range | None":
        """From normalization statistics; None if they say nothing."""
        found = {name: np.asarray(value, np.float64).ravel() for name, value in statistics.items()}
        for low, high in (("min", "max"), ("q01", "q99")):
            if {low, high} <= found.keys():
                return cls(found[low], found[high])
        if {"mean", "std"} <= found.keys():
            away = DEVIATIONS * found["std"]
            return cls(found["mean"] - away, found["mean"] + away)
        return None

    @classmethod
    def around(cls, values: np.ndarray) -> "Range":
        return cls(values.min(0), values.max(0))

    @property
    def width(self) -> np.ndarray:
        wide = self.high - self.low
        return np.maximum(wide, max(NARROWEST * float(np.median(wide)), NEARLY_CONSTANT))

    def misses(self, values: np.ndarray, width: np.ndarray | None = None) -> np.ndarray:
        """Which dimensions (dims,) of values (n, dims) lie outside, by more than a margin of the width."""
        margin = MARGIN * (self.width if width is None else width)
        within = (values >= self.low - margin) & (values <= self.high + margin)  # and no NaN
        return np.logical_not(within.all(axis=0))


def state_is_the_policys(inputs: Inputs) -> Iterator[Finding]:
    """After a reset the state is within what the policy was trained on."""
    assert inputs.env is not None
    state, config = inputs.opened_env.state, inputs.config
    trained = Range.of(inputs.statistics.get(OBS_STATE, {}))
    if state is None:
        yield error(
            "the environment gives no state ('observation.state')",
            f"the policy was trained with {len(trained.low) if trained else 'some'} dimensions",
            "--env.obs_type=pixels_agent_pos, where the environment has it",
        )
        return
    if trained is None:
        return
    size, expected = state.shape[1], len(trained.low)
    names = config.state_feature_names or [str(i) for i in range(expected)]
    fix = (
        f"the state is made by the processors of --env.type={inputs.env.type} (get_env_processors): give it "
        "there as it was recorded, or train on data that has it as it is here"
    )
    if size != expected:
        meant = _first_that_fits(_other_sizes(size, expected), state, trained)
        yield error(
            f"the environment's state has {size} dimensions, the policy's {expected}"
            + (f": it looks like {meant}" if meant else ""),
            f"after a reset it is {_vector(state[0])}; the policy: {listed(names, 8)}",
            fix,
        )
        return
    learned = policy_columns(config, {OBS_STATE: state})[OBS_STATE]  # with adapt_to_pi, openpi's joints
    missed = trained.misses(learned)
    if missed.any():
        meant = _first_that_fits(_same_size(size, missed), learned, trained)
        yield (error if meant or missed.mean() > 0.5 else warning)(
            "the environment's state is not what the policy was trained on"
            + (f": it looks like {meant}" if meant else ""),
            _misses(learned, trained, missed, names, "in training"),
            fix,
        )
        return
    # Within the range but nowhere near where demonstrations begin: a gripper that counts otherwise.
    if inputs.reference is not None and inputs.reference.columns.state.shape[1] == size:
        columns = inputs.reference.columns
        starts = Range.around(columns.state[[episode.start for episode in columns.episodes]])
        width = Range.around(columns.state).width
        missed = starts.misses(state, width)
        meant = _first_that_fits(_of_grippers(missed), state, starts, width) if missed.any() else ""
        if meant:
            yield error(
                f"the environment's state is not what the policy was trained on: it looks like {meant}",
                _misses(state, starts, missed, names, "where demonstrations begin"),
                fix,
            )
            return
    yield fine(f"the state after a reset ({size} dimensions) is within what the policy was trained on")


def actions_are_the_policys(inputs: Inputs) -> Iterator[Finding]:
    """The environment takes as many actions as the policy gives, in the same units."""
    assert inputs.env is not None
    env, config = inputs.opened_env, inputs.config
    size, expected = len(env.low), config.action_feature.shape[0] if config.action_feature else len(env.low)
    fix = (
        f"{takes(inputs)} says how the environment takes actions: is it as they were recorded? If not, train "
        "on data of this environment"
    )
    if size != expected:
        given = listed(config.action_feature_names or [expected], 8)
        yield error(
            f"the environment takes {size} actions, the policy gives {expected}",
            f"the policy's: {given}",
            fix,
        )
        return
    reference = inputs.reference
    if reference is not None and reference.columns.action.shape[1] == size:
        given = Range.around(reference.columns.action)
    elif config.relative_actions or config.adapt_to_pi:
        return  # statistics are not of what the environment takes
    else:
        given = Range.of(inputs.statistics.get(ACTION, {}))
    most = np.maximum(np.abs(env.low), np.abs(env.high))
    if given is None or not np.isfinite(most).all() or not most.all():
        yield fine(f"{size} actions, without limits")
        return
    names = config.action_feature_names or [str(i) for i in range(size)]
    largest = np.maximum(np.abs(given.low), np.abs(given.high)) / most
    hands = named_grippers(names) or [size - 1]
    arm = np.setdiff1d(np.arange(size), hands) if size > len(hands) else np.arange(size)
    spans = [f"{names[i]} {given.low[i]:.3g} to {given.high[i]:.3g}" for i in range(size)]
    limits = dict.fromkeys(f"{low:.3g} to {high:.3g}" for low, high in zip(env.low, env.high, strict=True))
    evidence = f"in training {listed(spans)}; the environment takes {listed(limits)}"
    if (largest[arm] > BEYOND).any() or (largest[arm] < TINY).all():
        more = "larger" if largest[arm].max() > 1 else "smaller"
        yield error(
            f"actions are in other units: the policy's are much {more} than what the environment takes",
            evidence,
            fix,
        )
        return
    # Of a box around zero that the arm keeps to: gym-aloha takes joints beyond it, and grippers from 0 to 1.
    keeps = (largest[arm] < 1 + SLACK).all()
    moves = (given.high - given.low > NEARLY_CONSTANT) & (env.low < 0) & keeps
    middle = (env.low + env.high) / 2
    halves = [names[i] for i in hands if moves[i] and given.low[i] > middle[i] - SLACK * env.high[i]]
    if halves:
        yield error(
            f"the gripper's action ({listed(halves)}) uses the upper half of what the environment takes",
            evidence,
            fix,
        )
        return
    yield fine(f"{size} actions, in the units of the environment")


def takes(inputs: Inputs) -> str:
    """The flags that say how the environment takes actions."""
    assert inputs.env is not None
    modes = [name for name in vars(inputs.env) if "control_mode" in name or "actions" in name]
    return " or ".join(f"--env.{name}" for name in modes) or f"--env.type={inputs.env.type}"


def _of_grippers(missed: np.ndarray) -> Iterator[tuple[str, Read]]:
    """A gripper, or two, in another count. `missed` (dims,): the dimensions that do not fit."""
    if missed.sum() > 2:
        return
    where = f"dimension {listed(np.flatnonzero(missed))}"
    yield f"a gripper ({where}) from 0 to 1 where training had −1 to 1", _in(missed, lambda x: 2 * x - 1)
    yield f"a gripper ({where}) from −1 to 1 where training had 0 to 1", _in(missed, lambda x: (x + 1) / 2)
    yield f"a gripper ({where}) with open and shut exchanged", _in(missed, lambda x: 1 - x)
    yield f"a gripper ({where}) of the opposite sign", _in(missed, lambda x: -x)


def _same_size(size: int, missed: np.ndarray) -> Iterator[tuple[str, Read]]:
    """What a state of the right size could mean."""

    def degrees(values: np.ndarray) -> np.ndarray:
        return _in(missed, np.radians)(values) if (np.abs(values[:, missed]) > TURN).any() else values

    yield "degrees where training had radians", degrees
    yield from _of_grippers(missed)
    yield "radians where training had degrees", _in(missed, np.degrees)
    for shift in range(1, size):
        order = np.roll(np.arange(size), shift)
        yield (
            f"another order: in training the last {size - shift} dimensions come first",
            _ordered(np.argsort(order)),
        )
    for a, b in itertools.combinations(range(size), 2):
        order = np.arange(size)
        order[[a, b]] = b, a
        yield f"another order: dimensions {a} and {b} are exchanged", _ordered(order)
    yield "another order: the last dimension comes first, and so on", _ordered(np.arange(size)[::-1])


def _other_sizes(size: int, expected: int) -> Iterator[tuple[str, Read]]:
    """What a state with a dimension more, or less, could mean."""
    for at, (order, where) in itertools.product(range(max(size, expected) - 3), QUATERNIONS.items()):
        rest = f"dimensions {at} to {at + 3} are a quaternion ({order})"
        if size == expected + 1:
            yield f"a quaternion where training had axis and angle: {rest}", _from_quaternion(at, where)
        if size + 1 == expected:
            words = f"axis and angle where training had a quaternion ({order}): dimensions {at} to {at + 2}"
            yield words, _to_quaternion(at, where)


def _first_that_fits(
    readings: Iterator[tuple[str, Read]], state: np.ndarray, trained: Range, width: np.ndarray | None = None
) -> str:
    """The first reading by which the state is within a range; empty if there is none."""
    for words, read in readings:
        if not trained.misses(read(state), width).any():
            return words
    return ""


def _in(chosen: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> Read:
    return lambda values: np.where(chosen, change(values), values)


def _ordered(order: np.ndarray) -> Read:
    return lambda values: values[:, order]


def _from_quaternion(at: int, order: list[int]) -> Read:
    """As LeRobot's and robosuite's `quat2axisangle`; NaN, which is in no range, without unit length."""

    def read(values: np.ndarray) -> np.ndarray:
        *axis, w = values[:, at : at + 4][:, order].T
        length = np.sqrt(np.square(values[:, at : at + 4]).sum(1))
        w = np.where(np.abs(length - 1) < UNIT, np.clip(w, -1, 1), np.nan)
        turned = np.stack(axis, 1) * (2 * np.arccos(w) / np.sqrt(np.maximum(1 - w**2, 1e-12)))[:, None]
        return np.concatenate((values[:, :at], turned, values[:, at + 4 :]), axis=1)

    return read


def _to_quaternion(at: int, order: list[int]) -> Read:
    def read(values: np.ndarray) -> np.ndarray:
        turned = values[:, at : at + 3]
        angle = np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-12)
        whole = np.concatenate((turned / angle * np.sin(angle / 2), np.cos(angle / 2)), axis=1)
        return np.concatenate((values[:, :at], whole[:, np.argsort(order)], values[:, at + 3 :]), axis=1)

    return read


def _misses(state: np.ndarray, of: Range, missed: np.ndarray, names: list[str], when: str) -> str:
    return "after a reset " + listed(
        f"{names[i]} is {state[0, i]:.3g}, {when} {of.low[i]:.3g} to {of.high[i]:.3g}"
        for i in np.flatnonzero(missed)
    )


def _vector(values: np.ndarray) -> str:
    return f"[{listed((f'{value:.3g}' for value in values), 16)}]"
