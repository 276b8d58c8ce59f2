"""The simulated arm in time: where joints are after a command, in which units, and where the block lies."""

import numpy as np
import pytest

from lerobot_pi0.simulated_robot import simulation
from lerobot_pi0.simulated_robot.kinematics import joints_for_tip
from lerobot_pi0.simulated_robot.simulation import HOME, JOINTS, Simulation


class Clock:
    """A clock that the test moves on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def run(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def arm(clock) -> Simulation:
    return Simulation(seed=0, clock=clock)


def reach(arm: Simulation, clock: Clock) -> None:
    arm.command(joints_for_tip(arm.model, arm.goal()))
    clock.run(2)


def go_home(arm: Simulation, clock: Clock) -> None:
    arm.command(HOME)
    clock.run(2)


def test_a_joint_goes_where_it_is_sent_in_the_time_of_the_clock(arm, clock):
    before = arm.joints()
    arm.command({"shoulder_pan": 30.0})
    assert arm.joints()["shoulder_pan"] == pytest.approx(before["shoulder_pan"], abs=0.1)
    clock.run(0.1)
    assert 5 < arm.joints()["shoulder_pan"] < 30
    clock.run(1.0)
    after = arm.joints()
    assert after["shoulder_pan"] == pytest.approx(30, abs=1)
    for joint in JOINTS[1:]:
        assert after[joint] == pytest.approx(before[joint], abs=1)


def test_without_a_command_the_arm_rests(arm, clock):
    before = arm.joints()
    clock.run(10)
    assert arm.joints() == pytest.approx(before, abs=0.1)


def test_units_are_degrees_and_the_gripper_opens_from_0_to_100(arm, clock):
    arm.command({"wrist_roll": 90.0, "gripper": 0.0})
    clock.run(1)
    index = arm.model.joint("wrist_roll").qposadr[0]
    assert arm.snapshot()[1][index] == pytest.approx(np.pi / 2, abs=0.01)
    low, high = arm.model.joint("gripper").range
    index = arm.model.joint("gripper").qposadr[0]
    assert arm.snapshot()[1][index] == pytest.approx(low, abs=0.02)
    arm.command({"gripper": 100.0})
    clock.run(1)
    assert arm.snapshot()[1][index] == pytest.approx(high, abs=0.02)


def test_a_target_beyond_the_range_is_cut_and_said_so(arm):
    sent = arm.command({"gripper": 150.0, "shoulder_pan": -400.0, "elbow_flex": 10.0})
    assert sent == pytest.approx({"gripper": 100.0, "shoulder_pan": -110.0, "elbow_flex": 10.0}, rel=1e-5)


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_is_refused_and_the_arm_stays(arm, clock, target):
    before = arm.joints()
    with pytest.raises(ValueError, match="'elbow_flex' is"):
        arm.command({"shoulder_pan": 30.0, "elbow_flex": target})
    clock.run(1)
    assert arm.joints() == pytest.approx(before, abs=0.1)


def test_an_unknown_joint_is_refused_with_the_names_of_all(arm):
    with pytest.raises(ValueError, match=r"no joint 'elbow': it has shoulder_pan, .* gripper"):
        arm.command({"elbow": 0.0})


def test_the_seed_says_where_the_block_lies(clock):
    places = [Simulation(seed, clock).block() for seed in (0, 0, 1)]
    assert np.allclose(places[0], places[1])
    assert np.linalg.norm(places[0] - places[2]) > 0.01


def test_the_block_is_placed_anew_when_the_arm_comes_home_and_only_then(arm, clock):
    first = arm.block()
    go_home(arm, clock)  # it was there already
    assert np.allclose(arm.block(), first, atol=1e-3)
    reach(arm, clock)
    assert np.allclose(arm.block(), first, atol=1e-3)
    go_home(arm, clock)
    second = arm.block()
    assert np.linalg.norm(second - first) > 0.02
    reach(arm, clock)
    go_home(arm, clock)
    assert np.linalg.norm(arm.block() - second) > 0.02


def test_every_place_of_the_block_is_in_reach_and_reaching_does_not_move_it(arm, clock):
    for _ in range(20):
        block = arm.block()
        assert arm.distance() > 0.035  # that is, farther than what counts as reached
        reach(arm, clock)
        assert arm.distance() < 0.015
        assert np.allclose(arm.block(), block, atol=1e-3)
        go_home(arm, clock)


def test_a_point_out_of_reach_is_refused(arm):
    with pytest.raises(ValueError, match="out of the arm's reach"):
        joints_for_tip(arm.model, np.array([0.8, 0, 0.1]))


def test_without_the_arms_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(simulation, "find_spec", lambda name: None)
    simulation.make_model.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lerobot-policy-pi0\[simulated-robot\]'"):
        Simulation()
