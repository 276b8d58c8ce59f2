"""Normalisation statistics: read from a checkpoint of any layout, and checked before they do harm."""

import json
import logging

import numpy as np
import torch
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors import safe_open
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config, Statistics
from lerobot_pi0.weights import WEIGHTS_FILE, CheckpointError, find_checkpoint

logger = logging.getLogger(__name__)

# Below this standard deviation or range (in the dataset's units) a dimension hardly moves, and noise in it is
# blown up.
NEARLY_CONSTANT = 1e-4
# What each mode normalises by: by the second, or by the second minus the first.
NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


def read_statistics(checkpoint: str, revision: str | None = None) -> Statistics:
    """A checkpoint's statistics: {"action": {"mean": …, "std": …}, "observation.state": {…}}.

    Sources: LeRobot's processor files; openpi's `assets/*/norm_stats.json`; the buffers of LeRobot up to 0.3.
    Raises CheckpointError when there are none.
    """
    folder = find_checkpoint(checkpoint, revision=revision)
    pipeline = folder / "policy_preprocessor.json"
    if pipeline.is_file():
        for step in json.loads(pipeline.read_text())["steps"]:
            if step.get("registry_name") == "normalizer_processor" and step.get("state_file"):
                with safe_open(folder / step["state_file"], framework="pt") as file:
                    names = file.keys()
                    return _nested({name: file.get_tensor(name) for name in names})
    assets = sorted(folder.glob("assets/**/norm_stats.json"))
    if len(assets) > 1:
        raise CheckpointError(
            f"'{checkpoint}' carries statistics of several robots "
            f"({', '.join(path.parent.name for path in assets)}): copy it and leave that of your robot in "
            "assets/, or train with --policy.statistics=dataset"
        )
    if assets:
        stats = json.loads(assets[0].read_text())["norm_stats"]
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
                for name in file.keys()  # noqa: SIM118 (no mapping)
                if name.startswith(("normalize_inputs.buffer_", "normalize_targets.buffer_"))
            }
        if buffers:
            return _nested(buffers)
    raise CheckpointError(
        f"'{checkpoint}' carries no normalisation statistics (no policy_preprocessor.json with a normalizer, "
        "no assets/*/norm_stats.json): train with --policy.statistics=dataset"
    )


def check_statistics(config: Pi0Config, statistics: Statistics, source: str) -> None:
    """Check the statistics of state and action that the config normalises by, and warn where they are tiny.

    `source` says where they are from, as in "the dataset". Raises ValueError for one that is missing or of
    another size than the robot's vector. LeRobot would pass the values on without normalising them, or fail
    in mid-batch.
    """
    for kind, key, feature, names in (
        ("STATE", OBS_STATE, config.robot_state_feature, config.state_feature_names),
        ("ACTION", ACTION, config.action_feature, config.action_feature_names),
    ):
        mode = config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or feature is None:
            continue
        low, high = NEEDED[mode]
        # numpy, because policies are built under torch's meta device.
        of = {name: np.asarray(value).ravel() for name, value in statistics.get(key, {}).items()}
        missing = [name for name in (low, high) if name not in of]
        if missing:
            raise ValueError(
                f"{source} has no {missing} of '{key}', which --policy.normalization_mapping needs ({kind}: "
                f"{mode.value}): compute them with lerobot-edit-dataset --operation.type=recompute_stats, or "
                "choose another mode"
            )
        if len(of[high]) != feature.shape[0]:
            raise ValueError(
                f"{source} has statistics of {len(of[high])} dimensions for '{key}', the robot has "
                f"{feature.shape[0]}: take the dataset's (--policy.statistics=dataset)"
            )
        spread = (of[high] if mode is NormalizationMode.MEAN_STD else of[high] - of[low]).tolist()
        flat = [i for i, value in enumerate(spread) if value < NEARLY_CONSTANT]
        if flat:
            logger.warning(
                "%s hardly moves in the data in: %s. Normalised, a difference of 0.01 there is a value of "
                "up to %.0e: leave such dimensions out of the dataset, or make sure that they stay as they "
                "are on the robot",
                key,
                ", ".join(f"{names[i] if names else i} ({spread[i]:.1e})" for i in flat),
                0.01 / (min(spread[i] for i in flat) + 1e-6),
            )


def _nested(flat: dict[str, Tensor]) -> Statistics:
    nested: Statistics = {}
    for name, value in flat.items():
        key, statistic = name.rsplit(".", 1)
        nested.setdefault(key, {})[statistic] = value
    return nested
