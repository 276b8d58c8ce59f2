"""Optimiser, schedule and ten training steps against openpi's optax (README.md of each golden folder)."""

import numpy as np
import pytest
import torch
from lerobot.optim import AdamWConfig
from openpi_jax import from_openpi_jax

from lerobot_pi0 import Pi0Config
from lerobot_pi0.training.schedule import CosineAfterWarmupConfig

# Cancels in the softmax: its gradient is rounding, which Adam scales up to steps.
SIGLIP_KEY_BIAS = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"


def optimizer_of(parameters, lr, weight_decay=1e-10):
    return AdamWConfig(
        lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, grad_clip_norm=1.0
    ).build(parameters)


def test_presets_are_openpis_defaults(golden):
    schedule, adamw = (
        golden("lr_schedule.json")["defaults"],
        golden("lr_schedule.json")["adamw_defaults"],
    )
    config = Pi0Config()
    optimizer, scheduler = config.get_optimizer_preset(), config.get_scheduler_preset()
    assert optimizer.lr == schedule["peak_lr"]
    assert optimizer.betas == (adamw["b1"], adamw["b2"])
    assert optimizer.eps == adamw["eps"]
    assert optimizer.weight_decay == adamw["weight_decay"]
    assert optimizer.grad_clip_norm == adamw["clip_gradient_norm"]
    assert scheduler.num_warmup_steps == schedule["warmup_steps"]
    assert scheduler.num_decay_steps == schedule["decay_steps"]
    assert scheduler.decay_factor * optimizer.lr == pytest.approx(schedule["decay_lr"])


def test_learning_rate_schedule(golden):
    stored = golden("lr_schedule.json")
    config = Pi0Config()
    optimizer = config.get_optimizer_preset().build([torch.nn.Parameter(torch.zeros(1))])
    (factor,) = config.get_scheduler_preset().build(optimizer, 30_000).lr_lambdas
    ours = [config.optimizer_lr * factor(step) for step in stored["steps"]]
    assert ours == pytest.approx(stored["lr_eager"], rel=1e-5)
    assert ours == pytest.approx(stored["lr_jit_int32"], rel=1e-5)


@pytest.mark.parametrize(
    ("setup", "weight_decay", "schedule"),
    [
        ("default_lr0.01", 1e-10, None),
        ("wd0.1_lr0.01", 0.1, None),
        ("default_with_default_schedule", 1e-10, CosineAfterWarmupConfig()),
    ],
)
def test_three_optimizer_steps(golden, setup, weight_decay, schedule):
    stored = golden("optimizer.npz")
    parameters = {name: torch.nn.Parameter(stored[f"param0_{name}"].clone()) for name in ("w", "b")}
    optimizer = optimizer_of(parameters.values(), 2.5e-5 if schedule else 0.01, weight_decay)
    scheduler = schedule and schedule.build(optimizer, 30_000)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = stored[f"grad{step}_{name}"].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert norm.item() == pytest.approx(stored[f"grad{step}_global_norm"].item(), rel=1e-6)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.step()
        if scheduler:
            scheduler.step()
        for name, parameter in parameters.items():
            expected = {kind: stored[f"{setup}/step{step}/{kind}_{name}"] for kind in ("param", "mu", "nu")}
            state = optimizer.state[parameter]
            torch.testing.assert_close(parameter.detach(), expected["param"], rtol=2e-6, atol=2e-7)
            torch.testing.assert_close(state["exp_avg"], expected["mu"], rtol=5e-6, atol=1e-9)
            torch.testing.assert_close(state["exp_avg_sq"], expected["nu"], rtol=1e-5, atol=1e-12)
            update = stored[f"{setup}/step{step}/update_{name}"]
            assert (parameter.detach() - before[name] - update).norm() < 1e-3 * update.norm() + 2e-7


@pytest.mark.usefixtures("stored_time_embedding")
@pytest.mark.parametrize(
    ("which", "run"),
    [
        ("pi0", None),
        ("pi05", "short_schedule"),
        ("pi05", "pi05_libero_from_step_0"),
        ("pi05", "pi05_libero_from_step_10000"),
        ("pi05", "pi05_aloha_pen_uncap_from_step_1000"),
    ],
    indirect=["which"],
)
def test_ten_training_steps(golden, golden_weights, model, observation, training_pair, run):
    file = golden("train10.json")
    stored = file["runs"][run] if run else file
    schedule, first_step = stored["schedule"], stored.get("first_step", 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(trained, schedule["peak_lr"])
    (factor,) = (
        CosineAfterWarmupConfig(
            num_warmup_steps=schedule["warmup_steps"],
            num_decay_steps=schedule["decay_steps"],
            decay_factor=schedule["decay_lr"] / schedule["peak_lr"],
        )
        .build(optimizer, schedule["decay_steps"])
        .lr_lambdas
    )
    cuts = tensors_of_each_leaf(golden("params.npz"))
    kernels = [name for path in file["kernel_param_names"] for name in cuts[path]]

    for step in range(10):
        loss = model.loss(observation, *training_pair).mean()
        assert loss.item() == pytest.approx(stored["loss"][step], rel=1e-4)
        lr = optimizer.param_groups[0]["lr"] = schedule["peak_lr"] * factor(first_step + step)
        # openpi subtracts float32 numbers as large as the peak: its first steps of a warm-up are 2e-4 off.
        assert lr == pytest.approx(stored["lr"][step], rel=1e-6, abs=2**-24 * schedule["peak_lr"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        # A rounding of the weights (1e-7) moves the norm by 3e-3 after ten steps of π0.5.
        assert norm.item() == pytest.approx(stored["grad_norm"][step], rel=5e-3)
        optimizer.step()
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        size = sum(weights[name].square().sum() for name in kernels) ** 0.5
        assert size.item() == pytest.approx(stored["param_norm"][step], rel=1e-6)

    for path, final in stored["final_params_after_10"].items():
        tensors = [weights[name] for name in cuts[path]]
        changes = [weights[name] - golden_weights[name].double() for name in cuts[path]]
        if path == SIGLIP_KEY_BIAS:
            assert norm_of(changes) < 5e-3
            continue
        assert norm_of(tensors) == pytest.approx(final["l2"], rel=1e-5), path
        # Half a float32 rounding of the weights, which the smallest learning rate (5e-9) is within.
        rounding = 1e-7 + 2**-24 * final["l2"]
        assert norm_of(changes) == pytest.approx(final["change_l2"], rel=1e-3, abs=rounding), path
        total = sum(tensor.sum().item() for tensor in tensors)
        assert total == pytest.approx(final["sum"], rel=1e-4, abs=1e-3), path
    context = model.with_state(model.prefix(observation), observation.state)
    velocity = model.velocity(context, golden("f32.npz")["x_t"], training_pair[2])
    assert velocity.square().mean().item() ** 0.5 == pytest.approx(stored["final_v_t_rms"], rel=2e-4)


def tensors_of_each_leaf(leaves):
    """openpi's leaf → our names for what it is cut into, found by filling each leaf with its number."""
    numbered = {path: np.full(leaf.shape, number) for number, (path, leaf) in enumerate(leaves.items())}
    cuts = {path: [] for path in leaves}
    for name, tensor in from_openpi_jax(numbered).items():
        cuts[list(leaves)[int(tensor.flatten()[0])]].append(name)
    return cuts


def norm_of(tensors):
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5
