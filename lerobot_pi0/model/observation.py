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
    """A batch of observations for the network. Masks are True where something is real, or None: all is."""

    images: Float[Tensor, "b v 3 h w"]  # in [-1, 1]
    image_mask: Bool[Tensor, "b v"] | None
    tokens: Int[Tensor, "b l"]
    token_mask: Bool[Tensor, "b l"] | None
    state: Float[Tensor, "b e"]  # normalized, padded with zeros

    def mask(self, tokens_per_image: int) -> Bool[Tensor, "b p"] | None:
        """Which tokens of the prefix are real, images and then prompt; None: all."""
        images, prompt = self.image_mask, self.token_mask
        if images is None and prompt is None:
            return None
        images = self.images.new_ones(self.images.shape[:2], dtype=torch.bool) if images is None else images
        prompt = torch.ones_like(self.tokens, dtype=torch.bool) if prompt is None else prompt
        return torch.cat((images.repeat_interleave(tokens_per_image, 1), prompt), 1)

    def padded(self, length: int) -> Observation:
        """With prompts of that length, or longer ones as they are, and a mask of them in either case."""
        end = (0, max(length - self.tokens.shape[1], 0))
        mask = torch.ones_like(self.tokens, dtype=torch.bool) if self.token_mask is None else self.token_mask
        return replace(self, tokens=F.pad(self.tokens, end), token_mask=F.pad(mask, end))

    def trimmed(self) -> Observation:
        """Without the cameras and ends of prompts that nobody has, nor masks of nothing (waits for a GPU)."""
        images, of_images, tokens, of_tokens = self.images, self.image_mask, self.tokens, self.token_mask
        if of_images is not None:
            seen = of_images.any(0)
            images, of_images = images if seen.all() else images[:, seen], of_images[:, seen]
            of_images = None if of_images.all() else of_images
        if of_tokens is not None:
            length = int((of_tokens * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).max())
            tokens, of_tokens = tokens[:, :length], of_tokens[:, :length]
            of_tokens = None if of_tokens.all() else of_tokens
        return Observation(images, of_images, tokens, of_tokens, self.state)


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
    resized = F.interpolate(images, (new_height, new_width), mode="bilinear", antialias=True)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(resized, (left, size - new_width - left, top, size - new_height - top))
