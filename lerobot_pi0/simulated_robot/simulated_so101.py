"""The robot of `--robot.type=simulated_so101`: LeRobot's view of the simulated arm.

It acts like `so101_follower`: the same joints in the same units, positions as actions, and a camera, "front".
The task is to bring the gripper's tip over the red block. Nobody has to tidy up: whenever the arm comes home
the block is placed anew. How far the tip is from its goal stands in the trace.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from lerobot.robots.robot import Robot
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from lerobot_pi0.control.trace import Trace
from lerobot_pi0.simulated_robot.camera import SimulatedCamera
from lerobot_pi0.simulated_robot.config_simulated_so101 import SimulatedSO101Config
from lerobot_pi0.simulated_robot.simulation import CAMERA, JOINTS, RUNNING, Simulation

POSITION = ".pos"  # ends the names of joints in LeRobot's observations and actions


class SimulatedSO101(Robot):
    """An SO-101 arm that exists in this process alone, in real time."""

    config_class = SimulatedSO101Config
    name = "simulated_so101"

    def __init__(self, config: SimulatedSO101Config):
        super().__init__(config)
        self.config = config
        self.cameras = {CAMERA: SimulatedCamera(config.camera_width, config.camera_height, config.camera_fps)}
        self._simulation: Simulation | None = None
        self._trace: Trace | None = None

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        pictures = {name: (camera.height, camera.width, 3) for name, camera in self.cameras.items()}
        return {**self.action_features, **pictures}

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return {f"{joint}{POSITION}": float for joint in JOINTS}

    @property
    def is_connected(self) -> bool:
        return self._simulation is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """A simulated arm needs no calibration."""

    def configure(self) -> None:
        """A simulated arm has no motors to set up."""

    @property
    @check_if_not_connected
    def simulation(self) -> Simulation:
        """What a person beside the arm would see of it."""
        assert self._simulation is not None
        return self._simulation

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        """Start the simulation, arm at home, and its camera.

        Raises ModuleNotFoundError without the package of the arm's model, RuntimeError without a camera.
        """
        simulation = Simulation(self.config.seed)
        for camera in self.cameras.values():
            camera.connect(simulation)
        if self.config.trace is not None:
            self._trace = Trace(Path(self.config.trace) / "robot.jsonl")
            self._trace.write("start", robot=self.name, joints=list(JOINTS), seed=self.config.seed)
        self._simulation = simulation
        RUNNING.add(simulation)

    @check_if_not_connected
    def get_observation(self) -> dict[str, Any]:
        """The joints as they are now, and the newest picture.

        Raises RuntimeError when the camera's process has ended, TimeoutError when it hangs.
        """
        joints = self.simulation.joints()
        pictures = {name: camera.read_latest() for name, camera in self.cameras.items()}
        if self._trace is not None:
            self._trace.write(
                "observation",
                joints=joints,
                cameras={name: taken for name, (taken, _) in pictures.items()},
                block=self.simulation.block().tolist(),
                distance=self.simulation.distance(),
                placed=self.simulation.placed,
            )
        return {f"{joint}{POSITION}": value for joint, value in joints.items()} | {
            name: picture for name, (_, picture) in pictures.items()
        }

    @check_if_not_connected
    def send_action(self, action: dict[str, Any]) -> dict[str, float]:
        """Let joints move to where the action says; returns it within the joints' ranges.

        Raises ValueError for an action that is not finite, or for a joint that the arm has not.
        """
        targets = {name.removesuffix(POSITION): float(value) for name, value in action.items()}
        sent = {f"{joint}{POSITION}": value for joint, value in self.simulation.command(targets).items()}
        if self._trace is not None:
            self._trace.write("action", values=sent)
        return sent

    @check_if_not_connected
    def disconnect(self) -> None:
        """End the simulation and the camera's process."""
        for camera in self.cameras.values():
            camera.disconnect()
        if self._trace is not None:
            self._trace.write("stop", why="disconnected")
            self._trace.close()
        RUNNING.discard(self.simulation)
        self._simulation = self._trace = None
