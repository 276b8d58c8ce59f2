"""Gemma: a decoder stack that adds keys and values to a cache, or reads one (Gemma Team, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.model.layers import Layer, Linear, RMSNorm, attend, recomputable

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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"vlm.num_heads ({self.num_heads}) must be a multiple of vlm.num_kv_heads "
                f"({self.num_kv_heads}), and vlm.head_dim ({self.head_dim}) must be even"
            )


@dataclass(frozen=True)
class ExpertConfig:
    """Sizes of the action expert; depth and heads are the language model's, whose cache it reads."""

    width: int = 1024
    mlp_dim: int = 4096

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"expert.width ({self.width}) must be even: half sines, half cosines of time")


# "_" and not "t": a layer is given past keys alone, which are fewer than its mask has places.
type KeysValues = tuple[Float[Tensor, "b k _ d"], Float[Tensor, "b k _ d"]]


@dataclass(frozen=True)
class Cache:
    """What later tokens attend to: keys (rotated) and values of each layer, and which of them are real."""

    layers: list[KeysValues]
    mask: Bool[Tensor, "b t"]

    def repeat(self, times: int) -> Cache:
        """The cache for a batch in which every sample stands `times` times in a row."""
        if times == 1:
            return self
        layers = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.layers]
        return Cache(layers, self.mask.repeat_interleave(times, 0))


type Rotation = tuple[Float[Tensor, "b 1 s d"], Float[Tensor, "b 1 s d"]]


def rotation(positions: Int[Tensor, "b s"], head_dim: int) -> Rotation:
    """Cosine and signed sine of the rotary angles, in float32: in bfloat16 they are off by up to 1 rad."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None] / 10_000.0**exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Float[Tensor, "b h s d"], by: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary positions: element i turns with element i + d/2, in float32."""
    (cos, sin), turned = by, x.float()
    return torch.addcmul(turned * cos, turned.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class DecoderLayer(Layer):
    """Pre-norm block: multi-query attention over cache and own tokens, then a gated MLP; no biases."""

    def __init__(self, width: int, mlp_dim: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = RMSNorm(width)
        self.q_proj = Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(num_heads * head_dim, width, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.gate_proj = Linear(width, mlp_dim, bias=False)
        self.up_proj = Linear(width, mlp_dim, bias=False)
        self.down_proj = Linear(mlp_dim, width, bias=False)

    @recomputable
    def forward(
        self,
        x: Float[Tensor, "b s w"],
        by: Rotation,
        past: KeysValues | None,
        mask: Bool[Tensor, "b t"] | None,
        blocks: Sequence[int] | None = None,
    ) -> tuple[Float[Tensor, "b s w"], KeysValues]:
        """One block: the tokens' new hidden states, and the keys and values that they saw, past ones first.

        Tokens in several `blocks`, of so many each, do not see the later ones. Without a mask only keys and
        values are computed, and `x` comes back as it was.
        """
        h = self.attention_norm(x)
        keys, values = rotate(self._heads(self.k_proj(h)), by), self._heads(self.v_proj(h))
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        if mask is None:
            return x, (keys, values)
        queries = rotate(self._heads(self.q_proj(h)), by).split(blocks or x.shape[1], 2)
        seen, attended = keys.shape[2] - x.shape[1], []
        for block in queries:
            seen += block.shape[2]
            attended.append(attend(block, keys[:, :, :seen], values[:, :, :seen], mask[:, :seen]))
        x = x + self.o_proj(torch.cat(attended, 1))
        h = self.mlp_norm(x)
        x = x + self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        return x, (keys, values)

    def _heads(self, x: Float[Tensor, "b s hd"]) -> Float[Tensor, "b h s d"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Decoder(nn.Module):
    """A stack of layers in which new tokens see all valid tokens of a cache and one another."""

    def __init__(self, width: int, mlp_dim: int, heads: GemmaConfig):
        super().__init__()
        self.head_dim = heads.head_dim
        self.layers = nn.ModuleList(
            DecoderLayer(width, mlp_dim, heads.num_heads, heads.num_kv_heads, heads.head_dim)
            for _ in range(heads.depth)
        )
        self.norm = RMSNorm(width)

    def extend(
        self, x: Float[Tensor, "b s w"], mask: Bool[Tensor, "b s"], cache: Cache | None = None
    ) -> Cache:
        """The cache with these tokens appended. Of the last layer only keys and values are computed."""
        by, past, mask = self._place(mask, cache)
        extended = []
        for layer, seen in zip(self.layers, past, strict=True):
            is_last = layer is self.layers[-1]
            x, keys_values = layer(x, by, seen, None if is_last else mask)
            extended.append(keys_values)
        return Cache(extended, mask)

    def read(
        self, x: Float[Tensor, "b s w"], cache: Cache, blocks: Sequence[int] | None = None
    ) -> Float[Tensor, "b s w"]:
        """Normed output of tokens, all real, that see the cache and one another (or earlier blocks)."""
        by, past, mask = self._place(cache.mask.new_ones(x.shape[:2]), cache)
        for layer, seen in zip(self.layers, past, strict=True):
            x, _ = layer(x, by, seen, mask, blocks)
        return self.norm(x)

    def _place(
        self, mask: Bool[Tensor, "b s"], cache: Cache | None
    ) -> tuple[Rotation, list[KeysValues] | list[None], Bool[Tensor, "b t"]]:
        # Masked tokens do not advance positions, so a padded prompt or an absent camera moves nobody.
        positions = mask.cumsum(1) - 1
        if cache is None:
            return rotation(positions, self.head_dim), [None] * len(self.layers), mask
        positions = positions + cache.mask.sum(1, keepdim=True)
        return rotation(positions, self.head_dim), cache.layers, torch.cat((cache.mask, mask), 1)
