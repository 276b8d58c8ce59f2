"""π0.5: as π0, but the time modulates each norm of the action expert instead of its tokens, and there is no
token of the state, which may stand in the prompt (Physical Intelligence, 2025,
"π0.5: a Vision-Language-Action Model with Open-World Generalization").

              images prompt | actions
 prefix          ✓     ✓    |            VLM, once per observation
 actions         ✓     ✓    |    ✓       expert, once per denoising step
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.model.gemma import Cache, ExpertConfig, GemmaConfig
from lerobot_pi0.model.layers import Linear, ahead
from lerobot_pi0.model.network import Network
from lerobot_pi0.model.siglip import SiglipConfig

if TYPE_CHECKING:
    from jaxtyping import Float


class AdaptiveRMSNorm(nn.Module):
    """RMS norm with a scale, a shift and a gate of the residual that are linear in a condition, and zero at
    first (adaLN-Zero; Peebles and Xie, 2023). Float32, epsilon 1e-6; gives back the dtype it was given."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = Linear(width, 3 * width)  # rows: scale, shift, gate
        nn.init.zeros_(self.dense.weight)

    def forward(
        self, x: Float[Tensor, "b s w"], condition: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "b s w"], Float[Tensor, "*b _ w"]]:
        scale, shift, gate = self.dense(condition.float()).chunk(3, dim=-1)
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype), gate.to(x.dtype)


class Pi05(Network):
    """The network. It does not read `Observation.state`: the state may stand in the prompt."""

    def __init__(
        self,
        vision: SiglipConfig,
        vlm: GemmaConfig,
        expert: ExpertConfig,
        action_dim: int,
        dtype: torch.dtype,
    ):
        super().__init__(vision, vlm, expert, dtype, AdaptiveRMSNorm)
        self.action_in_proj = Linear(action_dim, expert.width)
        self.time_mlp_in = Linear(expert.width, expert.width)
        self.time_mlp_out = Linear(expert.width, expert.width)
        self.action_out_proj = Linear(expert.width, action_dim)

    def prepare(self, time: Float[Tensor, "b ..."]) -> Float[Tensor, "b _ ..."]:
        hidden = F.silu(self.time_mlp_in(self.embed_time(time)))
        return ahead(self.expert, F.silu(self.time_mlp_out(hidden)))

    def velocity_at(
        self, context: Cache, actions: Float[Tensor, "b a e"], prepared: Float[Tensor, "..."]
    ) -> Float[Tensor, "b a e"]:
        tokens = self.action_in_proj(actions.float()).to(self.dtype)
        x = self.expert.attend(tokens, context, condition=prepared)
        return self.action_out_proj(x.float())
