"""Training rows: one forward and backward pass of each side, its time and the memory of its activations.

No optimizer runs. In-tree trains as its own code has it (under bfloat16 nearly all its weights are bfloat16),
ours as LeRobot trains it (what trains is float32, what is frozen in `dtype`).
"""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from lerobot_pi0 import Pi0Policy

from . import intree, ours
from .inputs import actions, batch
from .worker import Measure, Measurement, Setup

FLOW_SAMPLES = 8


def expert_only_ours(setup: Setup) -> Measure:
    """The vision-language model frozen."""
    policy = trained(ours.build(setup, freeze="vlm"))
    return measure(policy, policy_loss(policy, setup))


def expert_only_in_tree(setup: Setup) -> Measure:
    """The vision-language model frozen."""
    policy = intree.build(setup, train_expert_only=True)
    return measure(policy, policy_loss(policy, setup, intree.policy_prompt_length(setup)))


def flow_samples_ours(setup: Setup) -> Measure:
    """Several (noise, time) pairs over one pass of the frozen vision-language model."""
    policy = trained(ours.build(setup, freeze="vlm", num_flow_samples=FLOW_SAMPLES))
    return measure(policy, policy_loss(policy, setup), FLOW_SAMPLES)


def checkpointed_ours(setup: Setup) -> Measure:
    """Everything trains, with gradient checkpointing."""
    policy = trained(ours.build(setup, gradient_checkpointing=True))
    return measure(policy, policy_loss(policy, setup))


def checkpointed_in_tree(setup: Setup) -> Measure:
    """Everything trains, with gradient checkpointing."""
    policy = intree.build(setup, gradient_checkpointing=True)
    return measure(policy, policy_loss(policy, setup, intree.policy_prompt_length(setup)))


def trained(policy: Pi0Policy) -> Pi0Policy:
    """The policy as `from_pretrained` gives it to LeRobot's training: what trains is held in float32."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def policy_loss(policy: Any, setup: Setup, max_length: int | None = None) -> Callable[[], Tensor]:
    """What LeRobot calls in a training step; noise and time are the policy's own draws."""
    given = batch(setup, max_length) | {ACTION: actions(setup)}
    return lambda: policy.forward(given)[0]


def measure(policy: nn.Module, loss: Callable[[], Tensor], samples: int = 1) -> Measure:
    """Measures forward and backward: `seconds`, `activation_bytes` (where known), `samples` per step."""
    policy.train()

    def step() -> None:
        loss().backward()

    step()  # gradients are there, and what libraries prepare at the first call
    figures = {"samples": float(samples)}
    activations = peak_growth(step)
    if activations is not None:
        figures["activation_bytes"] = float(activations)

    def once() -> Measurement:
        policy.zero_grad(set_to_none=True)  # as LeRobot's loop does after each update
        start = time.perf_counter()
        step()
        return Measurement(figures | {"seconds": time.perf_counter() - start})

    return once


def peak_growth(function: Callable[[], None]) -> int | None:
    """Bytes by which resident memory grows at most during a call; None where there is no Linux to ask.

    What stays afterwards and was there before, as gradients are in a second backward pass, is not in it.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Freed memory that the C library keeps would be taken for memory in use.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    reset.write_text("5")  # the peak, VmHWM, starts again from here
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
