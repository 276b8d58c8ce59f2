"""ALOHA as a suite: what it says without the simulator; its physics, pictures and expert with it.

What needs gym-aloha is skipped where it is not installed: `.ci/setup.sh aloha` makes an environment with it.
"""

import importlib.util
from dataclasses import replace

import draccus
import numpy as np
import pytest
import torch
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.envs.configs import AlohaEnv

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.relative_actions import relative_joints
from lerobot_pi0.demo.aloha import JOINTS, SUITE
from lerobot_pi0.demo.demo import Demo, DemoConfig
from lerobot_pi0.demo.suites import EVALUATION_SEED
from lerobot_pi0.inputs.shipped_configs import shipped_config
from lerobot_pi0.model.observation import letterbox

TASK = "transfer_cube"

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("gym_aloha") is None, reason="gym-aloha is not installed (.ci/setup.sh aloha)"
)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("insertion", "Unknown ALOHA task insertion. Known tasks: transfer_cube"),
        ("", "No ALOHA task given"),
        ("transfer_cube,transfer_cube", "named twice"),
    ],
)
def test_a_wrong_task_list_is_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        SUITE.parse_tasks(tasks)


@pytest.fixture
def demo(tmp_path) -> Demo:
    return Demo(DemoConfig(suite="aloha", output_dir=tmp_path / "demo"))


@pytest.fixture
def policy(demo):
    """The settings of the demo's policy, with what training fills in of the dataset."""
    (training,) = demo.train()
    config = TrainPipelineConfig.from_pretrained(
        shipped_config("demo_aloha"), cli_args=list(training.command.arguments[1:])
    ).policy
    assert isinstance(config, Pi0Config)
    config.action_feature_names = config.state_feature_names = list(JOINTS)
    return config


def test_the_policy_learns_all_joints_but_the_grippers_relative_to_the_state(policy):
    assert policy.relative_actions
    assert {JOINTS[action] for action, _ in relative_joints(policy)} == {
        name for name in JOINTS if "gripper" not in name
    }


def test_the_policy_sees_recorded_pictures_as_they_are(policy):
    height, width, _ = SUITE.features(SUITE.defaults)["observation.images.top"]["shape"]
    assert (width, height * 4) == (policy.vision.image_size, width * 3)


def test_it_is_evaluated_in_lerobots_own_environment(demo):
    (evaluation,) = SUITE.evaluations([TASK], demo.recording, 300, 16)
    env = draccus.parse(EvalPipelineConfig, args=[*evaluation.flags, "--policy.type=lerobot_pi0"]).env
    assert isinstance(env, AlohaEnv)
    assert (env.type, env.task, env.episode_length) == ("aloha", "AlohaTransferCube-v0", 300)
    assert env.fps == SUITE.fps
    assert SUITE.task_name(env.type, 0) == TASK


@pytest.fixture(scope="module")
def simulation():
    pytest.importorskip("gym_aloha")
    from lerobot_pi0.demo.aloha_env import Simulation

    return Simulation()


@needs_simulator
def test_physics_and_pictures_are_those_of_lerobots_environment(simulation):
    import gymnasium as gym

    from lerobot_pi0.demo.aloha_env import Camera

    theirs = gym.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos").unwrapped
    observation, _ = theirs.reset(seed=EVALUATION_SEED)
    simulation.reset(EVALUATION_SEED)
    action = simulation.state + np.linspace(-0.1, 0.1, len(JOINTS))
    for _ in range(3):
        np.testing.assert_array_equal(observation["agent_pos"], simulation.state)
        observation, *_ = theirs.step(action)
        simulation.step(action)
    camera = Camera(simulation, width=160)
    picture = camera.picture()
    camera.close()
    full = torch.from_numpy(observation["pixels"]["top"].copy()).permute(2, 0, 1)[None] / 255
    seen = letterbox(full, 160)[0, :, 20:140].permute(1, 2, 0).numpy() * 255
    assert np.abs(seen - picture).mean() < 1
    assert np.abs(seen[::-1] - picture).mean() > 5  # the other way up


@needs_simulator
def test_the_joints_of_a_place_bring_the_finger_tips_there(simulation):
    from lerobot_pi0.demo.aloha_env import HAND, joints_of_tip, tip_of_joints

    simulation.reset(0)
    for arm, joints in (("left", simulation.state[:7]), ("right", simulation.state[7:])):
        tip, pitch = tip_of_joints(arm, joints)
        np.testing.assert_allclose(joints_of_tip(arm, tip, pitch), joints[[0, 1, 2, 4]], atol=1e-9)
        hand = simulation.data.body(f"vx300s_{arm}/gripper_link")
        forwards = hand.xmat.reshape(3, 3)[:, 0]
        np.testing.assert_allclose(tip, hand.xpos + forwards * (HAND - 0.069744), atol=1e-5)


@needs_simulator
def test_the_experts_clean_labels_solve_the_scene_that_they_were_recorded_in_and_not_another():
    from lerobot_pi0.demo.aloha_env import Simulation

    recording = replace(SUITE.defaults, noise=0.0, image_size=32, after_success=5)
    (frames,) = SUITE.successes(TASK, recording, [EVALUATION_SEED])
    names = {name for name in frames[0] if name != "task"}
    assert names == SUITE.features(recording).keys()
    actions = np.stack([frame["action"] for frame in frames])
    (evaluation,) = SUITE.evaluations([TASK], recording, 250, 16)
    assert SUITE.replay(evaluation, TASK, actions, 2, 250) == [True, False]
    simulation = Simulation()
    simulation.reset(EVALUATION_SEED)
    for frame in frames:
        np.testing.assert_allclose(simulation.state, frame["observation.state"], atol=1e-3)
        simulation.step(frame["action"])


@needs_simulator
def test_attempts_are_disturbed_but_their_labels_are_not_and_equal_settings_give_equal_frames():
    recording = replace(SUITE.defaults, image_size=32, after_success=0)
    seed = recording.seed + 3  # one that the expert solves
    (frames,), (again,) = (SUITE.successes(TASK, recording, [seed]) for _ in range(2))
    for name in frames[0]:
        np.testing.assert_array_equal([frame[name] for frame in frames], [frame[name] for frame in again])
    actions = np.stack([frame["action"] for frame in frames])
    states = np.stack([frame["observation.state"] for frame in frames])
    # A label moves on by little; where a push has led to is far from where the label would have the joints.
    assert np.abs(np.diff(actions[:, :6], axis=0)).max() < 0.12
    assert np.abs(actions[:, 7:12] - states[:, 7:12]).max() > 0.1


@needs_simulator
def test_most_demonstrations_begin_with_the_hands_elsewhere_and_the_part_before_is_not_recorded(simulation):
    recording = replace(SUITE.defaults, image_size=32, after_success=0)
    episodes = SUITE.successes(TASK, recording, range(recording.seed, recording.seed + 6))
    simulation.reset(0)
    begin = np.stack([frames[0]["observation.state"] for frames in episodes])
    away = np.abs(begin - simulation.state).max(axis=1) > 0.1
    assert 2 <= away.sum() < len(episodes)
    for frames in episodes:  # and the expert goes on from there
        assert np.abs(frames[0]["action"] - frames[0]["observation.state"]).max() < 0.3


@needs_simulator
def test_the_expert_opens_a_hand_that_has_closed_on_nothing_and_solves_the_scene(simulation):
    from lerobot_pi0.demo.aloha_env import Expert

    simulation.reset(EVALUATION_SEED)
    cube = simulation.cube
    expert = Expert(simulation.state, np.random.default_rng(0), 0.0)
    motions = []
    while motions[-2:] != ["grasp", "reach"]:
        expert.step(simulation.state, cube + np.array([-0.12, 0.12, 0.0]))
        simulation.step(expert.action())
        motions.append(expert.right_motion)
        assert len(motions) < 150
    assert simulation.state[13] < 0.5
    solved, openings = False, []
    while not solved:
        expert.step(simulation.state, simulation.cube)
        solved = simulation.step(expert.action())
        openings.append(simulation.state[13])
        assert len(openings) < 150
    assert max(openings[:40]) > 0.9
