"""LIBERO: recorded frames are what lerobot-eval shows, and what was recorded solves its episodes.

Run by `make test-libero`, in an environment that has LIBERO.
"""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed here: make test-libero")

from env_pairs import found, inputs_of, write
from lerobot.envs import make_env
from lerobot.envs.configs import LiberoEnv
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from playback import Playback, check_frames, check_queues, evaluate

from lerobot_pi0.demo.libero import SUITE
from lerobot_pi0.demo.libero_installation import prepare_libero

prepare_libero()  # LeRobot's commands do so when they discover the plugin
TASKS = ("alphabet_soup", "cream_cheese")  # numbers 0 and 1
SIZE = 96  # pixels
# Of 255: the recorder's cameras draw neither shadows nor reflections, and smooth no edges.
TOLERANCE = 4.0
SHORT = 6  # steps
CAMERAS = [f"{OBS_IMAGES}.image", f"{OBS_IMAGES}.image2"]


def environment(*numbers: int, **changes) -> LiberoEnv:
    """LeRobot's own; the scene is compiled once."""
    size = {"observation_height": SIZE, "observation_width": SIZE}
    return LiberoEnv(task="libero_object", task_ids=list(numbers), hard_reset=False, **size, **changes)


@pytest.fixture(scope="module")
def demonstration():
    """The expert in lerobot-eval's first episode, as the recorder sees it, without disturbances."""
    from lerobot_pi0.demo.libero_env import Scene, expert_action

    task, frames = TASKS[0], []
    with closing(Scene(task, SIZE)) as scene:
        scene.reset(scene.initial_states[0])
        while not scene.solved(task):
            assert len(frames) < 200
            pictures = zip(CAMERAS, scene.pictures().values(), strict=True)
            action = expert_action(scene, task)
            frames.append(
                dict(pictures) | {OBS_STATE: scene.state(), ACTION: action, "task": SUITE.instruction(task)}
            )
            scene.step(action)
    return frames


def played(frames, steps: int):
    """The demonstration's actions through lerobot-eval: the policy, and what lerobot-eval reports."""
    config = environment(0, episode_length=steps)
    actions = np.stack([frame[ACTION] for frame in frames])
    policy = Playback({frames[0]["task"]: [actions]}, n_action_steps=8)
    return policy, evaluate(policy, config, make_env(config, n_envs=1), n_episodes=1)


def test_recorded_frames_are_what_lerobot_eval_shows(demonstration):
    policy, _ = played(demonstration, SHORT)
    (observed,) = policy.observed[demonstration[0]["task"]]
    check_frames(demonstration[:SHORT], observed, TOLERANCE)


@pytest.mark.slow
def test_a_recorded_episode_played_back_through_lerobot_eval_succeeds(demonstration):
    policy, info = played(demonstration, len(demonstration))
    assert info["overall"]["pc_success"] == 100.0
    (observed,) = policy.observed[demonstration[0]["task"]]
    check_frames(demonstration[: len(observed)], observed, TOLERANCE)


@pytest.mark.slow
def test_two_tasks_with_two_environments_each_execute_their_own_actions():
    """An episode ends in the middle of a chunk: what is left of it must not be executed in the next one."""
    config, random = environment(0, 1, episode_length=SHORT), np.random.default_rng(0)
    recorded = {
        SUITE.instruction(task): list(random.uniform(-0.3, 0.3, (4, SHORT, 7)).astype(np.float32))
        for task in TASKS
    }
    policy = Playback(recorded, n_action_steps=4)
    evaluate(policy, config, make_env(config, n_envs=2), n_episodes=4)
    check_queues(policy, rollouts=2)


@pytest.fixture(scope="module")
def pair(demonstration, tmp_path_factory):
    """The demonstration on disk, and the inputs of a doctor that has opened LeRobot's environment."""
    root = tmp_path_factory.mktemp("data") / "libero"
    features = SUITE.features(replace(SUITE.defaults, image_size=SIZE))
    write(root, features, SUITE.fps, [demonstration])
    return root, inputs_of(root, environment(0))


def test_the_doctor_finds_nothing_in_a_policy_that_fits(pair):
    _, inputs = pair
    assert found(inputs) == {}


def change_state(inputs, change):
    columns = replace(inputs.columns, state=change(inputs.columns.state))
    low, high = columns.state.min(0), columns.state.max(0)
    inputs.__dict__.update(
        columns=columns, statistics=inputs.statistics | {OBS_STATE: {"min": low, "max": high}}
    )


def quaternion(inputs):
    """As robosuite gives it, and LeRobot's environment before its processor."""

    def change(state):
        angle = np.linalg.norm(state[:, 3:6], axis=1, keepdims=True)
        turn = np.concatenate([state[:, 3:6] / angle * np.sin(angle / 2), np.cos(angle / 2)], 1)
        return np.concatenate([state[:, :3], turn, state[:, 6:]], 1)

    change_state(inputs, change)


def gripper_first(inputs):
    change_state(inputs, lambda state: np.roll(state, 2, axis=1))


def opposite_gripper(inputs):
    inputs.__dict__["columns"] = replace(
        inputs.columns, action=inputs.columns.action * [1, 1, 1, 1, 1, 1, -1]
    )


def upside_down(inputs):
    first = inputs.first_pictures("")
    inputs.__dict__["first_pictures"] = lambda _: {key: x.flip((2, 3)) for key, x in first.items()}


def exchanged(inputs):
    first = inputs.first_pictures("")
    swapped = dict(zip(CAMERAS, (first[key] for key in reversed(CAMERAS)), strict=True))
    inputs.__dict__["first_pictures"] = lambda _: swapped


def openpis_names(inputs):
    inputs.config.cameras = {"base": "observation.images.agentview", "left_wrist": CAMERAS[1]}


def ten_per_second(inputs):
    inputs.env.fps = 10


def plans_rarely(inputs):
    inputs.config.n_action_steps = 50


def another_object(inputs):
    inputs.__dict__["tasks"] = {0: SUITE.instruction("milk")}


@pytest.mark.parametrize(
    ("mistake", "check", "says"),
    [
        (quaternion, "state_is_the_policys", "axis and angle where training had a quaternion (x, y, z, w)"),
        (gripper_first, "state_is_the_policys", "another order"),
        (opposite_gripper, "gripper_has_the_datas_sign", "the gripper has the opposite sign"),
        (upside_down, "pictures_are_upright", "when turned by 180°"),
        (exchanged, "pictures_are_upright", "are exchanged"),
        (openpis_names, "environment_fills_slots", "no picture for slot base"),
        (ten_per_second, "environment_has_the_datas_rate", "takes 10 actions per second, the data has 20"),
        (plans_rarely, "episodes_are_long_enough", "plans every 50 steps"),
        (another_object, "instructions_are_those_trained_on", "pick up the milk and place it in the basket"),
    ],
)
def test_the_doctor_names_a_mistake(pair, mistake, check, says):
    root, opened = pair
    inputs = inputs_of(root, environment(0), like=opened)
    mistake(inputs)
    assert says in found(inputs)[check]
