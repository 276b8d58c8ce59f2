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
from torch import Tensor

from lerobot_pi0.model.gemma import Cache, ExpertConfig, GemmaConfig
from lerobot_pi0.model.layers import Linear, ahead, joined
from lerobot_pi0.model.network import Network
from lerobot_pi0.model.siglip import SiglipConfig

if TYPE_CHECKING:
    from jaxtyping import Float


class Pi0(Network):
    """The state is a token of the expert; the time is mixed into each action's token."""

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
        super().__init__(vision, vlm, expert, dtype)
        self.state_proj = Linear(state_dim, expert.width)
        self.action_in_proj = Linear(action_dim, expert.width)
        self.action_time_mlp_in = Linear(2 * expert.width, expert.width)
        self.action_time_mlp_out = Linear(expert.width, expert.width)
        self.action_out_proj = Linear(expert.width, action_dim)

    def with_state(self, prefix: Cache, state: Float[Tensor, "b e"]) -> Cache:
        return self.expert.prefill(self.embed_state(state), cache=prefix)

    def prepare(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ w"]:
        return ahead(self.action_time_mlp_in, self.embed_time(time))

    def velocity_at(
        self, context: Cache, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a e"]:
        x = self.expert.attend(self.embed_actions(actions, prepared), context)
        return self.action_out_proj(x.float())

    def joint_velocity(
        self,
        prefix: Cache,
        state: Float[Tensor, "_ e"],
        actions: Float[Tensor, "n a e"],
        time: Float[Tensor, "n ..."],
    ) -> Float[Tensor, "n a e"]:
        state = self.embed_state(state).repeat_interleave(len(actions) // len(state), 0)
        tokens = torch.cat((state, self.embed_actions(actions, self.prepare(time))), 1)
        x = self.expert.attend(tokens, prefix, blocks=(1, actions.shape[1]))[:, 1:]
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
