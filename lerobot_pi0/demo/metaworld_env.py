"""One Meta-World task: the simulation without a camera, and as a gymnasium environment that sees.

Importing this module imports MuJoCo; `environment`, which plugin discovery imports, therefore imports it
late.
"""

import importlib
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lerobot_pi0.demo.metaworld_tasks import ACTION_NAMES, FPS, STATE_NAMES
from lerobot_pi0.rendering import ADVICE, choose_renderer

Observation = dict[str, np.ndarray]

# A displacement of 1 is a centimetre.
PER_METRE = 100
CAMERA = "corner2"
# LeRobot's view of the table: nearer than Meta-World's own "corner2".
CAMERA_POSITION = (0.75, 0.075, 0.7)


def cannot_render(error: Exception) -> RuntimeError:
    """The error that says in one line how to get MuJoCo to render."""
    return RuntimeError(
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({error}). {ADVICE}."
    )


choose_renderer()
try:
    import mujoco

    # Another plugin (lerobot_env_so101) may have imported it before: then it has to choose again.
    for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):  # by MuJoCo's version
        if name in sys.modules:
            importlib.reload(sys.modules[name])
except ModuleNotFoundError:
    raise
except (ImportError, AttributeError, OSError) as error:
    # PyOpenGL fails in any of these ways when a library is not there.
    raise cannot_render(error) from error
import metaworld.env_dict  # noqa: E402
import metaworld.policies  # noqa: E402
import metaworld.types  # noqa: E402


def scripted_expert(task: str) -> Callable[[np.ndarray], np.ndarray]:
    """Meta-World's hand-written policy for a task: simulator state (39,) → action (4,) float32 in [-1, 1]."""
    text = files("lerobot").joinpath("envs", "metaworld_config.json").read_text(encoding="utf-8")
    policy = getattr(metaworld.policies, json.loads(text)["TASK_POLICY_MAPPING"][task])()

    def expert(state: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings(action="ignore"):  # "Constant(s) may be too high": hence the clipping
            return np.clip(policy.get_action(state), -1.0, 1.0).astype(np.float32)

    return expert


class Simulation:
    """A Meta-World task without its camera: about 2,000 steps per second, where rendering allows 100.

    `state` (39,) float64 holds the hand's position and gripper opening, the positions of all objects, the
    same of the previous step, and the goal. The scripted experts see it; a policy sees only its first four
    numbers.

    `moved`: how far objects are moved along x and y at most, in metres, beyond where Meta-World places them.
    There the places of a task are so alike that many a fixed motion solves it.
    """

    def __init__(self, task: str, moved: float = 0.0) -> None:
        task_class = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]
        self._env: Any = task_class()
        # The experts need to know the goal. (MT1 would do the same after sampling 50 goals that nobody uses.)
        settings = {"rand_vec": None, "env_cls": task_class, "partially_observable": False}
        self._env.set_task(metaworld.types.Task(env_name=task, data=pickle.dumps(settings)))
        self._env._freeze_rand_vec = False  # objects move at every reset ...
        self._env.seeded_rand_vec = True  # ... and the seed says where
        if moved:
            space = self._env._random_reset_space  # positions: x, y, z of one object after the other
            assert space is not None
            reach = np.tile([moved, moved, 0.0], space.low.size // 3)
            self._env._random_reset_space = spaces.Box(
                space.low - reach, space.high + reach, dtype=np.float64
            )
        self._env.max_path_length = sys.maxsize  # who runs the episode decides when it ends
        self.model: mujoco.MjModel = self._env.model
        self.data: mujoco.MjData = self._env.data
        self.state = np.zeros(39)

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode. A seed fixes where the objects lie."""
        if seed is not None:
            self._env.seed(seed)
        self._env.reset()
        # Some tasks (faucet-open, window-open) move the object last, and would show it where it was before.
        mujoco.mj_forward(self.model, self.data)
        self.state = self._env._get_obs()

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Apply an action (4,), clipped to [-1, 1]. Returns the reward and whether the task is solved."""
        self.state, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        return float(reward), bool(info["success"])


class MetaworldFastEnv(gym.Env[dict[str, Any], np.ndarray]):
    """A Meta-World task seen through one camera.

    Observation: `pixels` (H, W, 3) uint8 and `agent_pos` (4,) float32: the hand's x, y, z in metres and the
    gripper's opening, 0 to 1. Action: (4,) in [-1, 1], clipped: the hand's displacement in centimetres, and
    the gripper's effort; with `position_actions` the hand's next position in metres, and effort. An episode
    ends at success or after `episode_length` steps. A seed passed to `reset` fixes where the objects lie, up
    to `moved` metres beyond Meta-World's own places.
    The camera takes a picture every `steps_per_picture` steps from the first observation on, and one at the
    end; in between, observations hold the last one.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012  (gymnasium's way)
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        task_description: str,
        *,
        episode_length: int = 200,
        image_size: int = 96,
        steps_per_picture: int = 1,
        show_goal: bool = False,
        position_actions: bool = False,
        moved: float = 0.0,
    ) -> None:
        self.task = task
        self.task_description = task_description
        self._max_episode_steps = episode_length  # the name under which lerobot-eval looks for it
        self._image_size = image_size
        self._steps_per_picture = steps_per_picture
        self._show_goal = show_goal
        self._position_actions = position_actions
        self._moved = moved
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": spaces.Box(-np.inf, np.inf, (len(STATE_NAMES),), np.float32),
            }
        )
        bound = np.inf if position_actions else 1.0
        self.action_space = spaces.Box(-bound, bound, (len(ACTION_NAMES),), np.float32)
        self._simulation: Simulation | None = None
        self._renderer: mujoco.Renderer | None = None
        self._frame: np.ndarray | None = None
        self._steps = 0

    @property
    def simulation(self) -> Simulation:
        """The running simulation, made late: lerobot-eval makes all tasks before it runs the first."""
        if self._simulation is None:
            self._simulation = Simulation(self.task, self._moved)
            self._renderer = self._make_renderer(self._simulation.model)
        return self._simulation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.simulation.reset(seed)
        self._steps = 0
        return self.observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, success = self.act(action)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        takes_picture = success or truncated or self._steps % self._steps_per_picture == 0
        return self.observe(takes_picture), reward, success, truncated, {"is_success": success}

    def act(self, action: np.ndarray) -> tuple[float, bool]:
        """Move without looking, in a tenth of the time. Returns the reward and whether the task is solved."""
        if self._position_actions:
            action = np.append((action[:3] - self.simulation.state[:3]) * PER_METRE, action[3])
        return self.simulation.step(action)

    def render(self) -> np.ndarray:
        """The image of the last observation, (H, W, 3) uint8: not rendered a second time for the video."""
        if self._frame is None:
            raise RuntimeError("render() before reset(): there is no image yet.")
        return self._frame

    def close(self) -> None:
        # MuJoCo complains about an OpenGL context that lives until the interpreter ends.
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = self._simulation = None

    def observe(self, takes_picture: bool = True) -> Observation:
        """What the arm's sensors say now, and the camera; or the last picture, if it takes none."""
        simulation = self.simulation
        if takes_picture:
            assert self._renderer is not None
            self._renderer.update_scene(simulation.data, camera=CAMERA)
            # This camera is mounted upside down.
            self._frame = np.ascontiguousarray(self._renderer.render()[::-1, ::-1])
        return {"pixels": self.render(), "agent_pos": simulation.state[:4].astype(np.float32)}

    def _make_renderer(self, model: mujoco.MjModel) -> mujoco.Renderer:
        # Meta-World's own render() draws into the wrong context when a process has several environments.
        model.cam_pos[mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)] = CAMERA_POSITION
        # In software, shadows and multisampling take most of the time, and reflections a third of the rest.
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = self._image_size
        if not self._show_goal:
            model.site_rgba[:, 3] = 0.0
        try:
            return mujoco.Renderer(model, self._image_size, self._image_size)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise cannot_render(error) from error
