"""LeRobot's own commands, with the plugin found because it is installed, and the hub switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from tiny_policy import SIZES, tiny_network

from lerobot_pi0.demo.environment import ACTION_NAMES, STATE_NAMES
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.weights import from_published, to_openpi

pytestmark = pytest.mark.slow

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
WANDB = ["--wandb.enable=true", "--wandb.mode=offline", "--wandb.disable_artifact=true"]


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
    done = run(folder, commands)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
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
