"""Readers of π0 checkpoints of any layout: config, statistics, and tensors by our names (read lazily)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from draccus.utils import ParsingError
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from lerobot_pi0.checkpoints.files import Checkpoint, check_fit, find_checkpoint
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_json, read_steps
from lerobot_pi0.configuration_pi0 import CAMERA_SLOTS, Pi0Config, Statistics
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.conversion.orbax import PARAMS, OrbaxCheckpoint, find_params
from lerobot_pi0.data.normalization import EPSILON, NEEDED, NormalizationStatistics
from lerobot_pi0.data.relative_actions import reference_state_of
from lerobot_pi0.data.statistics import PREPROCESSOR, read_statistics, unnormalizer_differences
from lerobot_pi0.errors import CheckpointError, MissingFileError, UserError
from lerobot_pi0.lerobot_compat import parsing_failure_line
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Pi0, SiglipConfig

logger = logging.getLogger(__name__)

OURS, IN_TREE = "lerobot_pi0", "LeRobot's pi0"
LEROBOT_EPSILON = 1e-8  # LeRobot's normalizer adds this to deviations, and divides by it where a range is 0


@dataclass
class Policy:
    """A policy, independent of the layout it was read from."""

    layout: str
    folder: Path
    config: Pi0Config
    statistics: NormalizationStatistics | None
    tensors: Mapping[str, Tensor]  # by our names, each read when it is asked for
    meta: dict[str, Tensor]  # their shapes and dtypes
    rename: dict[str, str] = field(default_factory=dict)  # observations, before all else


@dataclass(frozen=True)
class _Source:
    """A checkpoint folder: its config.json, and its tensors by our names."""

    folder: Path
    saved: dict[str, Any]
    tensors: Mapping[str, Tensor]
    meta: dict[str, Tensor]


def read_policy(flags: ConvertConfig, scratch: Path) -> Policy:
    """The policy in the source; its tensors are read later. `scratch`: a folder for temporary files."""
    if "://" in flags.source:
        raise MissingFileError(
            f"{flags.source}: download it first, for example with gsutil -m cp -r {flags.source} FOLDER"
        )
    folder = Path(flags.source).expanduser()
    params = find_params(folder)
    if params is None:
        folder = find_checkpoint(flags.source, also=[f"{PARAMS}/*"])
        params = find_params(folder)
    if params is not None:
        root = folder if params != folder else folder.parent
        return _read_openpi_jax(root, OrbaxCheckpoint(params, scratch, flags.lora_alpha), flags)
    checkpoint, saved = Checkpoint(folder), _read_json(folder / "config.json")
    if checkpoint.head_differs():
        logger.warning(
            "the text head of %s differs from the embedding, to which it should be tied: the embedding is "
            "used, and the head is left out",
            flags.source,
        )
    meta = {name: tensor.to("meta") for name, tensor in checkpoint.items()}
    source = _Source(folder, saved, checkpoint, meta)
    if saved.get("type") in ("lerobot_pi0", "pi0"):
        _refuse_flags(flags)
    match saved.get("type"), saved.get("model_type"):
        case "lerobot_pi0", _:
            return _read_ours(source, flags)
        case "pi0", _:
            return _read_in_tree(source, flags)
        case None, "pi0":
            return _read_transformers(source, flags)
        case None, _:
            return _read_openpi_pytorch(source, flags)
    raise CheckpointError(f"'{flags.source}' is a policy of type '{saved.get('type')}', not π0")


def _refuse_flags(flags: ConvertConfig) -> None:
    """Raises ValueError for a flag about what a LeRobot policy says itself."""
    given = [
        name
        for name in ("cameras", "state_dim", "action_dim", "chunk_size", "delta_mask", "lora_alpha")
        if getattr(flags, name)
    ]
    if given:
        raise UserError(
            f"--{given[0]} says what openpi's checkpoints do not; '{flags.source}' is a LeRobot policy, "
            "whose config.json does: leave the flag out"
        )
    if flags.asset_id and flags.to != "openpi-pytorch":
        raise UserError(
            f"--asset_id={flags.asset_id} is a folder of openpi's, and neither '{flags.source}' nor the "
            "target is: leave the flag out"
        )


def _read_ours(source: _Source, flags: ConvertConfig) -> Policy:
    folder = source.folder
    if flags.to == "lerobot_pi0" and (flags.tokenizer or not flags.statistics):
        given = "--tokenizer" if flags.tokenizer else "--statistics=false"
        raise UserError(
            f"'{flags.source}' is a policy of ours already and keeps its processors: leave {given} out"
        )
    try:
        config = cast(Pi0Config, Pi0Config.from_pretrained(folder))
    except (ValueError, ParsingError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read ({parsing_failure_line(error)}): copy or "
            "download it again, or install the version that wrote it"
        ) from error
    config.dtype, config.tokenizer = flags.dtype or config.dtype, flags.tokenizer or config.tokenizer
    check_fit(_network(config), source.meta)
    statistics = _statistics(folder, config, flags, LEROBOT_EPSILON)
    return Policy(OURS, folder, config, statistics, source.tensors, source.meta, _rename_map(folder))


def _read_in_tree(source: _Source, flags: ConvertConfig) -> Policy:
    """LeRobot's own π0, of today or up to 0.3: the file of its config is read, since its class changes."""
    folder, saved = source.folder, source.saved
    if saved.get("adapt_to_pi_aloha"):
        raise UserError(
            f"{folder} was trained with adapt_to_pi_aloha, which turned the joints of ALOHA into those of "
            "openpi's: LeRobot itself no longer does, and neither does this policy"
        )
    needed = ("chunk_size", "n_action_steps", "tokenizer_max_length", "normalization_mapping")
    if missing := [name for name in needed if name not in saved]:
        raise CheckpointError(f"{folder / 'config.json'} has no {missing}: {COPY_AGAIN}")
    features = {
        name: PolicyFeature(FeatureType(of["type"]), tuple(of["shape"]))
        for name, of in {**saved.get("input_features", {}), **saved.get("output_features", {})}.items()
    }
    cameras = [
        name
        for name, of in features.items()
        if of.type is FeatureType.VISUAL and not name.startswith(f"{OBS_IMAGES}.empty_camera_")
    ]
    sizes = _sizes(source.meta, flags)
    state, action = features.get(OBS_STATE), features.get(ACTION)
    # In the order of the features: that is how they stand in its prefix.
    slots = [*CAMERA_SLOTS, *(name.removeprefix(f"{OBS_IMAGES}.") for name in cameras[len(CAMERA_SLOTS) :])]
    config = _config(
        sizes,
        flags,
        cameras=dict(zip(slots, cameras, strict=False)),
        shapes={name: features[name].shape for name in cameras},
        state_dim=state.shape[0] if state else sizes["max_state_dim"],
        action_dim=action.shape[0] if action else sizes["max_action_dim"],
        chunk_size=saved["chunk_size"],
        n_action_steps=saved["n_action_steps"],
        num_inference_steps=saved.get("num_inference_steps", saved.get("num_steps", 10)),
        tokenizer_max_length=saved["tokenizer_max_length"],
        dtype=flags.dtype or saved.get("dtype", "float32"),
        normalization_mapping={
            key: NormalizationMode(mode) for key, mode in saved["normalization_mapping"].items()
        },
        action_feature_names=saved.get("action_feature_names"),
        device=saved.get("device"),
    )
    statistics = _statistics(folder, config, flags, LEROBOT_EPSILON)
    if saved.get("use_relative_actions"):
        names, words = saved.get("action_feature_names"), saved.get("relative_exclude_joints") or []
        size = cast(PolicyFeature, config.action_feature).shape[0]
        config.absolute_joints = words
        _make_relative(config, statistics, [i for i in range(size) if not is_absolute(names, i, words)])
    layout = IN_TREE if "paligemma_variant" in saved else "LeRobot's pi0 up to 0.3"
    return Policy(layout, folder, config, statistics, source.tensors, source.meta, _rename_map(folder))


def _read_openpi_pytorch(source: _Source, flags: ConvertConfig) -> Policy:
    dtype = flags.dtype or ("float32" if source.saved.get("precision") == "float32" else "bfloat16")
    return _read_openpi("openpi's PyTorch", source, flags, source.saved.get("action_horizon", 50), dtype)


def _read_openpi_jax(folder: Path, checkpoint: OrbaxCheckpoint, flags: ConvertConfig) -> Policy:
    layout = "openpi's JAX, LoRA merged" if checkpoint.has_lora else "openpi's JAX"
    source = _Source(folder, {}, checkpoint, checkpoint.meta())
    return _read_openpi(layout, source, flags, 50, flags.dtype or "bfloat16", checkpoint.heads())


def _read_transformers(source: _Source, flags: ConvertConfig) -> Policy:
    saved = source.saved
    try:
        text, vision = saved["vlm_config"]["text_config"], saved["vlm_config"]["vision_config"]
        heads = vision["num_attention_heads"], text["num_attention_heads"], text["num_key_value_heads"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source.folder / 'config.json'} has no {error}: {COPY_AGAIN}") from error
    dtype = flags.dtype or ("bfloat16" if saved.get("dtype") == "bfloat16" else "float32")
    chunk_size = saved.get("chunk_size", 50)
    return _read_openpi("transformers' π0", source, flags, chunk_size, dtype, heads)


def _read_openpi(
    layout: str,
    source: _Source,
    flags: ConvertConfig,
    chunk_size: int,
    dtype: str,
    heads: tuple[int, int, int] | None = None,
) -> Policy:
    """A checkpoint that knows nothing of a robot but its statistics."""
    folder, sizes = source.folder, _sizes(source.meta, flags, heads)
    raw = _openpi_statistics(folder, flags)
    dims = {key: len(np.ravel(of["mean"])) for key, of in raw.items()}
    cameras = {
        slot: name if name.startswith("observation.") else f"{OBS_IMAGES}.{name}"
        for slot, name in (flags.cameras or {slot: slot for slot in CAMERA_SLOTS}).items()
    }
    square = (3, sizes["vision"].image_size, sizes["vision"].image_size)
    horizon = flags.chunk_size or chunk_size
    config = _config(
        sizes,
        flags,
        cameras=cameras,
        shapes=dict.fromkeys(cameras.values(), square),
        state_dim=flags.state_dim or dims.get(OBS_STATE, sizes["max_state_dim"]),
        action_dim=flags.action_dim or dims.get(ACTION, sizes["max_action_dim"]),
        chunk_size=horizon,
        n_action_steps=horizon,
        dtype=dtype,
    )
    statistics = _fitting(config, raw, EPSILON, str(folder)) if raw else None
    if flags.delta_mask:
        mask = [on for n in flags.delta_mask for on in [n > 0] * abs(n)]
        _make_relative(config, statistics, [i for i, on in enumerate(mask) if on])
    return Policy(layout, folder, config, statistics, source.tensors, source.meta)


def _config(
    sizes: dict[str, Any],
    flags: ConvertConfig,
    *,
    cameras: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    state_dim: int,
    action_dim: int,
    **settings: Any,
) -> Pi0Config:
    config = Pi0Config(
        **sizes,
        **settings,
        cameras=cameras,
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, shapes[name]) for name in cameras.values()},
            OBS_STATE: PolicyFeature(FeatureType.STATE, (state_dim,)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))},
    )
    if flags.tokenizer:
        config.tokenizer = flags.tokenizer
    config.validate_features()
    return config


def _sizes(
    meta: Mapping[str, Tensor], flags: ConvertConfig, heads: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """The network's sizes, by the shapes of its tensors, which must all be there.

    `heads`: of the vision tower, the language model's queries and its keys; else they are those of the
    published sizes, all of which have one head of keys.
    """
    shape = {name: tuple(tensor.shape) for name, tensor in meta.items()}
    try:
        width, _, patch, _ = shape["vision.patch_embedding.weight"]
        keys = shape["vlm.layers.0.k_proj.weight"][0]
        queries = shape["vlm.layers.0.q_proj.weight"][0]
        vision_heads = (
            heads[0] if heads else flags.vision_heads or (16 if width == SiglipConfig().width else None)
        )
        if vision_heads is None:
            raise UserError(
                f"the vision tower is {width} wide, and the source does not "
                "say how many attention heads it has (SigLIP So400m is 1152 wide and has 16): "
                "--vision_heads=..."
            )
        num_kv_heads = heads[2] if heads else 1
        head_dim = keys // num_kv_heads
        vocab_size, vlm_width = shape["token_embedding.weight"]
        sizes: dict[str, Any] = {
            "vision": SiglipConfig(
                image_size=patch * isqrt(shape["vision.position_embedding"][0]),
                patch_size=patch,
                width=width,
                depth=_depth(shape, "vision"),
                mlp_dim=shape["vision.layers.0.up_proj.weight"][0],
                num_heads=vision_heads,
            ),
            "vlm": GemmaConfig(
                width=vlm_width,
                depth=_depth(shape, "vlm"),
                mlp_dim=shape["vlm.layers.0.up_proj.weight"][0],
                num_heads=queries // head_dim,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                vocab_size=vocab_size,
            ),
            "expert": ExpertConfig(
                width=shape["state_proj.weight"][0], mlp_dim=shape["expert.layers.0.up_proj.weight"][0]
            ),
            "max_state_dim": shape["state_proj.weight"][1],
            "max_action_dim": shape["action_in_proj.weight"][1],
        }
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no {error}: it is incomplete, or not π0") from error
    check_fit(_network(Pi0Config(**sizes)), meta)
    return sizes


def _depth(shapes: Mapping[str, Any], stack: str) -> int:
    return 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(f"{stack}.layers."))


def _network(config: Pi0Config) -> dict[str, Tensor]:
    """The network's tensors, without values."""
    sizes = config.vision, config.vlm, config.expert, config.max_state_dim, config.max_action_dim
    with torch.device("meta"):
        return Pi0(*sizes, torch.float32).state_dict()


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


# Statistics.


def _openpi_statistics(folder: Path, flags: ConvertConfig) -> Statistics:
    """openpi's own, of the robot that is asked for; empty where none are wanted."""
    if not flags.statistics:
        return {}
    files = {file.parent.relative_to(folder / "assets").as_posix(): file for file in _assets(folder)}
    if flags.asset_id is not None and flags.asset_id not in files:
        raise UserError(f"{folder} has no assets/{flags.asset_id}/norm_stats.json; it has {sorted(files)}")
    if len(files) != 1 and flags.asset_id is None:
        raise UserError(
            (
                f"{folder} has statistics of several robots: --asset_id=... chooses one of {sorted(files)}"
                if files
                else f"{folder} has no statistics (assets/<asset_id>/norm_stats.json): copy those of "
                "your robot "
                "there"
            )
            + ", and --statistics=false makes a checkpoint without, to be fine-tuned"
        )
    file = files[flags.asset_id or next(iter(files))]
    saved = _read_json(file).get("norm_stats", {})
    try:
        return {
            ours: {name: np.array(values, np.float64) for name, values in saved[theirs].items() if values}
            for theirs, ours in (("state", OBS_STATE), ("actions", ACTION))
        }
    except KeyError as error:
        raise CheckpointError(f"{file} has no statistics of {error}") from error


def _assets(folder: Path) -> list[Path]:
    return sorted(folder.glob("assets/**/norm_stats.json"))


def _statistics(
    folder: Path, config: Pi0Config, flags: ConvertConfig, epsilon: float
) -> NormalizationStatistics | None:
    """A LeRobot policy's own."""
    if not flags.statistics:
        return None
    try:
        found = read_statistics(folder)
    except CheckpointError as error:
        why = str(error) if (folder / PREPROCESSOR).is_file() else f"{folder} has no statistics"
        raise CheckpointError(
            f"{why}. --statistics=false converts without them; such a checkpoint has to be fine-tuned"
        ) from error
    statistics = _fitting(config, found, epsilon, str(folder))
    if differences := unnormalizer_differences(folder):
        raise CheckpointError(
            f"{folder}: actions are not unnormalised as they were normalised: {'; '.join(differences)}. The "
            f"processors' files are of different checkpoints, or damaged: {COPY_AGAIN}"
        )
    return statistics


def _fitting(config: Pi0Config, found: Statistics, epsilon: float, source: str) -> NormalizationStatistics:
    """Statistics that normalise as the source did: its epsilon in them, and no floor.

    openpi's statistics may be longer than the robot's vectors, and are cut. Raises ValueError for others.
    """
    features = {OBS_STATE: config.robot_state_feature, ACTION: config.action_feature}
    prepared: Statistics = {}
    for key, feature in features.items():
        size = cast(PolicyFeature, feature).shape[0]
        of = {name: np.ravel(np.asarray(value, np.float64)) for name, value in found.get(key, {}).items()}
        of = {name: value for name, value in of.items() if name != "count"}
        mode = config.normalization_mapping["STATE" if key == OBS_STATE else "ACTION"]
        if mode is NormalizationMode.IDENTITY:
            continue
        missing = [name for name in NEEDED.get(mode, ()) if name not in of]
        lengths = {len(value) for value in of.values()}
        if missing or any(length < size or (length > size and epsilon != EPSILON) for length in lengths):
            what = f"has no {missing}" if missing else f"has statistics of {sorted(lengths)} dimensions"
            flag = "state_dim" if key == OBS_STATE else "action_dim"
            raise UserError(
                f"{source} {what} for '{key}', and the robot has {size}: statistics of another robot? "
                f"--asset_id chooses among openpi's, --{flag} gives the size, --statistics=false does without"
            )
        prepared[key] = {
            name: value[:size].astype(np.float32)
            for name, value in (
                of if isinstance(found, NormalizationStatistics) else _with_epsilon(of, epsilon)
            ).items()
        }
        if not all(np.isfinite(value).all() for value in prepared[key].values()):
            raise UserError(f"{source}: the statistics of '{key}' hold NaN or infinite values")
    return NormalizationStatistics(prepared)


def _with_epsilon(of: dict[str, np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """Statistics to divide by as they are. openpi adds its epsilon always, LeRobot to ranges that are 0."""
    found = dict(of)
    for mode, (low, high) in NEEDED.items():
        if low not in of or high not in of:
            continue
        if mode is NormalizationMode.MEAN_STD:
            found[high] = of[high] + epsilon
        else:
            flat = of[high] == of[low]
            found[high] = of[high] + (epsilon if epsilon == EPSILON else np.where(flat, epsilon, 0.0))
    return found


def _make_relative(config: Pi0Config, statistics: NormalizationStatistics | None, joints: list[int]) -> None:
    """Let these dimensions of actions be relative to those of the state with the same number."""
    state = cast(PolicyFeature, config.robot_state_feature).shape[0]
    action = cast(PolicyFeature, config.action_feature).shape[0]
    if statistics is None:
        raise UserError("relative actions are made absolute by means of the statistics: --statistics=true")
    if joints and max(joints) >= min(state, action):
        raise UserError(
            f"dimension {max(joints)} of the action is relative, but the state has {state} and the action "
            f"{action} dimensions: --delta_mask, --state_dim or --action_dim is another robot's"
        )
    config.relative_actions = True
    config.reference_state = reference_state_of(config, statistics, [(i, i) for i in joints])


def is_absolute(names: list[str] | None, dimension: int, words: list[str]) -> bool:
    """Whether LeRobot's step leaves a dimension of the action as it is."""
    return bool(names) and any(str(word).lower() in str(names[dimension]).lower() for word in words if word)


def _rename_map(folder: Path) -> dict[str, str]:
    file = folder / PREPROCESSOR
    steps = read_steps(file) if file.is_file() else []
    return next((step["config"]["rename_map"] for step in steps if "rename_map" in step["config"]), {})
