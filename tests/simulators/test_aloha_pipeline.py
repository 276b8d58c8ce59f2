"""ALOHA in gym-aloha: recorded frames are what lerobot-eval shows, and what was recorded solves its episodes.

Run by `make test-aloha`, in an environment that has gym-aloha.
"""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("gym_aloha", reason="gym-aloha is not installed here: make test-aloha")

from env_pairs import found, inputs_of, write
from lerobot.envs import make_env
from lerobot.envs.configs import AlohaEnv
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from playback import Playback, check_frames, check_queues, evaluate

from lerobot_pi0.demo.aloha import SUITE
from lerobot_pi0.demo.suites import EVALUATION_SEED

TASK = "transfer_cube"
GYM = "AlohaTransferCube-v0"
TOP = f"{OBS_IMAGES}.top"
# Of 255: the recorder's camera draws shadows from a coarser map, and smooths no edges.
TOLERANCE = 2.0
SHORT = 6  # steps; gym-aloha takes three pictures in each


@pytest.fixture(scope="module")
def recording():
    """Without disturbances, so that the recorded actions are those that were executed."""
    return replace(SUITE.defaults, noise=0.0)


@pytest.fixture(scope="module")
def demonstration(recording):
    """In the scene of lerobot-eval's first episode."""
    (frames,) = SUITE.successes(TASK, recording, [EVALUATION_SEED])
    return frames


def played(frames, steps: int, n_action_steps: int = 8):
    """The demonstration's actions through lerobot-eval: the policy, and what lerobot-eval reports."""
    config = AlohaEnv(task=GYM, episode_length=steps)
    actions = np.stack([frame["action"] for frame in frames])
    policy = Playback({SUITE.instruction(TASK): [actions]}, n_action_steps=n_action_steps)
    return policy, evaluate(policy, config, make_env(config, n_envs=1), n_episodes=1)


def test_recorded_frames_are_what_lerobot_eval_shows(demonstration):
    policy, _ = played(demonstration, SHORT)
    (observed,) = policy.observed[SUITE.instruction(TASK)]
    check_frames(demonstration[:SHORT], observed, TOLERANCE)


@pytest.mark.slow
def test_a_recorded_episode_played_back_through_lerobot_eval_succeeds(demonstration):
    policy, info = played(demonstration, len(demonstration))
    assert info["overall"]["pc_success"] == 100.0
    (observed,) = policy.observed[SUITE.instruction(TASK)]
    check_frames(demonstration[: len(observed)], observed, TOLERANCE)


def test_two_environments_at_once_and_the_episodes_after_them_execute_their_own_actions(demonstration):
    """An episode ends in the middle of a chunk: what is left of it must not be executed in the next one."""
    config = AlohaEnv(task=GYM, episode_length=SHORT)
    random = np.random.default_rng(0)
    episodes = [demonstration[0]["action"] + random.normal(0, 0.02, (SHORT, 14)) for _ in range(4)]
    policy = Playback({SUITE.instruction(TASK): episodes}, n_action_steps=4)
    evaluate(policy, config, make_env(config, n_envs=2), n_episodes=4)
    check_queues(policy, rollouts=2)


@pytest.fixture(scope="module")
def pair(demonstration, recording, tmp_path_factory):
    """The demonstration on disk, and the inputs of a doctor that has opened LeRobot's environment."""
    root = tmp_path_factory.mktemp("data") / "aloha"
    write(root, SUITE.features(recording), SUITE.fps, [demonstration])
    return root, inputs_of(root, AlohaEnv(task=GYM))


def test_the_doctor_finds_nothing_in_a_policy_that_fits(pair):
    _, inputs = pair
    assert found(inputs) == {}


def change_state(inputs, change):
    columns = replace(inputs.columns, state=change(inputs.columns.state))
    ends = {"min": columns.state.min(0), "max": columns.state.max(0)}
    inputs.__dict__.update(columns=columns, statistics=inputs.statistics | {OBS_STATE: ends})


def in_degrees(inputs):
    joints = [i for i in range(14) if i % 7 != 6]
    change_state(inputs, lambda x: np.where(np.isin(np.arange(14), joints), np.degrees(x), x))


def grippers_from_minus_1(inputs):
    change_state(inputs, lambda x: np.where(np.arange(14) % 7 == 6, 2 * x - 1, x))


def upside_down(inputs):
    first = inputs.first_pictures(inputs.opened_env.instructions[0])
    inputs.__dict__["first_pictures"] = lambda _: {key: x.flip((2, 3)) for key, x in first.items()}


def another_camera(inputs):
    inputs.config.cameras = {"base": f"{OBS_IMAGES}.cam_high"}


def other_words(inputs):
    inputs.__dict__["tasks"] = {0: "Transfer cube to the left hand"}


@pytest.mark.parametrize(
    ("mistake", "check", "says"),
    [
        (in_degrees, "state_is_the_policys", "radians where training had degrees"),
        (grippers_from_minus_1, "state_is_the_policys", "from 0 to 1 where training had −1 to 1"),
        (upside_down, "pictures_are_upright", "when turned by 180°"),
        (another_camera, "environment_fills_slots", "no picture for slot base"),
        (other_words, "instructions_are_those_trained_on", "none that the policy was trained on"),
    ],
)
def test_the_doctor_names_a_mistake(pair, mistake, check, says):
    root, opened = pair
    inputs = inputs_of(root, AlohaEnv(task=GYM), like=opened)
    mistake(inputs)
    assert says in found(inputs)[check]
