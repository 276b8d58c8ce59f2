"""The simulated arm as a LeRobot robot: features, pictures, refusals, its trace, and the camera's process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from attempts import NEAR, attempts, detect_success
from lerobot.robots import make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

import lerobot_pi0
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.simulated_robot.config_simulated_so101 import SimulatedSO101Config
from lerobot_pi0.simulated_robot.kinematics import joints_for_tip
from lerobot_pi0.simulated_robot.simulated_so101 import SimulatedSO101
from lerobot_pi0.simulated_robot.simulation import HOME, JOINTS

NAMES = [f"{joint}.pos" for joint in JOINTS]
AT_HOME = {f"{joint}.pos": value for joint, value in HOME.items()}


@pytest.fixture
def make(tmp_path) -> Iterator[Callable[..., SimulatedSO101]]:
    """Makes robots as LeRobot does; they are disconnected after the test."""
    made: list[SimulatedSO101] = []

    def make_one(**settings) -> SimulatedSO101:
        config = SimulatedSO101Config(id="test", calibration_dir=tmp_path / "calibration", **settings)
        robot = make_robot_from_config(config)
        assert isinstance(robot, SimulatedSO101)
        made.append(robot)
        return robot

    yield make_one
    for robot in made:
        if robot.is_connected:
            robot.disconnect()


def camera_process(of: int | None = None) -> int:
    """The one that renders, of this process or another one."""
    children = psutil.Process(of).children()
    (pid,) = [child.pid for child in children if any("camera_process.py" in word for word in child.cmdline())]
    return pid


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something holds within a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_observations_and_actions_are_what_the_features_say(make):
    robot = make(camera_width=64, camera_height=48)
    robot.connect()
    observation = robot.get_observation()
    assert [*robot.action_features] == NAMES
    assert [*observation] == [*robot.observation_features] == [*NAMES, "front"]
    assert robot.observation_features["front"] == observation["front"].shape == (48, 64, 3)
    assert observation["front"].dtype == np.uint8
    assert all(type(observation[name]) is float for name in NAMES)
    assert robot.send_action(AT_HOME) == pytest.approx(AT_HOME)
    assert robot.send_action({"gripper.pos": 120.0}) == {"gripper.pos": pytest.approx(100.0)}


def test_pictures_show_the_arm_where_it_went_and_are_the_callers_own(make):
    robot = make()
    robot.connect()
    before, same = robot.get_observation()["front"], robot.get_observation()["front"]
    assert before.std() > 10
    before_took = robot.cameras["front"].read_latest()[0]
    same[:] = 0
    robot.send_action({"shoulder_pan.pos": 60.0})
    assert eventually(lambda: robot.get_observation()["shoulder_pan.pos"] > 55)
    moved = time.monotonic()
    assert eventually(lambda: robot.cameras["front"].read_latest()[0] > moved)
    taken, after = robot.cameras["front"].read_latest()
    assert before_took < moved < taken < time.monotonic()
    changed = (np.abs(after.astype(int) - before).max(-1) > 40).mean()
    assert 0.03 < changed < 0.5
    assert before.std() > 10


def test_an_action_that_is_not_finite_is_refused(make):
    robot = make()
    robot.connect()
    with pytest.raises(ValueError, match="the target of 'elbow_flex' is nan"):
        robot.send_action(AT_HOME | {"elbow_flex.pos": float("nan")})
    with pytest.raises(ValueError, match="no joint 'elbow'"):
        robot.send_action({"elbow.pos": 1.0})


def test_a_robot_that_is_not_connected_says_so(make):
    robot = make()
    for call in (robot.get_observation, lambda: robot.send_action(AT_HOME), robot.disconnect):
        with pytest.raises(DeviceNotConnectedError):
            call()
    robot.connect()
    with pytest.raises(DeviceAlreadyConnectedError):
        robot.connect()


def test_the_trace_has_every_observation_and_action_in_order(make, tmp_path):
    robot = make(trace=tmp_path / "run")
    robot.connect()
    expected = []
    for pan in (0.0, 10.0, 20.0):
        observation = robot.get_observation()
        expected.append(("observation", {joint: observation[f"{joint}.pos"] for joint in JOINTS}))
        expected.append(("action", robot.send_action(AT_HOME | {"shoulder_pan.pos": pan})))
    robot.disconnect()
    start, *events, stop = read_trace(tmp_path / "run")
    assert (start["event"], start["robot"], start["joints"]) == ("start", "simulated_so101", [*JOINTS])
    assert stop["event"] == "stop"
    assert [(event["event"], event.get("joints") or event["values"]) for event in events] == expected
    for event in events[::2]:
        assert start["t"] - 10 < event["cameras"]["front"] < event["t"]
        assert event["distance"] > 0.05


def test_success_is_detected_when_the_block_was_reached(make, tmp_path):
    robot = make(trace=tmp_path / "run")
    robot.connect()

    def go(action: dict[str, float], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            robot.get_observation()
            robot.send_action(action)
            time.sleep(0.02)

    joints = joints_for_tip(robot.simulation.model, robot.simulation.goal())
    go(AT_HOME | {f"{joint}.pos": value for joint, value in joints.items()}, 1.5)
    go(AT_HOME, 2)
    go(AT_HOME | {"shoulder_pan.pos": 100.0}, 1.5)
    robot.disconnect()
    first, second = attempts(tmp_path / "run")
    assert first.reached is not None
    assert first.closest < 0.015
    assert second.reached is None
    assert second.closest > NEAR


def test_near_the_block_for_an_instant_is_not_reached():
    def passing(near: float) -> list[dict]:
        return [
            {"t": 0.1 * i, "distance": 0.01 if 1 <= 0.1 * i < 1 + near else 0.2, "block": [0, 0, 0]}
            for i in range(40)
        ]

    assert detect_success(passing(0.3)).reached is None
    assert detect_success(passing(1.0)).reached == pytest.approx(1.0)


def test_the_cameras_process_ends_with_the_robot_and_starts_with_it_again(make):
    robot = make()
    robot.connect()
    pid = camera_process()
    robot.disconnect()
    assert not is_running(pid)
    robot.connect()
    assert is_running(camera_process())


def test_a_killed_camera_is_an_error_that_says_so(make):
    robot = make()
    robot.connect()
    os.kill(camera_process(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"camera's process ended \(exit code -9\): connect"):
        eventually(lambda: not robot.get_observation())
    robot.disconnect()
    robot.connect()
    assert robot.get_observation()["front"].std() > 10


def test_a_camera_that_cannot_draw_leaves_its_last_words(make, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    robot = make()
    with pytest.raises(RuntimeError, match=r"nonsense.*set MUJOCO_GL=egl"):
        robot.connect()
    assert not robot.is_connected


# A process with a camera that imports neither LeRobot nor torch: it starts in a second.
WITH_A_CAMERA = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
package = sys.modules["lerobot_pi0"] = types.ModuleType("lerobot_pi0")
package.__path__ = [sys.argv[1]]
from lerobot_pi0.simulated_robot.camera import SimulatedCamera
from lerobot_pi0.simulated_robot.simulation import Simulation
camera = SimulatedCamera(32, 32, 30)
camera.connect(Simulation())
assert not {"lerobot", "torch"} & set(sys.modules)
print("connected", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_cameras_process_ends_when_the_robots_is_ended(end):
    package = Path(lerobot_pi0.__file__).parent
    parent = subprocess.Popen(
        [sys.executable, "-c", WITH_A_CAMERA, str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    assert parent.stdout.readline()
    pid = camera_process(parent.pid)
    assert is_running(pid)
    parent.send_signal(end)
    parent.wait(60)
    assert eventually(lambda: not is_running(pid))
