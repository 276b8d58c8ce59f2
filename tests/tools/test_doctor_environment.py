"""The doctor of an environment: a pair that fits gets no finding, and each mistake is named with its flag."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from tiny_dataset import make_checkpoint
from tiny_policy import tiny_config

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.statistics import PREPROCESSOR
from lerobot_pi0.tools.columns import Columns
from lerobot_pi0.tools.doctor import checkpoint, environment, responses
from lerobot_pi0.tools.doctor.checks import CHECKS, Answer, examine
from lerobot_pi0.tools.doctor.conventions import actions_are_the_policys, state_is_the_policys
from lerobot_pi0.tools.doctor.finding import Severity
from lerobot_pi0.tools.doctor.inputs import Inputs
from lerobot_pi0.tools.doctor.orientation import ORIENTATIONS
from lerobot_pi0.tools.pairing import Pairing

FPS, EPISODES, LENGTH = 20, 6, 60
FRONT, WRIST = f"{OBS_IMAGES}.front", f"{OBS_IMAGES}.wrist"
STATES = ["x", "y", "z", "axis_angle_1", "axis_angle_2", "axis_angle_3", "gripper"]
ACTIONS = ["dx", "dy", "dz", "gripper"]
TASKS = {0: "put the milk into the basket", 1: "put the soup into the basket"}
STEP, CLOSES = 0.02, 0.2  # metres and gripper per frame


class Arm:
    """A hand with two cameras; the gripper's state is −1 open, 1 shut."""

    def __init__(self, seed: int):
        random = np.random.default_rng(seed)
        self.state = np.array([*random.uniform(-0.02, 0.02, 3), 3.1, *random.uniform(-0.1, 0.1, 2), -1.0])

    def move(self, action: np.ndarray) -> None:
        self.state[:3] += STEP * action[:3]
        self.state[6] = np.clip(self.state[6] + CLOSES * action[3], -1, 1)

    def pictures(self) -> dict[str, np.ndarray]:
        """(height, width, 3): a table with different corners, and where the hand is."""
        front = np.zeros((32, 32, 3), np.uint8)
        front[:10, :16, 0], front[12:20, 20:, 1], front[24:, :6, 2] = 200, 160, 255
        left, top = (16 + 20 * self.state[:2]).astype(int).clip(0, 28)
        front[top : top + 4, left : left + 4] = 120
        wrist = np.zeros((32, 32, 3), np.uint8)
        wrist[4:30, 26:30], wrist[2:6, 2:20, 1], wrist[10:12, 8:24, 2] = 90, 255, 200
        return {"front": front, "wrist": wrist}


class ArmEnv(gym.Env):
    """The arm, seen as the settings say."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, settings: "ArmEnvConfig"):
        self.settings = settings
        self.task, self.task_description = settings.task, settings.instruction
        self._max_episode_steps = settings.episode_length
        self.action_space = gym.spaces.Box(-settings.limit, settings.limit, (settings.takes,), np.float32)
        self.arm = Arm(0)
        pictures = self.observe()["pixels"]
        boxes: Any = {name: gym.spaces.Box(0, 255, x.shape, np.uint8) for name, x in pictures.items()}
        spaces: Any = {"pixels": gym.spaces.Dict(boxes)}
        if settings.obs_type != "pixels":
            size = settings.see(self.arm.state).shape
            spaces["agent_pos"] = gym.spaces.Box(-np.inf, np.inf, size, np.float64)
        self.observation_space = gym.spaces.Dict(spaces)

    def observe(self) -> dict[str, Any]:
        pictures = self.settings.show(self.arm.pictures())
        seen = {"pixels": {name: np.ascontiguousarray(x) for name, x in pictures.items()}}
        return (
            seen
            if self.settings.obs_type == "pixels"
            else seen | {"agent_pos": self.settings.see(self.arm.state)}
        )

    def reset(self, *, seed=None, options=None):
        self.arm = Arm(seed or 0)
        return self.observe(), {}

    def step(self, action):
        self.arm.move(self.settings.take(self.arm, action))
        return self.observe(), 0.0, False, False, {"is_success": False}


def same(values: Any) -> Any:
    return values


def as_given(arm: Arm, action: np.ndarray) -> np.ndarray:
    return action


@EnvConfig.register_subclass("doctors_arm_env")
@dataclass
class ArmEnvConfig(EnvConfig):
    task: str = "basket"
    fps: int = FPS
    episode_length: int = 100
    obs_type: str = "pixels_agent_pos"
    camera_name: str = "front,wrist"
    observation_height: int = 32
    observation_width: int = 32
    control_mode: str = "relative"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    instruction: str = TASKS[0]
    takes: int = len(ACTIONS)
    limit: float = 1.0
    rate_matters: bool = True
    package: str = ""
    show: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = same
    see: Callable[[np.ndarray], np.ndarray] = same
    take: Callable[[Arm, np.ndarray], np.ndarray] = as_given

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"control_freq": self.fps} if self.rate_matters else {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> Any:
        if self.package:
            raise ModuleNotFoundError(f"No module named '{self.package}'")
        return {"arm": {0: gym.vector.SyncVectorEnv([partial(ArmEnv, self)] * n_envs)}}


See = Callable[[np.ndarray], np.ndarray]  # a state, as another environment would give it


@dataclass(frozen=True)
class Recording:
    """Demonstrations in this environment, in memory."""

    columns: Columns
    first: dict[str, torch.Tensor]  # pictures


def record() -> Recording:
    """The hand goes to its own place, and shuts half-way."""
    states, actions, first = [], [], []
    for seed in range(EPISODES):
        arm, random = Arm(seed), np.random.default_rng(seed)
        first.append(arm.pictures())
        way = random.uniform(0.3, 0.9, 3) * [1, -1, 1]
        for frame in range(LENGTH):
            action = np.array([*(way if frame < 30 else -way), -1.0 if frame < 30 else 1.0])
            states.append(arm.state.copy())
            actions.append(action)
            arm.move(action)
    frame = np.tile(np.arange(LENGTH), EPISODES)
    episode = np.repeat(np.arange(EPISODES), LENGTH)
    columns = Columns(episode, frame, frame / FPS, episode % 2, np.array(states), np.array(actions))
    pictures = {
        f"{OBS_IMAGES}.{name}": torch.from_numpy(np.stack([x[name] for x in first])).permute(0, 3, 1, 2) / 255
        for name in first[0]
    }
    return Recording(columns, pictures)


def statistics(columns: Columns) -> dict[str, dict[str, np.ndarray]]:
    return {
        key: {name: getattr(np, name)(values, axis=0) for name in ("mean", "std", "min", "max")}
        for key, values in ((OBS_STATE, columns.state), (ACTION, columns.action))
    }


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record()


def policy_config(**changes: Any) -> Pi0Config:
    pictures = {key: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for key in (FRONT, WRIST)}
    return tiny_config(
        input_features=pictures | {OBS_STATE: PolicyFeature(FeatureType.STATE, (len(STATES),))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (len(ACTIONS),))},
        cameras={"base": FRONT, "left_wrist": WRIST},
        state_feature_names=STATES,
        action_feature_names=ACTIONS,
        **changes,
    )


def inputs_of(recording: Recording, env: ArmEnvConfig, data: bool = True, **changes: Any) -> Inputs:
    """A policy that was trained on the recording, and an environment to evaluate it in."""
    columns = changes.pop("columns", recording.columns)
    rename_map = changes.pop("given_rename_map", {})
    inputs = Inputs(None, None, None, rename_map, env)
    config = policy_config(**changes)
    given: dict[str, Any] = {"checkpoint": (config, Path()), "statistics": statistics(columns)}
    inputs.__dict__.update(given, rename_map=rename_map, reference=None)
    if data:
        inputs.__dict__.update(
            reference=inputs,
            columns=columns,
            recorded=config,
            metadata=SimpleNamespace(fps=FPS),
            tasks=TASKS,
            pairing=Pairing.of(columns, STATES, ACTIONS, FPS),
            first_pictures=lambda instruction: recording.first,
        )
    return inputs


OF_ENVIRONMENT = [check for check in CHECKS if check.area == "environment"]


def found(inputs: Inputs) -> list[Answer]:
    return [of for of in examine(inputs, OF_ENVIRONMENT) if of.finding.severity is not Severity.FINE]


@pytest.mark.parametrize("data", [True, False])
def test_a_pair_that_fits_gets_no_finding(recording, data):
    inputs = inputs_of(recording, ArmEnvConfig(), data)
    assert found(inputs) == []
    answered = {of.check.look for of in examine(inputs, OF_ENVIRONMENT)}
    if data:
        assert answered == {check.look for check in OF_ENVIRONMENT if "shapes" not in check.name}


# Settings of the environment, and of the policy; the check that names the mistake, its words, and the flag.


def quaternion(order: list[int]) -> See:
    def see(state: np.ndarray) -> np.ndarray:
        angle = np.linalg.norm(state[3:6])
        whole = np.append(state[3:6] / angle * np.sin(angle / 2), np.cos(angle / 2))
        return np.concatenate((state[:3], whole[order], state[6:]))

    return see


def changed(where: slice | list[int], change: See) -> See:
    def see(state: np.ndarray) -> np.ndarray:
        state = state.copy()
        state[where] = change(state[where])
        return state

    return see


def renamed(**names: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda pictures: {names[name]: x for name, x in pictures.items() if name in names}


def noise(pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.integers(0, 255, x.shape, np.uint8) for name, x in pictures.items()}


def mirrored(pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[:, ::-1] if name == "front" else x for name, x in pictures.items()}


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    "a camera has another name": (
        {"show": renamed(front="agentview", wrist="wrist")},
        {},
        "environment_fills_slots",
        "no picture for slot base",
        f"""--rename_map='{{"{OBS_IMAGES}.agentview": "{FRONT}"}}'""",
    ),
    "the wrist camera is missing": (
        {"show": renamed(front="front")},
        {},
        "environment_fills_slots",
        "no picture for slot left_wrist",
        "--env.camera_name",
    ),
    "wide pictures": (
        {"show": lambda pictures: {name: x[::2] for name, x in pictures.items()}},
        {},
        "environment_shapes",
        "32×16",
        "--env.observation_width and --env.observation_height",
    ),
    "cameras are exchanged": (
        {"show": renamed(front="wrist", wrist="front")},
        {},
        "pictures_are_upright",
        "are exchanged",
        "--rename_map=",
    ),
    "one camera is mirrored": (
        {"show": mirrored},
        {},
        "pictures_are_upright",
        f"'{FRONT}' of the environment looks like the training pictures when mirrored left to right",
        "--env.type=doctors_arm_env",
    ),
    "another scene": (
        {"show": noise},
        {},
        "pictures_are_upright",
        "looks like none of the training pictures",
        "--env.task",
    ),
    "no state": ({"obs_type": "pixels"}, {}, "state_is_the_policys", "no state", "--env.obs_type"),
    "a quaternion": (
        {"see": quaternion([0, 1, 2, 3])},
        {},
        "state_is_the_policys",
        "a quaternion where training had axis and angle: dimensions 3 to 6 are a quaternion (x, y, z, w)",
        "--env.type=doctors_arm_env",
    ),
    "a quaternion with w first": (
        {"see": quaternion([3, 0, 1, 2])},
        {},
        "state_is_the_policys",
        "(w, x, y, z)",
        "--env.type=doctors_arm_env",
    ),
    "degrees": (
        {"see": changed(slice(3, 6), np.degrees)},
        {},
        "state_is_the_policys",
        "degrees where training had radians",
        "--env.type=doctors_arm_env",
    ),
    "the gripper first": (
        {"see": lambda state: np.roll(state, 1)},
        {},
        "state_is_the_policys",
        "another order: in training the last 6 dimensions come first",
        "--env.type=doctors_arm_env",
    ),
    "a gripper from 0 to 1": (
        {"see": changed([6], lambda x: (x + 1) / 2)},
        {},
        "state_is_the_policys",
        "a gripper (dimension 6) from 0 to 1 where training had −1 to 1",
        "--env.type=doctors_arm_env",
    ),
    "six actions": ({"takes": 6}, {}, "actions_are_the_policys", "takes 6 actions", "--env.control_mode"),
    "actions in other units": (
        {"limit": 0.01},
        {},
        "actions_are_the_policys",
        "much larger than what the environment takes",
        "--env.control_mode",
    ),
    "another rate": (
        {"fps": 50},
        {},
        "environment_has_the_datas_rate",
        "50 actions per second, the data has 20",
        "--env.fps=20",
    ),
    "a rate that the flag only names": (
        {"fps": 50, "rate_matters": False},
        {},
        "environment_has_the_datas_rate",
        "50 actions per second",
        "train on data of 50 per second",
    ),
    "the gripper's sign": (
        {"take": lambda arm, action: action * [1, 1, 1, -1]},
        {},
        "gripper_has_the_datas_sign",
        "the gripper has the opposite sign",
        "--env.type=doctors_arm_env",
    ),
    "positions for displacements": (
        {"take": lambda arm, action: np.append((action[:3] - arm.state[:3]) / STEP, action[3])},
        {},
        "environment_moves_as_recorded",
        "elsewhere",
        "--env.control_mode",
    ),
    "episodes that are too short": (
        {"episode_length": 40},
        {},
        "episodes_are_long_enough",
        "episodes end after 40 steps",
        "--env.episode_length=90",
    ),
    "a chunk as long as an episode": (
        {},
        {"chunk_size": 50, "n_action_steps": 50},
        "episodes_are_long_enough",
        "plans every 50 steps",
        "--policy.n_action_steps=10",
    ),
    "an instruction in other words": (
        {"instruction": "Pick up the milk and put it into the basket!"},
        {},
        "instructions_are_those_trained_on",
        "none that the policy was trained on",
        "--env.task",
    ),
    "a package that is not installed": (
        {"package": "gym_arm"},
        {},
        "environment_opens",
        "does not open",
        "brings --env.type=doctors_arm_env",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_flag(recording, name):
    settings, policy, check, says, flag = MISTAKES[name]
    inputs = inputs_of(recording, ArmEnvConfig(**settings), **policy)
    answers = found(inputs)
    assert {of.check.look.__name__ for of in answers} == {check}, [of.finding for of in answers]
    finding = answers[0].finding
    assert says in finding.what or says in finding.evidence
    assert flag in finding.fix
    assert finding.severity in (Severity.ERROR, Severity.WARNING)


def test_whatever_a_simulator_raises_is_a_finding(recording, monkeypatch):
    """MuJoCo's FatalError, where there is no OpenGL, has no other base than Exception."""

    def fail(*_: Any, **__: Any) -> None:
        raise Exception("gladLoadGL error")

    monkeypatch.setattr(ArmEnvConfig, "create_envs", fail)
    (answer,) = found(inputs_of(recording, ArmEnvConfig()))
    assert answer.check.look is environment.environment_opens
    assert answer.finding.evidence == "gladLoadGL error"


def test_the_nearest_instruction_is_named(recording):
    inputs = inputs_of(recording, ArmEnvConfig(instruction="put the milk in the basket"))
    (answer,) = found(inputs)
    assert f"to 'put the milk in the basket' is {TASKS[0]!r}" in answer.finding.evidence


@pytest.mark.parametrize("turn", list(ORIENTATIONS)[1:])
def test_each_of_the_other_orientations_is_named(recording, turn):
    """What turns the environment's pictures back is named, and it alone."""
    seen = {key: ORIENTATIONS[turn](x) for key, x in recording.first.items()}
    inputs = inputs_of(replace(recording, first=seen), ArmEnvConfig())
    answers = found(inputs)
    assert len(answers) == 2
    assert all(f"looks like the training pictures when {turn}" in of.finding.what for of in answers)


@pytest.mark.parametrize(
    ("before", "see", "says"),
    [
        (changed([6], lambda x: (x + 1) / 2), same, "from −1 to 1 where training had 0 to 1"),
        (changed(slice(3, 6), np.degrees), same, "radians where training had degrees"),
        (quaternion([0, 1, 2, 3]), same, "axis and angle where training had a quaternion (x, y, z, w)"),
    ],
)
def test_the_policy_may_be_the_one_that_counts_otherwise(recording, before, see, says):
    columns = replace(recording.columns, state=np.array([before(state) for state in recording.columns.state]))
    inputs = inputs_of(recording, ArmEnvConfig(), data=False, columns=columns)
    (finding,) = state_is_the_policys(inputs)
    assert says in finding.what


def test_a_gripper_action_from_0_to_1(recording):
    action = recording.columns.action * [1, 1, 1, 0.5] + [0, 0, 0, 0.5]
    inputs = inputs_of(recording, ArmEnvConfig(), columns=replace(recording.columns, action=action))
    answers = [of for of in found(inputs) if of.check.look.__name__ == "actions_are_the_policys"]
    assert "upper half" in answers[0].finding.what
    assert "--env.control_mode" in answers[0].finding.fix


def test_a_gripper_from_0_to_1_where_the_environment_says_little(recording):
    """gym-aloha's box is ±1, its joints go beyond and its grippers are 0 to 1; PushT's box begins at 0."""
    action = recording.columns.action * [1, 1, 1, 0.5] + [0, 0, 0, 0.5]
    inputs = inputs_of(recording, ArmEnvConfig(limit=0.5), columns=replace(recording.columns, action=action))
    (finding,) = actions_are_the_policys(inputs)
    assert finding.severity is Severity.FINE, finding
    inputs.__dict__["opened_env"] = replace(inputs.opened_env, low=np.zeros(4), high=np.ones(4))
    (finding,) = actions_are_the_policys(inputs)
    assert finding.severity is Severity.FINE, finding


def test_a_rate_that_a_dataset_only_says(recording, monkeypatch):
    """As LIBERO's: --env.fps=10 would change what its displacements do."""
    inputs = inputs_of(recording, ArmEnvConfig())
    inputs.__dict__["metadata"] = SimpleNamespace(fps=10)
    (answer,) = found(inputs)
    assert answer.finding.fix == "--env.fps=10"
    monkeypatch.setitem(environment.RECORDED_AT, ("doctors_arm_env", 10), FPS)
    assert found(inputs) == []


@pytest.mark.parametrize("away", [0.0, 0.6])
def test_positions_lead_towards_their_place_from_elsewhere(recording, away):
    """An environment that starts elsewhere moves otherwise, with absolute actions, and is right."""
    state = recording.columns.state.copy()
    state[:, :3] += away
    action = np.column_stack((np.roll(state[:, :3], -1, 0), recording.columns.action[:, 3]))
    env = ArmEnvConfig(take=lambda arm, a: np.append((a[:3] - arm.state[:3]) / STEP * 0.15, a[3]))
    columns = replace(recording.columns, state=state, action=action)
    (finding,) = responses.environment_moves_as_recorded(inputs_of(recording, env, columns=columns))
    assert finding.severity is Severity.FINE, finding


def test_old_pictures(recording):
    """metaworld_fast takes a picture every `steps_per_picture` steps."""
    config = ArmEnvConfig()
    config.__dict__["steps_per_picture"] = 5
    (answer,) = found(inputs_of(recording, config))
    assert answer.check.look is environment.episodes_are_long_enough
    assert "--env.steps_per_picture=3" in answer.finding.fix


def test_lerobot_evals_rename_map_is_its_own(recording):
    """A policy that was trained with a rename map needs it again: the doctor knows which."""
    env = ArmEnvConfig(show=renamed(front="agentview", wrist="eye_in_hand"))
    names = {f"{OBS_IMAGES}.eye_in_hand": WRIST, f"{OBS_IMAGES}.agentview": FRONT}
    inputs = inputs_of(recording, env)
    inputs.__dict__["rename_map"] = names
    (answer,) = found(inputs)
    assert f'"{OBS_IMAGES}.eye_in_hand": "{WRIST}"' in answer.finding.fix
    assert f'"{OBS_IMAGES}.agentview": "{FRONT}"' in answer.finding.fix
    assert found(inputs_of(recording, env, given_rename_map=names)) == []


def test_statistics_that_are_not_there(tmp_path):
    """Whatever the environment: nothing would be normalized."""
    folder = make_checkpoint(tmp_path / "checkpoint")
    inputs = Inputs(None, None, None, {}, ArmEnvConfig())
    inputs.__dict__["checkpoint"] = (tiny_config(), folder)
    assert list(checkpoint.statistics_are_whole(inputs)) == []
    inputs.__dict__["statistics"] = {}
    (state, action, *_) = checkpoint.statistics_are_whole(inputs)
    assert state.severity is action.severity is Severity.ERROR
    assert "no mean, std of 'observation.state'" in state.what
    assert (folder / PREPROCESSOR).is_file()
