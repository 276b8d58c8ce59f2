"""Golden actions: written with a policy, compared where something else runs it, else silent."""

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_policy import batch, statistics, tiny_config, tiny_policy
from torch import Tensor

from lerobot_pi0 import modeling_pi0
from lerobot_pi0.checkpoints import golden_actions as module
from lerobot_pi0.checkpoints.golden_actions import (
    GOLDEN_ACTIONS_FILE,
    check_golden_actions,
    fixed_input,
    golden_actions,
)
from lerobot_pi0.modeling_pi0 import Pi0Policy


@pytest.fixture(autouse=True)
def no_memory_of_others(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "HF_LEROBOT_HOME", tmp_path / "home")


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_policy().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def actions_of(policy: Pi0Policy) -> Tensor:
    return golden_actions(policy.config, policy.predict_with_network, 10)


def check(policy: Pi0Policy, folder: Path) -> float | None:
    return check_golden_actions(folder, policy.config, policy.predict_with_network, policy.device)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def written_with(folder: Path, actions: Any = None, **environment: str) -> None:
    """Change what the file of golden actions says."""
    file = folder / GOLDEN_ACTIONS_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | environment
    found = load_file(file)["actions"]
    save_file({"actions": found if actions is None else actions(found)}, file, metadata=metadata)


def test_a_saved_policy_carries_small_golden_actions(saved):
    file = saved / GOLDEN_ACTIONS_FILE
    assert file.stat().st_size < 4096
    assert_same(load_file(file)["actions"], actions_of(tiny_policy()))


def test_the_input_is_the_same_for_ever():
    """Bytes that are written here: if a release of anything draws others, all golden actions are void."""
    given, noise_ = fixed_input(tiny_policy().config)
    digest = hashlib.sha256()
    for name in sorted(given):
        digest.update(given[name].numpy().tobytes())
    digest.update(noise_.numpy().tobytes())
    assert digest.hexdigest()[:16] == "1447923adc2e734f"
    assert noise_.std().item() == pytest.approx(1, abs=0.2)


def test_nothing_is_computed_where_nothing_changed(saved, monkeypatch):
    computed, compute = [], module.golden_actions
    monkeypatch.setattr(module, "golden_actions", lambda *given: computed.append(given) or compute(*given))
    Pi0Policy.from_pretrained(saved)
    assert computed == []
    written_with(saved, torch="2.7.0")
    Pi0Policy.from_pretrained(saved)
    assert len(computed) == 1


def test_the_same_actions_in_another_environment_are_found_once(saved, caplog):
    written_with(saved, torch="2.7.0")
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        policy = Pi0Policy.from_pretrained(saved)
    assert f"torch 2.7.0 → {version('torch')}" in caplog.text
    assert "golden actions: the same" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert check(policy, saved) is None


def test_other_actions_are_told_with_versions_and_size_each_time(saved, caplog):
    written_with(saved, lambda actions: actions + 0.5, lerobot="0.6.0")
    for _ in range(2):
        caplog.clear()
        Pi0Policy.from_pretrained(saved)
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        text = record.getMessage()
        assert "THIS POLICY ACTS DIFFERENTLY" in text
        assert "lerobot 0.6.0 → " in text
        assert "at most 0.5 in one" in text


def test_a_change_of_the_code_is_found(saved, caplog, monkeypatch):
    """Here: images that come in black."""
    written_with(saved, lerobot_policy_pi0="0.0.1")
    monkeypatch.setattr(modeling_pi0, "letterbox", lambda image, size: image[..., :size, :size] * 0)
    Pi0Policy.from_pretrained(saved)
    assert "THIS POLICY ACTS DIFFERENTLY" in caplog.text


def test_steps_and_solver_are_the_recorded_ones(saved, tmp_path, caplog):
    written_with(saved, torch="2.7.0")
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        policy = Pi0Policy.from_pretrained(saved, config=tiny_config(num_inference_steps=3, solver="ab2"))
    assert "golden actions: the same" in caplog.text
    policy.save_pretrained(tmp_path / "ab2")
    written_with(tmp_path / "ab2", torch="2.7.0")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        Pi0Policy.from_pretrained(tmp_path / "ab2", config=tiny_config())
    assert "golden actions: the same" in caplog.text
    by_euler = load_file(saved / GOLDEN_ACTIONS_FILE)["actions"]
    assert not torch.equal(load_file(tmp_path / "ab2" / GOLDEN_ACTIONS_FILE)["actions"], by_euler)


def no_metadata(file: Path) -> None:
    save_file(load_file(file), file)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_bytes(b"{"), id="not safetensors"),
        pytest.param(no_metadata, id="no metadata"),
        pytest.param(lambda file: written_with(file.parent, inference_steps="0"), id="no steps"),
        pytest.param(lambda file: written_with(file.parent, inference_steps="9" * 9), id="hours of steps"),
        pytest.param(lambda file: written_with(file.parent, solver="rk45"), id="unknown solver"),
        pytest.param(lambda file: written_with(file.parent, lambda x: x.bfloat16()), id="other dtype"),
    ],
)
def test_damaged_golden_actions_are_logged_and_no_obstacle(saved, caplog, damage):
    damage(saved / GOLDEN_ACTIONS_FILE)
    Pi0Policy.from_pretrained(saved)
    assert f"{GOLDEN_ACTIONS_FILE} is damaged" in caplog.text


def test_golden_actions_of_an_unknown_dtype_are_compared_with_the_wider_tolerance(saved, caplog):
    written_with(saved, dtype="float7")
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        Pi0Policy.from_pretrained(saved)
    assert "golden actions: the same" in caplog.text


def test_where_nothing_can_be_written_the_policy_loads_all_the_same(saved, tmp_path, monkeypatch, caplog):
    written_with(saved, torch="2.7.0")
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "HF_LEROBOT_HOME", tmp_path / "file")
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        Pi0Policy.from_pretrained(saved)
    assert "golden actions: the same" in caplog.text


def test_a_checkpoint_without_one_loads_and_a_line_says_that_nothing_was_checked(saved, caplog):
    (saved / GOLDEN_ACTIONS_FILE).unlink()
    with caplog.at_level(logging.INFO):
        Pi0Policy.from_pretrained(saved)
    (record,) = [record for record in caplog.records if "has no golden actions" in record.getMessage()]
    assert record.levelno == logging.INFO


def test_saving_in_training_changes_nothing_of_it(tmp_path):
    """The golden actions are of the EMA, which is what is saved; training goes on with the weights."""
    policy = Pi0Policy(tiny_config(ema_decay=0.9, optimizer_lr=1e-2), statistics())
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy.train()
    for step in range(3):
        policy.forward(batch(seed=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.update()
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    random = torch.get_rng_state()
    policy.save_pretrained(tmp_path / "saved")
    assert policy.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    loaded = Pi0Policy.from_pretrained(tmp_path / "saved")
    found = actions_of(loaded)
    wanted = load_file(tmp_path / "saved" / GOLDEN_ACTIONS_FILE)["actions"]
    assert_same(found, wanted)
    assert (actions_of(policy) - wanted).abs().max() > 1e-3  # the weights are not the EMA


def test_golden_actions_are_what_the_policy_predicts(saved):
    policy = Pi0Policy.from_pretrained(saved)
    given, drawn = fixed_input(policy.config)
    found = policy.predict_action_chunk(given, noise=drawn)[0]
    torch.testing.assert_close(actions_of(policy), found, rtol=1e-4, atol=1e-4)


def test_actions_that_are_not_finite_are_not_written(tmp_path, caplog):
    policy = tiny_policy()
    policy.model.action_out_proj.bias.data.fill_(3e38)  # finite, and more after the first Euler steps
    policy.save_pretrained(tmp_path)
    assert not (tmp_path / GOLDEN_ACTIONS_FILE).exists()
    assert (tmp_path / "model.safetensors").exists()
    assert "ARE NaN OR INFINITE" in caplog.text


@pytest.mark.parametrize("allowed", [True, False])
def test_golden_actions_are_computed_without_tf32_and_the_setting_is_as_before_after_it(allowed):
    backends: Any = torch.backends
    matmul, conv = backends.cuda.matmul, backends.cudnn.conv
    was_allowed = matmul.allow_tf32
    matmul.allow_tf32 = allowed  # as lerobot-train sets it
    policy, seen = tiny_policy(), []
    before = matmul.fp32_precision, conv.fp32_precision
    assert (before[0] == "tf32") == allowed

    def predict(*given: Any) -> Tensor:
        seen.append((matmul.fp32_precision, conv.fp32_precision))
        return policy.predict_with_network(*given)

    try:
        golden_actions(policy.config, predict, 1)
        assert seen == [("ieee", "ieee")]
        assert (matmul.fp32_precision, conv.fp32_precision) == before
        assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = was_allowed
