"""NaN and Inf never leave a policy or its training: statistics, limits, steps and losses are checked."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from tiny_policy import batch, statistics, tiny_config, tiny_policy

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.checkpoints import processors
from lerobot_pi0.configuration_pi0 import ActionLimits
from lerobot_pi0.data import action_space
from lerobot_pi0.data.normalization import NormalizationStatistics
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.data.training_data import make_limits
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, policy = tmp_path_factory.mktemp("checkpoint"), tiny_policy()
    policy.save_pretrained(folder)
    prepared = prepare_statistics(policy.config, statistics())
    for pipeline in make_lerobot_pi0_pre_post_processors(policy.config, prepared):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def set_statistic(name: str, value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / STATE)
        tensors[name][1] = value
        save_file(tensors, folder / STATE)

    return damage


def edit(change: Callable[[dict[str, Any]], Any], file: str = POST) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        pipeline = json.loads((folder / file).read_text())
        change(pipeline)
        (folder / file).write_text(json.dumps(pipeline))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_statistic("action.mean", float("nan")), "has nan in 'action.mean'"),
        (set_statistic("action.std", float("inf")), "has inf in 'action.std'"),
        (set_statistic("action.std", 0.0), "has 0 in 'action.std'"),
        (set_statistic("action.std", -1.0), "has -1 in 'action.std'"),
        (set_statistic("action.mean", 7.0), r"different statistics \('action.mean'\)"),
        (edit(lambda pipeline: pipeline["steps"][0].pop("state_file")), "by another"),
        (edit(lambda pipeline: pipeline["steps"].pop(2), PRE), "has 0 steps 'lerobot_pi0_tokenizer'"),
        (edit(lambda pipeline: pipeline["steps"][4]["config"].update(features={}), PRE), "not normalized"),
        (
            edit(lambda pipeline: pipeline["steps"][4]["config"].update(normalize_observation_keys=[]), PRE),
            "not normalized",
        ),
        (edit(lambda pipeline: pipeline["steps"].pop(0)), "has 0 steps 'unnormalizer_processor'"),
        (edit(lambda pipeline: pipeline["steps"][0]["config"].update(eps=0.5)), "by another"),
        (
            edit(lambda pipeline: pipeline["steps"][0]["config"]["norm_map"].update(ACTION="MIN_MAX")),
            "by another",
        ),
    ],
)
def test_a_damaged_pipeline_is_refused_with_the_policy(folder, damage, message):
    Pi0Policy.from_pretrained(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Pi0Policy.from_pretrained(folder)


def test_limits_that_are_not_finite_are_refused():
    limits = ActionLimits([-1.0] * 4, [1.0, float("nan"), 1.0, 1.0], None, [1.0] * 4, [0.0] * 4)
    with pytest.raises(UserError, match=r"action_limits .*NaN or infinite for \['1'\]"):
        tiny_policy(action_limits=limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({key: [1.0] for key in ("low", "high", "step", "gain", "offset")}, "other sizes"),
        ({"high": [1.0]}, "other sizes than the 4 actions"),
        ({"high": [1.0, -2.0, 1.0, 1.0]}, "allow no action"),
        ({"gain": [1.0, 0.0, 1.0, 1.0]}, "allow no action"),
        ({"step": [1.0, -1.0, 1.0, 1.0]}, "allow no action"),
    ],
)
def test_limits_that_no_action_keeps_to_are_refused(change, message):
    limits = ActionLimits([-1.0] * 4, [1.0] * 4, [1.0] * 4, [1.0] * 4, [0.0] * 4)
    tiny_policy(action_limits=limits)
    with pytest.raises(UserError, match=f"action_limits .*{message}"):
        tiny_policy(action_limits=replace(limits, **change))


def test_actions_that_are_not_finite_shape_no_limits(tmp_path, caplog):
    (tmp_path / "data" / "chunk-000").mkdir(parents=True)
    actions = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    actions[3, 1] = np.nan
    columns = {"action": list(actions), "episode_index": [0] * 9, "index": list(range(9))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "chunk-000" / "file-000.parquet")
    with caplog.at_level(logging.WARNING):
        limits = make_limits(
            tiny_policy().config, NormalizationStatistics(statistics()), SimpleNamespace(root=tmp_path)
        )
    assert limits is not None
    assert limits.step is not None
    assert np.isfinite([limits.low, limits.high, limits.step]).all()
    assert "1 actions of the dataset are NaN or infinite, the first one at index 3" in caplog.text


def test_training_stops_at_a_loss_that_is_not_finite():
    policy = Pi0Policy(tiny_config(), statistics())
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy.train()
    given = batch(seed=1)  # frames 10 and 11
    policy(given)[0].backward()
    optimizer.step()
    policy.update()
    given["action"][1, 2, 0] = float("nan")
    policy(given)[0].backward()
    with pytest.raises(UserError, match=r"NaN or infinite for the frames \[11\]"):
        policy.update()


def test_kinds_that_a_mapping_does_not_name_are_normalized_by_default():
    mapping = tiny_config(normalization_mapping={"STATE": NormalizationMode.QUANTILES}).normalization_mapping
    assert mapping["ACTION"] is NormalizationMode.MEAN_STD
    assert mapping["STATE"] is NormalizationMode.QUANTILES


def test_images_are_not_normalized_twice():
    config = tiny_config(normalization_mapping={"VISUAL": NormalizationMode.MEAN_STD})
    with pytest.raises(UserError, match=r"normalizes images \(VISUAL\)"):
        Pi0Policy(config, statistics())
    assert torch.is_tensor(tiny_policy().select_action(batch()))


def set_statistics(value: float) -> Callable[[Path], None]:
    """In both pipelines alike, as training would have saved it."""

    def change(folder: Path) -> None:
        for file in folder.glob("policy_p*normalizer_processor.safetensors"):
            tensors = load_file(file)
            tensors["action.std"][1] = value
            save_file(tensors, file)

    return change


@pytest.mark.parametrize("action", [1.0, 0.99 * action_space.LARGEST, -0.99 * action_space.LARGEST])
def test_the_largest_actions_times_the_largest_statistics_are_finite(folder, action):
    set_statistics(0.99 * processors.LARGEST)(folder)
    policy = Pi0Policy.from_pretrained(folder)
    policy.model.action_out_proj.weight.data.zero_()
    policy.model.action_out_proj.bias.data.fill_(-action)  # time runs from 1 to 0
    _, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    normalized = policy.select_action(batch(), noise=torch.zeros(2, 6, 8))
    torch.testing.assert_close(normalized, torch.full((2, 4), action), rtol=1e-4, atol=1e-4)
    assert postprocess(normalized).isfinite().all()


def test_what_would_overflow_when_it_is_unnormalized_is_refused(folder):
    policy = Pi0Policy.from_pretrained(folder)
    policy.model.action_out_proj.bias.data.fill_(1.1 * action_space.LARGEST)
    with pytest.raises(UserError, match=r"NaN or Inf for .*beyond 1e\+08"):
        policy.select_action(batch())
    set_statistics(1.1 * processors.LARGEST)(folder)
    with pytest.raises(CheckpointError, match=r"in 'action\.std', which nothing"):
        Pi0Policy.from_pretrained(folder)
    stats = statistics()
    stats["action"]["std"][1] = 1.1 * processors.LARGEST
    with pytest.raises(UserError, match="the dataset has a NaN or infinite std"):
        Pi0Policy(tiny_config(), stats)
