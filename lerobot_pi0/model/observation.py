"""What the model sees at one moment, and how a picture of any size becomes a square one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Observation:
    """A batch of observations, ready for the network. Masks are True where something is real."""

    images: Float[Tensor, "b v 3 h w"]  # in [-1, 1]
    image_mask: Bool[Tensor, "b v"]
    tokens: Int[Tensor, "b l"]
    token_mask: Bool[Tensor, "b l"]
    state: Float[Tensor, "b e"]  # normalised, padded with zeros

    def padded(self, length: int) -> Observation:
        """With prompts of that length, or longer ones as they are."""
        end = (0, max(length - self.tokens.shape[1], 0))
        return replace(self, tokens=F.pad(self.tokens, end), token_mask=F.pad(self.token_mask, end))

    def trimmed(self) -> Observation:
        """Without the cameras and the ends of prompts that nobody in the batch has (waits for a GPU)."""
        seen = self.image_mask.any(0)
        length = int(
            (self.token_mask * torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)).max()
        )
        return Observation(
            images=self.images if seen.all() else self.images[:, seen],
            image_mask=self.image_mask[:, seen],
            tokens=self.tokens[:, :length],
            token_mask=self.token_mask[:, :length],
            state=self.state,
        )


def letterbox(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c size size"]:
    """Images in [0, 1] scaled to fit a square of `size` pixels, centred on black; as they are if they fit.

    Antialiased bilinear, as Pillow does it and openpi with it (within one of 255 levels).
    Odd padding goes right and down.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    ratio = max(height, width) / size
    new_height, new_width = int(height / ratio), int(width / ratio)
    resized = F.interpolate(
        images, (new_height, new_width), mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(resized, (left, size - new_width - left, top, size - new_height - top))
