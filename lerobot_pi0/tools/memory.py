"""Memory estimate of a training run, and its operations, counted from the model's own operations.

A step runs forward and backward on torch's meta device, and each tensor that is allocated or freed is
counted. Nothing is tabulated: another size, number of cameras or adapter counts
by itself. What a step needs is linear in the batch at each moment, so two batch sizes give all others.

Two things a meta device does not know: which attention the real one runs, which `attention_of` states,
and what libraries allocate outside of torch, for which `plan` adds an allowance.
"""

import dataclasses
import gc
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.configs.default import PeftConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy

Device = Literal["gpu", "cpu"]

FLOAT32 = 4
MOMENTS = 2 * FLOAT32  # AdamW's, per trained parameter


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes and operations of a training run, without what libraries and the allocator add.

    `growth` is (moments, 2): bytes that a step holds beyond what is held between steps, at each moment of it,
    as a fixed part (gradients, mostly) and a part per sample (activations).
    """

    trained: int  # parameters
    weights: int  # bytes: float32 what trains, the rest in the policy's dtype
    ema: int  # bytes of the EMA of the weights
    adapter: bool
    growth: np.ndarray
    flops: int  # per sample, forward and backward

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return FLOAT32 * self.trained

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two moments."""
        return MOMENTS * self.trained

    @property
    def held(self) -> int:
        """Bytes held between steps."""
        return self.weights + self.ema + self.optimizer

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk: the policy, and what resuming needs."""
        saved = FLOAT32 * self.trained if self.adapter else self.weights
        return saved + self.optimizer + self.ema

    def step(self, batch_size: int) -> int:
        """Bytes that a step adds at its peak."""
        return int((self.growth @ (1, batch_size)).max())

    def peak(self, batch_size: int) -> int:
        """Bytes at the peak of a step."""
        return self.held + self.step(batch_size)


def estimate_memory(
    config: Pi0Config, peft: PeftConfig | None = None, device: Device = "gpu"
) -> MemoryEstimate:
    """The memory of LeRobot's training with this policy (validated features), or with adapters on it.

    Prompts are as long as they may be. On a CPU weights are taken to be mapped from a bfloat16 file, so that
    those that no operation reads, rows of the vocabulary above all, are not in memory.
    Raises ImportError when there is no PEFT to make adapters with.
    """
    policy = on_meta_device(config, peft)
    policy.get_optim_params()
    policy.train()
    parameters = list(policy.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # In a batch of one some copies are views, so the line goes through two and three.
    two, three = (_run_step(policy, batch_size, device) for batch_size in (2, 3))
    if len(two.line) != len(three.line):
        raise RuntimeError("the operations of a step depend on the batch size: this cannot be extrapolated")
    line = np.array(two.line), np.array(three.line)
    slope = line[1] - line[0]
    in_memory = (p for p in parameters if device == "gpu" or p.requires_grad or _key(p) in two.read)
    return MemoryEstimate(
        trained=trained,
        weights=sum(_nbytes(p) for p in in_memory),
        ema=FLOAT32 * trained if config.ema_decay else 0,
        adapter=peft is not None,
        growth=np.stack((line[0] - 2 * slope, slope), 1),
        flops=two.flops // 2,
    )


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated while it is active, except the storages of `known` ones.

    `line` is the number of live bytes after each allocation; `read` the known storages that an operation
    other than a lookup reads; `flops` the operations of matrix products and attention.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live, self.flops = 0, 0
        self.line: list[int] = []
        self.read: set[int] = set()
        self._known = {_key(tensor) for tensor in known}
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.embedding.default:
            self.read.update(key for tensor in _tensors(args) if (key := _key(tensor)) in self._known)
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            key = _key(tensor)
            if key in self._alive or key in self._known:
                continue
            storage = tensor.untyped_storage()
            self._alive.add(key)
            self.live += storage.nbytes()
            self.line.append(self.live)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.live -= num_bytes


@contextmanager
def attention_of(device: Device) -> Iterator[None]:
    """Attention as a device runs it: what it keeps for its backward pass differs by the square of the tokens.

    A GPU keeps the output and a number per row (memory-efficient kernel, the one that takes a mask; flash
    attention keeps the same). A CPU does so in float32, and in bfloat16 writes out logits and probabilities
    (see `layers.attend`). Replaced by name: a mode would be off where layers are recomputed in the backward.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
        if device == "gpu":
            bias = None if bias is None else bias.expand(*q.shape[:-1], k.shape[-2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
        if q.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)[0]
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    torchs = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention  # pyrefly: ignore[bad-assignment]  # has what `attend` gives
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torchs


def on_meta_device(config: Pi0Config, peft: PeftConfig | None = None) -> Pi0Policy:
    """The policy as LeRobot's training makes it, on the meta device, with adapters if there are any."""
    with torch.device("meta"):
        policy = policy_class(config)(config)
        if peft is not None:
            # As `wrap_with_peft`, which wants to know the checkpoint that adapters are over.
            adapters = policy.adapter_config(dataclasses.asdict(peft))
            policy.requires_grad_(False)
            import_module("peft").get_peft_model(policy, adapters)
    return policy


def _run_step(policy: Pi0Policy, batch_size: int, device: Device) -> AllocationTracker:
    """Forward and backward, the batch included; gradients stay, and are no part of what is held before."""
    tracker = AllocationTracker(policy.parameters())
    example = policy.config.example_observation(prompt_length=policy.config.tokenizer_max_length)
    # A collection during one of the two measured steps would distort the line fitted through them.
    gc.disable()
    try:
        with attention_of(device), tracker:
            # Which LeRobot's loop keeps during the step.
            batch = {
                key: _empty(batch_size, *x.shape[1:]).to(torch.float32 if x.dtype == torch.uint8 else x.dtype)
                for key, x in example.items()
            }
            loss_on_meta_device(policy, batch).backward()
    finally:
        gc.enable()
    for parameter in policy.parameters():
        parameter.grad = None
    return tracker


def loss_on_meta_device(policy: Pi0Policy, batch: dict[str, Tensor]) -> Tensor:
    """`Pi0Policy.forward` without what takes little and waits for values."""
    config, observation = policy.config, policy.observation(batch)
    prefix = None
    if config.freeze == "vlm":
        with torch.no_grad():
            prefix = policy.model.prefix(observation)
    size, chunk = len(observation.state), (config.chunk_size, config.max_action_dim)
    actions, noise = _empty(size, *chunk), _empty(size * config.num_flow_samples, *chunk)
    return policy.model.loss(observation, actions, noise, noise[:, 0, 0], prefix).mean()


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in what an operation takes or gives: lists of them at most."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
