"""π0: run the vision-language model once per observation, let the action expert read its keys and values,
integrate a velocity field from noise to actions (Black et al., 2024,
"π0: A Vision-Language-Action Flow Model").

              images prompt | state | actions
 prefix          ✓     ✓    |       |            VLM, once per observation
 state           ✓     ✓    |   ✓   |            expert, once per observation
 actions         ✓     ✓    |   ✓   |    ✓       expert, once per denoising step

Nothing ever attends to what stands to its right, so each row is a pass over the cache that the rows
above left, and the only mask is the one of valid keys. The loss takes the last two rows in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.model.flow import embed_time, integrate, interpolate
from lerobot_pi0.model.gemma import Cache, Decoder, ExpertConfig, GemmaConfig
from lerobot_pi0.model.layers import Linear, ahead, joined
from lerobot_pi0.model.observation import Observation
from lerobot_pi0.model.siglip import Siglip, SiglipConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Pi0(nn.Module):
    """The network. It computes in `dtype`; norms, rotary angles, time and action head stay float32."""

    folds: ClassVar = {"action_time_mlp_in": "action_in_proj"}

    def __init__(
        self,
        vision: SiglipConfig,
        vlm: GemmaConfig,
        expert: ExpertConfig,
        state_dim: int,
        action_dim: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.dtype = dtype
        self.expert_width = expert.width
        self.vision = Siglip(vision, vlm.width)
        self.token_embedding = nn.Embedding(vlm.vocab_size, vlm.width)
        nn.init.normal_(self.token_embedding.weight, std=vlm.width**-0.5)
        self.vlm = Decoder(vlm.width, vlm.mlp_dim, vlm)
        self.expert = Decoder(expert.width, expert.mlp_dim, vlm)
        self.state_proj = Linear(state_dim, expert.width)
        self.action_in_proj = Linear(action_dim, expert.width)
        self.action_time_mlp_in = Linear(2 * expert.width, expert.width)
        self.action_time_mlp_out = Linear(expert.width, expert.width)
        self.action_out_proj = Linear(expert.width, action_dim)
        # No output depends on these: they stay for round trips with published checkpoints.
        for name in ("q_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj"):
            self.vlm.layers[-1].get_submodule(name).requires_grad_(False)
        self.vlm.norm.requires_grad_(False)

    def prefix(self, observation: Observation) -> Cache:
        """Keys and values of images and prompt: all that depends on the vision-language model."""
        return self.vlm.prefill(*self.embed_prefix(observation))

    def embed_prefix(self, observation: Observation) -> tuple[Float[Tensor, "b p w"], Bool[Tensor, "b p"]]:
        """The language model's input, encoded images and then the prompt, and which of it is real."""
        batch, views = observation.images.shape[:2]
        images = self.vision(observation.images.flatten(0, 1), self.dtype)
        images = images.unflatten(0, (batch, views)).flatten(1, 2)
        # The prompt is on the scale √width, as Gemma was trained; the images are not scaled.
        prompt = self.token_embedding(observation.tokens) * self.token_embedding.embedding_dim**0.5
        image_mask = observation.image_mask.repeat_interleave(images.shape[1] // views, 1)
        mask = torch.cat((image_mask, observation.token_mask), 1)
        return torch.cat((images, prompt.to(self.dtype)), 1), mask

    def with_state(self, prefix: Cache, state: Float[Tensor, "b e"]) -> Cache:
        """The prefix with the state token appended: all that actions attend to besides themselves."""
        return self.expert.prefill(self.embed_state(state), cache=prefix)

    def velocity(
        self, context: Cache, actions: Float[Tensor, "b a e"], time: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at `time`, one per sample or one per action, given prefix and state."""
        return self.velocity_at(context, actions, self.prepare(time))

    def prepare(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ w"]:
        """What of a velocity depends on the time alone, one per sample or one per action."""
        embedding = embed_time(time if time.ndim == 2 else time[:, None], self.expert_width)
        return ahead(self.action_time_mlp_in, embedding)

    def velocity_at(
        self, context: Cache, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a e"]:
        """Velocity of noisy actions at a time that was prepared, given prefix and state."""
        x = self.expert.attend(self.embed_actions(actions, prepared), context)
        return self.action_out_proj(x.float())

    def embed_state(self, state: Float[Tensor, "b e"]) -> Float[Tensor, "b 1 w"]:
        """The state's token in the expert."""
        return self.state_proj(state.float())[:, None].to(self.dtype)

    def embed_actions(
        self, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a w"]:
        """Tokens of noisy actions, which know their time."""
        hidden = joined(self.action_time_mlp_in, self.action_in_proj(actions.float()), prepared)
        return self.action_time_mlp_out(F.silu(hidden)).to(self.dtype)

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
        state = self.embed_state(observation.state).repeat_interleave(draws, 0)
        # Together, so that the expert's weights have one gradient to write.
        tokens = torch.cat((state, self.embed_actions(x, self.prepare(time))), 1)
        x = self.expert.attend(tokens, prefix, blocks=(1, x.shape[1]))[:, 1:]
        return (self.action_out_proj(x.float()) - velocity).square()

    @torch.no_grad()
    def sample(
        self, observation: Observation, noise: Float[Tensor, "b a e"], num_steps: int
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalised actions for each observation."""
        context = self.with_state(self.prefix(observation), observation.state)
        return integrate(lambda x, time: self.velocity(context, x, time), noise, num_steps)
