"""A run that was interrupted ends as if it had not been: through LeRobot's own commands.

All of it within the first epoch: from the second on LeRobot 0.6.1 resumes with another order of the data,
because accelerate sets its sampler's epoch back to 0 (`DataLoaderShard.__iter__`).
"""

import shutil
from pathlib import Path

import pytest
from forked import Program, commands
from lerobot_commands import dataset, run, train_command
from safetensors.torch import load_file
from tiny_policy import SIZES

pytestmark = pytest.mark.slow

__all__ = ["dataset"]  # a fixture


def train(dataset, folder: Path, name: str, *arguments: str) -> list[str]:
    return train_command(dataset, folder / name, "--steps=8", "--save_freq=4", *arguments)


SMALL = [*SIZES, "--policy.tokenizer=small", "--policy.dtype=float32"]
NEW = ["--policy.type=lerobot_pi0", *SMALL]


def resume(folder: Path, name: str, step: str = "last") -> list[str]:
    config = folder / name / "checkpoints" / step / "pretrained_model" / "train_config.json"
    return ["lerobot-train", f"--config_path={config}", "--resume=true", f"--output_dir={folder / name}"]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> Path:
    """Uninterrupted runs, full (of both models) and with adapters, and copies that stopped at step 4."""
    folder = tmp_path_factory.mktemp("resume")
    fast = ["--policy.optimizer_lr=1e-2", "--policy.scheduler_warmup_steps=1"]
    first = [
        train(dataset, folder, "full", *NEW, *fast),
        train(
            dataset,
            folder,
            "adapters",
            f"--policy.path={folder}/full/checkpoints/000004/pretrained_model",
            "--peft.method_type=LORA",
            *fast,
        ),
        train(dataset, folder, "pi05", "--policy.type=lerobot_pi05", *SMALL, *fast),
    ]
    run(folder, first).succeed()
    for name in ("full", "adapters", "pi05"):
        shutil.copytree(folder / name, folder / f"{name}_resumed", symlinks=True)
        checkpoints = folder / f"{name}_resumed" / "checkpoints"
        shutil.rmtree(checkpoints / "000008")
        (checkpoints / "last").unlink()
        (checkpoints / "last").symlink_to("000004")
    run(folder, [resume(folder, f"{name}_resumed") for name in ("full", "adapters", "pi05")]).succeed()
    return folder


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("full", "model.safetensors"),
        ("adapters", "adapter_model.safetensors"),
        ("pi05", "model.safetensors"),
    ],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(runs, name, weights):
    for file in (f"pretrained_model/{weights}", "training_state/optimizer_state.safetensors"):
        one, other = (
            load_file(runs / run / "checkpoints" / "000008" / file) for run in (name, f"{name}_resumed")
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert tensor.equal(other[key]), key
        before = load_file(runs / name / "checkpoints" / "000004" / file)
        assert not all(tensor.equal(before[key]) for key, tensor in one.items())


def test_saved_weights_are_the_average_and_the_optimizer_has_its_own(runs):
    for name, file in (("full", "model.safetensors"), ("adapters", "adapter_model.safetensors")):
        last = runs / name / "checkpoints" / "000008"
        saved = list(load_file(last / "pretrained_model" / file).values())
        state = load_file(last / "training_state" / "optimizer_state.safetensors")
        own = [tensor for key, tensor in state.items() if key.endswith("/weights")]
        assert own
        for tensor in own:
            same_shape = [average for average in saved if average.shape == tensor.shape]
            assert same_shape
            assert not any(average.equal(tensor) for average in same_shape)


def test_a_killed_run_loses_nothing_but_the_steps_since_its_last_checkpoint(dataset, tmp_path):
    command = train(dataset, tmp_path, "killed", *NEW, "--steps=100000", "--save_freq=1")
    checkpoints = tmp_path / "killed" / "checkpoints"
    with Program(tmp_path / "killed.txt", commands, [command]) as program:
        program.wait_until((checkpoints / "000003").is_dir)
    step = int((checkpoints / "last").resolve().name)
    # Whatever the kill cut off, the checkpoint that `last` names is whole, and no half-written file of ours
    # has the name of a whole one.
    for folder in checkpoints.glob("0*/pretrained_model"):
        for file in folder.glob("*.safetensors"):
            load_file(file)
    run(tmp_path, [[*resume(tmp_path, "killed"), f"--steps={step + 2}"]]).succeed()
    assert int((checkpoints / "last").resolve().name) == step + 2


def test_a_folder_without_training_state_is_not_resumed(runs, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "full", symlinks=True)
    shutil.rmtree(tmp_path / "full" / "checkpoints" / "000008" / "training_state")
    done = run(tmp_path, [resume(tmp_path, "full", "000008")])
    assert done.returncode != 0
    assert "training_state" in done.output.splitlines()[-1]
