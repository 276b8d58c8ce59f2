"""Readers of checkpoints of any layout: config, statistics, and tensors by our names (read lazily)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from lerobot_pi0.checkpoints.files import Checkpoint, check_fit, find_checkpoint
from lerobot_pi0.checkpoints.layouts import FAMILIES, PI0, PI05, Family
from lerobot_pi0.checkpoints.loading import read_config
from lerobot_pi0.checkpoints.published import TRAININGS, aloha_mask, as_flags, pi0_horizon, training_of
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_json, read_steps
from lerobot_pi0.configuration_pi0 import CAMERA_SLOTS, NUM_ALOHA_JOINTS, Pi0Config, Statistics
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.conversion.orbax import PARAMS, OrbaxCheckpoint, find_params
from lerobot_pi0.data.normalization import EPSILON, NEEDED, NormalizationStatistics
from lerobot_pi0.data.relative_actions import reference_state_of
from lerobot_pi0.data.statistics import (
    PREPROCESSOR,
    processor_statistics,
    read_statistics,
    unnormalizer_differences,
)
from lerobot_pi0.errors import CheckpointError, MissingFileError, UserError
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig

logger = logging.getLogger(__name__)

# Layouts, each of both models: this package's, and LeRobot's own as it is today.
OURS = tuple(family.type for family in FAMILIES)
IN_TREE = tuple(f"LeRobot's {family.in_tree}" for family in FAMILIES)
CONFIGS = {PI0: Pi0Config, PI05: Pi05Config}
LEROBOT_EPSILON = 1e-8  # LeRobot's normalizer adds this to deviations, and divides by it where a range is 0


@dataclass
class Policy:
    """A policy, independent of the layout it was read from."""

    layout: str
    family: Family
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
    family: Family
    saved: dict[str, Any]
    tensors: Mapping[str, Tensor]
    meta: dict[str, Tensor]

    @property
    def says_how_it_was_trained(self) -> bool:
        """Whether its config.json does: that of weights that others trained has LeRobot's defaults."""
        if self.saved.get("type") != self.family.in_tree:
            return self.saved.get("type") == self.family.type
        # LeRobot up to 0.3, whose statistics are among the weights, had π0 alone.
        return (self.family is PI0 and "paligemma_variant" not in self.saved) or (
            processor_statistics(self.folder, PREPROCESSOR, "normalizer_processor") is not None
        )


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
    source, family = _Source(folder, checkpoint.family, saved, checkpoint, meta), checkpoint.family
    if source.says_how_it_was_trained:
        _refuse_flags(flags)
    match saved.get("type"), saved.get("model_type"):
        case family.type, _:
            return _read_ours(source, flags)
        case family.in_tree, _ if source.says_how_it_was_trained:
            return _read_in_tree(source, flags)
        case family.in_tree, _:
            return _read_published_by_lerobot(source, flags)
        case None, "pi0":
            return _read_transformers(source, flags)
        case None, _:
            return _read_openpi_pytorch(source, flags)
    raise CheckpointError(f"'{flags.source}' is a policy of type '{saved.get('type')}', not {family.name}")


def _refuse_flags(flags: ConvertConfig) -> None:
    """Raises ValueError for a flag about what a LeRobot policy says itself."""
    vectors = "state_dim", "action_dim", "delta_mask", "norm_stats", "state_in_prompt", "adapt_to_pi"
    names = "cameras", "chunk_size", "lora_alpha", *vectors
    given = [name for name in names if getattr(flags, name) not in (None, {})]
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
    config = cast(Pi0Config, read_config(folder))
    config.dtype, config.tokenizer = flags.dtype or config.dtype, flags.tokenizer or config.tokenizer
    check_fit(_network(config), source.meta)
    statistics = _statistics(folder, config, flags, LEROBOT_EPSILON)
    return _policy(source.family.type, source, config, statistics)


def _read_in_tree(source: _Source, flags: ConvertConfig) -> Policy:
    """LeRobot's own, of today, or its π0 up to 0.3: the file of its config is read, as its class changes."""
    folder, saved = source.folder, source.saved
    if saved.get("adapt_to_pi_aloha"):
        raise UserError(
            f"{folder} was trained with adapt_to_pi_aloha, which turned the joints of ALOHA into those of "
            "openpi's, but grippers otherwise than openpi (and adapt_to_pi) does. LeRobot itself no longer "
            "has it, and neither does this policy: train openpi's weights with --policy.adapt_to_pi=true"
        )
    needed = ("chunk_size", "n_action_steps", "tokenizer_max_length", "normalization_mapping")
    if missing := [name for name in needed if name not in saved]:
        raise CheckpointError(f"{folder / 'config.json'} has no {missing}: {COPY_AGAIN}")
    features, cameras = _features(saved), _cameras(saved)
    sizes = _sizes(source.meta, flags)
    state, action = features.get(OBS_STATE), features.get(ACTION)
    config = _config(
        source,
        sizes,
        flags,
        cameras=cameras,
        shapes={name: features[name].shape for name in cameras.values()},
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
    layout = f"LeRobot's {source.family.in_tree}"
    if "paligemma_variant" not in saved:
        layout = f"{layout} up to 0.3"
    return _policy(layout, source, config, statistics)


def _features(saved: Mapping[str, Any]) -> dict[str, PolicyFeature]:
    """Those of a config of LeRobot's, with the names of its datasets."""
    both = {**saved.get("input_features", {}), **saved.get("output_features", {})}
    return {name: PolicyFeature(FeatureType(of["type"]), tuple(of["shape"])) for name, of in both.items()}


def _cameras(saved: Mapping[str, Any]) -> dict[str, str]:
    """The slots in the order of LeRobot's features: that is how they stand in its prefix."""
    names = [
        name
        for name, of in _features(saved).items()
        if of.type is FeatureType.VISUAL and not name.startswith(f"{OBS_IMAGES}.empty_camera_")
    ]
    slots = [*CAMERA_SLOTS, *(name.removeprefix(f"{OBS_IMAGES}.") for name in names[len(CAMERA_SLOTS) :])]
    return dict(zip(slots, names, strict=False))


def _read_published_by_lerobot(source: _Source, flags: ConvertConfig) -> Policy:
    """openpi's weights under LeRobot's names, as lerobot/pi05_base or lerobot/pi0_libero_base: the config is
    LeRobot's, and not what they were trained with."""
    flags = replace(flags, cameras=flags.cameras or _cameras(source.saved))
    dtype = flags.dtype or source.saved.get("dtype", "float32")
    return _read_openpi("openpi's, in LeRobot's layout", source, flags, None, dtype)


def _read_openpi_pytorch(source: _Source, flags: ConvertConfig) -> Policy:
    dtype = flags.dtype or ("float32" if source.saved.get("precision") == "float32" else "bfloat16")
    horizon = source.saved.get("action_horizon")
    if horizon is not None and not (type(horizon) is int and horizon > 0):
        raise CheckpointError(f"{source.folder / 'config.json'} has action_horizon={horizon!r}: {COPY_AGAIN}")
    return _read_openpi("openpi's PyTorch", source, flags, horizon, dtype)


def _read_openpi_jax(folder: Path, checkpoint: OrbaxCheckpoint, flags: ConvertConfig) -> Policy:
    layout = "openpi's JAX, LoRA merged" if checkpoint.has_lora else "openpi's JAX"
    source = _Source(folder, checkpoint.family, {}, checkpoint, checkpoint.meta())
    return _read_openpi(layout, source, flags, None, flags.dtype or "bfloat16", checkpoint.heads())


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
    chunk_size: int | None,
    dtype: str,
    heads: tuple[int, int, int] | None = None,
) -> Policy:
    """A checkpoint that knows nothing of a robot but its statistics. `chunk_size`: what it says, or None."""
    folder, sizes = source.folder, _sizes(source.meta, flags, heads)
    flags = _of_aloha(source.family, flags)
    settings = _unsaid(source, flags, chunk_size)
    raw = _openpi_statistics(folder, flags)
    dims = {key: len(np.ravel(next(iter(of.values())))) for key, of in raw.items() if of}
    if flags.adapt_to_pi:
        dims = dict.fromkeys((OBS_STATE, ACTION), NUM_ALOHA_JOINTS)
    cameras = {
        slot: name if name.startswith("observation.") else f"{OBS_IMAGES}.{name}"
        for slot, name in (flags.cameras or {slot: slot for slot in CAMERA_SLOTS}).items()
    }
    square = (3, sizes["vision"].image_size, sizes["vision"].image_size)
    config = _config(
        source,
        sizes,
        flags,
        cameras=cameras,
        shapes=dict.fromkeys(cameras.values(), square),
        state_dim=flags.state_dim or dims.get(OBS_STATE, sizes["max_state_dim"]),
        action_dim=flags.action_dim or dims.get(ACTION, sizes["max_action_dim"]),
        n_action_steps=settings["chunk_size"],
        dtype=dtype,
        adapt_to_pi=bool(flags.adapt_to_pi),
        **settings,
    )
    statistics = _fitting(config, raw, EPSILON, str(flags.norm_stats or folder)) if raw else None
    if flags.delta_mask:
        mask = [on for n in flags.delta_mask for on in [n > 0] * abs(n)]
        _make_relative(config, statistics, [i for i, on in enumerate(mask) if on])
    return _policy(layout, source, config, statistics)


def _of_aloha(family: Family, flags: ConvertConfig) -> ConvertConfig:
    """The flags; where they leave it out, openpi's ALOHA checkpoint of the source's name says it."""
    named, mask = training_of(flags.source), aloha_mask(flags.source) if family is PI0 else None
    if flags.adapt_to_pi is None:
        of_aloha = mask is not None or (family is PI05 and named is not None and named[1].adapt_to_pi)
        flags = replace(flags, adapt_to_pi=of_aloha)
    if mask is not None and flags.delta_mask is None and flags.statistics:
        flags = replace(flags, delta_mask=list(mask))
    return flags


def _unsaid(source: _Source, flags: ConvertConfig, chunk_size: int | None) -> dict[str, Any]:
    """The settings that openpi's files do not say, from the flags. `chunk_size`: what this one says, or None.

    Raises UserError for a flag that is missing.
    """
    chunk_size = flags.chunk_size or chunk_size
    if source.family is PI0:
        if flags.state_in_prompt is not None:
            raise UserError(
                f"--state_in_prompt is about π0.5, and '{flags.source}' is π0, which has a token of the "
                "state: leave the flag out"
            )
        return {"chunk_size": chunk_size or pi0_horizon(flags.source)}
    needed = {
        "chunk_size (actions in a chunk)": chunk_size,
        "state_in_prompt (false where its prompts held the instruction alone)": flags.state_in_prompt,
        "delta_mask (openpi's, as '[6, -1]'; '[]' where no action is relative to the state)": (
            flags.delta_mask if flags.statistics else []
        ),
    }
    if missing := [f"--{flag}" for flag, value in needed.items() if value is None]:
        named = training_of(flags.source)
        all_known = "; ".join(f"{name} {as_flags(training)}" for name, training in TRAININGS.items())
        known = f"{named[0]} was trained with {as_flags(named[1])}" if named else f"Known are: {all_known}"
        raise UserError(
            f"'{flags.source}' does not say how it was trained, and a π0.5 that is run otherwise fails "
            f"without an error: give {', '.join(missing)}. {known}"
        )
    return {"chunk_size": chunk_size, "state_in_prompt": flags.state_in_prompt}


def _policy(
    layout: str, source: _Source, config: Pi0Config, statistics: NormalizationStatistics | None
) -> Policy:
    folder, rename = source.folder, _rename_map(source.folder) if source.saved.get("type") else {}
    return Policy(layout, source.family, folder, config, statistics, source.tensors, source.meta, rename)


def _config(
    source: _Source,
    sizes: dict[str, Any],
    flags: ConvertConfig,
    *,
    cameras: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    state_dim: int,
    action_dim: int,
    **settings: Any,
) -> Pi0Config:
    config = CONFIGS[source.family](
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
    check_fit(_network(config), source.meta)
    return config


def _sizes(
    meta: Mapping[str, Tensor], flags: ConvertConfig, heads: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """The network's sizes, by the shapes of its tensors.

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
                width=shape["action_in_proj.weight"][0], mlp_dim=shape["expert.layers.0.up_proj.weight"][0]
            ),
            "max_state_dim": shape.get("state_proj.weight", (0, Pi0Config.max_state_dim))[1],
            "max_action_dim": shape["action_in_proj.weight"][1],
        }
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint has no {error}: it is incomplete (download it again), or no π0"
        ) from error
    return sizes


def _depth(shapes: Mapping[str, Any], stack: str) -> int:
    return 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(f"{stack}.layers."))


def _network(config: Pi0Config) -> dict[str, Tensor]:
    """The network's tensors, without values."""
    with torch.device("meta"):
        return policy_class(config).make_network(config).state_dict()


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


# Statistics.


def _openpi_statistics(folder: Path, flags: ConvertConfig) -> Statistics:
    """openpi's own, of the robot that is asked for; empty where none are wanted."""
    if not flags.statistics:
        if flags.norm_stats:
            raise UserError(
                f"--statistics=false leaves out --norm_stats={flags.norm_stats}: give one of them"
            )
        return {}
    if flags.norm_stats:
        return _read_norm_stats(flags.norm_stats)
    files = {file.parent.relative_to(folder / "assets").as_posix(): file for file in _assets(folder)}
    if flags.asset_id is not None and flags.asset_id not in files:
        raise UserError(f"{folder} has no assets/{flags.asset_id}/norm_stats.json; it has {sorted(files)}")
    if len(files) != 1 and flags.asset_id is None:
        raise UserError(
            (
                f"{folder} has statistics of several robots: --asset_id=... chooses one of {sorted(files)}"
                if files
                else f"{folder} has no statistics (assets/<asset_id>/norm_stats.json): --norm_stats=FILE "
                "names those of your robot"
            )
            + ", and --statistics=false makes a checkpoint without, to be fine-tuned"
        )
    return _read_norm_stats(files[flags.asset_id or next(iter(files))])


def _read_norm_stats(file: Path) -> Statistics:
    saved = read_json(file).get("norm_stats", {})
    try:
        return {
            ours: {name: np.array(values, np.float64) for name, values in saved[theirs].items() if values}
            for theirs, ours in (("state", OBS_STATE), ("actions", ACTION))
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} has no statistics of state and actions ({error!r}): {COPY_AGAIN}"
        ) from error


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
            f"{folder}: actions are not unnormalized as they were normalized: {'; '.join(differences)}. The "
            f"processors' files are of different checkpoints, or damaged: {COPY_AGAIN}"
        )
    return statistics


def _fitting(config: Pi0Config, found: Statistics, epsilon: float, source: str) -> NormalizationStatistics:
    """Statistics that normalize as the source did: its epsilon in them, and no floor.

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
        if missing:
            raise UserError(
                f"{source} has no {' and '.join(missing)} for '{key}', by which this policy normalizes "
                f"({mode.value}): compute the statistics again, with today's version of what wrote them, or "
                "--statistics=false does without"
            )
        if any(length < size or (length > size and epsilon != EPSILON) for length in lengths):
            flag = "state_dim" if key == OBS_STATE else "action_dim"
            raise UserError(
                f"{source} has statistics of {sorted(lengths)} dimensions for '{key}', and the robot has "
                f"{size}: statistics of another robot? "
                f"--asset_id chooses among openpi's, --{flag} gives the size, --statistics=false does without"
            )
        ready = of if isinstance(found, NormalizationStatistics) else _with_epsilon(of, epsilon)
        prepared[key] = {name: value[:size].astype(np.float32) for name, value in ready.items()}
        if mode is not NormalizationMode.MEAN_STD:
            # An epsilon may be less than float32 has between two numbers.
            low, high = (prepared[key][name] for name in NEEDED[mode])
            prepared[key][NEEDED[mode][1]] = np.maximum(high, np.nextafter(low, np.float32(np.inf)))
        if not all(np.isfinite(value).all() for value in prepared[key].values()):
            raise UserError(
                f"{source}: the statistics of '{key}' hold NaN or infinite values: compute "
                "them again, or convert with --statistics=false and train"
            )
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
