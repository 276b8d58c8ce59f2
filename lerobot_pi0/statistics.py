"""Normalisation statistics: read from a published checkpoint of any layout, and checked for dimensions that would explode."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lerobot_pi0.weights import WEIGHTS_FILE, CheckpointError, find_checkpoint

logger = logging.getLogger(__name__)

Statistics = dict[str, dict[str, Any]]
# Below this standard deviation or range (in the dataset's units) a dimension hardly moves, and noise in it is blown up.
NEARLY_CONSTANT = 1e-4


def read_statistics(checkpoint: str, revision: str | None = None) -> Statistics:
    """Statistics that a checkpoint was trained with: {"action": {"mean": …, "std": …}, "observation.state": {…}}.

    Sources: LeRobot's processor files; openpi's `assets/*/norm_stats.json`; the buffers of LeRobot up to 0.3.
    Raises CheckpointError when there are none.
    """
    folder = find_checkpoint(checkpoint, revision=revision)
    pipeline = folder / "policy_preprocessor.json"
    if pipeline.is_file():
        for step in json.loads(pipeline.read_text())["steps"]:
            if step.get("registry_name") == "normalizer_processor" and step.get("state_file"):
                with safe_open(folder / step["state_file"], framework="pt") as file:
                    return _nested({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118: no mapping
    for path in sorted(folder.glob("assets/**/norm_stats.json")):
        stats = json.loads(path.read_text())["norm_stats"]
        keys = {"state": "observation.state", "actions": "action"}
        return {
            keys[name]: {k: torch.tensor(v) for k, v in of.items()}
            for name, of in stats.items()
            if name in keys
        }
    if (folder / WEIGHTS_FILE).is_file():
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            buffers = {
                name.split(".buffer_", 1)[1].replace(
                    "observation_state", "observation.state"
                ): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118: no mapping
                if name.startswith(("normalize_inputs.buffer_", "normalize_targets.buffer_"))
            }
        if buffers:
            return _nested(buffers)
    raise CheckpointError(
        f"'{checkpoint}' carries no normalisation statistics (no policy_preprocessor.json with a normalizer, no "
        "assets/*/norm_stats.json): train with --policy.statistics=dataset"
    )


def warn_of_constant_dimensions(
    statistics: Statistics, names: dict[str, list[str] | None], mode: str
) -> None:
    """Log the dimensions of state and action that hardly move in the data: normalising divides by almost nothing.

    `names` gives the dimensions' names for each of the keys to check, `mode` is LeRobot's normalisation mode.
    """
    for key, dimensions in names.items():
        of = {name: torch.as_tensor(value) for name, value in statistics.get(key, {}).items()}
        low, high = {"MEAN_STD": (None, "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}.get(
            mode, (None, None)
        )
        if high not in of:
            continue
        spread = of[high] - (of[low] if low else 0)
        flat = [i for i, value in enumerate(spread.flatten().tolist()) if value < NEARLY_CONSTANT]
        if flat:
            called = [f"{dimensions[i] if dimensions else i} ({spread[i]:.1e})" for i in flat]
            logger.warning(
                "%s hardly moves in the data in: %s. Normalised, a difference of 0.01 there is a value of up to %.0e: "
                "leave such dimensions out of the dataset, or make sure that they stay as they are on the robot",
                key,
                ", ".join(called),
                0.01 / (min(spread[i].item() for i in flat) + 1e-6),
            )


def _nested(flat: dict[str, Tensor]) -> Statistics:
    nested: Statistics = {}
    for name, value in flat.items():
        key, statistic = name.rsplit(".", 1)
        nested.setdefault(key, {})[statistic] = value
    return nested
