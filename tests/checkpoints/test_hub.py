"""A policy's life on the hub, and what is logged of its training: LeRobot's commands, a hub in a folder."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from forked import Program, commands
from hub_stand_in import commit, files, install
from huggingface_hub import ModelCard
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE
from tiny_dataset import noise_episodes, write_dataset
from tiny_policy import SIZES
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from lerobot_pi0.modeling_pi0 import Pi0Policy

pytestmark = pytest.mark.slow

REPOSITORY, ADAPTERS = "me/policy", "me/adapters"
NAMES = ["pan.pos", "lift.pos", "gripper.pos"]


def with_a_hub(cache: Path, lines: list[list[str]]) -> None:
    install(cache)
    commands(lines)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A run that is pushed and logged, one from the repository, one resumed from it, one on a stream."""
    folder = tmp_path_factory.mktemp("hub")
    episodes = noise_episodes(["push"] * 4, 8, len(NAMES), len(NAMES))
    dataset = write_dataset(folder / "data", episodes, NAMES, NAMES, repo_id="me/data", fps=10, size=(32, 32))

    def train(name: str, *arguments: str) -> list[str]:
        return [
            "lerobot-train",
            "--dataset.repo_id=me/data",
            f"--dataset.root={dataset.root}",
            f"--output_dir={folder / name}",
            "--policy.device=cpu",
            "--batch_size=2",
            "--num_workers=0",
            "--log_freq=1",
            "--env_eval_freq=0",
            *arguments,
        ]

    new = ["--policy.type=lerobot_pi0", *SIZES, "--policy.tokenizer=small", "--policy.log_joints_every=1"]
    cached = ["--policy.freeze=vlm", "--policy.augmentation=false"]
    # The only revision that the hub has of it: a run that asked for another would find nothing.
    commit(HF_LEROBOT_HUB_CACHE, "me/data", Path(dataset.root), repo_type="dataset", revision="monday")
    # A stream has as many shards as there are workers: LeRobot 0.6.1 reads nothing without one.
    one_worker = ["--num_workers=1", "--dataloader_multiprocessing_context=fork"]
    lines = [
        train(
            "pushed",
            *new,
            *cached,
            "--policy.push_to_hub=true",
            f"--policy.repo_id={REPOSITORY}",
            "--save_checkpoint_to_hub=true",
            "--steps=2",
            "--dataset.eval_split=0.25",
            "--eval_steps=1",
            "--wandb.enable=true",
            "--wandb.mode=offline",
            "--wandb.disable_artifact=true",
        ),
        train("from_hub", f"--policy.path={REPOSITORY}", "--policy.push_to_hub=false", "--steps=1"),
        train(
            "adapters",
            f"--policy.path={REPOSITORY}",
            "--peft.method_type=LORA",
            "--policy.push_to_hub=true",
            f"--policy.repo_id={ADAPTERS}",
            "--steps=1",
        ),
        train(
            "from_adapters",
            f"--policy.path={ADAPTERS}",
            "--peft.method_type=LORA",
            "--policy.push_to_hub=false",
            "--steps=1",
        ),
        [
            "lerobot-train",
            f"--config_path={REPOSITORY}",
            "--resume=true",
            "--steps=3",
            "--wandb.enable=false",
            "--policy.push_to_hub=false",
            "--save_checkpoint_to_hub=false",
            f"--output_dir={folder / 'resumed'}",
        ],
        train(
            "streamed",
            *new,
            "--policy.push_to_hub=false",
            "--dataset.streaming=true",
            "--steps=2",
            *one_worker,
        ),
    ]
    pinned = train("pinned", *new, "--policy.push_to_hub=false", "--dataset.revision=monday", "--steps=1")
    lines.append([argument for argument in pinned if "--dataset.root" not in argument])
    log = folder / "log.txt"
    Program(log, with_a_hub, folder / "cache", lines, WANDB_SILENT="true").succeed()
    return folder


def snapshot(ran: Path, repo_id: str = REPOSITORY) -> Path:
    repository = ran / "cache" / f"models--{repo_id.replace('/', '--')}"
    return repository / "snapshots" / (repository / "refs" / "main").read_text()


def test_pushed_policy_has_all_that_running_it_needs(ran):
    folder = snapshot(ran)
    policy = Pi0Policy.from_pretrained(folder)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    given = {
        "observation.images.front": torch.rand(3, 32, 32),
        "observation.state": torch.zeros(3),
        "task": "push",
    }
    assert postprocess(policy.select_action(preprocess(given))).shape == (1, 3)


def test_repository_has_checkpoints_only_where_they_belong(ran):
    uploaded = files(ran / "cache", REPOSITORY)
    top = {name for name in uploaded if not name.startswith("checkpoints/")}
    assert {"README.md", "config.json", "model.safetensors", "train_config.json"} <= top
    assert not any("optimizer" in name or "unfinished" in name for name in top)
    assert "checkpoints/000002/training_state/optimizer_state.safetensors" in uploaded


def test_pushed_adapters_name_their_base_and_train_on_over_it(ran):
    assert "model.safetensors" not in files(ran / "cache", ADAPTERS)
    card = ModelCard.load(snapshot(ran, ADAPTERS) / "README.md")
    assert card.data.to_dict()["base_model"] == REPOSITORY
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "pip install lerobot-policy-pi0 peft" in card.text
    assert f"at revision `{snapshot(ran).name}`" in card.text
    onwards = ran / "from_adapters" / "checkpoints" / "000001" / "pretrained_model"
    assert (onwards / "adapter_model.safetensors").is_file()


def test_model_card_says_what_to_install_and_what_it_is(ran):
    card = ModelCard.load(snapshot(ran) / "README.md")
    assert card.data.to_dict()["datasets"] == ["me/data"]
    for said in ("pip install lerobot-policy-pi0", f"--policy.path={REPOSITORY}", *NAMES, '"push"'):
        assert said in card.text


def test_run_starts_from_the_repository_and_another_resumes_it(ran):
    assert (ran / "from_hub" / "checkpoints" / "000001" / "pretrained_model" / "model.safetensors").is_file()
    state = ran / "resumed" / "checkpoints" / "000003" / "training_state" / "training_step.json"
    assert json.loads(state.read_text())["step"] == 3


def test_a_stream_trains_like_a_dataset_on_disk(ran):
    assert (ran / "streamed" / "checkpoints" / "000002" / "pretrained_model" / "model.safetensors").is_file()


def test_the_revision_of_the_dataset_is_the_one_that_was_asked_for(ran):
    folder = ran / "pinned" / "checkpoints" / "000001" / "pretrained_model"
    assert json.loads((folder / "train_config.json").read_text())["dataset"]["revision"] == "monday"


def history(ran: Path) -> dict[str, list[float]]:
    """What Weights & Biases was told, by key, from the file of an offline run."""
    (path,) = (ran / "pushed" / "wandb").glob("offline-run-*/*.wandb")
    store, told = DataStore(), {}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = cast(Any, wandb_internal_pb2).Record()
        record.ParseFromString(data)
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            told.setdefault(key, []).append(json.loads(item.value_json))
    return told


def test_offline_log_has_losses_joints_learning_rate_and_average(ran):
    told: dict[str, Any] = history(ran)
    for key in ("loss", "lr", "ema_decay", *(f"loss/{name}" for name in NAMES), "loss/steps_0-1"):
        assert len(told[f"train/{key}"]) == 2, sorted(told)
    assert len(told["eval/eval_loss"]) == 2
    joints = [told[f"train/loss/{name}"][0] for name in NAMES]
    assert all(value > 0 for value in joints)
