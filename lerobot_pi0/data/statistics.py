"""Normalization statistics: where a run's are from, epsilon and floor applied, checked before they do harm.

LeRobot normalizes by `dataset.meta.stats`, and reads them after it has built the policy. So the policy leaves
there what `prepare_statistics` gives, and neither LeRobot's processors nor a fine-tune know of any others.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.checkpoints.files import WEIGHTS_FILE, find_checkpoint
from lerobot_pi0.checkpoints.processors import LARGEST, PIPELINES
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, open_safetensors, read_json, read_state, read_steps
from lerobot_pi0.configuration_pi0 import (
    Pi0Config,
    Statistics,
)
from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.data.frames import read_columns
from lerobot_pi0.data.normalization import (
    EPSILON,
    FLOOR,
    NEARLY_CONSTANT,
    NEEDED,
    QUANTILES,
    NormalizationStatistics,
    affine,
    dimension_name,
    normalization_modes,
)
from lerobot_pi0.data.relative_actions import relative_action_statistics, relative_joints
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.lerobot_compat import dataset_key

logger = logging.getLogger(__name__)

PREPROCESSOR, POSTPROCESSOR = PIPELINES


def prepare_statistics(
    config: Pi0Config,
    dataset_stats: Statistics | None,
    dataset: Any = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    episodes: Sequence[int] | None = None,
) -> NormalizationStatistics:
    """The statistics that a run normalizes by, all others of the dataset among them.

    `dataset`: its metadata, whose data is read if actions are relative, or quantiles are needed that its
    statistics do not have: all of it, or `episodes`.
    `checkpoint`: what training starts from, for `--policy.statistics=checkpoint`. Logs the three dimensions
    that get the largest values.
    Raises ValueError or CheckpointError where there are none that fit.
    """
    prepared_before = NormalizationStatistics.known(dataset_stats)
    raw = prepared_before.raw if prepared_before is not None else dataset_stats or {}
    _check_dimensions(config, dataset)
    modes = normalization_modes(config)
    data = dict(raw)
    if config.statistics == "checkpoint":
        if checkpoint is None:
            raise UserError(
                "--policy.statistics=checkpoint, but training starts from random weights: name a checkpoint "
                "with --policy.path or --policy.pretrained_path, or set --policy.statistics=dataset"
            )
        chosen, source = read_statistics(checkpoint, revision), f"the checkpoint '{checkpoint}'"
        _check_kind(config, checkpoint, revision)
        if config.relative_actions or config.adapt_to_pi:
            data.pop(ACTION, None)  # the dataset's are absolute
        if config.adapt_to_pi:
            data.pop(OBS_STATE, None)  # and those of other joints
    else:
        if config.adapt_to_pi:
            data |= _adapted_statistics(config, dataset, episodes)
        else:
            for key in modes.keys() & {OBS_STATE, ACTION}:
                data[key] = _with_quantiles(config, key, raw.get(key, {}), dataset, episodes)
        if config.relative_actions and modes.get(ACTION) is not NormalizationMode.IDENTITY:
            data[ACTION] = relative_action_statistics(config, data.get(ACTION, {}), dataset, episodes)
        chosen, source = data, "the dataset"
    check_statistics(config, chosen, source)
    prepared = dict(raw)
    for key, mode in modes.items():
        of = chosen.get(key, raw.get(key))
        if mode is not NormalizationMode.IDENTITY and of is not None:
            ready = isinstance(chosen, NormalizationStatistics) and key in chosen
            prepared[key] = of if ready else _prepare(config, key, of)
    _log_largest(config, prepared, data)
    return NormalizationStatistics(prepared, raw)


def read_statistics(checkpoint: str | Path, revision: str | None = None) -> Statistics:
    """A checkpoint's statistics: {"action": {"mean": …, "std": …}, "observation.state": {…}}.

    Sources: LeRobot's processor files, ours among them, whose statistics are prepared; openpi's
    `assets/*/norm_stats.json`; the buffers of LeRobot up to 0.3. Raises CheckpointError when there are none.
    """
    folder = find_checkpoint(checkpoint, revision=revision)
    if (found := processor_statistics(folder, PREPROCESSOR, "normalizer_processor")) is not None:
        return found
    assets = sorted(folder.glob("assets/**/norm_stats.json"))
    if len(assets) > 1:
        raise CheckpointError(
            f"'{checkpoint}' carries statistics of several robots "
            f"({', '.join(path.parent.name for path in assets)}): copy it and leave that of your robot in "
            "assets/, or train with --policy.statistics=dataset"
        )
    if assets:
        stats = read_json(assets[0]).get("norm_stats")
        keys = {"state": "observation.state", "actions": "action"}
        if not isinstance(stats, dict) or not all(isinstance(stats.get(name, {}), dict) for name in keys):
            raise CheckpointError(f"{assets[0]} has no 'norm_stats' of state and actions: {COPY_AGAIN}")
        return {
            keys[name]: {k: np.array(v) for k, v in of.items()} for name, of in stats.items() if name in keys
        }
    if (folder / WEIGHTS_FILE).is_file():
        with open_safetensors(folder / WEIGHTS_FILE, "np") as file:
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
        f"'{checkpoint}' carries no normalization statistics (no policy_preprocessor.json with a normalizer, "
        "no assets/*/norm_stats.json): train with --policy.statistics=dataset"
    )


def processor_statistics(folder: Path, pipeline: str, step_name: str) -> Statistics | None:
    """The statistics of a step of LeRobot's processors; None where there is no such step, or no state."""
    step = _processor_step(folder, pipeline, step_name)
    found = _nested(read_state(folder, step))
    return NormalizationStatistics(found) if found and step["config"].get("eps") == 0 else found or None


def unnormalizer_differences(folder: Path) -> list[str]:
    """How a checkpoint's unnormalizer is not the inverse of its normalizer, in words; empty if it is.

    Compares mode, epsilon and statistics of the action.
    """
    before = _processor_step(folder, PREPROCESSOR, "normalizer_processor")
    after = _processor_step(folder, POSTPROCESSOR, "unnormalizer_processor")
    one, other = (_nested(read_state(folder, step)).get(ACTION, {}) for step in (before, after))
    if not one:
        return []
    if not other:
        return [f"{POSTPROCESSOR} has no statistics of the action"]
    found = []
    for name in ("eps", "norm_map"):
        values = [step["config"].get(name) for step in (before, after)]
        if name == "norm_map":
            values = [value.get("ACTION") if isinstance(value, dict) else None for value in values]
        if values[0] != values[1]:
            found.append(f"{name} is {values[0]} in the normalizer, {values[1]} in the unnormalizer")
    for name, value in one.items():
        if name not in other:
            found.append(f"the unnormalizer has no action.{name}")
        elif value.shape != other[name].shape or not np.allclose(
            value, other[name], rtol=1e-4, equal_nan=True
        ):
            start = np.ravel(value)[:3], np.ravel(other[name])[:3]
            found.append(f"action.{name} is {start[0]} in the normalizer, {start[1]} in the unnormalizer")
    return found


def _processor_step(folder: Path, pipeline: str, name: str) -> dict[str, Any]:
    """A step as the pipeline's JSON file has it; without settings and state where there is none."""
    steps = read_steps(folder / pipeline) if (folder / pipeline).is_file() else []
    return next((step for step in steps if step.get("registry_name") == name), {"config": {}})


def _check_dimensions(config: Pi0Config, dataset: Any) -> None:
    """Raises UserError when the dataset is of a robot with other joints than the policy's features."""
    features = getattr(dataset, "features", {})
    for key, feature in ((OBS_STATE, config.robot_state_feature), (ACTION, config.action_feature)):
        found = features.get(dataset_key(key, features))
        if found is not None and feature is not None and tuple(found["shape"]) != tuple(feature.shape):
            raise UserError(
                f"'{key}' has {found['shape'][0]} dimensions in the dataset and {feature.shape[0]} "
                "in the policy: --policy.path keeps the features of its checkpoint. To train the same "
                "weights on another robot, replace it by "
                f"--policy.type={config.type} --policy.pretrained_path=CHECKPOINT, and give the "
                "checkpoint's other settings as flags (sizes, tokenizer: see its config.json)"
            )


def check_statistics(config: Pi0Config, statistics: Statistics, source: str) -> None:
    """Check that there are the statistics of state and action that the config normalizes by.

    `source` says where they are from, as in "the dataset". Raises UserError for one that is missing, of
    another size than the robot's vector, NaN or infinite. LeRobot would pass the values on without
    normalizing them, or fail in mid-batch.
    """
    modes = normalization_modes(config)
    for kind, key, feature in (
        ("STATE", OBS_STATE, config.robot_state_feature),
        ("ACTION", ACTION, config.action_feature),
    ):
        mode = modes.get(key, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or feature is None:
            continue
        low, high = NEEDED[mode]
        of = statistics.get(key, {})
        missing = [name for name in (low, high) if name not in of]
        if missing:
            raise UserError(
                f"{source} has no {missing} of '{key}', which --policy.normalization_mapping needs ({kind}: "
                f"{mode.value}): compute them with lerobot-edit-dataset --operation.type=recompute_stats, or "
                "choose another mode"
            )
        for name in (low, high):
            values = np.asarray(of[name], np.float64).ravel()  # JSON's null becomes NaN
            wrong = np.flatnonzero(~(np.abs(values) <= LARGEST))
            if bad := [dimension_name(config, key, int(i)) for i in wrong]:
                raise UserError(
                    f"{source} has a NaN or infinite {name} of '{key}' in {bad} (what is beyond {LARGEST:g} "
                    "counts as infinite). If it is a dataset, `lerobot-pi0 doctor` names the frames: correct "
                    "them, or delete their episodes (lerobot-edit-dataset --operation.type=delete_episodes), "
                    "and compute the statistics again (--operation.type=recompute_stats). If it is a "
                    "checkpoint, copy or download it again"
                )
        size = np.asarray(of[high]).size
        if size != feature.shape[0]:
            raise UserError(
                f"{source} has statistics of {size} dimensions for '{key}', the robot has "
                f"{feature.shape[0]}: compute the dataset's again (lerobot-edit-dataset "
                "--operation.type=recompute_stats) and take those (--policy.statistics=dataset)"
            )


def _with_quantiles(
    config: Pi0Config, key: str, of: dict[str, Any], dataset: Any, episodes: Sequence[int] | None
) -> dict[str, Any]:
    """Statistics of a feature with the quantiles that its mode needs.

    Where they are missing (in datasets from before LeRobot 0.4), or the config says so, they are those of the
    frames on this disk.
    """
    needed = {*NEEDED.get(normalization_modes(config)[key], ())}
    if dataset is None or not needed or not needed <= QUANTILES.keys():
        return of
    if not config.quantiles_of_frames and needed <= of.keys():
        return of
    if not (frames := read_columns(dataset, [key], episodes=episodes)):
        return of
    logger.info("quantiles of '%s' are computed from %d frames", key, len(frames[key]))
    values = np.quantile(frames[key].astype(np.float64), list(QUANTILES.values()), axis=0)
    return {**of, **dict(zip(QUANTILES, values, strict=True))}


def vector_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics (dims,) of the values (frames, dims) of a feature."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    ends = {"min": values.min(0), "max": values.max(0)}
    return {
        "mean": values.mean(0),
        "std": values.std(0),
        **ends,
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


# Other joints than the dataset's.


def _adapted_statistics(config: Pi0Config, dataset: Any, episodes: Sequence[int] | None) -> Statistics:
    """Those of state and actions in openpi's joints, from the dataset's frames."""
    frames = {} if dataset is None else read_columns(dataset, [OBS_STATE, ACTION], episodes=episodes)
    if not frames:
        raise UserError(
            "--policy.adapt_to_pi=true needs the statistics of openpi's joints, which are computed from the "
            "dataset's frames, and there are none on this disk: train without --dataset.streaming, or take "
            "the statistics of a checkpoint (--policy.statistics=checkpoint)"
        )
    logger.info(
        "the statistics of openpi's joints (adapt_to_pi) are computed from %d frames", len(frames["index"])
    )
    return {key: vector_statistics(policy_columns(config, frames)[key]) for key in (OBS_STATE, ACTION)}


# Relative actions.


def _check_kind(config: Pi0Config, checkpoint: str | Path, revision: str | None) -> None:
    """Raises ValueError when a checkpoint's statistics are known to be of other actions than the config's."""
    file = find_checkpoint(checkpoint, revision=revision) / "config.json"
    saved = read_json(file) if file.is_file() else {}
    wanted = [action for action, _ in relative_joints(config)] if config.relative_actions else []
    if saved.get("type") and bool(saved.get("adapt_to_pi")) != config.adapt_to_pi:
        raise UserError(
            f"the statistics of '{checkpoint}' are those of other joints: this run has "
            f"--policy.adapt_to_pi={str(config.adapt_to_pi).lower()}. Set it as that checkpoint was trained, "
            "or take the dataset's statistics (--policy.statistics=dataset)"
        )
    if saved.get("type") == config.type:
        same = wanted == (saved.get("reference_state") or saved.get("anchor") or {"actions": []})["actions"]
    elif saved.get("type"):
        same = bool(wanted) == bool(saved.get("use_relative_actions"))
    else:
        return  # openpi's do not say
    if not same:
        raise UserError(
            f"the statistics of '{checkpoint}' are those of other actions: this run has "
            f"--policy.relative_actions={str(config.relative_actions).lower()} and "
            f"--policy.absolute_joints='{json.dumps(config.absolute_joints)}'. Set them as that checkpoint "
            "was trained, or take the dataset's statistics (--policy.statistics=dataset)"
        )


# What both need.


def _prepare(config: Pi0Config, key: str, of: dict[str, Any]) -> dict[str, np.ndarray]:
    """Statistics of a feature with epsilon and floor, for all modes alike. Tells where the floor is used."""
    # numpy, because policies are built under torch's meta device.
    values = {name: np.asarray(value, np.float64) for name, value in of.items()}
    for mode, (low, high) in NEEDED.items():
        start = values.get(low) if mode is not NormalizationMode.MEAN_STD else 0.0
        if high not in values or start is None:
            continue
        spread = values[high] - start
        flat = spread < NEARLY_CONSTANT
        values[high] = start + np.where(flat, FLOOR, spread + EPSILON)
        if flat.any() and mode is normalization_modes(config)[key]:
            logger.warning(
                "%s hardly moves in the data in: %s. There it is divided by %g, lest noise be blown up",
                key,
                ", ".join(
                    f"{dimension_name(config, key, int(i))} ({spread.flat[i]:.1e})"
                    for i in np.flatnonzero(flat)
                ),
                FLOOR,
            )
    return {name: value.astype(np.float32) for name, value in values.items()}


def _log_largest(config: Pi0Config, statistics: Statistics, data: Statistics) -> None:
    """Log where the data's ends, normalized, are farthest from zero: dimensions to look at in the data."""
    found = []
    for key, mode in normalization_modes(config).items():
        if (
            mode is NormalizationMode.IDENTITY
            or key not in statistics
            or not {"min", "max"} <= {*data.get(key, ())}
        ):
            continue
        gain, offset = affine(config, statistics, key)
        ends = [np.asarray(data[key][name], np.float64).ravel() * gain + offset for name in ("min", "max")]
        largest = np.abs(ends).max(0)
        found += [
            (value, f"{value:.1f} in {dimension_name(config, key, i)} of {key}")
            for i, value in enumerate(largest)
        ]
    if found:
        found.sort(reverse=True)
        logger.info("largest normalized values in the data: %s", "; ".join(text for _, text in found[:3]))


def _nested(flat: dict[str, np.ndarray]) -> Statistics:
    """{"action.mean": …} → {"action": {"mean": …}}."""
    nested: Statistics = {}
    for name, value in flat.items():
        key, _, statistic = name.rpartition(".")
        nested.setdefault(key, {})[statistic] = value
    return nested
