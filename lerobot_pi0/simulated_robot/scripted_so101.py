"""The teleoperator of `--teleop.type=scripted_so101`: a script in place of a person who shows the task.

It moves the gripper over the red block and stays there for the rest of the episode, then goes home, where the
block is placed anew. No two reaches are alike: they take longer or shorter and bend one way or another.

A person sees the arm and the block; the script asks the simulation, which has to run in the same process (as
it does in lerobot-record). A person knows when an episode begins; the script knows how long lerobot-record
records and resets (two settings), and takes the pause in which an episode is saved for the start of the next.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.teleoperators.teleoperator import Teleoperator
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from lerobot_pi0.simulated_robot.config_scripted_so101 import REACH_TIME, ScriptedSO101Config
from lerobot_pi0.simulated_robot.kinematics import joints_for_tip
from lerobot_pi0.simulated_robot.simulation import HOME, JOINTS, Simulation, running_simulation

FASTEST, WAY_HOME = 1.2, 1.2  # seconds
OPEN = 60.0
# The joints' detours half-way, in degrees, are normally distributed with this deviation.
DETOUR = 4.0
# An episode is over when it is due, give or take, and actions were not asked for meanwhile, in seconds.
EARLY, LATE, PAUSE = 0.1, 0.35, 0.06


class ScriptedSO101(Teleoperator):
    """Shows how to reach the block, again and again."""

    config_class = ScriptedSO101Config
    name = "scripted_so101"

    def __init__(self, config: ScriptedSO101Config):
        super().__init__(config)
        self.config = config
        self._connected = False
        self._random = np.random.default_rng(0)
        self._last_call = self._began = 0.0
        self._move: Move | None = None

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def feedback_features(self) -> dict[str, Any]:
        return {}

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """A script needs no calibration."""

    def configure(self) -> None:
        """A script has no motors to set up."""

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        """Begin with a reach."""
        self._connected, self._move = True, None

    @check_if_not_connected
    def get_action(self) -> dict[str, float]:
        """Where the joints are to be now.

        Raises RuntimeError unless there is one simulated robot in this process.
        """
        simulation = running_simulation()
        now = simulation.clock()
        pause, self._last_call = now - self._last_call, now
        if self._move is None:
            self._began, self._move = now, self._reach(simulation, np.array([*HOME.values()]), now)
        at = self._move.at(now)
        due = self._began + self.config.episode_time_s + self.config.reset_time_s
        if now >= due + LATE or (now >= due - EARLY and pause > PAUSE):
            self._began = due if pause <= PAUSE else now
            self._move = self._reach(simulation, at, now)
        elif now >= self._began + self.config.episode_time_s and not self._move.homeward:
            self._move = Move(now, WAY_HOME, at, np.array([*HOME.values()]), homeward=True)
        at = self._move.at(now)
        return {f"{joint}.pos": value for joint, value in zip(JOINTS, at.tolist(), strict=True)}

    @check_if_not_connected
    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """A script feels nothing."""

    @check_if_not_connected
    def disconnect(self) -> None:
        """Stop operating the arm."""
        self._connected = False

    def _reach(self, simulation: Simulation, start: np.ndarray, now: float) -> "Move":
        joints = joints_for_tip(simulation.model, simulation.goal())
        end = np.array([*joints.values(), OPEN])
        detour = self._random.normal(0, DETOUR, len(JOINTS))
        return Move(now, self._random.uniform(FASTEST, REACH_TIME), start, end, detour)


@dataclass(frozen=True)
class Move:
    """A way of minimum jerk from one position of the joints (6,) to another, with a detour half-way."""

    began: float
    duration: float
    start: np.ndarray
    end: np.ndarray
    detour: np.ndarray | float = 0.0
    homeward: bool = False

    def at(self, now: float) -> np.ndarray:
        """Where the joints are to be; after the duration, at the end."""
        x = min((now - self.began) / self.duration, 1.0)
        progress = x**3 * (10 - 15 * x + 6 * x**2)
        return self.start + progress * (self.end - self.start) + 16 * (x * (1 - x)) ** 2 * self.detour
