"""Responses: an environment moves with recorded actions as the recording did."""

from collections.abc import Iterator, Sequence

import numpy as np

from lerobot_pi0.tools.columns import named_grippers
from lerobot_pi0.tools.doctor.conventions import Range, takes
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed
from lerobot_pi0.tools.doctor.inputs import Inputs

MOVED = 0.02  # of the state's range: less says nothing
ASTRAY = 0.7  # of the recorded movement, between where it led and where it leads here
RESPONDS = 0.15  # of the state's range, from one end of the gripper's action to the other


def environment_moves_as_recorded(inputs: Inputs) -> Iterator[Finding]:
    """The first actions of a demonstration lead where they led in the recording."""
    reference, tries, env = inputs.reference, inputs.tries, inputs.opened_env
    if reference is None or tries is None or not env.responses:
        return
    columns, here = reference.columns, env.responses[0]
    there = columns.state[tries.replayed.start :][: len(here)]
    if len(here) < 2 or here.shape != there.shape:
        return
    width = Range.around(columns.state).width
    (moved, recorded), ends = (of[-1] - of[0] for of in (here, there)), here[-1] - there[-1]
    size, begins = (float(np.linalg.norm(of / width)) for of in (recorded, here[0] - there[0]))
    if size < MOVED:
        return
    # Displacements lead as far; positions lead to the same place, or nearer to it from elsewhere.
    rest = min(
        float(np.linalg.norm((moved - recorded) / width)) / size,
        float(np.linalg.norm(ends / width)) / max(size, begins),
    )
    names = reference.recorded.state_feature_names
    numbers = (
        f"the first {len(here) - 1} actions of episode {columns.episode[tries.replayed.start]} change the "
        f"state by {_changes(moved, names)} here, by {_changes(recorded, names)} in the recording"
    )
    if rest > ASTRAY:
        yield error(
            "recorded actions move the environment elsewhere than the robot of the recording",
            numbers,
            f"{takes(inputs)}: does it take displacements, and the data has positions, or the other way "
            "round? Other units, another order or sign of the axes, another starting place?",
        )
    else:
        yield fine(f"recorded actions move it as in the recording: {numbers}")


def gripper_has_the_datas_sign(inputs: Inputs) -> Iterator[Finding]:
    """What opened the gripper in the recording opens it in the environment."""
    reference, tries, env = inputs.reference, inputs.tries, inputs.opened_env
    if reference is None or tries is None or tries.gripper is None or len(env.responses) < 2:
        return
    columns, states, steps = reference.columns, env.responses[1], tries.steps
    if states.shape != (2 * steps + 1, columns.state.shape[1]):
        return
    width, names = Range.around(columns.state).width, reference.recorded.state_feature_names
    here = (states[2 * steps] - states[steps]) / width
    candidates = named_grippers(names or []) or list(range(len(here)))
    joint = max(candidates, key=lambda i: abs(here[i]))
    value, middle = columns.action[:, tries.gripper], sum(tries.ends) / 2
    low, high = (_held(at, columns.episode, steps) for at in (value < middle, value > middle))
    if abs(here[joint]) < RESPONDS or not low.any() or not high.any():
        return
    state = columns.state[:, joint]
    there = (state[low].mean() - state[high].mean()) / width[joint]
    name = names[joint] if names else f"state {joint}"
    numbers = (
        f"from {tries.ends[1]:.3g} to {tries.ends[0]:.3g}, {name} changes by {here[joint]:+.0%} of its range "
        f"here, by {there:+.0%} in the data"
    )
    if there * here[joint] < 0 and abs(there) > RESPONDS:
        assert inputs.env is not None
        yield error(
            "the gripper has the opposite sign: what opened it in the recording closes it here",
            numbers,
            "turn the sign in the data and train again, or in the processors of "
            f"--env.type={inputs.env.type} (get_env_processors)",
        )
    else:
        yield fine(f"the gripper has the sign of the recording: {numbers}")


def _held(flags: np.ndarray, episode: np.ndarray, steps: int) -> np.ndarray:
    """Where a flag has been up for so many frames of an episode."""
    up = np.convolve(flags, np.ones(steps), "full")[: len(flags)] >= steps
    return up & (episode == episode[np.maximum(np.arange(len(flags)) - steps + 1, 0)])


def _changes(values: np.ndarray, names: Sequence[str] | None) -> str:
    called = names or [str(i) for i in range(len(values))]
    return listed((f"{name} {value:+.3g}" for name, value in zip(called, values, strict=True)), 8)
