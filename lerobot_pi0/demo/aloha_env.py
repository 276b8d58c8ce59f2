"""ALOHA's transfer of a cube: the physics without cameras, a cheaper camera, and a scripted expert.

Importing this module imports MuJoCo and gym-aloha; `aloha`, which the flags import, imports it late.
"""

import numpy as np

from lerobot_pi0.rendering import choose_renderer

choose_renderer()
import mujoco  # noqa: E402
from dm_control.mujoco import Physics  # noqa: E402
from dm_control.rl.control import Environment  # noqa: E402
from gym_aloha.constants import ASSETS_DIR, DT  # noqa: E402
from gym_aloha.tasks.sim import BOX_POSE, TransferCubeTask  # noqa: E402
from gym_aloha.utils import sample_box_pose  # noqa: E402
from PIL import Image  # noqa: E402

from lerobot_pi0.demo.meshes import coarser  # noqa: E402

# The reward at which gym-aloha's episode ends: the left hand touches the cube, and the table does not.
SOLVED = 4
ARM = 7  # joints of an arm: waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate, gripper
GRIPPERS = [ARM - 1, 2 * ARM - 1]

# What LeRobot's environment renders, before a policy makes it smaller.
CAMERA = "top"
HEIGHT, WIDTH = 480, 640
# The edge of the cubes to which the corners of a mesh are merged, in metres: a pixel is as large.
MESH_CELL = 0.0025


class UnseenTransferCube(TransferCubeTask):
    """The task without its pictures: gym-aloha renders three at each step, which takes 300 times as long."""

    def get_observation(self, physics: Physics) -> dict[str, np.ndarray]:
        """The joints."""
        return {"qpos": self.get_qpos(physics)}


class Simulation:
    """Episodes of gym-aloha's transfer of a cube, with the cube where `AlohaEnv.reset(seed)` puts it.

    `state` (14,) holds the joints of the left and the right arm in radians, of a gripper 0 (closed) to 1.
    """

    def __init__(self) -> None:
        physics = Physics.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
        self._env = Environment(physics, UnseenTransferCube(), float("inf"), control_timestep=DT)
        self.model: mujoco.MjModel = physics.model.ptr
        self.data: mujoco.MjData = physics.data.ptr
        self.state = np.zeros(2 * ARM)

    def reset(self, seed: int) -> None:
        """Begin an episode. The seed says where the cube lies."""
        BOX_POSE[0] = sample_box_pose(seed)
        self.state = self._env.reset().observation["qpos"]

    def step(self, action: np.ndarray) -> bool:
        """Apply joint targets (14,) for 20 ms. Returns whether the task is solved then."""
        step = self._env.step(action)
        self.state = step.observation["qpos"]
        return step.reward == SOLVED

    @property
    def cube(self) -> np.ndarray:
        """The cube's position (3,) in metres."""
        return self.data.body("box").xpos.copy()


class Camera:
    """Pictures as LeRobot's environment gives them to a policy that makes them smaller.

    Rendered at the full size, but with coarser arms and shadows and without multisampling, which the smaller
    picture hardly shows: 13 ms of CPU. `close` it before the interpreter ends.
    """

    def __init__(self, simulation: Simulation, width: int) -> None:
        self.size = (width, width * HEIGHT // WIDTH)
        self._data = simulation.data
        drawn = coarser(simulation.model, np.ones(simulation.model.ngeom, bool), MESH_CELL)
        drawn.vis.quality.shadowsize = 512
        drawn.vis.quality.offsamples = 0
        drawn.vis.global_.offheight, drawn.vis.global_.offwidth = HEIGHT, WIDTH
        self._renderer = mujoco.Renderer(drawn, HEIGHT, WIDTH)

    def picture(self) -> np.ndarray:
        """What the camera sees now, (H, W, 3) uint8."""
        self._renderer.update_scene(self._data, CAMERA)
        # Pillow's bilinear filter is the one with which the policy makes pictures smaller.
        picture = Image.fromarray(self._renderer.render())
        return np.asarray(picture.resize(self.size, Image.Resampling.BILINEAR))

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()


# Measures of an arm (vx300s_left.xml), in metres.
SHOULDER_HEIGHT = 0.12705
UPPER_ARM = (0.05955, 0.3)  # the elbow forwards of and above the shoulder, at angle 0
FOREARM = 0.3
HAND = 0.069744 + 0.14  # from the wrist to between the finger tips
# Of each arm's base: x, y, and which way it looks along x.
BASES = {"left": (-0.469, 0.5, 1.0), "right": (0.469, 0.5, -1.0)}


def joints_of_tip(arm: str, tip: np.ndarray, pitch: float) -> np.ndarray:
    """The joints (4,) waist, shoulder, elbow, wrist angle that bring a hand's finger tips to `tip` (3,).

    The forearm does not roll, so that the hand points away from the arm's base, and `pitch` radians
    downwards. Beyond its reach the arm is stretched.
    """
    x, y, way = BASES[arm]
    forwards, sideways = way * (tip[0] - x), way * (tip[1] - y)
    reach = np.hypot(forwards, sideways) - HAND * np.cos(pitch)
    height = tip[2] - SHOULDER_HEIGHT + HAND * np.sin(pitch)
    upper = np.hypot(*UPPER_ARM)
    distance = min(np.hypot(reach, height), upper + FOREARM - 1e-3)
    elevation = np.arctan2(height, reach)
    of_upper = elevation + np.arccos((upper**2 + distance**2 - FOREARM**2) / (2 * upper * distance))
    of_forearm = elevation - np.arccos((FOREARM**2 + distance**2 - upper**2) / (2 * FOREARM * distance))
    shoulder = np.arctan2(UPPER_ARM[1], UPPER_ARM[0]) - of_upper
    return np.array([np.arctan2(sideways, forwards), shoulder, -of_forearm - shoulder, pitch + of_forearm])


def tip_of_joints(arm: str, joints: np.ndarray) -> tuple[np.ndarray, float]:
    """Where an arm's joints (7,) have the finger tips, (3,), and the hand's pitch: undoes `joints_of_tip`."""
    waist, shoulder, elbow, _, wrist, _, _ = joints
    forearm, pitch = shoulder + elbow, shoulder + elbow + wrist
    cos, sin = np.cos(shoulder), np.sin(shoulder)
    reach = UPPER_ARM[0] * cos + UPPER_ARM[1] * sin + FOREARM * np.cos(forearm) + HAND * np.cos(pitch)
    height = UPPER_ARM[1] * cos - UPPER_ARM[0] * sin - FOREARM * np.sin(forearm) - HAND * np.sin(pitch)
    x, y, way = BASES[arm]
    tip = (x + way * reach * np.cos(waist), y + way * reach * np.sin(waist), height + SHOULDER_HEIGHT)
    return np.array(tip), pitch


# The expert's motions. A step is 20 ms.
GRASP_HEIGHT = 0.03  # of the right finger tips' middle: the fingers' ends are just above the table
GRASP_PITCH = 1.1
MEETING = (0.0, 0.5, 0.25)
LEFT_ROLL = np.pi / 2  # the left hand comes level and takes the cube from above and below
ABOVE = (0.0, 0.0, 0.1)
BESIDE = (-0.1, 0.0, 0.0)  # where the left hand waits, from the meeting point
AWAY = (0.1, 0.0, 0.05)  # where the right hand goes in the end, from there
SPEED = 0.01  # metres per step at most ...
GAIN = 0.15  # ... and at most this share of what is left of the way
GRIPPER_SPEED = 0.12  # per step
HELD, EMPTY = 0.85, 0.4  # a gripper that has stopped between these openings holds the cube ...
STOPPED = 0.004  # ... and it has stopped when the opening changes by less than this per step


class Hand:
    """A hand that is led from pose to pose: where it is sent now, and the joints for that."""

    def __init__(self, arm: str, joints: np.ndarray) -> None:
        self.arm = arm
        self.tip, self.pitch = tip_of_joints(arm, joints)
        self.roll, self.opening = joints[5], joints[-1]

    def lead(self, tip: np.ndarray, pitch: float, roll: float, opening: float) -> None:
        """Move on by a step towards a pose and an opening of the gripper."""
        way = tip - self.tip
        self.tip = self.tip + way * min(GAIN, SPEED / max(float(np.linalg.norm(way)), 1e-9))
        self.pitch += np.clip(GAIN * (pitch - self.pitch), -0.05, 0.05)
        self.roll += np.clip(GAIN * (roll - self.roll), -0.08, 0.08)
        self.opening += np.clip(opening - self.opening, -GRIPPER_SPEED, GRIPPER_SPEED)

    def joints(self, push: np.ndarray) -> np.ndarray:
        """The joints (7,) for where it is sent, displaced by `push` (3,) metres."""
        waist, shoulder, elbow, wrist = joints_of_tip(self.arm, self.tip + push, self.pitch)
        return np.array([waist, shoulder, elbow, 0.0, wrist, self.roll, self.opening])


class Expert:
    """Picks the cube up with the right hand and hands it over to the left.

    When it goes on to the next motion depends on what a policy sees too, the measured joints and the cube; so
    does the place of each motion but for the scattered ones.
    """

    def __init__(self, state: np.ndarray, rng: np.random.Generator, scatter: float) -> None:
        """Args: `state` (14,); `scatter`: standard deviation in metres of the place above the cube."""
        self.left, self.right = Hand("left", state[:ARM]), Hand("right", state[ARM:])
        self.left_motion, self.right_motion = "wait", "reach"
        self._above = rng.normal(0.0, scatter, 3) + ABOVE
        self._above[2] = max(self._above[2], 0.06)
        self._meeting = rng.normal(0.0, scatter / 2, 3) + MEETING
        self._waiting = rng.normal(0.0, scatter / 2, 3) + BESIDE + self._meeting
        self._state = state

    def step(self, state: np.ndarray, cube: np.ndarray) -> None:
        """Choose both hands' motions by the measured joints (14,) and the cube (3,), and go on with them."""
        left, right = tip_of_joints("left", state[:ARM])[0], tip_of_joints("right", state[ARM:])[0]
        openings, stopped = state[GRIPPERS], np.abs(state - self._state)[GRIPPERS] < STOPPED
        left_holds, right_holds = stopped & (openings < HELD) & (openings > EMPTY)
        self._state = state
        grasp = np.array([cube[0], cube[1], GRASP_HEIGHT])

        match self.right_motion:
            case "reach" if near(right, grasp + self._above, 0.02):
                self.right_motion = "lower"
            case "lower" if near(right, grasp, 0.012):
                self.right_motion = "grasp"
            case "grasp" if right_holds:
                self.right_motion = "carry"
            case "grasp" | "carry" if openings[1] < EMPTY:  # the cube is not there, or was lost
                self.right_motion, self.left_motion = "reach", "wait"
            case "carry" if self.left_motion == "take" and left_holds:
                self.right_motion = self.left_motion = "leave"
        match self.right_motion:
            case "reach":
                self.right.lead(grasp + self._above, GRASP_PITCH, 0.0, 1.0)
            case "lower":
                self.right.lead(grasp, GRASP_PITCH, 0.0, 1.0)
            case "grasp":
                self.right.lead(grasp, GRASP_PITCH, 0.0, 0.0)
            case "carry":
                self.right.lead(self._meeting, GRASP_PITCH, 0.0, 0.0)
            case "leave":
                self.right.lead(self._meeting + AWAY, GRASP_PITCH, 0.0, 1.0)

        arrived = self.right_motion == "carry" and near(right, self._meeting, 0.03)
        match self.left_motion:
            case "wait" if arrived and near(left, self._waiting, 0.03):
                self.left_motion = "enter"
            case "enter" if near(left, cube, 0.012):
                self.left_motion = "take"
        match self.left_motion:
            case "wait":
                self.left.lead(self._waiting, 0.0, LEFT_ROLL, 1.0)
            case "enter":
                self.left.lead(cube, 0.0, LEFT_ROLL, 1.0)
            case "take":
                self.left.lead(cube, 0.0, LEFT_ROLL, 0.0)
            case "leave":
                self.left.lead(self._waiting, 0.0, LEFT_ROLL, 0.0)

    def action(self, pushes: np.ndarray | None = None) -> np.ndarray:
        """Joint targets (14,); with the hands displaced by `pushes` (2, 3), in metres, left and right."""
        left, right = np.zeros((2, 3)) if pushes is None else pushes
        return np.concatenate([self.left.joints(left), self.right.joints(right)])

    def steadiness(self) -> np.ndarray:
        """The share (2,) of a push that each hand can be given now without spoiling the attempt."""
        right = {"reach": 1.0, "lower": 0.4, "grasp": 0.0}.get(self.right_motion, 1.0)
        return np.array([1.0, right]) * (0.4 if self.left_motion in ("enter", "take") else 1.0)


def near(a: np.ndarray, b: np.ndarray, distance: float) -> bool:
    """Whether two points (3,) are less than `distance` apart."""
    return bool(np.linalg.norm(a - b) < distance)


class Pushes:
    """Disturbances of both hands: bumps of 5 to 12 steps at random times, on average every 25 steps."""

    def __init__(self, rng: np.random.Generator, size: float) -> None:
        """Args: `size`: standard deviation in metres of a bump's height, in each direction."""
        self._rng, self._size = rng, size
        self._left: np.ndarray = np.zeros(2, int)  # steps that are left of the bump
        self._length: np.ndarray = np.ones(2, int)
        self._height = np.zeros((2, 3))

    def step(self) -> np.ndarray:
        """The displacements (2, 3) of the left and the right hand at the next step, in metres."""
        for hand in range(2):
            if self._left[hand] == 0 and self._rng.random() < 1 / 25:
                self._left[hand] = self._length[hand] = self._rng.integers(5, 13)
                self._height[hand] = self._rng.normal(0.0, self._size, 3)
        shape = np.sin(np.pi * self._left / self._length)
        self._left = np.maximum(self._left - 1, 0)
        return self._height * shape[:, None]
