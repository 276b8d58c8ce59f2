"""PushT: the doctor of environments in gym-pusht.

Run by `make test-pusht`, in an environment that has gym-pusht.
"""

import numpy as np
import pytest

pytest.importorskip("gym_pusht", reason="gym-pusht is not installed here: make test-pusht")

from env_pairs import found, inputs_of, write
from lerobot.envs import close_envs, make_env
from lerobot.envs.configs import PushtEnv
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

EPISODES, STEPS = 3, 40


def record():
    """The agent goes straight to a place. LeRobot's environment has no instruction, so there is none."""
    config = PushtEnv()
    envs = make_env(config, n_envs=1)
    ((env,),) = ([*of.values()] for of in envs.values())
    episodes = []
    for seed in range(EPISODES):
        seen, _ = env.reset(seed=seed)
        start, goal = seen["agent_pos"][0], np.random.default_rng(seed).uniform(100, 400, 2)
        frames = []
        for step in range(STEPS):
            action = (start + (goal - start) * min(1.0, step / 25)).astype(np.float32)
            state = seen["agent_pos"][0].astype(np.float32)
            frames.append({OBS_IMAGE: seen["pixels"][0], OBS_STATE: state, ACTION: action, "task": ""})
            seen, *_ = env.step(action[None])
        episodes.append(frames)
    close_envs(envs)
    return episodes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pusht"
    axes = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    picture = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
    write(root, {OBS_IMAGE: picture, OBS_STATE: axes, ACTION: axes}, 10, record())
    return root, inputs_of(root, PushtEnv())


def test_the_doctor_finds_nothing_in_a_policy_that_fits(pair):
    _, inputs = pair
    assert found(inputs) == {}


def twenty_per_second(inputs):
    inputs.env.fps = 20


def plans_rarely(inputs):
    inputs.config.n_action_steps = 50


def in_units(inputs):
    low, high = np.full(2, -1.0), np.ones(2)
    inputs.__dict__["statistics"] = inputs.statistics | {OBS_STATE: {"min": low, "max": high}}


@pytest.mark.parametrize(
    ("mistake", "check", "says"),
    [
        (twenty_per_second, "environment_has_the_datas_rate", "takes 20 actions per second, the data has 10"),
        (plans_rarely, "episodes_are_long_enough", "plans every 50 steps"),
        (in_units, "state_is_the_policys", "not what the policy was trained on"),
    ],
)
def test_the_doctor_names_a_mistake(pair, mistake, check, says):
    root, opened = pair
    inputs = inputs_of(root, PushtEnv(), like=opened)
    mistake(inputs)
    assert says in found(inputs)[check]
