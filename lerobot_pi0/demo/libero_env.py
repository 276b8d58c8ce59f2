"""A scene of libero_object: simulation, quick pictures, the scripted expert, and an environment for LeRobot.

Importing this module imports MuJoCo, robosuite and LIBERO.
"""

from copy import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from lerobot_pi0.demo.libero_installation import prepare_libero
from lerobot_pi0.demo.libero_tasks import ACTION_NAMES, CAMERAS, FPS, SUITE_NAME, TASK_IDS
from lerobot_pi0.rendering import choose_renderer

choose_renderer()
prepare_libero()
import mujoco  # noqa: E402
from libero.libero import benchmark, get_libero_path  # noqa: E402
from libero.libero.envs.env_wrapper import ControlEnv  # noqa: E402

from lerobot_pi0.demo.meshes import coarser  # noqa: E402

BASKET = "basket"
# What LeRobot does after a reset, so that objects settle.
IDLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
IDLE_STEPS = 10
# The edge of the cubes to which the corners of a mesh are merged, in metres: less than a pixel.
MESH_CELL = 0.004
# All that a picture depends on and that moves (MjData).
DRAWN = (
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)
# An action of 1 asks for a displacement of 5 cm, of which the arm makes a part in a control step.
METRES_PER_ACTION = 0.06
TOP_SPEED = 0.8
# Heights of the hand above the floor, in metres: to come from elsewhere, to carry, to let go.
APPROACH_HEIGHT = 0.20
CARRY_HEIGHT = 0.30
RELEASE_HEIGHT = 0.24
# From the top of an object down to where it is grasped: no deeper, or the palm meets it.
GRASP_DEPTH = 0.028
LOWEST_GRASP = 0.012
# Objects are placed anew until they rest where they were put: within this, in metres.
SETTLED = 0.01
# Fingers that are slower, in metres per second, have stopped.
RESTING = 0.02
MAX_PLACEMENTS = 20


class Scene:
    """A scene of libero_object, named by the object that its task is about.

    Without LIBERO's own pictures, which take most of its time. It moves exactly as LeRobot's environment
    does (soft resets).
    """

    def __init__(self, name: str, image_size: int | None = None) -> None:
        """
        Args:
            name: a key of TASK_IDS.
            image_size: width and height of pictures in pixels; None: there are none.
        """
        task = benchmark.get_benchmark_dict()[SUITE_NAME]().get_task(TASK_IDS[name])
        self._env: Any = ControlEnv(
            bddl_file_name=str(Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=FPS,
            hard_reset=False,
        )
        self._env.reset()
        states = Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
        # LIBERO's 50 initial states, each (time, positions, velocities).
        self.initial_states: np.ndarray = torch.load(states, weights_only=False)
        self._robot = self._env.robots[0]
        # What the controller holds after a reset. Since it does not look at the arm before its second step,
        # an initial state begins with a step towards the reset's pose.
        self._controller_state = {
            name: copy(value)
            for name, value in vars(self._robot.controller).items()
            if isinstance(value, np.ndarray | bool)
        }
        self.model: mujoco.MjModel = self._env.sim.model._model
        self.data: mujoco.MjData = self._env.sim.data._data
        self._drawn = mujoco.MjData(self.model)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[1] = 1  # what is seen; 0 is what collides
        self._renderer = None if image_size is None else self._make_renderer(image_size)

    @property
    def objects(self) -> list[str]:
        """What stands here, beside the basket."""
        names = [name.removesuffix("_1") for name in self._env.env.objects_dict]
        return [name for name in names if name != BASKET]

    def reset(self, state: np.ndarray) -> None:
        """Begin an episode in an initial state and let objects settle, as LeRobot does."""
        self._env.env.timestep = self._env.env.cur_time = 0
        self._env.env.done = False
        vars(self._robot.controller).update({name: copy(of) for name, of in self._controller_state.items()})
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
        self._env.set_init_state(state)
        for _ in range(IDLE_STEPS):
            self.step(IDLE_ACTION)

    def reset_moved(self, state: np.ndarray, target: str, moved: float, random: np.random.Generator) -> None:
        """Begin an episode with target and basket moved by up to `moved` metres along x and y.

        Places where something does not rest as it was put (it met another object) are drawn anew.
        """
        self.reset(state)
        heights = self._heights()
        for _ in range(MAX_PLACEMENTS):
            placed = np.array(state)
            for name in (target, BASKET):
                first = 1 + self._env.sim.model.get_joint_qpos_addr(f"{name}_1_joint0")[0]
                placed[first : first + 2] += random.uniform(-moved, moved, 2)
            self.reset(placed)
            if np.abs(self._heights() - heights).max() < SETTLED:
                return
        raise RuntimeError(
            f"{target} and the basket found no place within {moved} m in {MAX_PLACEMENTS} tries."
        )

    def step(self, action: np.ndarray) -> None:
        """Apply an action (7,): six displacements in [-1, 1], and the gripper: 1 closes."""
        self._env.step(action)

    @property
    def hand(self) -> np.ndarray:
        """Position (3,) between the fingertips, in metres."""
        return np.array(self.data.site_xpos[self._robot.eef_site_id])

    @property
    def fingers(self) -> np.ndarray:
        """Positions (2,) of the finger joints, in metres: ±0.04 is open."""
        return np.array(self.data.qpos[self._robot._ref_gripper_joint_pos_indexes])

    def position(self, name: str) -> np.ndarray:
        """Of an object's centre, (3,) in metres."""
        return np.array(self.data.body(f"{name}_1_main").xpos)

    def holds(self, name: str) -> bool:
        """Whether both fingers touch an object and have come to rest on it."""
        grasped = self._env.env._check_grasp(self._robot.gripper, self._env.env.objects_dict[f"{name}_1"])
        return grasped and bool(
            np.abs(self.data.qvel[self._robot._ref_gripper_joint_vel_indexes]).max() < RESTING
        )

    def solved(self, name: str) -> bool:
        """Whether an object lies in the basket, by LIBERO's own rule."""
        return bool(self._env.env._eval_predicate(["in", f"{name}_1", f"{BASKET}_1_contain_region"]))

    def robot_state(self) -> dict[str, dict[str, np.ndarray]]:
        """As LeRobot's LIBERO environment observes it, without joints."""
        quaternion = self.data.body(self._robot.robot_model.eef_name).xquat[[1, 2, 3, 0]]  # x, y, z, w
        return {"eef": {"pos": self.hand, "quat": quaternion}, "gripper": {"qpos": self.fingers}}

    def state(self) -> np.ndarray:
        """What LeRobot makes of `robot_state`, (8,) float32: position, axis · angle, fingers."""
        x, y, z, w = self.robot_state()["eef"]["quat"]
        sine = np.sqrt(max(1.0 - w * w, 0.0))
        rotation = (
            np.array([x, y, z]) * 2.0 * np.arccos(np.clip(w, -1.0, 1.0)) / sine
            if sine > 1e-10
            else np.zeros(3)
        )
        return np.concatenate([self.hand, rotation, self.fingers]).astype(np.float32)

    def moment(self) -> dict[str, np.ndarray]:
        """What the pictures of now are drawn from, for later."""
        return {name: np.array(getattr(self.data, name)) for name in DRAWN}

    def pictures(self, moment: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """One per camera, {"image": (H, W, 3) uint8, ...}, turned as LeRobot's processor turns them.

        Args:
            moment: an earlier `moment()` of this scene. None: now.
        """
        if self._renderer is None:
            raise RuntimeError("This scene was made without pictures.")
        drawn = self.data
        if moment is not None:
            drawn = self._drawn
            for name, values in moment.items():
                getattr(drawn, name)[:] = values
        pictures = {}
        for name, camera in CAMERAS.items():
            self._renderer.update_scene(drawn, camera=camera, scene_option=self._options)
            pictures[name] = np.ascontiguousarray(self._renderer.render()[:, ::-1])
        return pictures

    def _heights(self) -> np.ndarray:
        return np.array([self.position(name)[2] for name in (*self.objects, BASKET)])

    def close(self) -> None:
        """End the simulation: a renderer that lives longer leaks."""
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    def _make_renderer(self, image_size: int) -> mujoco.Renderer:
        # LIBERO's scanned objects and the robot have 350,000 triangles: a picture takes 12 ms instead of 33.
        drawn = coarser(self.model, self.model.geom_group == 1, MESH_CELL)
        # In software, shadows, reflections and multisampling take most of the time, triangles the rest.
        drawn.light_castshadow[:] = 0
        drawn.mat_reflectance[:] = 0
        drawn.vis.quality.offsamples = 0
        drawn.vis.global_.offwidth = drawn.vis.global_.offheight = image_size
        return mujoco.Renderer(drawn, image_size, image_size)


def expert_action(scene: Scene, target: str) -> np.ndarray:
    """What brings an object into the basket: action (7,) float32, without turning the hand.

    A function of what is seen: neither timers nor phases, so that it knows the way from everywhere. Each
    displacement is proportional to the distance from a goal, of which the height falls as the hand comes
    nearer to the place above it.
    """
    hand, opening = scene.hand, np.abs(scene.fingers).sum()
    thing, basket = scene.position(target), scene.position(BASKET)
    if scene.holds(target):
        away = np.linalg.norm(thing[:2] - basket[:2])
        height = RELEASE_HEIGHT + (CARRY_HEIGHT - RELEASE_HEIGHT) * np.clip((away - 0.02) / 0.06, 0.0, 1.0)
        move = (np.append(basket[:2] + hand[:2] - thing[:2], height) - hand) / METRES_PER_ACTION
        move[:2] *= np.clip((hand[2] - 0.10) / 0.10, 0.0, 1.0)  # up first
        move[2] = min(move[2], 0.25 + (hand[2] - 0.02) / 0.08)  # slowly, while fingers still press
        closes = away > 0.025 or hand[2] > RELEASE_HEIGHT + 0.012
    elif np.linalg.norm(thing[:2] - basket[:2]) < 0.07:  # it falls or lies in the basket
        move = np.array([0.0, 0.0, CARRY_HEIGHT - hand[2]]) / METRES_PER_ACTION
        closes = False
    else:
        grasp = np.append(thing[:2], max(2.0 * thing[2] - GRASP_DEPTH, LOWEST_GRASP))
        away, above = np.linalg.norm(hand[:2] - grasp[:2]), hand[2] - grasp[2]
        climb = max(APPROACH_HEIGHT - grasp[2], 0.1) * np.clip((away - 0.01) / 0.05, 0.0, 1.0)
        move = (grasp + np.array([0.0, 0.0, climb]) - hand) / METRES_PER_ACTION
        if away > 0.02 and above < 0.07:  # beside it: up before it is pushed over
            move[:2] *= np.clip((above - 0.03 * np.clip(away / 0.04, 0.0, 1.0)) / 0.04, 0.0, 1.0)
        if opening < 0.074:  # closing: goes on unless it slipped
            closes = away < 0.03 and abs(above) < 0.02 and opening > 0.004
        else:
            closes = away < 0.01 and abs(above) < 0.008
    move *= min(TOP_SPEED / max(np.abs(move).max(), 1e-6), 1.0)
    return np.concatenate([move, np.zeros(3), [1.0 if closes else -1.0]]).astype(np.float32)


class LiberoVariedEnv(gym.Env[dict[str, Any], np.ndarray]):
    """A scene of libero_object with other places or another instruction.

    Observations are those of LeRobot's LIBERO environment without the joints, so that LeRobot's processor
    takes them: pictures upside down, `robot_state` with the hand's pose and the fingers. Episodes begin in
    LIBERO's initial states, from number `first` on in steps of `stride`; the number also seeds the places.
    The cameras take pictures every `steps_per_picture` steps from the first observation on, and at the end;
    in between, observations hold the last ones. An episode ends at success or after `episode_length` steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012  (gymnasium's way)
    render_mode = "rgb_array"

    def __init__(
        self,
        scene: str,
        task_description: str,
        *,
        moved: float,
        episode_length: int,
        image_size: int,
        steps_per_picture: int,
        first: int,
        stride: int,
    ) -> None:
        self.task = scene
        self.task_description = task_description
        self._max_episode_steps = episode_length  # the name under which lerobot-eval looks for it
        self._moved, self._image_size = moved, image_size
        self._steps_per_picture = steps_per_picture
        self._next, self._stride = first, stride
        self._scene: Scene | None = None
        self._pictures: dict[str, np.ndarray] = {}
        self._steps = 0

        def unbounded(*shape: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, shape, np.float64)

        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, picture)),
                "robot_state": spaces.Dict(
                    {
                        "eef": spaces.Dict({"pos": unbounded(3), "quat": unbounded(4)}),
                        "gripper": spaces.Dict({"qpos": unbounded(2)}),
                    }
                ),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)

    @property
    def scene(self) -> Scene:
        """Made late: lerobot-eval makes all environments before it runs the first."""
        if self._scene is None:
            self._scene = Scene(self.task, self._image_size)
        return self._scene

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        reset_evaluated(self.scene, self.task, self._next, self._moved)
        self._next += self._stride
        self._steps = 0
        return self._observe(takes_pictures=True), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.scene.step(action)
        self._steps += 1
        success = self.scene.solved(self.task)
        truncated = not success and self._steps >= self._max_episode_steps
        ends = success or truncated
        observation = self._observe(ends or self._steps % self._steps_per_picture == 0)
        return observation, float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """The front camera's last picture, (H, W, 3) uint8, for the video."""
        if not self._pictures:
            raise RuntimeError("render() before reset(): there is no picture yet.")
        return self._pictures["image"]

    def close(self) -> None:
        if self._scene is not None:
            self._scene.close()
        self._scene = None

    def _observe(self, takes_pictures: bool) -> dict[str, Any]:
        if takes_pictures:
            self._pictures = self.scene.pictures()
        # LeRobot's processor will turn them again.
        pixels = {name: np.ascontiguousarray(picture[::-1, ::-1]) for name, picture in self._pictures.items()}
        return {"pixels": pixels, "robot_state": self.scene.robot_state()}


def reset_evaluated(scene: Scene, target: str, episode: int, moved: float) -> None:
    """Begin an evaluated episode: LIBERO's initial state of this number, moved by it."""
    state = scene.initial_states[episode % len(scene.initial_states)]
    if moved:
        scene.reset_moved(state, target, moved, np.random.default_rng(episode))
    else:
        scene.reset(state)
