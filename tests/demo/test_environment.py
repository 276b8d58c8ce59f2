"""The Meta-World environment: what a policy sees, when episodes end, which instruction it is given."""

import importlib.util
import sys
from typing import Any

import mujoco
import numpy as np
import pytest
from forked import Program, script
from gymnasium.vector import SyncVectorEnv
from lerobot.envs import close_envs, env_to_policy_features, make_env
from lerobot.envs.utils import NEW_ROLLOUT_OPTION

from lerobot_pi0.demo import metaworld_env
from lerobot_pi0.demo.environment import MetaworldFastEnvConfig
from lerobot_pi0.demo.metaworld import SUITE
from lerobot_pi0.demo.metaworld_env import MetaworldFastEnv, Simulation, scripted_expert
from lerobot_pi0.demo.metaworld_tasks import parse_tasks, task_instructions

DEFAULT_TASKS = parse_tasks(SUITE.defaults.tasks)
STILL = np.zeros(4, np.float32)


@pytest.fixture
def make():
    """Make environments that are closed after the test."""
    made: list[MetaworldFastEnv] = []

    def make_one(task: str = "faucet-open-v3", image_size: int = 64, **settings: Any) -> MetaworldFastEnv:
        made.append(MetaworldFastEnv(task, task_instructions()[task], image_size=image_size, **settings))
        return made[-1]

    yield make_one
    for env in made:
        env.close()


def test_observations_have_the_shapes_and_types_that_the_config_declares(make):
    config = MetaworldFastEnvConfig(image_size=64)
    observation, _ = make().reset(seed=0)
    assert {key: value.shape for key, value in observation.items()} == {
        key: feature.shape for key, feature in config.features.items() if key != "action"
    }
    assert observation["pixels"].dtype == np.uint8
    assert observation["pixels"].std() > 10  # there is something to see
    assert observation["agent_pos"].dtype == np.float32


def test_the_config_speaks_lerobots_feature_names():
    features = env_to_policy_features(MetaworldFastEnvConfig(image_size=96))
    assert {key: feature.shape for key, feature in features.items()} == {
        "observation.image": (3, 96, 96),
        "observation.state": (4,),
        "action": (4,),
    }


def test_a_seed_fixes_the_scene(make):
    env = make("plate-slide-v3")
    first, other, again = (env.reset(seed=seed)[0] for seed in (3, 4, 3))
    np.testing.assert_array_equal(first["pixels"], again["pixels"])
    np.testing.assert_array_equal(first["agent_pos"], again["agent_pos"])
    assert (first["pixels"] != other["pixels"]).mean() > 0.01


def test_objects_are_moved_beyond_meta_worlds_places_and_only_on_the_table():
    places = {}
    for moved in (0.0, 0.1):
        simulation = Simulation("faucet-open-v3", moved)
        for seed in range(20):
            simulation.reset(seed)
            places.setdefault(moved, []).append(simulation.state[4:7])
    spread = {moved: np.ptp(np.stack(found), axis=0) for moved, found in places.items()}
    assert (spread[0.0][:2] <= [0.1, 0.05]).all()
    assert (spread[0.1][:2] > [0.15, 0.1]).all()
    assert (spread[0.1][:2] <= [0.3, 0.25]).all()
    assert spread[0.1][2] < 1e-6


@pytest.mark.parametrize("task", ["faucet-open-v3", "window-open-v3"])
def test_the_first_observation_shows_the_object_where_it_is(make, task):
    # Meta-World moves these objects after its last look at the scene.
    env = make(task)
    observation, _ = env.reset(seed=1)
    mujoco.mj_forward(env.simulation.model, env.simulation.data)
    np.testing.assert_array_equal(observation["pixels"], env.observe()["pixels"])


@pytest.mark.parametrize("show_goal", [False, True])
def test_pixels_tell_opposite_tasks_apart_only_if_goals_are_drawn(make, show_goal):
    opening, closing = (make(f"faucet-{verb}-v3", show_goal=show_goal) for verb in ("open", "close"))
    for env in (opening, closing):
        env.reset(seed=0)
    # Arm and faucet in the one exactly as in the other.
    source, target = opening.simulation, closing.simulation
    target.model.body("faucetBase").pos = source.model.body("faucetBase").pos
    target._env.set_state(source.data.qpos, source.data.qvel)
    pixels = []
    for env in (opening, closing):
        mujoco.mj_forward(env.simulation.model, env.simulation.data)
        for site in env.simulation._env._target_site_config:
            env.simulation._env._set_pos_site(*site)
        pixels.append(env.observe()["pixels"])
    assert np.array_equal(*pixels) != show_goal


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_the_scripted_expert_ends_the_episode_in_success(task):
    simulation, expert = Simulation(task), scripted_expert(task)
    simulation.reset(seed=0)
    for _ in range(200):
        action = expert(simulation.state)
        assert np.abs(action).max() <= 1
        if simulation.step(action)[1]:
            return
    pytest.fail("not solved in 200 steps")


def test_an_episode_ends_at_success(make):
    env, expert = make("door-unlock-v3", image_size=16), scripted_expert("door-unlock-v3")
    env.reset(seed=0)
    terminated, info = False, {"is_success": False}
    for _ in range(200):
        assert not info["is_success"]
        _, _, terminated, truncated, info = env.step(expert(env.simulation.state))
        assert not truncated
        if terminated:
            break
    assert terminated
    assert info["is_success"]


def test_an_episode_without_success_ends_at_its_length(make):
    env = make(image_size=16, episode_length=3)
    env.reset(seed=0)
    ends = [env.step(STILL)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_render_gives_the_image_of_the_last_observation(make):
    env = make()
    env.reset(seed=0)
    observation, *_ = env.step(np.ones(4))
    assert env.render() is observation["pixels"]


def test_between_pictures_observations_hold_the_last_one_and_the_arm_as_it_is(make):
    env = make(steps_per_picture=3, episode_length=5)
    observations = [env.reset(seed=0)[0], *(env.step(np.ones(4))[0] for _ in range(5))]
    pictures = [observation["pixels"].tobytes() for observation in observations]
    # The last step ends the episode.
    assert [pictures.index(picture) for picture in pictures] == [0, 0, 0, 3, 3, 5]
    assert len({observation["agent_pos"].tobytes() for observation in observations}) == 6


def test_environments_side_by_side_each_draw_their_own_scene(make):
    config = MetaworldFastEnvConfig(image_size=64)
    envs = make_env(config, n_envs=2)
    vector = envs["faucet-open-v3"][0]
    assert isinstance(vector, SyncVectorEnv)
    together, _ = vector.reset(seed=[5, 6], options={NEW_ROLLOUT_OPTION: True})
    alone = [make().reset(seed=seed)[0]["pixels"] for seed in (5, 6)]
    close_envs(envs)
    np.testing.assert_array_equal(together["pixels"], alone)


def test_several_tasks_become_one_vector_environment_each():
    config = MetaworldFastEnvConfig(task="faucet-open-v3, plate-slide-v3", episode_length=7)
    envs = make_env(config, n_envs=2)
    assert {task: list(group) for task, group in envs.items()} == {
        "faucet-open-v3": [0],
        "plate-slide-v3": [0],
    }
    vector = envs["plate-slide-v3"][0]
    assert isinstance(vector, SyncVectorEnv)
    assert vector.call("task_description") == ("Slide a plate into a cabinet",) * 2
    assert vector.call("_max_episode_steps") == (7, 7)
    close_envs(envs)


def test_swapped_instructions_are_those_of_the_opposite_task():
    config = MetaworldFastEnvConfig(task="faucet-open-v3,faucet-close-v3", swap_instructions=True)
    envs = make_env(config, n_envs=1)
    instructions = {}
    for task, group in envs.items():
        assert isinstance(group[0], SyncVectorEnv)
        instructions[task] = group[0].call("task_description")
    close_envs(envs)
    assert instructions == {
        "faucet-open-v3": (task_instructions()["faucet-close-v3"],),
        "faucet-close-v3": (task_instructions()["faucet-open-v3"],),
    }


def test_swapping_the_instruction_of_a_task_without_opposite_is_refused():
    with pytest.raises(
        ValueError, match=r"swap_instructions.*not plate-slide-v3. Take them out of --env.task"
    ):
        MetaworldFastEnvConfig(task="faucet-open-v3,plate-slide-v3", swap_instructions=True)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("facet-open-v3", r"Unknown Meta-World task facet-open-v3. Known tasks: .*faucet-open-v3"),
        (" , ", "No Meta-World task given"),
        ("reach-v3,reach-v3", "named twice"),
    ],
)
def test_a_wrong_task_list_is_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        MetaworldFastEnvConfig(task=tasks)


def test_a_renderer_that_cannot_be_made_names_the_packages_to_install(make, monkeypatch):
    def no_display(*_):
        raise ImportError("Cannot initialize a EGL device display.")

    monkeypatch.setattr(mujoco, "Renderer", no_display)
    with pytest.raises(RuntimeError, match=r"Cannot initialize.*MUJOCO_GL=egl.*apt-get install libegl1 "):
        make().reset(seed=0)


def test_a_missing_gl_library_names_the_packages_to_install(monkeypatch):
    class NoLibrary:
        """Stands for PyOpenGL, which fails like this inside `import mujoco` when libEGL is not there."""

        @staticmethod
        def find_spec(name, *_):
            if name == "mujoco":
                raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.delitem(sys.modules, "mujoco")
    monkeypatch.setattr(sys, "meta_path", [NoLibrary, *sys.meta_path])
    spec = importlib.util.spec_from_file_location("metaworld_env_without_gl", metaworld_env.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(RuntimeError, match=r"eglQueryString.*apt-get install libegl1 "):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_it_renders_although_another_plugin_has_imported_mujoco_before(tmp_path):
    code = """
import os, sys
for name in ("MUJOCO_GL", "DISPLAY"):
    os.environ.pop(name, None)
assert "mujoco" not in sys.modules
import mujoco
from lerobot_pi0.demo.metaworld_env import MetaworldFastEnv
env = MetaworldFastEnv("faucet-open-v3", "")
env.reset(seed=0)
env.close()
"""
    Program(tmp_path / "log.txt", script, code).succeed()
