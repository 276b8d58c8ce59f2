"""The training rows of the benchmark: both sides do the same, and what is measured is what it says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from benchmarks import inputs, intree, ours, training
from benchmarks.worker import Setup
from lerobot_pi0.checkpoints.layouts import from_published

TIME = torch.tensor([0.5])
MEGABYTE = 1 << 20


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def tiny(request, tmp_path_factory) -> Setup:
    folder = tmp_path_factory.mktemp("checkpoint")
    setup = Setup("tiny", folder, folder, threads=1, model=request.param, dtype="float32")
    inputs.write_checkpoint(setup)
    return setup


def loss_of_ours(setup: Setup, **settings: Any) -> tuple[nn.Module, Tensor]:
    policy = training.trained(ours.build(setup, **settings))
    observation = policy.observation(inputs.batch(setup))
    return policy.model, policy.model.loss(observation, inputs.actions(setup), inputs.noise(setup), TIME)


def loss_in_tree(setup: Setup, policy: intree.Policy) -> Tensor:
    given = inputs.batch(setup, intree.policy_prompt_length(setup))
    return policy.model(
        *policy._preprocess_images(given),
        given[OBS_LANGUAGE_TOKENS],
        given[OBS_LANGUAGE_ATTENTION_MASK],
        *([given[OBS_STATE]] if setup.model == "pi0" else []),
        inputs.actions(setup),
        inputs.noise(setup),
        TIME,
    )


@pytest.mark.parametrize(("in_tree", "our"), [
    ({"train_expert_only": True}, {"freeze": "vlm"}),
    ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
])  # fmt: skip
def test_both_sides_have_the_same_loss_and_gradients(tiny, in_tree, our):
    theirs = intree.build(tiny, **in_tree).train()
    expected = loss_in_tree(tiny, theirs)
    model, loss = loss_of_ours(tiny, **our)
    assert abs(loss.mean().item() - expected.mean().item()) < 1e-4
    expected.mean().backward()
    loss.mean().backward()
    gradients = {name: p.grad for name, p in theirs.model.named_parameters() if p.grad is not None}
    gradients = from_published(gradients)
    whole = sum(gradient.square().sum().item() for gradient in gradients.values()) ** 0.5
    compared = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "expert.layers.0.q_proj.weight" in compared
    for name, gradient in compared.items():
        # Absolute for what cancels in the softmax (biases of SigLIP's keys): both sides are rounding.
        difference = (gradient - gradients[name]).norm().item()
        assert difference < 1e-3 * gradients[name].norm().item() + 1e-6 * whole, name
    # What has a gradient in-tree and none here has zeros there.
    assert not any(gradients[name].any() for name in gradients.keys() - compared.keys())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_tree_built_without_initialization_is_in_tree(tiny, dtype):
    setup = replace(tiny, dtype=dtype)
    quick = intree.build(setup, complete=True, train_expert_only=True).train()
    with intree.built_in_sizes(setup):
        usual = intree.CODE[setup.model].policy(intree.config(setup, train_expert_only=True)).train()
    usual.load_state_dict(quick.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(usual, kind)())
        found = dict(getattr(quick, kind)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
            assert tensor.requires_grad == expected[name].requires_grad, name
    assert torch.equal(loss_in_tree(setup, quick), loss_in_tree(setup, usual))


@pytest.mark.parametrize("task", [
    "expert_only_ours", "expert_only_in_tree", "flow_samples_ours", "checkpointed_ours",
    "checkpointed_in_tree",
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_task_measures_steps(tiny, task, dtype):
    once = getattr(training, task)(replace(tiny, dtype=dtype))
    figures = once().figures
    assert figures["seconds"] > 0
    assert figures["samples"] == (training.FLOW_SAMPLES if task == "flow_samples_ours" else 1)


def test_what_trains_is_float32_and_what_is_frozen_is_not(tiny):
    policy = training.trained(ours.build(replace(tiny, dtype="bfloat16"), freeze="vlm"))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in policy.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


class Hoarder(nn.Module):
    """Keeps an activation of 64 MB for a single number, and has another parameter, of 64 MB."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(16 * MEGABYTE))

    def loss(self) -> Tensor:
        # The gradient of what comes last is there first.
        return self.number.expand(16 * MEGABYTE).exp().sum() + self.weight.sum()


@pytest.mark.skipif(training.peak_growth(lambda: None) is None, reason="needs Linux's /proc")
def test_activation_bytes_are_of_activations_and_not_of_gradients_that_stay():
    hoarder = Hoarder()
    growth = training.measure(hoarder, hoarder.loss)().figures["activation_bytes"] / MEGABYTE
    # The activation and what the backward pass makes of it; with the weight's gradient it would be 192.
    assert 120 < growth < 150
