"""What a policy keeps of its training data is that of the episodes that it is trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from tiny_dataset import noise_episodes, write_dataset
from tiny_policy import ACTION, STATE, tiny_config

from lerobot_pi0 import Pi0Policy

JOINTS = ["pan", "lift", "roll", "gripper"]
TASKS = ("open", "close", "push")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three episodes; the actions of the second one are a hundred times as large."""
    root = tmp_path_factory.mktemp("data") / "arm"
    episodes = [
        (task, states, actions * (100 if task == "close" else 1))
        for task, states, actions in noise_episodes(TASKS, 12, STATE, ACTION)
    ]
    write_dataset(root, episodes, [*JOINTS, "current"], JOINTS, repo_id="local/arm")
    return root


def trained(root: Path, episodes: list[int] | None) -> tuple[Any, LeRobotDataset]:
    """The config of a policy that is made as lerobot-train makes it, and the dataset."""
    dataset = LeRobotDataset("local/arm", root=root, episodes=episodes)
    config = tiny_config(relative_actions=True)
    config.set_dataset_feature_metadata(dataset.meta.features)
    return Pi0Policy(config, dataset.meta.stats, dataset.meta).config, dataset


def relative_statistics(dataset: LeRobotDataset) -> dict[str, Any]:
    """Where the policy has left them for LeRobot."""
    statistics: Any = dataset.meta.stats
    return statistics["action"]


def test_episodes_that_are_left_out_shape_no_limits_instructions_and_relative_statistics(root, caplog):
    caplog.set_level("INFO")
    config, dataset = trained(root, [2, 0])
    rows = dataset.hf_dataset.with_format("numpy")
    actions = np.stack([*rows["action"]])
    np.testing.assert_allclose(config.action_limits.low, actions.min(0), rtol=1e-6)
    np.testing.assert_allclose(config.action_limits.high, actions.max(0), rtol=1e-6)
    assert max(config.action_limits.step) < 10  # not across the gap between the two, and not of the wild one
    assert config.training_data.tasks == ["open", "push"]
    assert relative_statistics(dataset)["max"][:3].max() < 20
    assert "those of the 2 episodes that are trained on" in caplog.text


def test_without_a_choice_all_episodes_count(root, caplog):
    caplog.set_level("INFO")
    config, dataset = trained(root, None)
    assert max(config.action_limits.high) > 50
    assert max(config.action_limits.step) > 50
    assert config.training_data.tasks == list(TASKS)
    assert relative_statistics(dataset)["max"][:3].max() > 50
    assert "episodes that are trained on" not in caplog.text
