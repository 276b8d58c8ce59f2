"""ALOHA's joints as openpi's: values by hand, the way back, and statistics of the joints that are learned."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_policy, make_pre_post_processors
from tiny_dataset import write_dataset
from tiny_policy import CHUNK, FRONT, MODELS, tiny_config
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.aloha import adapted_actions, adapted_state, policy_columns, restored_actions
from lerobot_pi0.data.relative_actions import relative_statistics
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.errors import UserError

ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
JOINTS = [f"{side}_{joint}" for side in ("left", "right") for joint in ARM]
GRIPPERS = [6, 13]
LENGTHS = (9, 4, 12)


def config(model: str = "pi0", /, **changes: Any) -> Pi0Config:
    features = {
        FRONT: PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
        "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
    }
    return tiny_config(
        model,
        adapt_to_pi=True,
        max_state_dim=16,
        max_action_dim=16,
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
        **changes,
    )


def test_state_by_hand():
    """Closed: arcsin((0.022² + 0.01844² - 0.036²) / (2 · 0.022 · 0.01844)) = -0.62086 rad. Open: the linkage
    is stretched, π/2."""
    state = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.0])
    closed, opened = (-0.62086 - 0.5476) / 1.082, (math.pi / 2 - 0.5476) / 1.082
    wanted = [0.1, -0.2, -0.3, 0.4, 0.5, 0.6, closed, 1.1, -1.2, -1.3, 1.4, 1.5, 1.6, opened]
    torch.testing.assert_close(adapted_state(state), torch.tensor(wanted), atol=1e-4, rtol=0)


def test_grippers_of_the_state_are_those_of_openpis_formula():
    """Beyond its ends too, where the arcsine is cut; near the open end float32 is as exact as float64."""
    opening = torch.linspace(-0.4, 1.4, 181, dtype=torch.float64)
    x = opening * (0.058 - 0.01844) + 0.01844
    angle = ((0.022**2 + x**2 - 0.036**2) / (2 * 0.022 * x)).clamp(-1, 1).asin()
    wanted = (angle - 0.5476) / (1.6296 - 0.5476)
    state = torch.zeros(181, 14, dtype=torch.float64)
    state[:, GRIPPERS] = opening[:, None]
    torch.testing.assert_close(adapted_state(state)[:, 6], wanted, atol=1e-7, rtol=0)
    exact = adapted_state(state.float().double())
    torch.testing.assert_close(adapted_state(state.float()).double(), exact, atol=1e-5, rtol=0)


def test_actions_by_hand_and_back():
    actions = torch.zeros(2, 3, 14)
    actions[..., 1], actions[..., 6], actions[..., 13] = 0.5, -1.1689, 0.9434
    restored = restored_actions(actions)
    assert restored[0, 0, 1] == -0.5
    torch.testing.assert_close(restored[..., 6], torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(restored[..., 13], torch.ones(2, 3), atol=1e-6, rtol=0)
    given = torch.randn(2, 3, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restored_actions(adapted_actions(given)), given)
    torch.testing.assert_close(adapted_actions(restored_actions(given)), given)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> LeRobotDatasetMetadata:
    root, generator, episodes = tmp_path_factory.mktemp("data") / "aloha", np.random.default_rng(0), []
    for length in LENGTHS:
        states = generator.standard_normal(14) + 0.1 * generator.standard_normal((length, 14)).cumsum(0)
        actions = states + 0.05 * generator.standard_normal((length, 14))
        for vectors in (states, actions):
            vectors[:, GRIPPERS] = generator.random((length, 2))
        episodes.append(("transfer the cube", states, actions))
    write_dataset(root, episodes, JOINTS, JOINTS, repo_id="local/aloha")
    return LeRobotDatasetMetadata("local/aloha", root)


def columns(metadata: LeRobotDatasetMetadata) -> tuple[Tensor, Tensor]:
    """State and actions (frames, 14) as they are recorded."""
    rows = LeRobotDataset("local/aloha", root=metadata.root).hf_dataset.with_format("numpy")
    states, actions = (torch.from_numpy(np.stack([*rows[key]])) for key in ("observation.state", "action"))
    return states, actions


@pytest.mark.parametrize("model", MODELS)
def test_a_run_learns_openpis_joints_and_acts_in_alohas(model, metadata, tmp_path):
    """Statistics of state and of relative actions are those behind the step; and so is what passes through
    the pipelines, which a checkpoint keeps."""
    metadata = LeRobotDatasetMetadata("local/aloha", metadata.root)  # afresh: the run changes it
    policy: Any = make_policy(config(model, relative_actions=True), ds_meta=metadata)
    states, actions = columns(metadata)
    learned, aims = adapted_state(states.double()), adapted_actions(actions.double())
    assert metadata.stats is not None
    found = metadata.stats["observation.state"]
    np.testing.assert_allclose(found["mean"], learned.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["std"], learned.std(0, correction=0) + 1e-6, atol=1e-5)
    joints = [i for i in range(14) if i not in GRIPPERS]
    borders = np.cumsum((0, *LENGTHS[:-1]))
    relative = relative_statistics(aims.T[joints].numpy(), learned.T[joints].numpy(), borders, CHUNK)
    mean = np.asarray(metadata.stats["action"]["mean"])[joints]
    np.testing.assert_allclose(mean, relative["mean"], atol=1e-5)
    limits = policy.config.action_limits
    np.testing.assert_allclose([limits.low, limits.high], [aims.amin(0), aims.amax(0)], atol=1e-6)

    policy.save_pretrained(tmp_path)
    stats: Any = metadata.stats
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=stats):
        pipeline.save_pretrained(tmp_path)
    policy = type(policy).from_pretrained(tmp_path)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    rows = [0, 13]  # where the first and the last episode begin
    chunks = torch.stack([actions[row : row + CHUNK] for row in rows])
    batch = preprocess(
        {
            FRONT: torch.zeros(2, 3, 48, 64),
            "observation.state": states[rows],
            "action": chunks,
            "task": ["transfer the cube"] * 2,
        }
    )
    mean, std = (torch.as_tensor(found[name]) for name in ("mean", "std"))
    if model == "pi0":
        torch.testing.assert_close(batch["observation.state"], ((learned[rows] - mean) / std).float())
    # What is learned, were it predicted, is what was demonstrated.
    space = policy.action_space
    reference = space.reference(batch["observation.state"])
    predicted = space.from_network(space.to_network(batch, reference), reference)
    torch.testing.assert_close(postprocess(predicted), chunks, atol=1e-5, rtol=0)


def test_statistics_need_frames_or_a_checkpoint():
    stats: Any = {key: {"mean": np.zeros(14), "std": np.ones(14)} for key in ("observation.state", "action")}
    with pytest.raises(UserError, match=r"needs the statistics of openpi's joints.*=checkpoint"):
        prepare_statistics(config(), stats)


def test_other_robots_are_refused():
    with pytest.raises(UserError, match=r"--policy.adapt_to_pi=true is for ALOHA's 14 joints.*\(5,\)"):
        tiny_config(adapt_to_pi=True).validate_features()


def test_without_the_setting_columns_pass_as_they_are():
    given = {"action": np.ones((2, 14), np.float32)}
    assert policy_columns(tiny_config(), given)["action"] is given["action"]
