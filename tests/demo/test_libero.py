"""The LIBERO suite: flags and names everywhere; scene, expert and environment where LIBERO is installed."""

import importlib.util
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import draccus
import numpy as np
import pytest
from lerobot.envs import EnvConfig
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from lerobot_pi0.demo.libero import RECORDED_STATES, SUITE
from lerobot_pi0.demo.libero_environment import LiberoVariedEnvConfig
from lerobot_pi0.demo.libero_installation import prepare_libero
from lerobot_pi0.demo.libero_tasks import CAMERAS, OTHERS, SUITE_NAME, TASK_IDS, instruction
from lerobot_pi0.errors import UserError

needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None,
    reason="LIBERO has an environment of its own: make test-libero",
)
TASKS = SUITE.parse_tasks(SUITE.defaults.tasks)


@dataclass
class Flags:
    env: EnvConfig


def environments() -> dict[str, Any]:
    """What lerobot-eval makes of the flags of each evaluation."""
    evaluations = SUITE.evaluations(TASKS, SUITE.defaults, 280, 8)
    return {one.name: draccus.parse(Flags, args=list(one.flags)).env for one in evaluations}


def test_success_is_measured_in_lerobots_own_environment():
    evaluation = environments()["evaluate"]
    assert evaluation.type == "libero"
    assert [list(TASK_IDS)[number] for number in evaluation.task_ids] == sorted(
        TASKS, key=TASK_IDS.__getitem__
    )


def test_an_evaluations_tasks_are_in_the_order_in_which_lerobot_eval_runs_them():
    for evaluation in SUITE.evaluations(["orange_juice", "alphabet_soup", "ketchup"], SUITE.defaults, 280, 8):
        assert list(evaluation.tasks) == sorted(evaluation.tasks, key=TASK_IDS.__getitem__)


def test_swapped_instructions_name_another_recorded_object_of_the_scene():
    environment = environments()["evaluate_swapped"]
    assert environment.scenes == sorted(TASKS, key=TASK_IDS.__getitem__)
    for scene in environment.scenes:
        assert environment.named(scene) in set(TASKS) & set(OTHERS[scene])


@pytest.mark.parametrize(("tasks", "swaps"), [(["milk", "alphabet_soup"], True), (["milk"], False)])
def test_instructions_are_swapped_where_another_recorded_object_stands(tasks, swaps):
    names = [evaluation.name for evaluation in SUITE.evaluations(tasks, SUITE.defaults, 280, 8)]
    assert ("evaluate_swapped" in names) == swaps


def test_each_object_is_recorded_in_two_scenes_and_each_scene_with_two_names():
    """Otherwise a scene would tell the object, and nothing would have to read the instruction."""
    tasks = SUITE.parse_tasks(SUITE.defaults.tasks)
    for task in tasks:
        assert set(OTHERS[task]) & set(tasks)
        assert any(task in OTHERS[scene] for scene in tasks)


def test_results_are_called_by_the_object():
    assert SUITE.task_name(SUITE_NAME, 4) == "ketchup"


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"task": "libero_goal"}, "--env.task"),
        ({"task_ids": [10]}, "--env.task_ids"),
        ({"moved": -0.1}, "--env.moved"),
        ({"steps_per_picture": 0}, "--env.steps_per_picture"),
        ({"observation_height": 64}, "--env.observation_height"),
        ({"instruction_of": "soup"}, "Known tasks"),
        ({"task_ids": [7], "instruction_of": "ketchup"}, "--env.instruction_of"),
    ],
)
def test_a_bad_setting_of_the_environment_names_its_flag(settings, flag):
    with pytest.raises(UserError, match=flag):
        LiberoVariedEnvConfig(**settings)


@needs_libero
def test_names_instructions_and_neighbours_are_liberos():
    prepare_libero()
    from libero.libero import benchmark

    suite = benchmark.get_benchmark_dict()[SUITE_NAME]()
    for name, number in TASK_IDS.items():
        assert suite.get_task(number).language == instruction(name)


@pytest.fixture(scope="module")
def scene():
    from lerobot_pi0.demo.libero_env import Scene

    with closing(Scene("ketchup", 64)) as made:
        yield made


@needs_libero
def test_a_scene_holds_its_object_and_the_others(scene):
    assert sorted(scene.objects) == sorted(("ketchup", *OTHERS["ketchup"]))


@needs_libero
def test_pictures_of_an_earlier_moment_are_those_that_were_taken_then(scene):
    from lerobot_pi0.demo.libero_env import expert_action

    scene.reset(scene.initial_states[0])
    taken = []
    for _ in range(8):
        scene.step(expert_action(scene, "ketchup"))
        taken.append((scene.moment(), scene.pictures()))
    for moment, pictures in taken:
        for name, picture in scene.pictures(moment).items():
            np.testing.assert_array_equal(picture, pictures[name])
    assert (taken[0][1]["image2"] != taken[-1][1]["image2"]).any()


@needs_libero
def test_the_experts_run_succeeds_in_lerobots_environment_and_looks_the_same_there(scene):
    from lerobot.envs.libero import LiberoEnv
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor import LiberoProcessorStep
    from libero.libero import benchmark

    from lerobot_pi0.demo.libero_env import expert_action

    number = RECORDED_STATES[0]
    scene.reset(scene.initial_states[number])
    recorded = []
    while not scene.solved("ketchup") and len(recorded) < 200:
        recorded.append((scene.pictures(), scene.state(), expert_action(scene, "ketchup")))
        scene.step(recorded[-1][-1])
    theirs = LiberoEnv(
        benchmark.get_benchmark_dict()[SUITE_NAME](),
        TASK_IDS["ketchup"],
        SUITE_NAME,
        obs_type="pixels_agent_pos",
        observation_width=64,
        observation_height=64,
        hard_reset=False,
        episode_index=number,
    )
    solved = False
    with closing(theirs):
        observation: Any = theirs.reset()[0]
        for pictures, state, action in recorded:
            batched: dict[str, Any] = {
                "pixels": {name: picture[None] for name, picture in observation["pixels"].items()},
                "robot_state": {
                    part: {name: value[None] for name, value in values.items()}
                    for part, values in observation["robot_state"].items()
                },
            }
            batch = preprocess_observation(batched)
            processed = LiberoProcessorStep().observation(batch)
            np.testing.assert_allclose(processed[OBS_STATE][0].numpy(), state, atol=1e-3)
            for name, picture in pictures.items():
                seen = processed[f"{OBS_IMAGES}.{name}"][0].permute(1, 2, 0).numpy() * 255
                assert np.abs(seen - picture).mean() < 8  # another orientation differs by 20 and more
            observation, _, solved, _, _ = theirs.step(action)
    assert solved


@needs_libero
def test_moved_objects_rest_where_they_were_put_and_the_expert_still_finds_them(scene):
    from lerobot_pi0.demo.libero_env import expert_action, reset_evaluated

    scene.reset(scene.initial_states[0])
    before = {name: scene.position(name) for name in (*scene.objects, "basket")}
    reset_evaluated(scene, "ketchup", 0, 0.05)
    distance = {name: np.abs(scene.position(name) - before[name])[:2].max() for name in before}
    assert {name for name, metres in distance.items() if metres > 0.003} == {"ketchup", "basket"}
    assert max(distance.values()) < 0.06
    for _ in range(200):
        scene.step(expert_action(scene, "ketchup"))
        if scene.solved("ketchup"):
            break
    assert scene.solved("ketchup")


@needs_libero
def test_the_varied_environment_says_what_was_asked_and_shows_what_is_recorded(scene):
    config = LiberoVariedEnvConfig(
        task_ids=[TASK_IDS["ketchup"]],
        instruction_of="alphabet_soup",
        observation_height=64,
        observation_width=64,
    )
    environment: Any = config.create_envs(1)[SUITE_NAME][TASK_IDS["ketchup"]]
    with closing(environment):
        assert environment.call("task_description")[0] == instruction("alphabet_soup")
        observation, _ = environment.reset(seed=[0])
        scene.reset(scene.initial_states[0])
        for name, picture in scene.pictures().items():
            seen = observation["pixels"][name][0][::-1, ::-1]
            assert np.abs(seen.astype(float) - picture).mean() < 1
        assert set(observation["pixels"]) == set(CAMERAS)


@needs_libero
def test_equal_seeds_give_equal_demonstrations():
    recording = replace(SUITE.defaults, image_size=32)
    one, two = (SUITE.successes("ketchup", recording, [3]) for _ in range(2))
    assert one
    assert len(one[0]) == len(two[0])
    for mine, other in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(mine[OBS_STATE], other[OBS_STATE])
        np.testing.assert_array_equal(mine[f"{OBS_IMAGES}.image2"], other[f"{OBS_IMAGES}.image2"])
