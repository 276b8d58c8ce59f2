"""Building blocks whose precision follows the activations: parameters may be float32 or bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)  # LeCun, as flax initializes openpi
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*s i"]) -> Float[Tensor, "*s o"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # Compiled code casts again in its backward pass by itself.
        casts = self.training and self.weight.requires_grad and self.weight.dtype != x.dtype
        if casts and not torch.compiler.is_compiling():
            y = _CastingProduct.apply(x, self.weight)
            return y if bias is None else y + bias
        return F.linear(x, self.weight.to(x.dtype), bias)


class _CastingProduct(torch.autograd.Function):
    """x·Wᵀ in the dtype of x. Backward casts W again instead of keeping a copy of every weight until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        of_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return of_x, (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 with SigLIP's epsilon; gives back the dtype it was given."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "*s w"]) -> Float[Tensor, "*s w"]:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Gemma's RMS norm: float32, epsilon 1e-6, scaled by (1 + weight); gives back the dtype it was given.
    A decoder's norm is called with a condition, and also gives the gate of the residual: this has neither."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def scale(self) -> Float[Tensor, " w"]:
        return 1 + self.weight.float()

    def forward(self, x: Float[Tensor, "*s w"], condition: None = None) -> tuple[Float[Tensor, "*s w"], None]:
        return F.rms_norm(x.float(), self.weight.shape, self.scale(), eps=1e-6).to(x.dtype), None


class Layer(nn.Module):
    """A layer that may recompute its activations in the backward pass, and be compiled, by itself."""

    gradient_checkpointing = False
    compiled = False


def recomputable[Forward: Callable[..., Any]](forward: Forward) -> Forward:
    """A `Layer`'s forward, compiled, and run again in the backward pass, if the layer says so.

    Within the layer's call, not around it: FSDP casts inputs and gathers weights when a layer is called, and
    does the former only once.
    """
    compiled = functools.cache(lambda: torch.compile(forward))

    @functools.wraps(forward)
    def checkpointed(layer: Layer, *args: object) -> Any:
        run = compiled() if layer.compiled else forward
        if layer.gradient_checkpointing and layer.training:
            return checkpoint(run, layer, *args, use_reentrant=False)
        return run(layer, *args)

    return cast(Forward, checkpointed)


# A linear backend (`sampling.linear`) may have methods that compute these together with its product.


def side_by_side(x: Float[Tensor, "*s i"], *linears: nn.Module | None) -> Float[Tensor, "*s o"]:
    """The outputs of linear layers with one input, concatenated."""
    outputs = [linear(x) for linear in linears if linear is not None]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def add(linear: Any, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
    """The output of a linear layer, times the gate if there is one, added to `residual`."""
    if gate is not None:
        return torch.addcmul(residual, gate, linear(x))
    return linear.add(x, residual) if hasattr(linear, "add") else residual + linear(x)


def gelu(linear: Any, x: Tensor) -> Tensor:
    """GELU (the tanh approximation) of the output of a linear layer."""
    return linear.gelu(x) if hasattr(linear, "gelu") else F.gelu(linear(x), approximate="tanh")


def gated(gate: Any, up: nn.Module | None, x: Tensor) -> Tensor:
    """The hidden layer of a gated MLP: gelu(gate x) · (up x)."""
    return gate.gated(up, x) if hasattr(gate, "gated") else gelu(gate, x) * side_by_side(x, up)


def ahead(module: Any, second: Tensor) -> Tensor:
    """What a module of two inputs computes of the second ahead of the first: by itself nothing."""
    return module.ahead(second) if hasattr(module, "ahead") else second


def joined(linear: Any, first: Float[Tensor, "*s w"], ahead: Tensor) -> Float[Tensor, "*s o"]:
    """The output of a linear layer over two inputs side by side, the second as `ahead` gives it."""
    if hasattr(linear, "joined"):
        return linear.joined(first, ahead)
    return linear(torch.cat((first, ahead.expand_as(first)), -1))


# Where gradients run on a GPU. cuDNN's backward pass gives NaN for queries with a mask, where the number of
# keys is 64 modulo 128 and a row's log-sum-exp is below -88.7 (pytorch#196678; torch 2.11 with cuDNN 9.19,
# which takes cuDNN first on sm90). In older versions and on other devices cuDNN does not come first.
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b k t d"],
    v: Float[Tensor, "b k t d"],
    key_mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b s hd"]:
    """Multi-query attention in which every query sees every valid key; heads come out side by side.

    Query heads that share a key head are folded into rows, by token and head: keys and values are never
    copied, and queries not for one key head. A row without any valid key gives finite, meaningless output.
    """
    (batch, _, length, dim), kv_heads = q.shape, k.shape[1]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    q = q.reshape(batch, kv_heads, -1, length, dim).transpose(2, 3).reshape(batch, kv_heads, -1, dim)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        # torch's fused kernel takes three times as long here, and its backward ten times.
        logits = (q * dim**-0.5) @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask, -2.3819763e38)
        out = logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        # Here, and not around the loss: gradient checkpointing calls it again in the backward pass.
        is_safe = not q.is_cuda or not torch.is_grad_enabled()
        with nullcontext() if is_safe else sdpa_kernel(_WITHOUT_CUDNN):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(batch, kv_heads, length, -1, dim).transpose(1, 2).reshape(batch, length, -1)
