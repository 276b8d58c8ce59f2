"""LeRobot's own commands, with the plugin found because it is installed, and the hub switched off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot_commands import ENVIRONMENT, TASKS, checkpoint, dataset, in_tree_folder, run, train_command
from safetensors.torch import load_file
from tiny_policy import SIZES

from lerobot_pi0.checkpoints.layouts import from_published
from lerobot_pi0.demo.metaworld_tasks import ACTION_NAMES, STATE_NAMES
from lerobot_pi0.modeling_pi0 import Pi0Policy

__all__ = ["dataset", "in_tree_folder"]  # fixtures

pytestmark = pytest.mark.slow

WANDB = ["--wandb.enable=true", "--wandb.mode=offline", "--wandb.disable_artifact=true"]


@pytest.fixture(scope="module")
def ran(dataset, in_tree_folder, tmp_path_factory) -> Path:
    """Where all commands have run: new, resumed, from ours, from in-tree (twice), evaluation."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, *arguments: str) -> list[str]:
        return train_command(dataset, folder / name, *arguments)

    from_scratch = ["--policy.type=lerobot_pi0", *SIZES, "--policy.tokenizer=small"]
    in_tree = [*from_scratch, f"--policy.pretrained_path={in_tree_folder}"]
    commands = [
        train("new", *from_scratch, "--steps=4", "--save_freq=2"),
        [
            "lerobot-train",
            f"--config_path={folder}/new/checkpoints/000002/pretrained_model/train_config.json",
            "--resume=true",
            f"--output_dir={folder}/new",
            "--steps=6",
        ],
        train("from_ours", f"--policy.path={folder}/new/checkpoints/last/pretrained_model", "--steps=1"),
        train("from_in_tree", *in_tree, "--steps=1", "--policy.freeze=vlm"),
        train("with_its_statistics", *in_tree, "--steps=1", "--policy.statistics=checkpoint"),
        train("watched", *from_scratch, "--steps=1", "--env_eval_freq=1", *ENVIRONMENT, *WANDB),
        [
            "lerobot-eval",
            f"--policy.path={folder}/from_in_tree/checkpoints/last/pretrained_model",
            "--policy.device=cpu",
            *ENVIRONMENT,
            f"--output_dir={folder}/evaluation",
        ],
    ]
    run(folder, commands).succeed()
    return folder


def processors(folder: Path) -> tuple[Any, Any]:
    return make_pre_post_processors(Pi0Policy.from_pretrained(folder).config, pretrained_path=str(folder))


def action_mean(folder: Path) -> torch.Tensor:
    _, postprocess = processors(folder)
    return postprocess(torch.zeros(1, len(ACTION_NAMES)))[0]


def dataset_mean(dataset: LeRobotDataset) -> torch.Tensor:
    stats: Any = dataset.meta.stats
    return torch.as_tensor(stats["action"]["mean"]).float()


def test_new_run_saves_a_checkpoint_that_needs_nothing_else(ran, dataset):
    folder = checkpoint(ran, "new", "000004")
    policy = Pi0Policy.from_pretrained(folder)
    assert policy.config.action_feature_names == list(ACTION_NAMES)
    assert policy.config.state_feature_names == list(STATE_NAMES)
    assert policy.config.cameras == {"base": "observation.image"}
    preprocess, postprocess = processors(folder)
    given = {"observation.image": torch.rand(3, 64, 64), "observation.state": torch.zeros(len(STATE_NAMES))}
    action = postprocess(policy.select_action(preprocess(given | {"task": TASKS[0]})))
    assert action.shape == (1, len(ACTION_NAMES))
    torch.testing.assert_close(action_mean(folder), dataset_mean(dataset))


def test_resumed_run_goes_on_from_where_it_was(ran):
    assert {path.name for path in (ran / "new" / "checkpoints").iterdir()} == {
        "000002",
        "000004",
        "000006",
        "last",
    }
    state = json.loads((checkpoint(ran, "new").parent / "training_state" / "training_step.json").read_text())
    assert state["step"] == 6
    weights = [load_file(checkpoint(ran, "new", step) / "model.safetensors") for step in ("000002", "000006")]
    name = "model.action_out_proj.weight"
    assert 0 < (weights[0][name] - weights[1][name]).abs().max() < 1e-3


def test_run_from_our_checkpoint_starts_with_its_weights_and_sizes(ran):
    weights = [
        load_file(checkpoint(ran, run) / "model.safetensors")["model.action_out_proj.weight"]
        for run in ("new", "from_ours")
    ]
    assert 0 < (weights[0] - weights[1]).abs().max() < 1e-3
    assert Pi0Policy.from_pretrained(checkpoint(ran, "from_ours")).config.vlm.width == 48


def test_run_from_an_in_tree_folder_takes_its_weights_and_our_processors(ran, dataset, in_tree_folder):
    folder = checkpoint(ran, "from_in_tree")
    source = from_published(load_file(in_tree_folder / "model.safetensors"))
    found = load_file(folder / "model.safetensors")
    frozen = "vlm.layers.0.q_proj.weight"  # in bfloat16, the config's dtype
    assert torch.equal(found[f"model.{frozen}"], source[frozen].to(torch.bfloat16))
    assert (found["model.action_out_proj.weight"] - source["action_out_proj.weight"]).abs().max() < 1e-3
    pipeline = (folder / "policy_preprocessor.json").read_text()
    assert "lerobot_pi0_tokenizer" in pipeline
    assert "google/paligemma" not in pipeline
    torch.testing.assert_close(action_mean(folder), dataset_mean(dataset))
    assert Pi0Policy.from_pretrained(folder).config.base_checkpoint == str(in_tree_folder)


def test_statistics_come_from_the_checkpoint_on_request(ran):
    torch.testing.assert_close(action_mean(checkpoint(ran, "with_its_statistics")), torch.full((4,), 5.0))


def test_evaluation_while_training_logs_a_video(ran):
    (video,) = (ran / "watched" / "wandb").glob("offline-run-*/files/media/videos/eval/*.mp4")
    assert video.stat().st_size > 1000


def test_policy_trained_from_an_in_tree_folder_is_evaluated_offline(ran):
    info = json.loads((ran / "evaluation" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2
    assert "pc_success" in info["overall"]
