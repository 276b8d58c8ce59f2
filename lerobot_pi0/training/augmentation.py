"""What training varies in an observation: where a camera hangs, light and colours, whether there is a prompt.

The numbers are those of openpi's JAX trainer (`preprocess_observation`), drawn for each view of each sample
from the sample's key: a sample looks the same in whatever batch and on whatever process it is. All of it runs
where the images lie, with static shapes, and the host never waits.

- Views that hang still: a crop of 95 % of height and width at a random place, scaled back, then turned by up
  to 5°; one bilinear resampling. What lies outside the picture is black. A wrist camera moves with the hand,
  whose place in its picture is what the policy steers by: it is spared.
- Half of all views: brightness ±0.3 and contrast ±0.4, as curves of HSV's value, and saturation ±0.5.

Three differences to openpi, where the library under it (augmax 0.4.1) does what openpi did not ask for, or
what a robot will not meet:

- Saturation varies, as openpi's settings say; augmax computes it and throws the result away. Ours is scaled,
  so that grey stays grey (augmax's formula would tint it red).
- Hue does not vary. augmax shifts it by ±0.1 unless told otherwise, which turns red to orange and yellow to
  green: the prompt may say which of them to pick.
- Rows and columns that are black throughout, i.e. a letterbox's bars and a missing camera, stay black: they
  are no part of the scene, and they are black whenever the robot runs. augmax brightens them with the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lerobot_pi0.model import Observation
from lerobot_pi0.training.randomness import uniform

CROP = 0.95
MAX_ANGLE = math.radians(5)
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
COLOURED = 0.5  # of all views

# Streams of random numbers (see `loss` for the others).
IMAGES, PROMPT = 2, 3


def augment_observation(
    observation: Observation,
    keys: Tensor,
    slots: Sequence[str],
    images: bool,
    prompt_dropout: float,
    without_task: tuple[Tensor, Tensor] | None = None,
) -> Observation:
    """An observation as training shows it, of which the b `keys` are the samples'.

    With `images` the cameras in these slots are augmented; `prompt_dropout` is the share of samples without
    their instruction. Their prompts are then `without_task`, tokens and mask (b, l), if given.
    """
    if images:
        geometric = ["wrist" not in slot for slot in slots]
        observation = replace(observation, images=augment(observation.images, keys, geometric))
    if prompt_dropout and without_task is not None:
        tokens, mask = observation.tokens, observation.token_mask
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        tokens = drop_prompts(tokens, without_task[0], keys, prompt_dropout)
        mask = drop_prompts(mask, without_task[1], keys, prompt_dropout)
        observation = replace(observation, tokens=tokens, token_mask=mask)
    return observation


def augment(images: Tensor, keys: Tensor, geometric: Sequence[bool]) -> Tensor:
    """Images (b, v, 3, h, w) in [-1, 1] as training shows them: same shape, dtype and range.

    `keys` (b,) are the samples' (`randomness.sample_keys`); `geometric` says of each of the v views whether
    it is cropped and turned. Those that are not keep every pixel in its place, and half of them its value.
    """
    drawn = uniform(keys, (len(geometric), 7), IMAGES)
    angles, downs, rights, brightness, contrast, saturation = (2 * drawn[..., :6] - 1).unbind(-1)
    coloured = drawn[..., 6] < COLOURED
    views = []
    # One view at a time: a third of the memory.
    for view, (image, moves) in enumerate(zip(images.unbind(1), geometric, strict=True)):
        pixels = image.float()
        jittered = jitter(
            pixels,
            BRIGHTNESS * brightness[:, view],
            CONTRAST * contrast[:, view],
            SATURATION * saturation[:, view],
        )
        pixels = torch.where(_pixelwise(coloured[:, view]), jittered, pixels)
        if moves:  # after the colours, because bars that are turned are no rows and columns
            pixels = crop_and_rotate(pixels, MAX_ANGLE * angles[:, view], downs[:, view], rights[:, view])
        views.append(pixels.to(images.dtype))
    return torch.stack(views, 1)


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1], float32, in another light; amounts (n,) in (-1, 1), 0 changes nothing.

    Negative brightness scales HSV's value, positive brings it nearer to 1; contrast is a curve of three
    straight lines through 0, ½ and 1, whose slope in the middle is the reciprocal of that at the ends;
    saturation is scaled by 1 + amount. Hue stays, unless saturation reaches its limit.
    """
    pixels = images / 2 + 0.5
    value = pixels.amax(1, keepdim=True)
    black = value == 0
    bars = black.all(2, keepdim=True) | black.all(3, keepdim=True)

    brightness = _pixelwise(brightness)
    lit = value * (1 - brightness.abs()) + brightness.clamp(min=0)

    slope = torch.tan((1 + _pixelwise(contrast)) * (math.pi / 4))
    from_middle = lit - 0.5
    in_middle = slope * from_middle
    at_ends = (from_middle.abs() - 0.5) / slope + 0.5
    is_middle = from_middle.abs() <= 0.5 / (1 + slope)
    lit = torch.where(is_middle, in_middle, at_ends.copysign(from_middle)) + 0.5
    lit = lit.masked_fill(bars, 0)

    # HSV → RGB with another value and saturation. A black pixel has neither hue nor saturation.
    strength = (1 + _pixelwise(saturation)) * lit / value.clamp(min=1e-6)
    return (lit - strength * (value - pixels)).clamp(0, 1) * 2 - 1


def crop_and_rotate(images: Tensor, angle: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1], float32, cropped to `CROP` of their size, scaled back, and turned.

    `angle` (n,) in radians, counter-clockwise; `down` and `right` (n,) in [-1, 1] are the crop's place: -1
    at the upper or left edge, 0 in the middle, 1 at the lower or right edge.
    """
    height, width = images.shape[-2:]
    crop_height, crop_width = int(CROP * height), int(CROP * width)
    # Pixels from the middle. The grid is made by hand: torch's affine_grid multiplies matrices, for which
    # autocast would round coordinates to bfloat16, i.e. to half a pixel.
    y = (torch.arange(height, device=images.device) - (height - 1) / 2).view(1, height, 1)
    x = (torch.arange(width, device=images.device) - (width - 1) / 2).view(1, 1, width)
    sine, cosine, down, right = (t.view(-1, 1, 1) for t in (angle.sin(), angle.cos(), down, right))
    from_y = (cosine * y + sine * x) * (crop_height / height) + down * ((height - crop_height) / 2)
    from_x = (cosine * x - sine * y) * (crop_width / width) + right * ((width - crop_width) / 2)
    grid = torch.stack((from_x / (width / 2), from_y / (height / 2)), -1)
    # Outside lies grid_sample's zero: black.
    return F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def drop_prompts(given: Tensor, without_task: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Tokens or masks (b, l), with this probability those without the instruction: for both the same rows."""
    return torch.where(uniform(keys, (1,), PROMPT) < probability, without_task, given)


def _pixelwise(amounts: Tensor) -> Tensor:
    """(n,) → (n, 1, 1, 1)"""
    return amounts[:, None, None, None]
