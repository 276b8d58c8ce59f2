"""LeRobot's own commands on tiny data: how tests run them, and what they start from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from safetensors.torch import save_file
from tiny_policy import tiny_network

from lerobot_pi0.checkpoints.layouts import to_openpi
from lerobot_pi0.demo.metaworld import ACTION_NAMES, STATE_NAMES

# Runs commands one after the other in one process that imports LeRobot alone, as its console scripts do.
DRIVER = """
import importlib, json, sys
for command, *arguments in json.load(open(sys.argv[1])):
    print("###", command, *arguments, flush=True)
    sys.argv = [command, *arguments]
    importlib.import_module("lerobot.scripts." + command.replace("-", "_")).main()
"""


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
    root = tmp_path_factory.mktemp("data") / "faucets"
    features = {
        "observation.image": {
            "dtype": "image",
            "shape": (64, 64, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
        "action": {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": list(ACTION_NAMES)},
    }
    dataset = LeRobotDataset.create("local/faucets", fps=20, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for task in TASKS:
        for _ in range(10):
            dataset.add_frame(
                {
                    "observation.image": generator.integers(0, 256, (64, 64, 3), dtype=np.uint8),
                    "observation.state": generator.standard_normal(len(STATE_NAMES), dtype=np.float32),
                    "action": generator.standard_normal(len(ACTION_NAMES), dtype=np.float32),
                    "task": task,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return dataset


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


def run(folder: Path, commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    """Run commands of LeRobot in a folder, and leave what they print in its log.txt."""
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder / "commands.json")],
        cwd=folder,  # not the repository: the package must be found because it is installed
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_LEROBOT_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return done


def checkpoint(ran: Path, run: str, step: str = "last") -> Path:
    return ran / run / "checkpoints" / step / "pretrained_model"
