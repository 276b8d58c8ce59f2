"""What policy, sampler, real-time chunking and tools need of a network, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lerobot_pi0.model.gemma import Cache, Decoder
from lerobot_pi0.model.observation import Observation
from lerobot_pi0.model.siglip import Siglip

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Network(Protocol):
    """A flow policy over a vision-language model, which it runs once per observation.

    A `torch.nn.Module` of a vision tower, a language model, its embedding, and an action expert of as many
    layers, which attends to the language model's keys and values. Its other children are linear layers around
    the expert, which compute in float32. Actions are normalised and padded.
    """

    dtype: torch.dtype  # of activations
    # Linear layers over two inputs side by side, each with the layer whose output the first of them is: two
    # products that sampling computes as one.
    folds: ClassVar[Mapping[str, str]]
    vision: Siglip
    token_embedding: nn.Embedding
    vlm: Decoder
    expert: Decoder

    def embed_prefix(self, observation: Observation) -> tuple[Float[Tensor, "b p w"], Bool[Tensor, "b p"]]:
        """The language model's input, and which of it is real."""
        ...

    def prefix(self, observation: Observation) -> Cache:
        """Keys and values of the language model: `vlm.prefill` of `embed_prefix`."""
        ...

    def with_state(self, prefix: Cache, state: Float[Tensor, "b e"]) -> Cache:
        """All that actions attend to besides themselves: at most one token more, or the prefix as it is."""
        ...

    def velocity(
        self, context: Cache, actions: Float[Tensor, "b a e"], time: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at `time`, one per sample or one per action."""
        ...

    def prepare(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ ..."]:
        """What of a velocity depends on the time alone. The second dimension is of actions, or 1 for all."""
        ...

    def velocity_at(
        self, context: Cache, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at a time that was prepared: one of the batch, or without that dimension
        one for all samples."""
        ...

    def loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "b a e"],
        noise: Float[Tensor, "n a e"],
        time: Float[Tensor, "n ..."],
        prefix: Cache | None = None,
    ) -> Float[Tensor, "n a e"]:
        """Squared error of the velocity, unreduced; n = k·b draws k (noise, time) pairs per observation."""
        ...

    def sample(
        self, observation: Observation, noise: Float[Tensor, "b a e"], num_steps: int
    ) -> Float[Tensor, "b a e"]:
        """A chunk of actions for each observation, as plainly as it can be said."""
        ...
