"""What an observation costs once: a cache, which denoising steps write to and read in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lerobot_pi0.model.gemma import Append, Cache, GemmaConfig, KeysValues, Rotation, rotation

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Buffer(Cache):
    """A cache of a fixed size, in which new keys and values are written behind those that are there.

    `layers`, `mask` and `rotation` have the fixed size; `filled` says how many tokens there are. Other than
    those of the first `prefill`, all tokens are real.
    """

    rotation: Rotation
    filled: int = 0

    @classmethod
    def allocate(
        cls, x: Float[Tensor, "b s w"], mask: Bool[Tensor, "b s"] | None, room: int, heads: GemmaConfig
    ) -> Buffer:
        """An empty buffer for the tokens `x` and `room` more, of a stack with these heads."""
        batch, length = len(x), x.shape[1] + room
        if mask is None:
            positions = torch.arange(length, device=x.device).expand(batch, -1)
        else:
            mask = torch.cat((mask, mask.new_ones(batch, room)), 1)
            positions = mask.cumsum(1) - 1
        shape = (batch, heads.num_kv_heads, length, heads.head_dim)
        # A tensor for each: of parts of one, a compiled graph would copy all for what it writes into one.
        layers = [(x.new_empty(shape), x.new_empty(shape)) for _ in range(heads.depth)]
        return cls(layers, mask, rotation(positions, heads.head_dim))

    def place(
        self, x: Float[Tensor, "b s w"], own: Bool[Tensor, "b s"] | None, head_dim: int
    ) -> tuple[Rotation, Bool[Tensor, "b _"] | None]:
        end = self.filled + x.shape[1]
        cos, sin = (part[:, :, self.filled : end] for part in self.rotation)
        return (cos, sin), None if self.mask is None else self.mask[:, :end]

    def append(self, layer: int) -> Append:
        return partial(_write, *self.layers[layer], self.filled)

    def grown(self, layers: list[KeysValues], mask: Bool[Tensor, "b _"] | None) -> Buffer:
        return replace(self, filled=layers[0][0].shape[2])

    def repeat(self, times: int) -> Buffer:
        if times == 1:
            return self
        whole, (cos, sin) = super().repeat(times), self.rotation
        by = (cos.repeat_interleave(times, 0), sin.repeat_interleave(times, 0))
        return replace(self, layers=whole.layers, mask=whole.mask, rotation=by)

    def read(self) -> Cache:
        """What is filled, without a copy, as a cache that is not written to."""
        layers = [(k[:, :, : self.filled], v[:, :, : self.filled]) for k, v in self.layers]
        return Cache(layers, None if self.mask is None else self.mask[:, : self.filled])


def _write(all_keys: Tensor, all_values: Tensor, filled: int, keys: Tensor, values: Tensor) -> KeysValues:
    end = filled + keys.shape[2]
    all_keys[:, :, filled:end], all_values[:, :, filled:end] = keys, values
    return all_keys[:, :, :end], all_values[:, :, :end]


@dataclass(frozen=True)
class Context:
    """All that an observation costs once. Sampling writes behind the prefix and the state, never over them.

    It may be sampled from any number of times, one after the other.
    """

    buffer: Buffer  # prefix, state, room for the actions
    reference: Float[Tensor, "b d"] | None = None  # relative actions are made absolute by adding it

    @property
    def batch_size(self) -> int:
        return len(self.buffer.layers[0][0])

    def repeat(self, times: int) -> Context:
        """The context of a batch in which every observation stands `times` times in a row."""
        reference = None if self.reference is None else self.reference.repeat_interleave(times, 0)
        return Context(self.buffer.repeat(times), reference)
