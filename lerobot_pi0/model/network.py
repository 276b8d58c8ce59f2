"""What π0 and π0.5 have in common, and all that sampler, real-time chunking and tools need of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lerobot_pi0.model.flow import Solver, embed_time, integrate, interpolate
from lerobot_pi0.model.gemma import Cache, Decoder, ExpertConfig, GemmaConfig
from lerobot_pi0.model.layers import Linear, RMSNorm
from lerobot_pi0.model.observation import Observation
from lerobot_pi0.model.siglip import Siglip, SiglipConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Network(nn.Module, ABC):
    """A flow policy over a vision-language model, which it runs once per observation.

    It has a vision tower, a language model, its embedding, and an action expert of as many layers, which
    attends to the language model's keys and values. Its other children are linear layers around the expert.
    It computes in `dtype`; norms, rotary angles, time and action head stay float32. Actions are normalized
    and padded.
    """

    # Linear layers over two inputs side by side, each with the layer whose output the first of them is: two
    # products that sampling computes as one.
    folds: ClassVar[Mapping[str, str]] = {}
    action_in_proj: Linear
    action_out_proj: Linear

    def __init__(
        self,
        vision: SiglipConfig,
        vlm: GemmaConfig,
        expert: ExpertConfig,
        dtype: torch.dtype,
        expert_norm: Callable[[int], nn.Module] = RMSNorm,
    ):
        super().__init__()
        self.dtype = dtype
        self.expert_width = expert.width
        self.vision = Siglip(vision, vlm.width)
        self.token_embedding = nn.Embedding(vlm.vocab_size, vlm.width)
        nn.init.normal_(self.token_embedding.weight, std=vlm.width**-0.5)
        self.vlm = Decoder(vlm.width, vlm.mlp_dim, vlm)
        self.expert = Decoder(expert.width, expert.mlp_dim, vlm, expert_norm)
        # No output depends on these: they stay for round trips with published checkpoints.
        for name in ("q_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj"):
            self.vlm.layers[-1].get_submodule(name).requires_grad_(False)
        self.vlm.norm.requires_grad_(False)

    @abstractmethod
    def prepare(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ ..."]:
        """What of a velocity depends on the time alone, one per sample or one per action."""

    @abstractmethod
    def velocity_at(
        self, context: Cache, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at a time that was prepared: one of the batch, or without that dimension
        one for all samples."""

    def with_state(self, prefix: Cache, state: Float[Tensor, "b e"]) -> Cache:
        """All that actions attend to besides themselves: the prefix, and at most one token of the state."""
        return prefix

    def joint_velocity(
        self,
        prefix: Cache,
        state: Float[Tensor, "_ e"],
        actions: Float[Tensor, "n a e"],
        time: Float[Tensor, "n ..."],
    ) -> Float[Tensor, "n a e"]:
        """`velocity` with the state, one for every n/b of the samples, in one pass of the expert: its weights
        then have one gradient to write."""
        return self.velocity(prefix, actions, time)

    def prefix(self, observation: Observation) -> Cache:
        """Keys and values of images and prompt: all that depends on the vision-language model."""
        return self.vlm.prefill(*self.embed_prefix(observation))

    def embed_prefix(self, observation: Observation) -> tuple[Tensor, Bool[Tensor, "b p"] | None]:
        """The language model's input (b, p, w), images and then prompt, and what of it is real."""
        batch, views = observation.images.shape[:2]
        images = self.vision(observation.images.flatten(0, 1), self.dtype)
        images = images.unflatten(0, (batch, views)).flatten(1, 2)
        # The prompt is on the scale √width, as Gemma was trained; the images are not scaled.
        prompt = self.token_embedding(observation.tokens) * self.token_embedding.embedding_dim**0.5
        tokens = torch.cat((images, prompt.to(self.dtype)), 1)
        return tokens, observation.mask(images.shape[1] // views)

    def embed_time(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ w"]:
        """Sinusoids of the time, one per sample or one per action, as wide as the expert."""
        return embed_time(time if time.ndim == 2 else time[:, None], self.expert_width)

    def velocity(
        self, context: Cache, actions: Float[Tensor, "b a e"], time: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at `time`, one per sample or one per action."""
        return self.velocity_at(context, actions, self.prepare(time))

    def loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "b a e"],
        noise: Float[Tensor, "n a e"],
        time: Float[Tensor, "n ..."],
        prefix: Cache | None = None,
    ) -> Float[Tensor, "n a e"]:
        """Squared error of the velocity, unreduced; n = k·b draws k (noise, time) pairs per observation.
        `time` is one per sample or one per action; actions at time 0 are given as they are. A `prefix` that
        was computed before, without a graph, leaves the gradients of the expert as they are.
        """
        draws = noise.shape[0] // actions.shape[0]
        prefix = (prefix or self.prefix(observation)).repeat(draws)
        x, velocity = interpolate(actions.repeat_interleave(draws, 0), noise, time)
        return (self.joint_velocity(prefix, observation.state, x, time) - velocity).square()

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b a e"],
        num_steps: int,
        solver: Solver = "euler",
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalized actions for each observation, as plainly as it can be said."""
        context = self.with_state(self.prefix(observation), observation.state)
        return integrate(lambda x, time: self.velocity(context, x, time), noise, num_steps, solver=solver)
