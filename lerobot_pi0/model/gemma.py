"""Gemma: a decoder stack that fills a cache of keys and values, or attends to one (Gemma Team, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lerobot_pi0.model.layers import Layer, Linear, RMSNorm, add, attend, gated, recomputable, side_by_side

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of the language model; the defaults are Gemma 2B as in PaliGemma."""

    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257152


@dataclass(frozen=True)
class ExpertConfig:
    """Sizes of the action expert; depth and heads are the language model's, whose cache it reads."""

    width: int = 1024
    mlp_dim: int = 4096


# "_" and not "t": keys are given to a layer before its own are appended, fewer than its mask has places.
type KeysValues = tuple[Float[Tensor, "b k _ d"], Float[Tensor, "b k _ d"]]
# (keys, values) of new tokens -> all of them, in the dtype of the values.
type Append = Callable[[Tensor, Tensor], KeysValues]
type Rotation = tuple[Float[Tensor, "b 1 s d"], Float[Tensor, "b 1 s d"]]


@dataclass(frozen=True)
class Cache:
    """What later tokens attend to: keys (rotated) and values of each layer, and which of them are real."""

    layers: list[KeysValues]  # empty before the first tokens
    mask: Bool[Tensor, "b t"] | None  # None: all are

    def place(
        self, x: Float[Tensor, "b s w"], own: Bool[Tensor, "b s"] | None, head_dim: int
    ) -> tuple[Rotation, Bool[Tensor, "b t"] | None]:
        """The rotation of the next tokens, `own` of them real (None: all), and the mask of what they see."""
        batch, length = x.shape[:2]
        past = self.layers[0][0].shape[2] if self.layers else 0
        if self.mask is None and own is None:
            positions = torch.arange(past, past + length, device=x.device).expand(batch, -1)
            return rotation(positions, head_dim), None
        before = x.new_ones(batch, past, dtype=torch.bool) if self.mask is None else self.mask
        own = x.new_ones(batch, length, dtype=torch.bool) if own is None else own
        # Masked tokens do not advance positions, so a padded prompt or an absent camera moves nobody.
        positions = own.cumsum(1) - 1 + before.sum(1, keepdim=True)
        return rotation(positions, head_dim), torch.cat((before, own), 1)

    def append(self, layer: int) -> Append:
        """What takes a layer's keys and values of new tokens, and returns all of them, new ones last: a
        function of tensors alone, so that compiled code for one layer is for all."""
        return partial(_behind, *self.layers[layer]) if self.layers else _alone

    def grown(self, layers: list[KeysValues], mask: Bool[Tensor, "b t"] | None) -> Cache:
        """The cache after `append` has returned these for its layers, and `place` this mask."""
        return Cache(layers, mask)

    def repeat(self, times: int) -> Cache:
        """The cache for a batch in which every sample stands `times` times in a row."""
        if times == 1:
            return self
        layers = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.layers]
        return Cache(layers, None if self.mask is None else self.mask.repeat_interleave(times, 0))


def _alone(keys: Tensor, values: Tensor) -> KeysValues:
    return keys.to(values.dtype), values


def _behind(past_keys: Tensor, past_values: Tensor, keys: Tensor, values: Tensor) -> KeysValues:
    return torch.cat((past_keys, keys.to(values.dtype)), 2), torch.cat((past_values, values), 2)


def rotation(positions: Int[Tensor, "b s"], head_dim: int) -> Rotation:
    """Cosine and signed sine of the rotary angles, in float32: in bfloat16 they are off by up to 1 rad."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None] / 10_000.0**exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Float[Tensor, "b h s d"], by: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary positions: element i turns with element i + d/2. In float32, and so is what comes out."""
    (cos, sin), x = by, x.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class DecoderLayer(Layer):
    """Pre-norm block: multi-query attention over cache and own tokens, then a gated MLP; no biases."""

    def __init__(self, width: int, mlp_dim: int, heads: GemmaConfig, norm: Callable[[int], nn.Module]):
        super().__init__()
        num_heads, num_kv_heads, head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.attention_norm = norm(width)
        self.q_proj = Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(num_heads * head_dim, width, bias=False)
        self.mlp_norm = norm(width)
        self.gate_proj = Linear(width, mlp_dim, bias=False)
        self.up_proj = Linear(width, mlp_dim, bias=False)
        self.down_proj = Linear(mlp_dim, width, bias=False)

    @recomputable
    def forward(
        self,
        x: Float[Tensor, "b s w"],
        by: Rotation,
        append: Append,
        mask: Bool[Tensor, "b t"] | None = None,
        blocks: Sequence[int] | None = None,
        keys_values_only: bool = False,
        condition: Float[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b s w"], KeysValues]:
        """One block: the tokens' new hidden states, and the keys and values that they saw.

        `append` takes the tokens' own keys (float32) and values and returns all that they see. Tokens in
        several `blocks`, of so many each, do not see the later ones. With `keys_values_only`, `x` comes back
        as it was. The `condition` is passed to the norms.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        # Without k_proj, q_proj is a backend that computes all three.
        skipped = keys_values_only and self.k_proj is not None
        normed, gate = self.attention_norm(x, condition)
        heads = side_by_side(normed, *projections[skipped:])
        heads, kv_heads = heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), self.num_kv_heads
        turned = rotate(heads[:, :-kv_heads], by)
        keys, values = append(turned[:, -kv_heads:], heads[:, -kv_heads:])
        if keys_values_only:
            return x, (keys, values)
        queries = turned[:, :-kv_heads].to(x.dtype)
        if blocks is None:
            attended = attend(queries, keys, values, mask)
        else:
            seen, outputs = keys.shape[2] - x.shape[1], []
            for block in queries.split(blocks, 2):
                seen += block.shape[2]
                visible = None if mask is None else mask[:, :seen]
                outputs.append(attend(block, keys[:, :, :seen], values[:, :, :seen], visible))
            attended = torch.cat(outputs, 1)
        x = add(self.o_proj, attended, x, gate)
        normed, gate = self.mlp_norm(x, condition)
        return add(self.down_proj, gated(self.gate_proj, self.up_proj, normed), x, gate), (keys, values)


class Decoder(nn.Module):
    """A stack of layers in which new tokens see all valid tokens of a cache and one another."""

    def __init__(
        self, width: int, mlp_dim: int, heads: GemmaConfig, norm: Callable[[int], nn.Module] = RMSNorm
    ):
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(DecoderLayer(width, mlp_dim, heads, norm) for _ in range(heads.depth))
        self.norm = norm(width)

    def prefill(
        self, x: Float[Tensor, "b s w"], mask: Bool[Tensor, "b s"] | None = None, cache: Cache | None = None
    ) -> Cache:
        """A cache with these tokens, all real without a `mask`; the last layer gives keys and values only."""
        cache = cache or Cache([], None)
        (by, seen), filled = cache.place(x, mask, self.heads.head_dim), []
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            x, keys_values = layer(x, by, cache.append(i), seen, None, is_last)
            filled.append(keys_values)
        return cache.grown(filled, seen)

    def attend(
        self,
        x: Float[Tensor, "b s w"],
        cache: Cache,
        blocks: Sequence[int] | None = None,
        condition: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "b s w"]:
        """Normed output of tokens, all real, that see the cache and one another (or earlier blocks)."""
        by, seen = cache.place(x, None, self.heads.head_dim)
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, by, cache.append(i), seen, blocks, False, condition)
        return self.norm(x, condition)[0]
