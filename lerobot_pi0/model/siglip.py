"""SigLIP: the vision tower that turns an image into tokens of the language model (Zhai et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.model.layers import Layer, LayerNorm, Linear, add, attend, gelu, recomputable, side_by_side

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the vision tower; the defaults are SigLIP So400m/14 at 224 pixels, as in PaliGemma."""

    image_size: int = 224  # height and width of the square input, pixels
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16

    @property
    def num_tokens(self) -> int:
        """Tokens per image: one for each patch, without pooling."""
        return (self.image_size // self.patch_size) ** 2


class VisionLayer(Layer):
    """Pre-norm transformer block with full attention over the patches of one image."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = LayerNorm(config.width)
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.o_proj = Linear(config.width, config.width)
        self.mlp_norm = LayerNorm(config.width)
        self.up_proj = Linear(config.width, config.mlp_dim)
        self.down_proj = Linear(config.mlp_dim, config.width)

    @recomputable
    def forward(self, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        qkv = side_by_side(self.attention_norm(x), self.q_proj, self.k_proj, self.v_proj)
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = add(self.o_proj, attend(*heads), x)
        return add(self.down_proj, gelu(self.up_proj, self.mlp_norm(x)), x)


class Siglip(nn.Module):
    """Patches plus learned positions, transformer, norm, and the projection to the language model's width."""

    def __init__(self, config: SiglipConfig, output_dim: int):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        # Starts as sine-cosine of row and column, wavelengths 2π to 20,000π patches: near patches are alike.
        side = config.image_size // config.patch_size
        phases = torch.outer(torch.arange(side), 1e-4 ** torch.linspace(0, 1, config.width // 4))
        waves = torch.cat((phases.sin(), phases.cos()), 1)
        waves = torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, 0)), 1)
        self.position_embedding = nn.Parameter(F.pad(waves, (0, config.width % 4)))
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.projector = Linear(config.width, output_dim)

    def forward(self, images: Float[Tensor, "n 3 h w"], dtype: torch.dtype) -> Float[Tensor, "n t o"]:
        """Tokens of images in [-1, 1]."""
        x = self.embed(images, dtype)
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.norm(x))

    def embed(self, images: Float[Tensor, "n 3 h w"], dtype: torch.dtype) -> Float[Tensor, "n t c"]:
        """Patches with their positions: computed in float32, what follows is `dtype`."""
        weight, bias = (parameter.float() for parameter in self.patch_embedding.parameters())
        patches = F.conv2d(images, weight, bias, stride=weight.shape[-1])
        return (patches.flatten(2).transpose(1, 2) + self.position_embedding.float()).to(dtype)
