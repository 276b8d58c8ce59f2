"""What trains: precision, moving average, and what a resumed run goes on from."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from safetensors.torch import load_file
from tiny_policy import batch, first, noise, statistics, tiny_config, tiny_policy

from lerobot_pi0.errors import UserError
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.training.optimizer import ResumableAdamW


class Meta:
    """As much of a dataset's metadata as the policy reads when it trains."""

    def __init__(self) -> None:
        self.stats: dict[str, Any] = statistics()


def training() -> dict[str, Any]:
    """What LeRobot gives besides the config when it trains."""
    return {"dataset_meta": Meta(), "dataset_stats": statistics()}


def build(policy: Pi0Policy) -> torch.optim.Optimizer:
    policy.config.optimizer_lr = 1e-2
    return policy.config.get_optimizer_preset().build(policy.get_optim_params())


def step(policy: Pi0Policy, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """As LeRobot's training loop makes it."""
    policy.train()
    loss, _ = policy(batch(seed=seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    policy.update()
    return loss.item()


def raw(policy: Pi0Policy) -> dict[str, torch.Tensor]:
    policy.train()
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def test_average_follows_the_weights_as_in_openpi():
    policy = tiny_policy(ema_decay=0.9, freeze="vlm")
    optimizer = build(policy)
    expected = raw(policy)
    for seed in range(3):
        step(policy, optimizer, seed)
        for name, weights in raw(policy).items():
            expected[name] = 0.9 * expected[name] + 0.1 * weights
    saved = policy.state_dict()
    for name, average in expected.items():
        torch.testing.assert_close(saved[name], average, rtol=0, atol=1e-6)
    assert not torch.equal(saved["model.action_out_proj.weight"], raw(policy)["model.action_out_proj.weight"])


def test_evaluation_and_saving_see_the_average_and_training_the_weights():
    policy = tiny_policy(ema_decay=0.5)
    optimizer = build(policy)
    step(policy, optimizer)
    weights, average = raw(policy), copy.deepcopy(policy.state_dict())
    twin = tiny_policy(ema_decay=0.0)
    twin.load_state_dict(average)
    found = policy.eval().predict_action_chunk(batch(), noise=noise())
    torch.testing.assert_close(found, twin.predict_action_chunk(batch(), noise=noise()), rtol=0, atol=1e-6)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, average[name])
        assert torch.equal(policy.state_dict()[name], average[name])  # in eval mode as well
    for name, parameter in policy.train().named_parameters():
        assert torch.equal(parameter, weights[name])


def test_held_out_loss_is_the_averages_and_the_same_each_time():
    policy = tiny_policy(ema_decay=0.5)
    step(policy, build(policy))
    twin = tiny_policy(ema_decay=0.0)
    twin.load_state_dict(policy.state_dict())
    with torch.no_grad():
        losses = [one.eval()(batch())[0] for one in (policy, policy, twin)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], losses[2])


def test_held_out_loss_of_a_frame_does_not_depend_on_its_batch():
    policy = tiny_policy()
    given = batch()
    with torch.no_grad():
        alone = policy(first(given), reduction="none")[0]
        torch.testing.assert_close(policy(given, reduction="none")[0][:1], alone, rtol=1e-5, atol=1e-6)


def test_without_decay_nothing_is_kept_twice():
    policy = tiny_policy(ema_decay=0.0)
    optimizer = build(policy)
    step(policy, optimizer)
    assert policy.trained.ema() == {}
    assert all("weights" not in state for state in optimizer.state_dict()["state"].values())


def test_without_decay_the_whole_parameters_go_when_shards_take_their_places():
    """As FSDP puts them there: for the largest policies both would be more than a GPU has."""
    policy = tiny_policy(ema_decay=0.0)
    optimizer = build(policy)
    whole = [weakref.ref(parameter) for parameter in policy.parameters()]
    for module in policy.modules():
        for name in module._parameters:
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    optimizer.param_groups[0]["params"] = list(policy.parameters())
    gc.collect()
    assert not any(parameter() is not None for parameter in whole)


def test_a_step_draws_anew_and_the_same_step_the_same():
    def losses(policy: Pi0Policy) -> list[float]:
        return [policy.train()(batch())[0].item() for _ in range(3)]

    torch.manual_seed(0)
    first_run = losses(tiny_policy())
    torch.rand(100)  # the global generator has no part in it
    assert losses(tiny_policy()) == first_run
    assert len(set(first_run)) == 3


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_resumed_run_is_bit_equal_to_one_that_went_on(tmp_path: Path, ema_decay):
    """Through LeRobot's own functions for the optimizer's state."""
    policy = tiny_policy(ema_decay=ema_decay)
    optimizer = build(policy)
    for seed in range(2):
        step(policy, optimizer, seed)
    policy.save_pretrained(tmp_path)
    save_optimizer_state(optimizer, tmp_path)

    torch.manual_seed(0)  # the run's seed, which LeRobot sets before it loads anything
    resumed = Pi0Policy.from_pretrained(
        tmp_path, config=tiny_config(ema_decay=ema_decay), dataset_meta=Meta(), dataset_stats=statistics()
    )
    again: Any = load_optimizer_state(build(resumed), tmp_path)
    for seed in range(2, 4):
        assert step(policy, optimizer, seed) == step(resumed, again, seed)
    for name, weights in raw(policy).items():
        assert torch.equal(weights, raw(resumed)[name]), name
        assert torch.equal(policy.state_dict()[name], resumed.state_dict()[name]), name
    for path in ("one", "other"):
        (tmp_path / path).mkdir()
    save_optimizer_state(optimizer, tmp_path / "one")
    save_optimizer_state(again, tmp_path / "other")
    states = [load_file(tmp_path / path / "optimizer_state.safetensors") for path in ("one", "other")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_fine_tune_starts_from_the_average(tmp_path: Path):
    policy = tiny_policy(ema_decay=0.5)
    step(policy, build(policy))
    policy.save_pretrained(tmp_path)
    tuned = Pi0Policy.from_pretrained(
        tmp_path, config=tiny_config(), dataset_meta=Meta(), dataset_stats=statistics()
    )
    build(tuned)
    for name, weights in raw(tuned).items():
        assert torch.equal(weights, policy.state_dict()[name])


def test_a_run_with_an_average_is_not_resumed_without_one():
    """Its policy is the average: training would go on from that, with the moments of other weights."""
    policy = tiny_policy(ema_decay=0.5)
    optimizer = build(policy)
    step(policy, optimizer)
    with pytest.raises(UserError, match=r"--policy\.ema_decay .*train_config\.json"):
        build(tiny_policy(ema_decay=0.0)).load_state_dict(optimizer.state_dict())


def test_what_trains_is_float32_and_what_is_frozen_is_not(tmp_path: Path):
    policy = tiny_policy(dtype="bfloat16").to(torch.bfloat16)
    policy.save_pretrained(tmp_path)
    config = tiny_config(dtype="bfloat16", freeze="vlm")
    policy = Pi0Policy.from_pretrained(
        tmp_path, config=config, dataset_meta=Meta(), dataset_stats=statistics()
    )
    # A file in bfloat16 is not inflated before it is known what trains.
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    optimizer = build(policy)
    step(policy, optimizer)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {parameter.dtype for parameter in stepped} == {torch.float32}
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in moments} == {torch.float32}


def test_an_optimizer_over_bfloat16_weights_is_refused(tmp_path: Path):
    tiny_policy(dtype="bfloat16").to(torch.bfloat16).save_pretrained(tmp_path)
    config = tiny_config(dtype="bfloat16")
    policy = Pi0Policy.from_pretrained(
        tmp_path, config=config, dataset_meta=Meta(), dataset_stats=statistics()
    )
    with pytest.raises(ValueError, match=r"step on torch\.bfloat16 weights .*use_policy_training_preset"):
        policy.train()


def test_another_optimizer_than_the_policys_has_no_average():
    policy = tiny_policy()
    with pytest.raises(ValueError, match=r"use_policy_training_preset=true, or .*--policy\.ema_decay=0"):
        policy.update()
    tiny_policy(ema_decay=0.0).update()


def test_a_loop_that_never_updates_the_average_is_told():
    policy = tiny_policy()
    optimizer = build(policy)
    policy.train()(batch())[0].backward()
    optimizer.step()
    for saving in (policy.state_dict, policy.eval):
        with pytest.raises(ValueError, match=r"call policy\.update\(\) after each optimizer\.step\(\)"):
            saving()


def test_nothing_to_train_is_an_error():
    policy = tiny_policy()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing trains.*--policy\.freeze"):
        policy.get_optim_params()


def test_state_of_the_optimizer_holds_the_weights_that_it_steps_on():
    policy = tiny_policy(ema_decay=0.9)
    optimizer = build(policy)
    assert isinstance(optimizer, ResumableAdamW)
    step(policy, optimizer)
    state = optimizer.state_dict()
    weights = [weight for name, weight in raw(policy).items() if name in policy.trained.parameters]
    policy.eval()
    for i, weight in enumerate(weights):
        assert torch.equal(state["state"][i]["weights"], weight)
    assert state["param_groups"][0]["draws"] == 1


def test_figures_are_computed_at_their_interval_and_add_up_to_the_loss():
    policy = tiny_policy(log_joints_every=3, max_action_dim=4, augmentation=False).train()
    given = batch()
    given["action_is_pad"][1, 3:] = True
    seen = [policy(given) for _ in range(6)]
    assert [bool(figures) for _, figures in seen] == [False, False, True, True, True, True]
    figures = seen[2][1]
    assert seen[3][1] == seen[4][1] == figures != seen[5][1]  # without a value LeRobot would log zero
    joints = [figures[f"loss/{name}"] for name in ("0", "1", "2", "3")]
    parts = {name: value for name, value in figures.items() if name.startswith("loss/steps_")}
    assert list(parts) == ["loss/steps_0-1", "loss/steps_2-3", "loss/steps_4-5"]
    assert all(isinstance(value, float) for value in figures.values())
    assert figures["ema_decay"] == 0.99
    # Of 12 steps 9 are valid: each counts once.
    weighted = (4 * parts["loss/steps_0-1"] + 3 * parts["loss/steps_2-3"] + 2 * parts["loss/steps_4-5"]) / 9
    assert sum(joints) / 4 == pytest.approx(weighted, rel=1e-5)
    assert policy.eval()(given)[1] == {}


def test_augmentation_belongs_to_training():
    def loss(training: bool, **changes: Any) -> float:
        return tiny_policy(**changes).train(training)(batch())[0].item()

    assert loss(True) != loss(True, augmentation=False)
    assert loss(False) == loss(False, augmentation=False)
    assert loss(True, augmentation=False, prompt_dropout=0.99) != loss(True, augmentation=False)
    assert loss(False, prompt_dropout=0.99) == loss(False)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_the_last_step_made_nan_are_not_saved(tmp_path, decay, number):
    policy = tiny_policy(ema_decay=decay, freeze="vlm")
    optimizer = build(policy)
    step(policy, optimizer)
    policy.save_pretrained(tmp_path / "good")
    policy.train()
    policy(batch())[0].backward()
    name = "model.expert.layers.1.up_proj.weight"
    gradient = policy.get_parameter(name).grad
    assert gradient is not None
    gradient[0, 0] = number
    optimizer.step()
    policy.update()  # the loss was finite
    with pytest.raises(UserError, match=f"1 of the parameters .*{name}.*checkpoints/last"):
        policy.save_pretrained(tmp_path / "bad")
    assert list((tmp_path / "bad").iterdir()) == []
    with pytest.raises(UserError, match="NaN or infinite"):  # as FSDP gives what it has gathered
        policy.save_pretrained(tmp_path / "bad", state_dict=policy.state_dict())


def test_adapters_that_the_last_step_made_nan_are_not_saved(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "base")
    base = Pi0Policy.from_pretrained(tmp_path / "base", **training())
    wrapped: Any = base.wrap_with_peft(peft_cli_overrides={"r": 2})
    optimizer = build(base)
    step(base, optimizer)
    wrapped.save_pretrained(tmp_path / "good")
    (*_, last) = base.trained.parameters.values()
    last.data.view(-1)[-1] = float("nan")
    base.update()  # the EMA, which is what is saved
    with pytest.raises(UserError, match="1 of the parameters that train are NaN"):
        wrapped.save_pretrained(tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("*.safetensors"))


def test_a_sum_that_overflows_is_no_fault(tmp_path):
    policy = tiny_policy(ema_decay=0.0)
    build(policy)
    policy.model.token_embedding.weight.data.fill_(3e38)
    policy.trained.check_finite(policy.state_dict())


@pytest.mark.parametrize(("made", "warns"), [(3, False), (4, True), (5, True)])
def test_resuming_a_finished_run_says_how_to_go_on(caplog, made, warns):
    def schedule() -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return tiny_config().get_scheduler_preset().build(optimizer, 4)

    run = schedule()
    for _ in range(made):
        run.optimizer.step()
        run.step()
    resumed = schedule()
    resumed.load_state_dict(run.state_dict())
    assert ("this run has made its 4 steps" in caplog.text and "--steps=8" in caplog.text) == warns
    assert resumed.last_epoch == made
    assert "num_training_steps" not in run.state_dict()  # files are as they were
