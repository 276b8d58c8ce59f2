"""The script in place of a person: it reaches the block, stays, and goes home, episode after episode."""

from collections.abc import Iterator

import numpy as np
import pytest
from lerobot.utils.errors import DeviceNotConnectedError
from test_simulation import Clock

from lerobot_pi0.simulated_robot.config_scripted_so101 import ScriptedSO101Config
from lerobot_pi0.simulated_robot.scripted_so101 import ScriptedSO101
from lerobot_pi0.simulated_robot.simulation import JOINTS, RUNNING, Simulation

PERIOD = 1 / 30


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def arm(clock) -> Iterator[Simulation]:
    arm = Simulation(seed=0, clock=clock)
    RUNNING.add(arm)
    yield arm
    RUNNING.discard(arm)


@pytest.fixture
def script(tmp_path) -> ScriptedSO101:
    script = ScriptedSO101(ScriptedSO101Config(calibration_dir=tmp_path))
    script.connect()
    return script


def operate(script: ScriptedSO101, arm: Simulation, clock: Clock, seconds: float) -> np.ndarray:
    """As lerobot-record's loop does, for so long. Returns the actions (T, 6)."""
    actions, until = [], clock.now + seconds
    while clock.now < until:
        action = script.get_action()
        arm.command({name.removesuffix(".pos"): value for name, value in action.items()})
        actions.append([*action.values()])
        clock.run(PERIOD * 1.003)  # loops are a little late, each time
    return np.array(actions)


def test_each_episode_begins_at_home_and_ends_over_a_block_that_lies_elsewhere(script, arm, clock):
    blocks = []
    for _ in range(12):
        at_home = arm.joints()
        blocks.append(arm.block())
        actions = operate(script, arm, clock, script.config.episode_time_s)
        assert actions[0] == pytest.approx([*at_home.values()], abs=2)
        assert np.abs(actions[5] - actions[0]).max() > 0.1, "it begins at once"
        assert arm.distance() < 0.015
        assert np.abs(np.diff(actions[-20:], axis=0)).max() < 0.1, "it stays"
        operate(script, arm, clock, script.config.reset_time_s)
        clock.run(0.3)  # the episode is saved
    distances = np.linalg.norm(np.diff(blocks, axis=0), axis=1)
    assert distances.min() > 0.02


def test_an_episode_that_is_saved_in_no_time_does_not_delay_the_next(script, arm, clock):
    for _ in range(4):
        operate(script, arm, clock, script.config.episode_time_s + script.config.reset_time_s)
    actions = operate(script, arm, clock, script.config.episode_time_s)
    late = np.abs(actions - actions[0]).max(1) > 1
    assert late.argmax() * PERIOD < 0.8
    assert arm.distance() < 0.015


def test_moves_are_smooth_and_no_two_are_alike(script, arm, clock):
    episodes = []
    for _ in range(3):
        episodes.append(operate(script, arm, clock, script.config.episode_time_s))
        operate(script, arm, clock, script.config.reset_time_s)
        clock.run(0.3)
    for actions in episodes:
        assert np.abs(np.diff(actions, axis=0)).max() < 6  # degrees in a thirtieth of a second
    arrived = {int((np.abs(actions - actions[-1]).max(1) < 0.1).argmax()) for actions in episodes}
    assert len(arrived) > 1


def test_actions_are_those_that_the_robot_takes(script, arm):
    assert [*script.get_action()] == [*script.action_features] == [f"{joint}.pos" for joint in JOINTS]


def test_without_a_simulated_robot_it_says_which_robot_it_operates(script):
    with pytest.raises(RuntimeError, match=r"no simulated robots .* --robot.type=simulated_so101"):
        script.get_action()


def test_before_it_is_connected_it_gives_no_action(tmp_path):
    with pytest.raises(DeviceNotConnectedError):
        ScriptedSO101(ScriptedSO101Config(calibration_dir=tmp_path)).get_action()


def test_times_in_which_the_script_cannot_be_done_are_refused():
    with pytest.raises(ValueError, match=r"--teleop.reset_time_s must be at least 2\.0, got 0\.5"):
        ScriptedSO101Config(reset_time_s=0.5)
