"""Cameras: each slot of the policy gets the picture that it was trained on, and the picture has content."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lerobot.utils.constants import OBS_IMAGES
from torch import Tensor

from lerobot_pi0.configuration_pi0 import (
    WRIST_WORDS,
    Pi0Config,
    assign_cameras,
    image_height_width,
    num_channels,
)
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import fit_to
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

DARK = 6 / 255  # mean of a picture: a lens cap, or a lamp that is off
FLAT = 4 / 255  # standard deviation of a picture: nothing on it
STILL = 0.5 / 255  # mean difference of two pictures: less than what compression changes
USED = 0.5  # of the square: wider than 2 : 1 leaves less
SHAPE = 0.05  # difference of height : width
MOVED = 0.05  # of a joint's range
# Settings of LeRobot's environments, and of ours.
NAMING = ("camera_name_mapping", "camera_name")
SIZING = ("observation_width", "observation_height", "image_size")


def slots_are_filled(inputs: Inputs) -> Iterator[Finding]:
    """The policy's cameras and the dataset's have the same names."""
    yield from _same_cameras(inputs, "dataset", inputs.recorded_cameras)


def robot_fills_slots(inputs: Inputs) -> Iterator[Finding]:
    """The policy's cameras and the robot's have the same names."""
    yield from _same_cameras(inputs, "robot", inputs.robot_cameras)


def environment_fills_slots(inputs: Inputs) -> Iterator[Finding]:
    """The policy's cameras and the environment's have the same names."""
    yield from _same_cameras(inputs, "environment", _of_environment(inputs))


def environment_shapes(inputs: Inputs) -> Iterator[Finding]:
    """The environment's pictures have the height : width that the policy was trained on."""
    yield from _shapes(inputs, "environment", _of_environment(inputs))


def _of_environment(inputs: Inputs) -> dict[str, tuple[int, int]]:
    return {key: image_height_width(images.shape[1:]) for key, images in inputs.opened_env.cameras.items()}


def _same_cameras(inputs: Inputs, whose: str, there: dict[str, tuple[int, int]]) -> Iterator[Finding]:
    wanted = inputs.config.cameras
    missing = {slot: key for slot, key in wanted.items() if key not in there}
    spare = [key for key in there if key not in wanted.values()]
    if missing:
        # As in training, which lerobot-eval does not go by; or in order, a guess: people have to look at it.
        trained = {key: inputs.rename_map.get(key) for key in spare}
        known = {key: name for key, name in trained.items() if name in missing.values()}
        guess = json.dumps(known or dict(zip(spare, missing.values(), strict=False)))
        rename = f"--rename_map='{guess}' if these are the same views"
        first = _short(next(iter(missing.values())))
        others = {
            "robot": f"name the robot's cameras as they were recorded: --robot.cameras='{{{first}: …}}'",
            "environment": f"name them as they were recorded, by {_flags(inputs, NAMING)}",
            "dataset": "train on this dataset's cameras (a new run with --policy.cameras)",
        }
        yield error(
            f"the {whose} has no picture for {listed(f'slot {slot}' for slot in missing)}",
            f"the policy looks at {listed(wanted.values())}; the {whose} has {listed(there) or 'no camera'}",
            (f"{rename}, or " if spare else "") + others[whose],
        )
    elif spare:
        yield note(
            f"the policy does not look at {listed(spare)}",
            f"its slots: {_slots(wanted)}",
        )
    else:
        yield fine(f"{whose}: {_slots(wanted)}")


def slots_fit_names(inputs: Inputs) -> Iterator[Finding]:
    """No wrist camera in the base slot, no left one in the right slot, by their names."""
    cameras = inputs.config.cameras
    wrong = []
    for slot, key in cameras.items():
        name = _short(key).lower()
        if slot == "base" and any(word in name for word in WRIST_WORDS):
            wrong.append(f"slot base is given '{key}', a wrist camera by its name")
        for side, other in (("left", "right"), ("right", "left")):
            if side in slot and other in name and side not in name:
                wrong.append(f"slot {slot} is given '{key}', of the {other} by its name")
    if wrong:
        right = assign_cameras(list(cameras.values()), {})
        fix = f"train with --policy.cameras='{json.dumps(right)}'" if right != cameras else "see the pictures"
        yield warning(
            "a camera stands in a slot that its name does not fit", listed(wrong), f"{fix} (--output=FOLDER)"
        )


def features_fit(inputs: Inputs) -> Iterator[Finding]:
    """The dataset has a camera, a state and an action that a policy can be made for."""
    assert inputs.metadata is not None
    try:
        fit_to(Pi0Config(device="cpu"), inputs.metadata)
    except ValueError as reason:
        yield error("a policy cannot be made for this dataset", str(reason), "record what is missing")


def cameras_are_rgb(inputs: Inputs) -> Iterator[Finding]:
    """Every camera has three channels; depth maps are not used."""
    assert inputs.metadata is not None
    depth = set(getattr(inputs.metadata, "depth_keys", ()))
    used = inputs.config.cameras.values()
    for key, feature in inputs.metadata.features.items():
        channels = num_channels(feature["shape"])
        if feature["dtype"] not in ("image", "video") or channels == 3:
            continue
        what = "a depth map" if key in depth else f"{channels} channels" if channels else "no channels"
        rgb = list(inputs.recorded_cameras)
        say = error if inputs.rename_map.get(key, key) in used else note
        yield say(
            f"the camera '{key}' has {what}, and the policy takes RGB pictures"
            + ("" if say is error else ": it is left out"),
            f"its shape is {tuple(feature['shape'])}",
            f"--policy.cameras='{json.dumps(assign_cameras(rgb, {}))}' leaves it out"
            if rgb
            else "record an RGB camera",
        )


def dataset_shapes(inputs: Inputs) -> Iterator[Finding]:
    """The dataset's pictures have the height : width that the policy was trained on."""
    yield from _shapes(inputs, "dataset", inputs.recorded_cameras)


def robot_shapes(inputs: Inputs) -> Iterator[Finding]:
    """The robot's pictures have the height : width that the policy was trained on."""
    yield from _shapes(inputs, "robot", inputs.robot_cameras)


def _shapes(inputs: Inputs, whose: str, there: dict[str, tuple[int, int]]) -> Iterator[Finding]:
    for key, trained in inputs.policy_cameras.items():
        if key not in there or there[key] == trained:
            continue
        (h, w), (th, tw) = there[key], trained
        if abs((h / w) / (th / tw) - 1) > SHAPE:
            yield warning(
                f"the {whose}'s '{key}' has another shape than in training",
                f"{w}×{h} (width × height), trained on {tw}×{th}: letterboxed, things have another size "
                "and place",
                {
                    "robot": f"record with {tw}×{th} (width and height in --robot.cameras)",
                    "environment": f"give it {tw}×{th}, by {_flags(inputs, SIZING)}",
                    "dataset": f"record with {tw}×{th}, or train on this data",
                }[whose],
            )
        else:
            yield note(f"the {whose}'s '{key}' is {w}×{h}, in training {tw}×{th}: the same shape")


def squares_are_used(inputs: Inputs) -> Iterator[Finding]:
    """Pictures are not so wide that most of the model's square stays black."""
    size = inputs.config.vision.image_size
    for key, (height, width) in inputs.recorded_cameras.items():
        used = min(height, width) / max(height, width)
        if used < USED:
            yield warning(
                f"'{key}' fills {used:.0%} of the square that the model sees",
                f"{width}×{height} becomes {int(size * min(1, width / height))}×"
                f"{int(size * min(1, height / width))} of {size}×{size}; the rest is black",
                "record a picture nearer to a square, or crop it before recording",
            )


def pictures_show_something(inputs: Inputs) -> Iterator[Finding]:
    """No picture is black or of one colour."""
    for key, images in inputs.pictures_of(inputs.frames).items():
        mean, spread = images.mean((1, 2, 3)), images.std((2, 3)).amax(1)
        dark, flat = mean < DARK, spread < FLAT
        where = _where(inputs, dark | flat)
        if (share := (dark | flat).float().mean().item()) > 0:
            yield error(
                f"'{key}' is {'black' if dark.any() else 'of one colour'} in {share:.0%} of the pictures",
                f"{where}; mean brightness {mean[dark | flat].mean() * 255:.0f} of 255",
                "look at it with `lerobot-dataset-viz`; drop these episodes (`lerobot-edit-dataset "
                "--operation.type=delete_episodes`), or record again (lens cap, exposure, cable)",
            )


def pictures_change(inputs: Inputs) -> Iterator[Finding]:
    """No camera stands still while the robot moves."""
    states = torch.stack([frame["observation.state"] for frame in inputs.frames]).numpy()
    span = np.ptp(inputs.columns.state, axis=0)
    moves = np.abs(np.diff(states, axis=0)) > MOVED * np.maximum(span, 1e-9)
    moves &= span > 0
    episodes = torch.stack([frame["episode_index"] for frame in inputs.frames]).numpy()
    pairs = np.flatnonzero(moves.any(1) & (np.diff(episodes) == 0))
    pictures, frozen = inputs.pictures_of(inputs.frames), False
    for key, images in pictures.items():
        still = [int(i) for i in pairs if (images[i + 1] - images[i]).abs().mean() < STILL]
        if still:
            frozen = True
            yield (error if len(still) * 2 >= len(pairs) else warning)(
                f"'{key}' is frozen: it shows the same picture while the robot moves",
                f"in {len(still)} of {len(pairs)} pairs of pictures, as in {_place(inputs, still[0])} and "
                f"{_place(inputs, still[0] + 1)}",
                "drop these episodes and record again: the camera or its cable stopped giving pictures",
            )
    if pictures and not frozen:  # nor dark, which is asked before
        shown = "light and moving" if len(pairs) else "light"
        yield fine(f"{len(inputs.frames)} pictures of each camera decoded: {shown}")


def pictures_differ(inputs: Inputs) -> Iterator[Finding]:
    """No two cameras show the same picture."""
    pictures = inputs.pictures_of(inputs.frames)
    for (a, one), (b, other) in itertools.combinations(pictures.items(), 2):
        if one.shape == other.shape and (one - other).abs().mean() < STILL:
            yield error(
                f"'{a}' and '{b}' show the same picture",
                f"their mean difference is {(one - other).abs().mean() * 255:.2f} of 255",
                "both names point at one camera (index_or_path of --robot.cameras): record again",
            )


def contact_sheet(inputs: Inputs, file: Path) -> None:
    """What the model sees, letterboxed: a row for each slot, a column for each episode decoded.

    Raises ValueError for a dataset without cameras, and what decoding raises.
    """
    from PIL import Image, ImageDraw

    size, caption = inputs.config.vision.image_size, 16
    tile = max(size, 160)
    pictures = inputs.pictures_of(inputs.frames)
    slots = {slot: key for slot, key in inputs.config.cameras.items() if key in pictures}
    slots |= {_short(key): key for key in pictures if key not in slots.values()}
    if not slots:
        raise UserError("the dataset has no camera")
    # One of each episode, each a little later in it.
    episodes = torch.stack([frame["episode_index"] for frame in inputs.frames])
    firsts = [int((episodes == episode).nonzero()[0]) for episode in episodes.unique()]
    shown = [min(first + i, len(episodes) - 1) for i, first in enumerate(firsts)]
    page = Image.new("RGB", (tile * len(shown), (tile + caption) * len(slots)), "white")
    draw = ImageDraw.Draw(page)
    for row, (slot, key) in enumerate(slots.items()):
        top = row * (tile + caption)
        draw.text((4, top + 2), f"{slot} <- {key}, {size} x {size}", fill="black")
        for column, i in enumerate(shown):
            square = (letterbox(pictures[key][i : i + 1], size)[0] * 255).round().byte()
            picture = Image.fromarray(square.permute(1, 2, 0).numpy())
            page.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (column * tile, top + caption))
    page.save(file)


def _where(inputs: Inputs, wrong: Tensor) -> str:
    episodes = sorted({int(inputs.frames[i]["episode_index"]) for i in wrong.nonzero().flatten().tolist()})
    return f"in episodes {listed(episodes)} of those decoded"


def _place(inputs: Inputs, i: int) -> str:
    frame = inputs.frames[i]
    return f"episode {int(frame['episode_index'])}, frame {int(frame['frame_index'])}"


def _flags(inputs: Inputs, names: tuple[str, ...]) -> str:
    """Those of the flags that the environment has."""
    there = [f"--env.{name}" for name in names if hasattr(inputs.env, name)]
    return " and ".join(there) or "another --env.type"


def _slots(cameras: dict[str, str]) -> str:
    return ", ".join(f"{slot} ← {key}" for slot, key in cameras.items())


def _short(key: str) -> str:
    return key.removeprefix(f"{OBS_IMAGES}.").removeprefix("observation.")
