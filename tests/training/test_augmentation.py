"""Augmentation: openpi's numbers, a function of the sample's key, and what must not change does not."""

import colorsys
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from lerobot_pi0.training.augmentation import (
    augment,
    crop_and_rotate,
    drop_prompts,
    jitter,
)
from lerobot_pi0.training.randomness import sample_keys

SIZE = 40  # of which 38 are cropped: one pixel to each side


def keys_of(count: int, step: int = 0) -> Tensor:
    return sample_keys(seed=7, step=step, index=torch.arange(count))


def dropped_masks(mask: Tensor, keys: Tensor, probability: float) -> Tensor:
    return drop_prompts(
        mask, mask & (torch.arange(mask.shape[1], device=mask.device) == 0), keys, probability
    )


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def picture(*views: Tensor | float, size: int = SIZE) -> Tensor:
    """One sample (1, v, 3, h, w) of such views."""
    return torch.stack([torch.as_tensor(view).expand(3, size, size) for view in views])[None]


def ramps() -> Tensor:
    """A view whose red tells the column and whose green tells the row, 0.9 of the range wide."""
    ramp = torch.linspace(-0.9, 0.9, SIZE)
    return torch.stack((ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE), torch.zeros(SIZE, SIZE)))


def repeated(sample: Tensor, count: int) -> Tensor:
    return sample.expand(count, *sample.shape[1:])


def test_a_sample_looks_the_same_alone_and_within_a_batch():
    images, keys = noise(4, 2, 3, SIZE, SIZE), keys_of(4)
    batch = augment(images, keys, [True, False])
    for i in range(4):
        alone = augment(images[i : i + 1], keys[i : i + 1], [True, False])
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-6)


def test_a_view_looks_the_same_whatever_views_come_after_it():
    images, keys = noise(8, 3, 3, SIZE, SIZE), keys_of(8)
    both = augment(images, keys, [True, False, False])[:, :2]
    torch.testing.assert_close(augment(images[:, :2], keys, [True, False]), both, rtol=0, atol=1e-6)


def test_samples_steps_and_views_differ():
    images = repeated(picture(ramps(), ramps()), 8)
    first, second = (augment(images, keys_of(8, step), [True, True]) for step in (0, 1))
    looks = torch.cat((first, second)).flatten(0, 1)
    differences = torch.cdist(looks.flatten(1), looks.flatten(1))
    assert (differences + torch.eye(len(looks)) > 1e-3).all()


def test_a_view_that_is_not_geometric_keeps_every_pixel_in_its_place():
    palette = noise(5, 3)
    which = torch.randint(5, (SIZE, SIZE), generator=torch.Generator().manual_seed(2))
    image = palette[which].permute(2, 0, 1)
    out = augment(repeated(picture(image), 64), keys_of(64), [False])
    for colour in range(5):
        pixels = out[:, 0, :, which == colour]
        assert (pixels == pixels[..., :1]).all()


def test_half_of_the_views_keep_their_colours_bit_by_bit():
    images = repeated(picture(noise(3, 4, 4), noise(3, 4, 4), size=4), 1000)
    kept = (augment(images, keys_of(1000), [False, False]) == images).flatten(2).all(2)
    assert kept.float().mean(0).sub(0.5).abs().max() < 0.05
    assert (kept[:, 0] & kept[:, 1]).float().mean().sub(0.25).abs() < 0.05  # independently of each other


@pytest.mark.parametrize("shape", [(40, 40), (60, 40)], ids=["square", "upright"])
@pytest.mark.parametrize(("down", "right"), [(-1, -1), (1, -1), (-1, 1)])
def test_a_crop_is_torchvisions(shape, down, right):
    image, smooth = noise(1, 3, *shape), InterpolationMode.BILINEAR
    ours = crop_and_rotate(image, torch.zeros(1), torch.tensor([float(down)]), torch.tensor([float(right)]))
    height, width = (int(0.95 * n) for n in shape)
    top, left = shape[0] - height if down > 0 else 0, shape[1] - width if right > 0 else 0
    theirs = reference.resized_crop(image, top, left, height, width, list(shape), smooth, antialias=False)
    inner = (..., slice(1, -1), slice(1, -1))  # at its edge torchvision does not look beyond the crop
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 40), (60, 40)], ids=["square", "upright"])
@pytest.mark.parametrize(("degrees", "down", "right"), [(5, 0, 0), (-3, 0.25, 1)])
def test_crop_and_rotation_are_one_resampling_by_torchvisions_affine_map(shape, degrees, down, right):
    image, angle = noise(1, 3, *shape), math.radians(degrees)
    ours = crop_and_rotate(
        image, torch.tensor([angle]), torch.tensor([float(down)]), torch.tensor([float(right)])
    )
    # torchvision's map goes from the picture to the crop, and moves it last.
    offset = complex(right * shape[1] * 0.025, down * shape[0] * 0.025) / 0.95
    moved = -offset * complex(math.cos(angle), -math.sin(angle))
    theirs = reference.affine(
        image,
        angle=-degrees,
        translate=[moved.real, moved.imag],
        scale=1 / 0.95,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    inner = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-4)


def test_drawn_crops_and_angles_fill_their_ranges_and_do_not_leave_them():
    images, keys = repeated(picture(ramps()), 600), keys_of(600)
    plain = (augment(images, keys, [False]) == images).flatten(1).all(1)
    out = augment(images, keys, [True])[plain, 0, :2]
    inside = out[..., 6:-6, 6:-6]  # nothing there comes from outside
    assert inside.abs().max() < 0.9

    # There, source = scale · rotation · place + offset, in pixels from the middle.
    middle = torch.arange(SIZE)[6:-6] - (SIZE - 1) / 2
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    places = torch.stack((x.flatten(), y.flatten(), torch.ones(x.numel())), 1)
    sources = inside.flatten(2).mT * (SIZE - 1) / 2 / 0.9
    fitted = torch.linalg.lstsq(places.expand(len(sources), -1, -1), sources).solution  # (n, 3, 2)
    linear, offset = fitted[:, :2], fitted[:, 2]
    torch.testing.assert_close(linear.det().sqrt(), torch.full((len(out),), 38 / 40), rtol=0, atol=1e-4)
    degrees = torch.atan2(linear[:, 0, 1], linear[:, 0, 0]).rad2deg()
    for drawn, limit in ((degrees, 5), (offset[:, 0], 1), (offset[:, 1], 1)):
        assert limit * 0.95 < drawn.max() < limit * 1.001
        assert -limit * 1.001 < drawn.min() < -limit * 0.95
        assert drawn.mean().abs() < limit * 0.15
    assert torch.corrcoef(torch.stack((degrees, offset[:, 0], offset[:, 1]))).triu(1).abs().max() < 0.2
    corners = torch.tensor([[x, y] for x in (-19.5, 19.5) for y in (-19.5, 19.5)])
    moved = (corners @ linear + offset[:, None] - corners).norm(dim=-1).max()
    assert (
        2 < moved < math.sqrt(2) * (1 + 19.5 * abs(38 / 40 * complex(math.cos(0.0873), math.sin(0.0873)) - 1))
    )


def test_outside_of_the_picture_is_black():
    white = torch.ones(1, 3, SIZE, SIZE)
    turned = crop_and_rotate(white, torch.tensor([math.radians(5)]), torch.zeros(1), torch.ones(1))
    assert (turned[..., 0, -1] == -1).all()
    assert (turned[..., 10:-10, 10:-10] > 0.999).all()


# RGB of five pixels, and what augmax 0.4.1 makes of them with an amount of brightness and one of contrast.
PIXELS = [[0.8, 0.2, 0.1], [0.1, 0.3, 0.25], [0.5, 0.5, 0.5], [0.9, 0.85, 0.4], [0.02, 0.05, 0.9]]
AUGMAX = {
    (0.25, -0.3): [
        [0.75522, 0.18881, 0.0944],
        [0.16156, 0.48468, 0.4039],
        [0.5766, 0.5766, 0.5766],
        [0.87761, 0.82885, 0.39005],
        [0.0195, 0.04876, 0.87761],
    ],
    (-0.2, 0.35): [
        [0.74999, 0.1875, 0.09375],
        [0.0448, 0.13441, 0.11201],
        [0.32144, 0.32144, 0.32144],
        [0.84319, 0.79635, 0.37475],
        [0.01874, 0.04684, 0.84319],
    ],
    (0.3, 0.4): [
        [0.92867, 0.23217, 0.11608],
        [0.17321, 0.51963, 0.43302],
        [0.79439, 0.79439, 0.79439],
        [0.96433, 0.91076, 0.42859],
        [0.02143, 0.05357, 0.96433],
    ],
    (-0.3, -0.4): [
        [0.53057, 0.13264, 0.06632],
        [0.11741, 0.35224, 0.29353],
        [0.42357, 0.42357, 0.42357],
        [0.56624, 0.53478, 0.25166],
        [0.01258, 0.03146, 0.56624],
    ],
}


@pytest.mark.parametrize("amounts", AUGMAX)
def test_brightness_and_contrast_are_augmaxs(amounts):
    brightness, contrast = (torch.tensor([amount]) for amount in amounts)
    image = torch.tensor(PIXELS).T[None, :, None]  # (1, 3, 1, 5)
    out = jitter(image * 2 - 1, brightness, contrast, torch.zeros(1)) / 2 + 0.5
    torch.testing.assert_close(out[0, :, 0].T, torch.tensor(AUGMAX[amounts]), rtol=0, atol=1e-5)


def test_drawn_colours_fill_their_limits_and_do_not_leave_them():
    grey = augment(repeated(picture(0.0, size=2), 2000), keys_of(2000), [False])[:, 0, 0, 0, 0] / 2 + 0.5
    furthest = (
        0.3 / 2 * math.tan(1.4 * math.pi / 4)
    )  # of middle grey: brightness and contrast at their limits
    assert 0.85 * furthest < (grey - 0.5).abs().max() < furthest
    assert (grey - 0.5).mean().abs() < 0.01

    red = picture(torch.tensor([0.5, 0.0, 0.0])[:, None, None], size=2)  # saturation ⅓
    red, green, blue = (augment(repeated(red, 2000), keys_of(2000), [False])[:, 0, :, 0, 0] / 2 + 0.5).T
    torch.testing.assert_close(green, blue)
    saturation = (red - green) / red * 3
    assert 0.5 < saturation.min() < 0.52
    assert 1.48 < saturation.max() < 1.5


def test_hue_stays_and_grey_stays_grey():
    before = noise(3, 6, 6) * 0.2 + 0.4
    out = augment(repeated(picture(before, 0.1, size=6), 32), keys_of(32), [False, False])

    def hues(image: Tensor) -> Tensor:
        pixels = (image / 2 + 0.5).flatten(1).T.tolist()
        return torch.tensor([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])

    for after in out[:, 0]:
        assert ((hues(after) - hues(before) + 0.5) % 1 - 0.5).abs().max() < 1e-4
    assert (out[:, 1] == out[:, 1, :1]).all()


def test_values_stay_finite_and_within_their_range():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).T.reshape(3, 2, 4)
    extremes = corners.repeat(1, SIZE // 2, SIZE // 4)
    dark = -1 + 2e-3 * (noise(3, SIZE, SIZE) + 1)
    images = repeated(picture(extremes, dark, noise(3, SIZE, SIZE), 1.0), 100)
    for geometric in (True, False):
        out = augment(images, keys_of(100), [geometric] * 4)
        assert out.isfinite().all()
        assert out.abs().max() <= 1
        assert out.shape == images.shape


def test_bars_and_missing_cameras_stay_black_where_dark_things_are_brightened():
    wide, upright = noise(3, SIZE, SIZE), noise(3, SIZE, SIZE)
    wide[:, :5] = wide[:, -5:] = upright[..., :5] = upright[..., -5:] = -1
    wide[:, 20, 20] = -1
    sample = picture(wide, upright, -1.0)
    out = augment(repeated(sample, 64), keys_of(64), [False, False, False])
    assert (out[:, 0, :, :5] == -1).all()
    assert (out[:, 0, :, -5:] == -1).all()
    assert (out[:, 1, ..., :5] == -1).all()
    assert (out[:, 2] == -1).all()
    assert (out[:, 0, :, 20, 20] > -1).any()
    moved = augment(repeated(sample, 64), keys_of(64), [True, True, True])
    assert (moved[:, 0, :, 0, 20] == -1).all()
    assert (moved[:, 2] == -1).all()


def test_autocast_around_it_changes_nothing():
    images, keys = noise(4, 1, 3, SIZE, SIZE), keys_of(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(images, keys, [True])
    assert torch.equal(inside, augment(images, keys, [True]))


def test_bfloat16_images_are_computed_in_float32():
    images, keys = noise(4, 2, 3, SIZE, SIZE).bfloat16(), keys_of(4)
    assert torch.equal(
        augment(images, keys, [True, False]), augment(images.float(), keys, [True, False]).bfloat16()
    )


def test_the_host_never_waits_for_a_value():
    """Tensors without values: whoever asks for one fails."""
    images, keys = noise(4, 2, 3, SIZE, SIZE).to("meta"), keys_of(4).to("meta")
    assert augment(images, keys, [True, False]).shape == images.shape
    assert dropped_masks(torch.ones(4, 9, dtype=torch.bool, device="meta"), keys, 0.5).shape == (4, 9)


def test_it_is_one_graph_to_a_compiler():
    images, keys = noise(4, 2, 3, SIZE, SIZE), keys_of(4)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(images, keys, [True, False]), augment(images, keys, [True, False])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_prompts_are_dropped_as_often_as_asked_and_keep_their_first_token():
    mask = (torch.arange(12) < 7).expand(4000, -1)
    out = dropped_masks(mask, keys_of(4000), 0.2)
    dropped = out.sum(1) == 1
    assert 0.18 < dropped.float().mean() < 0.22
    assert out[:, 0].all()
    assert torch.equal(out[~dropped], mask[~dropped])


@pytest.mark.parametrize(("probability", "left"), [(0.0, 7), (1.0, 1)])
def test_no_prompt_or_every_prompt_is_dropped(probability, left):
    mask = (torch.arange(12) < 7).expand(100, -1)
    assert (dropped_masks(mask, keys_of(100), probability).sum(1) == left).all()


def test_which_prompts_are_dropped_has_nothing_to_do_with_the_images():
    keys = keys_of(2000)
    dropped = dropped_masks(torch.ones(2000, 2, dtype=torch.bool), keys, 0.5)[:, 1]
    rows = torch.linspace(-0.9, 0.9, 20)[:, None].expand(20, 20)
    out = augment(repeated(picture(rows, size=20), 2000), keys, [True])[:, 0, 0]
    turned_left = out[:, 10, 4] < out[:, 10, 16]
    bright = out[:, 10, 10] > 0
    table = torch.corrcoef(torch.stack((dropped, turned_left, bright)).float())
    assert table.triu(1).abs().max() < 0.08
