"""Golden actions: what a saved policy did with a fixed input, to be done again wherever it is loaded.

A checkpoint outlives the versions that it was made with, and a change in any of them shows in no error but in
a robot that does worse. So the folder carries the actions that the policy gave when it was saved, with the
versions of that moment, and the first load in another environment compares. The input
(`fixed_input`) covers resizing, prompt, state and noise; a few kilobytes in all.
"""

import contextlib
import hashlib
import logging
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch
from lerobot.utils.constants import HF_LEROBOT_HOME
from safetensors.torch import save_file
from torch import Tensor

from lerobot_pi0.checkpoints.reading import open_safetensors
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.model.flow import Solver
from lerobot_pi0.training.randomness import normal_of

logger = logging.getLogger(__name__)

GOLDEN_ACTIONS_FILE = "golden_actions.safetensors"
# Root mean square of the difference, over that of the actions or over 1: beyond it, it is no rounding. In
# bfloat16 two right compilations of openpi's code differ by 0.03.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
_STEPS, _SOLVER = "inference_steps", "solver"
_MOST_STEPS = 1000  # a damaged file must not make loading take hours

# (processed batch of one, noise (1, chunk, padded), steps, solver) → normalized (1, chunk, action size)
Predict = Callable[[dict[str, Tensor], Tensor, int, Solver], Tensor]


def fixed_input(config: Pi0Config) -> tuple[dict[str, Tensor], Tensor]:
    """A processed batch of one and its noise (1, chunk, padded), always the same for the same sizes."""
    size = config.vision.image_size
    noise = normal_of("noise", config.chunk_size * config.max_action_dim)
    batch = config.example_observation(image_size=(size * 3 // 2, size))  # neither square nor the camera's
    return batch, noise.view(1, config.chunk_size, config.max_action_dim)


def golden_actions(
    config: Pi0Config, predict: Predict, inference_steps: int | None = None, solver: Solver | None = None
) -> Tensor:
    """A chunk (steps, action size) for the fixed input, normalized: float32, on the CPU.

    `predict` runs the network as it is written down (`Pi0Policy.predict_with_network`): that needs no other
    layout of the weights, so it fits where the policy does, in the middle of training too.
    """
    steps = inference_steps or config.num_inference_steps
    with without_tf32():
        return predict(*fixed_input(config), steps, solver or config.solver)[0].float().cpu().contiguous()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 products and convolutions in float32 on a GPU too, whatever is set: torch's default for
    convolutions and `lerobot-train` round their factors to 10 bits (TF32), an error as large as the
    tolerance."""
    backends: Any = torch.backends
    parts = backends.cuda.matmul, backends.cudnn.conv
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def write_golden_actions(folder: Path, config: Pi0Config, predict: Predict, device: torch.device) -> None:
    """Leave the golden actions in a checkpoint's folder, with the versions and the device of now.

    Actions that are NaN or infinite are no measure of any: they are warned about, and not written.
    """
    actions = golden_actions(config, predict)
    if not actions.isfinite().all():
        logger.warning(
            "THIS POLICY'S ACTIONS ARE NaN OR INFINITE, though its weights are finite. %s is saved without "
            "golden actions; do not run it on a robot",
            folder,
        )
        return
    metadata = _environment(config, device)
    metadata |= {_STEPS: str(config.num_inference_steps), _SOLVER: config.solver}
    unfinished = folder / f"{GOLDEN_ACTIONS_FILE}.unfinished"
    save_file({"actions": actions}, unfinished, metadata=metadata)
    unfinished.replace(folder / GOLDEN_ACTIONS_FILE)


def check_golden_actions(
    folder: Path, config: Pi0Config, predict: Predict, device: torch.device
) -> float | None:
    """Compare the golden actions in a policy's folder with those that it gives here, and warn of a change.

    Returns their difference (see TOLERANCE); None where there was nothing to do: no golden actions, the
    environment that wrote them, or one in which this policy was found to act the same before.
    """
    file = folder / GOLDEN_ACTIONS_FILE
    if not file.is_file():
        logger.info("%s has no golden actions: whether it acts as when it was saved is not checked", folder)
        return None
    try:
        with open_safetensors(file) as opened:
            recorded, wanted = opened.metadata() or {}, opened.get_tensor("actions")
        steps, solver = recorded.pop(_STEPS, ""), recorded.pop(_SOLVER, "euler")  # before there were others
        known = steps.isdecimal() and 0 < int(steps) <= _MOST_STEPS and solver in get_args(Solver)
        if not known or wanted.dtype != torch.float32:
            raise CheckpointError(
                f"{file} is damaged ({_STEPS}={steps!r}, {_SOLVER}={solver!r}, actions in {wanted.dtype})"
            )
    except CheckpointError as error:
        logger.warning("whether this policy acts as it did when it was saved is not known: %s", error)
        return None
    here = _environment(config, device)
    if recorded == here:
        return None
    passed = HF_LEROBOT_HOME / "lerobot_pi0" / "golden_actions" / _key(wanted, here)
    if passed.is_file():
        return None
    found = golden_actions(config, predict, int(steps), cast(Solver, solver))
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
    tolerance = max(TOLERANCE.get(recorded.get("dtype", ""), TOLERANCE["bfloat16"]), TOLERANCE[here["dtype"]])
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
            "differ by %.2g (root mean square, relative; at most %.2g in one normalized number), where %.2g "
            "would be rounding. What changed: %s. Do not run it on a robot before you know why: install the "
            "versions of %s, or evaluate it in a simulator",
            difference,
            (found - wanted).abs().max().item(),
            tolerance,
            changes or "nothing that is recorded",
            file,
        )
    return difference


def _environment(config: Pi0Config, device: torch.device) -> dict[str, str]:
    """What may change how a policy acts, other than its weights."""
    kind = device.type
    return {
        **{name: version(name) for name in ("lerobot_policy_pi0", "lerobot", "torch")},
        "device": f"{kind} ({platform.machine()})" if kind == "cpu" else kind,
        "dtype": config.dtype,
    }


def _key(wanted: Tensor, environment: dict[str, str]) -> str:
    """Identifies a policy in an environment."""
    text = repr(sorted(environment.items())).encode()
    return hashlib.blake2b(wanted.numpy().tobytes() + text, digest_size=16).hexdigest()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
