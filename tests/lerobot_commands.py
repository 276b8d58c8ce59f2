"""LeRobot's own commands on tiny data: how tests run them, and what they start from."""

import json
from pathlib import Path

import pytest
import torch
from forked import Program, commands
from lerobot.datasets import LeRobotDataset
from safetensors.torch import save_file
from tiny_dataset import noise_episodes, write_dataset
from tiny_policy import tiny_network

from lerobot_pi0.checkpoints.layouts import to_openpi
from lerobot_pi0.demo.metaworld_tasks import ACTION_NAMES, STATE_NAMES

TASKS = ("open the faucet", "close the faucet")


ENVIRONMENT = [
    "--env.type=metaworld_fast",
    "--env.task=faucet-open-v3",
    "--env.episode_length=8",
    "--env.image_size=64",
    "--eval.n_episodes=2",
    "--eval.batch_size=1",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LeRobotDataset:
    """Two episodes with two instructions, as the demo's environment sees the world."""
    return write_dataset(
        tmp_path_factory.mktemp("data") / "faucets",
        noise_episodes(TASKS, 10, len(STATE_NAMES), len(ACTION_NAMES)),
        STATE_NAMES,
        ACTION_NAMES,
        repo_id="local/faucets",
        cameras=["observation.image"],
        size=(64, 64),
    )


@pytest.fixture(scope="module")
def in_tree_folder(tmp_path_factory) -> Path:
    """As LeRobot 0.6.1 saves its own π0: prefixed names, text heads, processors with a gated tokenizer."""
    folder = tmp_path_factory.mktemp("in_tree")
    tensors = {f"model.{name}": tensor for name, tensor in to_openpi(tiny_network().state_dict()).items()}
    head = tensors["model.paligemma_with_expert.paligemma.lm_head.weight"]
    tensors["model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = head.clone()
    tensors["model.paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(1024, 32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "n_obs_steps": 1}))
    state_file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "pi0_new_line_processor", "config": {}},
        {
            "registry_name": "tokenizer_processor",
            "config": {"tokenizer_name": "google/paligemma-3b-pt-224", "max_length": 48, "task_key": "task"},
        },
        {"registry_name": "device_processor", "config": {"device": "cpu"}},
        {"registry_name": "normalizer_processor", "config": {"eps": 1e-8}, "state_file": state_file},
    ]
    for name, pipeline in (("policy_preprocessor", steps), ("policy_postprocessor", steps[4:5])):
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": pipeline}))
    stats = {
        "action.mean": torch.full((len(ACTION_NAMES),), 5.0),
        "action.std": torch.full((len(ACTION_NAMES),), 0.5),
        "observation.state.mean": torch.zeros(len(STATE_NAMES)),
        "observation.state.std": torch.ones(len(STATE_NAMES)),
    }
    save_file(stats, folder / state_file)
    return folder


def train_command(dataset: LeRobotDataset, output_dir: Path, *arguments: str) -> list[str]:
    """Training on a CPU, two frames at a time, in this process alone, every step logged."""
    return [
        "lerobot-train",
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        f"--output_dir={output_dir}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--batch_size=2",
        "--num_workers=0",
        "--log_freq=1",
        "--env_eval_freq=0",
        *arguments,
    ]


def run(folder: Path, lines: list[list[str]]) -> Program:
    """Run commands of LeRobot in a folder, which is not the repository; what they print is in its log.txt."""
    with Program(folder / "log.txt", commands, lines) as program:
        return program.wait()


def checkpoint(ran: Path, run: str, step: str = "last") -> Path:
    return ran / run / "checkpoints" / step / "pretrained_model"
