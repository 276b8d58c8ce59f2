"""Golden actions: what a saved policy did with a fixed input, to be done again wherever it is loaded.

A checkpoint outlives the versions that it was made with, and a change in any of them shows in no error but in
a robot that does worse. So the folder carries the actions that the policy gave when it was saved, with the
versions of that moment, and the first load in another environment compares. The input is made by SHAKE-256,
which no release of a library changes, and covers resizing, prompt, state and noise; a few kilobytes in all.
"""

import contextlib
import hashlib
import logging
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lerobot.configs import PolicyFeature
from lerobot.utils.constants import (
    HF_LEROBOT_HOME,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lerobot_pi0.training.fsdp import is_sharded

logger = logging.getLogger(__name__)

CERTIFICATE_FILE = "golden_actions.safetensors"
# Root mean square of the difference, over that of the actions or over 1: beyond it, it is no rounding. In
# bfloat16 two right compilations of openpi's code differ by 0.03.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
_PROMPT_LENGTH = 8
_STEPS = "inference_steps"


def fixed_input(policy: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A processed batch of one and its noise, always the same for the same sizes."""
    config = policy.config
    device = policy.model.action_out_proj.weight.device
    size, rows = config.vision.image_size, config.vision.image_size * 3 // 2
    batch: dict[str, Any] = {
        camera: _bytes(camera, 3 * rows * size).view(1, 3, rows, size) for camera in config.cameras.values()
    }
    state_dim = cast(PolicyFeature, config.robot_state_feature).shape[0]
    ids = _bytes("prompt", 2 * _PROMPT_LENGTH).view(1, -1, 2).long()
    batch[OBS_STATE] = _normal("state", state_dim).view(1, -1)
    batch[OBS_LANGUAGE_TOKENS] = (ids[..., 0] * 256 + ids[..., 1]) % config.vlm.vocab_size
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(1, _PROMPT_LENGTH, dtype=torch.bool)
    noise = _normal("noise", config.chunk_size * config.max_action_dim)
    noise = noise.view(1, config.chunk_size, config.max_action_dim)
    return {key: value.to(device) for key, value in batch.items()}, noise.to(device)


@torch.no_grad()
def golden_actions(policy: Any, inference_steps: int) -> Tensor:
    """A chunk (steps, action size) for the fixed input, normalised, by the network as it is written down.

    It needs no other form of the weights, so it fits where the policy does, in the middle of training too.
    """
    batch, noise = fixed_input(policy)
    with torch.autocast(noise.device.type, enabled=False):
        actions = policy.model.sample(policy.observation(batch), noise, inference_steps)
    actions = actions[0, :, : cast(PolicyFeature, policy.config.action_feature).shape[0]]
    anchor = policy._anchor(batch)
    return (actions if anchor is None else actions + anchor).float().cpu().contiguous()


def write_certificate(policy: Any, folder: Path) -> None:
    """Leave the golden actions in a checkpoint's folder, those of the weights that evaluation sees.

    A policy that is sharded among processes (FSDP) leaves none: one of them alone cannot run it.
    """
    if is_sharded(policy):
        (folder / CERTIFICATE_FILE).unlink(missing_ok=True)  # of the weights that were here before
        return
    trains, steps = policy.training, policy.config.num_inference_steps
    actions = golden_actions(policy.eval(), steps)
    policy.train(trains)
    metadata = _environment(policy) | {_STEPS: str(steps)}
    unfinished = folder / f"{CERTIFICATE_FILE}.unfinished"
    save_file({"actions": actions}, unfinished, metadata=metadata)
    unfinished.replace(folder / CERTIFICATE_FILE)


def check_certificate(policy: Any, folder: Path) -> float | None:
    """Compare the golden actions in a policy's folder with those that it gives here, and warn of a change.

    Returns their difference (see TOLERANCE); None where there was nothing to do: no certificate, the
    environment that wrote it, or one in which this policy was found to act the same before.
    """
    file = folder / CERTIFICATE_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            recorded, wanted = opened.metadata() or {}, opened.get_tensor("actions")
        inference_steps = int(recorded.pop(_STEPS))
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged (%s): whether this policy acts as it did is not known", file, error)
        return None
    here = _environment(policy)
    if recorded == here:
        return None
    passed = HF_LEROBOT_HOME / "lerobot_pi0" / "golden_actions" / _key(wanted, here)
    if passed.is_file():
        return None
    found = golden_actions(policy, inference_steps)
    changes = ", ".join(
        f"{name} {recorded.get(name, 'unknown')} → {here[name]}"
        for name in here
        if recorded.get(name) != here[name]
    )
    if found.shape != wanted.shape:
        logger.warning(
            "the golden actions of %s are %s, those of the policy %s: its config was changed",
            folder,
            tuple(wanted.shape),
            tuple(found.shape),
        )
        return None
    difference = _rms(found - wanted) / max(_rms(wanted), 1.0)
    tolerance = max(TOLERANCE[recorded.get("dtype", "bfloat16")], TOLERANCE[here["dtype"]])
    if difference <= tolerance:
        logger.info(
            "golden actions: the same (to %.1e) as when it was saved; since then %s", difference, changes
        )
        with contextlib.suppress(OSError):  # where nothing can be written, it is compared again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    else:
        logger.warning(
            "THIS POLICY ACTS DIFFERENTLY FROM HOW IT DID WHEN IT WAS SAVED. For the same input its actions "
            "differ by %.2g (root mean square, relative; at most %.2g in one normalised number), where %.2g "
            "would be rounding. What changed: %s. Do not run it on a robot before you know why: install the "
            "versions of %s, or evaluate it in a simulator",
            difference,
            (found - wanted).abs().max().item(),
            tolerance,
            changes or "nothing that is recorded",
            file,
        )
    return difference


def _environment(policy: Any) -> dict[str, str]:
    """What may change how a policy acts, but for its weights."""
    device = policy.model.action_out_proj.weight.device.type
    return {
        **{name: version(name) for name in ("lerobot_policy_pi0", "lerobot", "torch")},
        "device": f"{device} ({platform.machine()})" if device == "cpu" else device,
        "dtype": policy.config.dtype,
    }


def _key(wanted: Tensor, environment: dict[str, str]) -> str:
    """What tells a policy in an environment from others."""
    text = repr(sorted(environment.items())).encode()
    return hashlib.blake2b(wanted.numpy().tobytes() + text, digest_size=16).hexdigest()


def _bytes(name: str, number: int) -> Tensor:
    """Evenly spread bytes that belong to a name: uint8 (number,)."""
    drawn = hashlib.shake_256(f"golden actions 1: {name}".encode()).digest(number)
    return torch.frombuffer(bytearray(drawn), dtype=torch.uint8)


def _normal(name: str, number: int) -> Tensor:
    """Numbers that belong to a name, all but normally distributed: float32 (number,)."""
    drawn = _bytes(name, 12 * number).view(number, 12).float()
    return (drawn.sum(1) - 12 * 127.5) / math.sqrt(12 * (256**2 - 1) / 12)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
