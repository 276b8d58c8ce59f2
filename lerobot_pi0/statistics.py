"""Normalisation statistics: where a run's are from, made fit to divide by, and checked before they do harm.

LeRobot normalises by `dataset.meta.stats`, and reads them after it has built the policy. So the policy leaves
there what `prepare_statistics` gives, and neither LeRobot's processors nor a fine-tune know of any others.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors import safe_open

from lerobot_pi0.configuration_pi0 import (
    ABSOLUTE_JOINTS,
    ActionLimits,
    Anchor,
    Pi0Config,
    Statistics,
    TrainingData,
)
from lerobot_pi0.weights import WEIGHTS_FILE, CheckpointError, find_checkpoint

logger = logging.getLogger(__name__)

# openpi adds this to each standard deviation and to each range.
EPSILON = 1e-6
# Below this standard deviation or range (in the dataset's units) a dimension hardly moves, and noise in it
# would be blown up: it is divided by the floor instead.
NEARLY_CONSTANT, FLOOR = 1e-4, 1e-2
# What each mode normalises by: by the second, or by the second minus the first.
NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

MOST_TASKS = 500  # instructions that a policy keeps of its data

_SAMPLES = 2**19  # that quantiles of relative actions are taken from
_BLOCK = 8192  # frames at once: what is computed of them stays in the processor's cache


class Prepared(dict[str, dict[str, Any]]):
    """Statistics fit to divide by as they are: epsilon and floor are in the deviations and upper ends.

    So normalising and unnormalising are exact inverses of one another. `raw`: the dataset's own.
    """

    def __init__(self, statistics: Statistics, raw: Statistics | None = None):
        super().__init__(statistics)
        self.raw: Statistics = raw or {}


def prepare_statistics(
    config: Pi0Config,
    dataset_stats: Statistics | None,
    dataset: Any = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
) -> Prepared:
    """The statistics that a run normalises by, all others of the dataset among them.

    `dataset`: its metadata, whose data is read if actions are relative. `checkpoint`: what training starts
    from, for `--policy.statistics=checkpoint`. Logs the three dimensions that get the largest values.
    Raises ValueError or CheckpointError where there are none that fit.
    """
    raw = dataset_stats.raw if isinstance(dataset_stats, Prepared) else dataset_stats or {}
    modes = _modes(config)
    data = dict(raw)
    if config.statistics == "checkpoint":
        if checkpoint is None:
            raise ValueError(
                "--policy.statistics=checkpoint, but training starts from random weights: name a checkpoint "
                "with --policy.path or --policy.pretrained_path, or set --policy.statistics=dataset"
            )
        chosen, source = read_statistics(checkpoint, revision), f"the checkpoint '{checkpoint}'"
        _check_kind(config, checkpoint, revision)
        if config.relative_actions:
            data.pop(ACTION, None)  # the dataset's are absolute
    else:
        if config.relative_actions and modes.get(ACTION) is not NormalizationMode.IDENTITY:
            data[ACTION] = _with_relative(config, raw.get(ACTION, {}), dataset)
        chosen, source = data, "the dataset"
    check_statistics(config, chosen, source)
    prepared = dict(raw)
    for key, mode in modes.items():
        of = chosen.get(key, raw.get(key))
        if mode is not NormalizationMode.IDENTITY and of is not None:
            ready = isinstance(chosen, Prepared) and key in chosen
            prepared[key] = of if ready else _prepare(config, key, of)
    _tell_largest(config, prepared, data)
    return Prepared(prepared, raw)


def read_statistics(checkpoint: str | Path, revision: str | None = None) -> Statistics:
    """A checkpoint's statistics: {"action": {"mean": …, "std": …}, "observation.state": {…}}.

    Sources: LeRobot's processor files, ours among them, whose statistics are prepared; openpi's
    `assets/*/norm_stats.json`; the buffers of LeRobot up to 0.3. Raises CheckpointError when there are none.
    """
    folder = find_checkpoint(checkpoint, revision=revision)
    pipeline = folder / "policy_preprocessor.json"
    if pipeline.is_file():
        for step in json.loads(pipeline.read_text())["steps"]:
            if step.get("registry_name") == "normalizer_processor" and step.get("state_file"):
                with safe_open(folder / step["state_file"], framework="np") as file:
                    found = _nested({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
                return Prepared(found) if step["config"].get("eps") == 0 else found
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
            keys[name]: {k: np.array(v) for k, v in of.items()} for name, of in stats.items() if name in keys
        }
    if (folder / WEIGHTS_FILE).is_file():
        with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
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
    """Check that there are the statistics of state and action that the config normalises by.

    `source` says where they are from, as in "the dataset". Raises ValueError for one that is missing or of
    another size than the robot's vector. LeRobot would pass the values on without normalising them, or fail
    in mid-batch.
    """
    modes = _modes(config)
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
            raise ValueError(
                f"{source} has no {missing} of '{key}', which --policy.normalization_mapping needs ({kind}: "
                f"{mode.value}): compute them with lerobot-edit-dataset --operation.type=recompute_stats, or "
                "choose another mode"
            )
        size = np.asarray(of[high]).size
        if size != feature.shape[0]:
            raise ValueError(
                f"{source} has statistics of {size} dimensions for '{key}', the robot has "
                f"{feature.shape[0]}: take the dataset's (--policy.statistics=dataset)"
            )


def check_first_batch(config: Pi0Config, statistics: Prepared, dataset: Any, batch: dict[str, Any]) -> None:
    """Check that a processed batch is normalised by these statistics, against the dataset's raw frames.

    `dataset` is its metadata. Without data on disk (streaming), or without `batch["index"]`, nothing can be
    checked. Raises ValueError that names the dimension that differs most, and both of its values.
    """
    if batch.get("index") is None or not _files(dataset):
        return
    indices = batch["index"].flatten().cpu().numpy()
    keys = [key for key in (OBS_STATE, ACTION) if key in dataset.features]
    frames = read_columns(dataset, keys, indices)
    if not frames:
        return
    rows = np.searchsorted(frames["index"], indices).clip(max=len(frames["index"]) - 1)
    known = frames["index"][rows] == indices
    worst, message = 0.0, ""
    for key in keys:
        gain, offset = _affine(config, statistics, key)
        raw = frames[key][rows].astype(np.float64) * gain
        wanted = raw + offset
        found = batch[key].detach().cpu().double().numpy()  # Apple's GPUs have no float64
        found = found[:, 0] if found.ndim == 3 else found
        # As close as float32 comes to it, and a little.
        tolerance = 1e-4 + 1e-6 * (np.abs(raw) + np.abs(offset))
        # What is no number differs most.
        error = np.nan_to_num(np.abs(found - wanted) / tolerance, nan=np.inf, posinf=np.inf)
        error[~known] = 0
        if error.max() > max(worst, 1.0):
            worst = error.max()
            i, j = np.unravel_index(error.argmax(), error.shape)
            message = (
                f"frame {indices[i]} has {found[i, j]:.6g} in '{_name(config, key, int(j))}' of '{key}'; "
                f"by this run's statistics it is {wanted[i, j]:.6g}"
            )
    if message:
        raise ValueError(
            f"the batch is not normalised by the statistics that this run computed: {message}. A resumed run "
            "needs the dataset and the settings that it began with. To go on with others, start a run from "
            "its last checkpoint: --policy.path=…/checkpoints/last/pretrained_model"
        )


def make_limits(config: Pi0Config, statistics: Prepared, dataset: Any) -> ActionLimits | None:
    """What actions the dataset has, for the chunk guard: from its frames on disk, or else its statistics,
    which say nothing of steps. None where neither says.
    """
    frames = {} if dataset is None else read_columns(dataset, [ACTION, "episode_index"])
    step = None
    if frames:
        actions, successive = frames[ACTION].astype(np.float64), ~_episode_borders(frames)[1:]
        low, high = actions.min(0), actions.max(0)
        if successive.any():
            step = np.abs(np.diff(actions, axis=0)[successive]).max(0).tolist()
    elif {"min", "max"} <= statistics.raw.get(ACTION, {}).keys():
        low, high = (np.asarray(statistics.raw[ACTION][name], np.float64).ravel() for name in ("min", "max"))
    else:
        return None
    gain, offset = _affine(config, statistics, ACTION)
    return ActionLimits(low.tolist(), high.tolist(), step, gain.tolist(), offset.tolist())


def describe_data(dataset: Any) -> TrainingData | None:
    """What a policy keeps of the dataset that it is trained on; None if it is not at hand."""
    if getattr(dataset, "tasks", None) is None:
        return None
    tasks = [str(task) for task in dataset.tasks.index]
    return TrainingData(float(dataset.fps), tasks if len(tasks) <= MOST_TASKS else [])


# Relative actions.


def relative_joints(config: Pi0Config) -> list[tuple[int, int]]:
    """The dimensions of actions that are relative, each with the state's dimension of the same name.

    Raises ValueError for a joint that the state does not have, and for names that are not there.
    """
    actions, states = config.action_feature_names, config.state_feature_names
    if not actions or not states:
        raise ValueError(
            "--policy.relative_actions=true finds each joint of the action in the state by its name, but the "
            f"dataset does not name each dimension of '{OBS_STATE if actions else ACTION}': write the names "
            "into its meta/info.json, or set --policy.relative_actions=false"
        )
    words = config.absolute_joints
    unknown = [word for word in words if not any(word.lower() in name.lower() for name in actions)]
    if unknown and words != list(ABSOLUTE_JOINTS):
        raise ValueError(f"--policy.absolute_joints names {unknown}, but the joints are {actions}")
    relative = [name for name in actions if not any(word.lower() in name.lower() for word in words)]
    if not relative:
        raise ValueError(
            f"--policy.relative_actions=true, but all joints are absolute: {actions} with "
            f"--policy.absolute_joints='{json.dumps(words)}'"
        )
    strangers = [name for name in relative if states.count(name) != 1 or actions.count(name) != 1]
    if strangers:
        everything = json.dumps([*(word for word in words if word not in unknown), *strangers])
        raise ValueError(
            f"--policy.relative_actions=true, but {strangers} of the action cannot be found in the state, "
            f"which is {states}. To let them be absolute: --policy.absolute_joints='{everything}'"
        )
    return [(actions.index(name), states.index(name)) for name in relative]


def make_anchor(config: Pi0Config, statistics: Prepared) -> Anchor | None:
    """What makes this config's relative actions absolute in normalised units; None if they are absolute."""
    return make_anchor_of(config, statistics, relative_joints(config)) if config.relative_actions else None


def make_anchor_of(config: Pi0Config, statistics: Prepared, joints: Sequence[tuple[int, int]]) -> Anchor:
    """What makes these dimensions of actions absolute, each relative to one of the state.

    With actions normalised as a · gain_a + offset_a, and offset_a of the relative ones, the normalised
    relative action is the normalised absolute one minus (raw state) · gain_a.
    """
    actions, states = [a for a, _ in joints], [s for _, s in joints]
    gain_of_action, _ = _affine(config, statistics, ACTION)
    gain_of_state, offset_of_state = _affine(config, statistics, OBS_STATE)
    gain = gain_of_action[actions] / gain_of_state[states]
    return Anchor(actions, states, gain.tolist(), (-offset_of_state[states] * gain).tolist())


def relative_statistics(
    actions: np.ndarray, states: np.ndarray, borders: np.ndarray, chunk_size: int
) -> dict[str, np.ndarray]:
    """Statistics (dims,) of all actions of all chunks, each minus the state that its chunk starts from.

    Actions and states (dims, frames), dimension i of the one belonging to dimension i of the other; `borders`
    are the frames at which an episode starts. Steps beyond an episode's end do not count. Exact, but for
    quantiles of more than about a million actions, which are those of evenly spread ones.
    """
    frames = actions.shape[1]
    starts = np.arange(frames)
    ends = np.append(borders, frames)[np.searchsorted(borders, starts, side="right")]
    total = int(np.minimum(ends - starts, chunk_size).sum())
    stride = -(-total // _SAMPLES)
    # Near the mean, so that sums of squares lose no digits.
    centre = (actions.mean(1, dtype=np.float64) - states.mean(1, dtype=np.float64))[:, None]
    sums, squares = np.zeros(len(actions)), np.zeros(len(actions))
    low, high = np.full(len(actions), np.inf), np.full(len(actions), -np.inf)
    samples, seen = [], 0
    for start in range(0, frames, _BLOCK):
        for step in range(chunk_size):
            stop = min(start + _BLOCK, frames - step)
            if start >= stop:
                break
            x = np.subtract(actions[:, start + step : stop + step], states[:, start:stop], dtype=np.float64)
            x -= centre
            inside = starts[start:stop] + step < ends[start:stop]
            x = x if inside.all() else x[:, inside]
            if not x.size:
                continue
            sums += x.sum(1)
            squares += np.einsum("ij,ij->i", x, x)
            np.minimum(low, x.min(1), out=low)
            np.maximum(high, x.max(1), out=high)
            samples.append(x[:, -seen % stride :: stride].copy())  # a view would keep all of x
            seen += x.shape[1]
    mean, centre = sums / total, centre[:, 0]
    quantiles = np.quantile(np.concatenate(samples, 1), list(QUANTILES.values()), axis=1) + centre
    return {
        "mean": mean + centre,
        "std": np.sqrt(np.maximum(squares / total - mean**2, 0)),
        "min": low + centre,
        "max": high + centre,
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def _with_relative(config: Pi0Config, absolute: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """The statistics of actions, those of relative joints computed from the dataset's frames."""
    joints = relative_joints(config)
    frames = {} if dataset is None else read_columns(dataset, [ACTION, OBS_STATE, "episode_index"])
    if not frames:
        raise ValueError(
            "--policy.relative_actions=true needs the statistics of relative actions, which are computed "
            "from the dataset's actions and states, and there are none on this disk: train without "
            "--dataset.streaming, or take the statistics of a checkpoint that was trained on relative "
            "actions (--policy.statistics=checkpoint)"
        )
    actions, states = (
        np.ascontiguousarray(frames[key][:, [joint[i] for joint in joints]].T)
        for i, key in enumerate((ACTION, OBS_STATE))
    )
    borders = np.flatnonzero(_episode_borders(frames))
    logger.info(
        "relative actions: %s; their statistics are computed from %d frames",
        ", ".join(_name(config, ACTION, action) for action, _ in joints),
        actions.shape[1],
    )
    found = {name: np.array(value, np.float64).ravel() for name, value in absolute.items()}
    size = frames[ACTION].shape[1]
    for name, values in relative_statistics(actions, states, borders, config.chunk_size).items():
        if name in found:
            found[name][[action for action, _ in joints]] = values
        elif len(joints) == size:
            found[name] = np.empty(size)
            found[name][[action for action, _ in joints]] = values
    return found


def _check_kind(config: Pi0Config, checkpoint: str | Path, revision: str | None) -> None:
    """Raises ValueError when a checkpoint's statistics are known to be of other actions than the config's."""
    file = find_checkpoint(checkpoint, revision=revision) / "config.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    wanted = [action for action, _ in relative_joints(config)] if config.relative_actions else []
    if saved.get("type") == "lerobot_pi0":
        same = wanted == (saved.get("anchor") or {"actions": []})["actions"]
    elif saved:
        same = bool(wanted) == bool(saved.get("use_relative_actions"))
    else:
        return  # openpi's do not say
    if not same:
        raise ValueError(
            f"the statistics of '{checkpoint}' are those of other actions: this run has "
            f"--policy.relative_actions={str(config.relative_actions).lower()} and "
            f"--policy.absolute_joints='{json.dumps(config.absolute_joints)}'. Set them as that checkpoint "
            "was trained, or take the dataset's statistics (--policy.statistics=dataset)"
        )


# What both need.


def _modes(config: Pi0Config) -> dict[str, NormalizationMode]:
    """How each feature is normalised."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return {
        key: config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        for key, feature in features.items()
    }


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
        if flat.any() and mode is _modes(config)[key]:
            logger.warning(
                "%s hardly moves in the data in: %s. There it is divided by %g, lest noise be blown up",
                key,
                ", ".join(
                    f"{_name(config, key, int(i))} ({spread.flat[i]:.1e})" for i in np.flatnonzero(flat)
                ),
                FLOOR,
            )
    return {name: value.astype(np.float32) for name, value in values.items()}


def _affine(config: Pi0Config, statistics: Statistics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset (dims,) of a feature's normalisation: x · gain + offset."""
    mode = _modes(config)[key]
    if mode is NormalizationMode.IDENTITY:
        feature = {**(config.input_features or {}), **(config.output_features or {})}[key]
        return np.ones(feature.shape[0]), np.zeros(feature.shape[0])
    low, high = (np.asarray(statistics[key][name], np.float64).ravel() for name in NEEDED[mode])
    if mode is NormalizationMode.MEAN_STD:
        return 1 / high, -low / high
    gain = 2 / (high - low)
    return gain, -low * gain - 1


def _tell_largest(config: Pi0Config, statistics: Statistics, data: Statistics) -> None:
    """Log where the data's ends, normalised, are farthest from zero: dimensions to look at in the data."""
    found = []
    for key, mode in _modes(config).items():
        if (
            mode is NormalizationMode.IDENTITY
            or key not in statistics
            or not {"min", "max"} <= {*data.get(key, ())}
        ):
            continue
        gain, offset = _affine(config, statistics, key)
        ends = [np.asarray(data[key][name], np.float64).ravel() * gain + offset for name in ("min", "max")]
        largest = np.abs(ends).max(0)
        found += [
            (value, f"{value:.1f} in {_name(config, key, i)} of {key}") for i, value in enumerate(largest)
        ]
    if found:
        found.sort(reverse=True)
        logger.info("largest normalised values in the data: %s", "; ".join(text for _, text in found[:3]))


def _name(config: Pi0Config, key: str, dimension: int) -> str:
    """What a dimension is called, or its number."""
    names = {ACTION: config.action_feature_names, OBS_STATE: config.state_feature_names}.get(key)
    return names[dimension] if names else str(dimension)


def _files(dataset: Any) -> list[Path]:
    """The files with a dataset's frames; none when it is streamed, and has metadata alone on this disk."""
    root = getattr(dataset, "root", None)
    return sorted(Path(root).glob("data/*/*.parquet")) if root else []


def read_columns(
    dataset: Any, columns: Sequence[str], indices: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns (frames, dims) of a dataset's frames on disk, all or some, and "index" (frames,), ascending.

    Empty when there are none.
    """
    filters = None if indices is None else [("index", "in", {int(i) for i in indices})]
    tables = [
        pyarrow.parquet.read_table(file, columns=[*columns, "index"], filters=filters)
        for file in _files(dataset)
    ]
    if not sum(table.num_rows for table in tables):
        return {}

    def array(name: str) -> np.ndarray:
        chunks = [chunk for table in tables for chunk in table.column(name).chunks]
        flat = [chunk.flatten() if hasattr(chunk, "flatten") else chunk for chunk in chunks]
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in flat])

    index = array("index")
    order = np.argsort(index, kind="stable")
    return {"index": index[order], **{name: array(name).reshape(len(index), -1)[order] for name in columns}}


def _episode_borders(frames: dict[str, np.ndarray]) -> np.ndarray:
    """Which frames (frames,) are the first of an episode, or come after a gap."""
    changes = (np.diff(frames["episode_index"][:, 0]) != 0) | (np.diff(frames["index"]) != 1)
    return np.append(True, changes)


def _nested(flat: dict[str, np.ndarray]) -> Statistics:
    """{"action.mean": …} → {"action": {"mean": …}}."""
    nested: Statistics = {}
    for name, value in flat.items():
        key, statistic = name.rsplit(".", 1)
        nested.setdefault(key, {})[statistic] = value
    return nested
