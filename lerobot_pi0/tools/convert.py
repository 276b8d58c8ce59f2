"""A π0 policy from one layout to another, with all that belongs to it, and a proof that it is the same.

Every source is read into one description (config, statistics, tensors by our names), and every target is
written from it. Tensors stream through in pieces. The target appears when it is complete and proven.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from lerobot_pi0.certificate import fixed_input, write_certificate
from lerobot_pi0.configuration_pi0 import CAMERA_SLOTS, Dtype, Pi0Config, Statistics
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Pi0, SiglipConfig
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.processor_pi0 import load_tokenizer, make_lerobot_pi0_pre_post_processors
from lerobot_pi0.statistics import EPSILON, NEEDED, Prepared, make_anchor_of, read_statistics
from lerobot_pi0.tools.orbax import OrbaxCheckpoint, find_params
from lerobot_pi0.tools.streaming import digest, write_safetensors
from lerobot_pi0.weights import (
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    check_fit,
    find_checkpoint,
    load_weights,
    to_openpi,
)

Layout = Literal["lerobot_pi0", "lerobot", "openpi-pytorch"]

# The sizes that openpi and LeRobot's own π0 know by name: width, depth, MLP, heads, those of keys, their size.
VARIANTS = {
    "gemma_2b": (2048, 18, 16384, 8, 1, 256),
    "gemma_300m": (1024, 18, 4096, 8, 1, 256),
}
VISION, VOCABULARY = SiglipConfig(), GemmaConfig().vocab_size  # and those that they have no name for
OURS, IN_TREE = "lerobot_pi0", "LeRobot's pi0"
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
LEROBOT_EPSILON = 1e-8  # LeRobot's normalizer adds this to deviations, and divides by it where a range is 0

# Policies of up to this many parameters are run in both implementations without being asked.
_COMPARED = 200_000_000
# Largest difference of normalised actions in float32 between two implementations, over the largest action:
# the time embedding of another precision alone makes 2e-4.
_TOLERANCE = 1e-3


@dataclass
class ConvertConfig:
    """Convert a π0 policy between openpi (JAX, PyTorch), LeRobot's own π0, transformers' and this one.

    What SOURCE is, is recognised: a folder, or a repository on the hub. Weights are bit for bit those of the
    source unless --dtype says otherwise.
    """

    # Checkpoint to read: openpi's JAX (with params/) or PyTorch, LeRobot's pi0, transformers' PI0, or ours.
    source: str
    # Folder to write, which must not exist.
    target: Path
    # Layout to write.
    to: Layout = "lerobot_pi0"
    # Of the weights in the file, and what the policy computes in. Default: as the source has them.
    dtype: Dtype | None = None
    # PaliGemma's tokenizer, if the source does not carry it: a folder with its tokenizer.json, or a repository.
    tokenizer: str | None = None
    # openpi does not name a robot's cameras: which feature fills which slot, as --policy.cameras. Default: the
    # slots' own names (base, left_wrist, right_wrist), to be matched with --rename_map.
    cameras: dict[str, str] = field(default_factory=dict)
    # openpi keeps statistics by robot, in assets/<asset_id>: which of them to read, or the name to write.
    asset_id: str | None = None
    # Without statistics: a checkpoint to fine-tune, which cannot drive a robot as it is.
    statistics: bool = True
    # Dimensions of the robot's state and action. Default: as the source says, or its statistics.
    state_dim: int | None = None
    action_dim: int | None = None
    # openpi's action_horizon. Default: as the source says, or 50.
    chunk_size: int | None = None
    # openpi's mask of actions that are relative to the state, as given to make_bool_mask: '[6, -1]'.
    delta_mask: list[int] = field(default_factory=list)
    # alpha of openpi's LoRA. Default: the rank.
    lora_alpha: float | None = None
    # Attention heads of a vision tower that is not SigLIP So400m, where the source does not say.
    vision_heads: int | None = None
    # Run the policy as LeRobot's own π0 and as ours, and compare; 40 GB of memory at full size. Default: small
    # policies only.
    compare: bool | None = None


@dataclass
class Policy:
    """What a policy is, whatever layout it came from."""

    layout: str
    folder: Path
    config: Pi0Config
    statistics: Prepared | None
    tensors: Mapping[str, Tensor]  # by our names, each read when it is asked for
    meta: dict[str, Tensor]  # their shapes and dtypes
    rename: dict[str, str] = field(default_factory=dict)  # observations, before all else


def main(config: ConvertConfig) -> str:
    """Run `lerobot-pi0 convert`."""
    return convert(config)


def convert(flags: ConvertConfig) -> str:
    """Write the target; it appears when it is complete, and equal to the source. Returns the proof as a text.

    Raises FileExistsError for a target that exists, CheckpointError or ValueError for a source that is damaged,
    of another family or lacks what the target needs, OSError for a tokenizer that cannot be had.
    """
    target = flags.target
    if target.exists():
        raise FileExistsError(f"{target} exists: give another TARGET, or delete it")
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was interrupted
    unfinished.mkdir(parents=True)
    try:
        policy = read_policy(flags, scratch=unfinished)
        write = {"lerobot_pi0": write_ours, "lerobot": write_in_tree, "openpi-pytorch": write_openpi}[
            flags.to
        ]
        settings = write(policy, unfinished, flags)  # small files first: what is missing is told at once
        digests = _write_weights(policy, unfinished, flags)
        proof = _proof(policy, unfinished, digests, flags)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return "\n".join([f"{target}: {proof}", *settings])


# Sources.


def read_policy(flags: ConvertConfig, scratch: Path) -> Policy:
    """The policy in the source; its tensors are read later. `scratch`: a folder for temporary files."""
    if "://" in flags.source:
        raise FileNotFoundError(
            f"{flags.source}: download it first, for example with gsutil -m cp -r {flags.source} FOLDER"
        )
    folder = Path(flags.source).expanduser()
    params = find_params(folder)
    if params is not None:
        root = folder if params != folder else folder.parent
        return _read_openpi_jax(root, OrbaxCheckpoint(params, scratch, flags.lora_alpha), flags)
    folder = find_checkpoint(flags.source)
    checkpoint = Checkpoint(folder)
    meta = {name: tensor.to("meta") for name, tensor in checkpoint.items()}
    saved = _read_json(folder / "config.json")
    if saved.get("type") in ("lerobot_pi0", "pi0"):
        _refuse_flags(flags)
    match saved.get("type"), saved.get("model_type"):
        case "lerobot_pi0", _:
            return _read_ours(folder, checkpoint, meta, flags)
        case "pi0", _:
            return _read_in_tree(folder, saved, checkpoint, meta, flags)
        case None, "pi0":
            return _read_transformers(folder, saved, checkpoint, meta, flags)
        case None, _:
            return _read_openpi_pytorch(folder, saved, checkpoint, meta, flags)
    raise CheckpointError(f"'{flags.source}' is a policy of type '{saved['type']}', not π0")


def _refuse_flags(flags: ConvertConfig) -> None:
    """Raises ValueError for a flag about what a LeRobot policy says itself."""
    given = [
        name
        for name in ("cameras", "state_dim", "action_dim", "chunk_size", "delta_mask")
        if getattr(flags, name)
    ]
    if given:
        raise ValueError(
            f"--{given[0]} says what openpi's checkpoints do not; '{flags.source}' is a LeRobot policy, whose "
            "config.json does: leave the flag out"
        )


def _read_ours(
    folder: Path, tensors: Mapping[str, Tensor], meta: dict[str, Tensor], flags: ConvertConfig
) -> Policy:
    config = cast(Pi0Config, Pi0Config.from_pretrained(folder))
    if flags.dtype:
        config.dtype = flags.dtype
    check_fit(_network(config), meta)
    statistics = _statistics(folder, config, flags, LEROBOT_EPSILON)
    return Policy(OURS, folder, config, statistics, tensors, meta, _rename_map(folder))


def _read_in_tree(
    folder: Path,
    saved: dict[str, Any],
    tensors: Mapping[str, Tensor],
    meta: dict[str, Tensor],
    flags: ConvertConfig,
) -> Policy:
    """LeRobot's own π0, of today or up to 0.3: the file of its config is read, since its class changes."""
    if saved.get("adapt_to_pi_aloha"):
        raise ValueError(
            f"{folder} was trained with adapt_to_pi_aloha, which turned the joints of ALOHA into those of "
            "openpi's: LeRobot itself no longer does, and neither does this policy"
        )
    features = {
        name: PolicyFeature(FeatureType(of["type"]), tuple(of["shape"]))
        for name, of in {**saved.get("input_features", {}), **saved.get("output_features", {})}.items()
    }
    cameras = [
        name
        for name, of in features.items()
        if of.type is FeatureType.VISUAL and not name.startswith(f"{OBS_IMAGES}.empty_camera_")
    ]
    sizes = _sizes(meta, flags)
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
        _make_relative(config, statistics, [i for i in range(size) if not _is_absolute(names, i, words)])
    layout = IN_TREE if "paligemma_variant" in saved else "LeRobot's pi0 up to 0.3"
    return Policy(layout, folder, config, statistics, tensors, meta, _rename_map(folder))


def _read_openpi_pytorch(
    folder: Path,
    saved: dict[str, Any],
    tensors: Mapping[str, Tensor],
    meta: dict[str, Tensor],
    flags: ConvertConfig,
) -> Policy:
    dtype = flags.dtype or ("float32" if saved.get("precision") == "float32" else "bfloat16")
    return _read_openpi(
        "openpi's PyTorch", folder, tensors, meta, flags, saved.get("action_horizon", 50), dtype
    )


def _read_openpi_jax(folder: Path, checkpoint: OrbaxCheckpoint, flags: ConvertConfig) -> Policy:
    layout = "openpi's JAX, LoRA merged" if checkpoint.has_lora else "openpi's JAX"
    meta, dtype = checkpoint.meta(), flags.dtype or "bfloat16"
    return _read_openpi(layout, folder, checkpoint, meta, flags, 50, dtype, checkpoint.heads())


def _read_transformers(
    folder: Path,
    saved: dict[str, Any],
    tensors: Mapping[str, Tensor],
    meta: dict[str, Tensor],
    flags: ConvertConfig,
) -> Policy:
    text, vision = saved["vlm_config"]["text_config"], saved["vlm_config"]["vision_config"]
    heads = vision["num_attention_heads"], text["num_attention_heads"], text["num_key_value_heads"]
    dtype = flags.dtype or ("bfloat16" if saved.get("dtype") == "bfloat16" else "float32")
    chunk_size = saved.get("chunk_size", 50)
    return _read_openpi("transformers' π0", folder, tensors, meta, flags, chunk_size, dtype, heads)


def _read_openpi(
    layout: str,
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Tensor],
    flags: ConvertConfig,
    chunk_size: int,
    dtype: str,
    heads: tuple[int, int, int] | None = None,
) -> Policy:
    """A checkpoint that knows nothing of a robot but its statistics."""
    sizes = _sizes(meta, flags, heads)
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
    return Policy(layout, folder, config, statistics, tensors, meta)


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
        vision_heads = heads[0] if heads else flags.vision_heads or (16 if width == VISION.width else None)
        if vision_heads is None:
            raise ValueError(
                f"the vision tower is {width} wide, not SigLIP So400m's {VISION.width}, and the source does not "
                "say how many attention heads it has: --vision_heads=..."
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
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): copy or download it again") from error


# Statistics.


def _openpi_statistics(folder: Path, flags: ConvertConfig) -> Statistics:
    """openpi's own, of the robot that is asked for; empty where none are wanted."""
    if not flags.statistics:
        return {}
    files = {file.parent.relative_to(folder / "assets").as_posix(): file for file in _assets(folder)}
    if flags.asset_id is not None and flags.asset_id not in files:
        raise ValueError(f"{folder} has no assets/{flags.asset_id}/norm_stats.json; it has {sorted(files)}")
    if len(files) != 1 and flags.asset_id is None:
        raise ValueError(
            (
                f"{folder} has statistics of several robots: --asset_id=... chooses one of {sorted(files)}"
                if files
                else f"{folder} has no statistics (assets/<asset_id>/norm_stats.json): copy those of your robot "
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


def _statistics(folder: Path, config: Pi0Config, flags: ConvertConfig, epsilon: float) -> Prepared | None:
    """A LeRobot policy's own."""
    if not flags.statistics:
        return None
    try:
        found = read_statistics(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} has no statistics: its state and actions are normalised by something that is not in it. "
            "--statistics=false makes a checkpoint without, to be fine-tuned"
        ) from error
    return _fitting(config, found, epsilon, str(folder))


def _fitting(config: Pi0Config, found: Statistics, epsilon: float, source: str) -> Prepared:
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
            raise ValueError(
                f"{source} {what} for '{key}', and the robot has {size}: statistics of another robot? "
                f"--asset_id chooses among openpi's, --{flag} gives the size, --statistics=false does without"
            )
        prepared[key] = {
            name: value[:size].astype(np.float32)
            for name, value in (of if isinstance(found, Prepared) else _with_epsilon(of, epsilon)).items()
        }
        if not all(np.isfinite(value).all() for value in prepared[key].values()):
            raise ValueError(
                f"{source}: the statistics of '{key}' hold numbers that are infinite or none (NaN)"
            )
    return Prepared(prepared)


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


def _make_relative(config: Pi0Config, statistics: Prepared | None, joints: list[int]) -> None:
    """Let these dimensions of actions be relative to those of the state with the same number."""
    state = cast(PolicyFeature, config.robot_state_feature).shape[0]
    action = cast(PolicyFeature, config.action_feature).shape[0]
    if statistics is None:
        raise ValueError("relative actions are made absolute by means of the statistics: --statistics=true")
    if joints and max(joints) >= min(state, action):
        raise ValueError(
            f"dimension {max(joints)} of the action is relative, but the state has {state} and the action "
            f"{action} dimensions: --delta_mask, --state_dim or --action_dim is another robot's"
        )
    config.relative_actions = True
    config.anchor = make_anchor_of(config, statistics, [(i, i) for i in joints])


def _is_absolute(names: list[str] | None, dimension: int, words: list[str]) -> bool:
    """Whether LeRobot's step leaves a dimension of the action as it is."""
    return bool(names) and any(str(word).lower() in str(names[dimension]).lower() for word in words if word)


# Targets.


def write_ours(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """Config, processors, tokenizer; what is set is told."""
    config = policy.config
    if policy.layout == OURS:
        for file in policy.folder.glob("policy_p*processor*"):
            shutil.copy(file, folder)
    else:
        try:
            load_tokenizer(config.tokenizer)
        except OSError as error:
            raise OSError(
                f"{str(error).partition(' Ways out')[0]} A policy carries its tokenizer: give a folder that has "
                "it, --tokenizer=FOLDER, or accept the licence at huggingface.co/google/paligemma-3b-pt-224 and "
                "run `hf auth login`"
            ) from error
        pre, post = make_lerobot_pi0_pre_post_processors(config, policy.statistics)
        cast(Any, pre.steps[0]).rename_map = policy.rename
        pre.save_pretrained(folder)
        post.save_pretrained(folder)
        config.base_checkpoint = flags.source
    config._save_pretrained(folder)
    return _told(policy)


def write_in_tree(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """The same for LeRobot's own π0."""
    from lerobot.policies.pi0 import PI0Config
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        ProcessorStep,
        RelativeActionsProcessorStep,
        TokenizerProcessorStep,
        make_default_policy_processor_steps,
        make_policy_processor_pipelines,
    )

    config = policy.config
    paligemma, expert = _variants(config)
    words, names = _in_tree_joints(config)
    theirs = PI0Config(
        paligemma_variant=paligemma,
        action_expert_variant=expert,
        dtype=config.dtype,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps,
        max_state_dim=config.max_state_dim,
        max_action_dim=config.max_action_dim,
        num_inference_steps=config.num_inference_steps,
        use_relative_actions=config.relative_actions,
        relative_exclude_joints=words,
        action_feature_names=names,
        image_resolution=(config.vision.image_size, config.vision.image_size),
        normalization_mapping=config.normalization_mapping,
        tokenizer_max_length=config.tokenizer_max_length,
        input_features={
            **{key: config.image_features[key] for key in config.cameras.values()},
            OBS_STATE: cast(PolicyFeature, config.robot_state_feature),
        },
        output_features=config.output_features,
        device=config.device,
        repo_id=config.repo_id,
    )
    theirs._save_pretrained(folder)
    steps = make_default_policy_processor_steps(theirs, policy.statistics)
    steps.rename_observations.rename_map = policy.rename
    steps.normalize.eps = steps.unnormalize.eps = 0.0  # it is in the statistics
    # By the name alone: the tokenizer itself is gated, and is not needed to write this.
    tokenize = TokenizerProcessorStep(
        tokenizer=object(), max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
    )
    tokenize.tokenizer, tokenize.tokenizer_name = None, config.tokenizer
    relative = RelativeActionsProcessorStep(config.relative_actions, words, names)
    first: list[ProcessorStep] = [
        steps.rename_observations,
        steps.add_batch_dim,
        Pi0NewLineProcessor(),
        tokenize,
        steps.to_device,
        relative,
        steps.normalize,
    ]
    last: list[ProcessorStep] = [
        steps.unnormalize,
        AbsoluteActionsProcessorStep(config.relative_actions, relative),
        steps.to_cpu,
    ]
    for pipeline in make_policy_processor_pipelines(first, last):
        pipeline.save_pretrained(folder)
    return _told(policy)


def write_openpi(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """openpi's config and statistics; the rest is in openpi's code, and told."""
    config, told = policy.config, _told(policy)
    paligemma, expert = _variants(config)
    saved = {
        "action_dim": config.max_action_dim,
        "action_horizon": config.chunk_size,
        "paligemma_variant": paligemma,
        "action_expert_variant": expert,
        "precision": config.dtype,
    }
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    if policy.statistics is not None:
        asset_id = flags.asset_id or "lerobot"
        file = folder / "assets" / asset_id / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"norm_stats": _openpi_norm_stats(config, policy.statistics)}, indent=2))
        told.append(f"openpi's train config must name these statistics: AssetsConfig(asset_id={asset_id!r}).")
    if config.anchor is not None:
        size = cast(PolicyFeature, config.action_feature).shape[0]
        joints = _anchored(config)
        mask = ["True" if i in joints else "False" for i in range(size)]
        told.append(
            f"Actions are relative: openpi needs DeltaActions and AbsoluteActions with the mask "
            f"({', '.join(mask)})."
        )
    return told


def _variants(config: Pi0Config) -> tuple[str, str]:
    """openpi's names of the language model's and the expert's sizes. Raises ValueError where there are none."""
    vlm, expert = config.vlm, config.expert
    rest = vlm.num_heads, vlm.num_kv_heads, vlm.head_dim
    by_size = {size: name for name, size in VARIANTS.items()}
    found = (
        by_size.get((vlm.width, vlm.depth, vlm.mlp_dim, *rest)),
        by_size.get((expert.width, vlm.depth, expert.mlp_dim, *rest)),
    )
    if None in found or config.vision != VISION or vlm.vocab_size != VOCABULARY:
        raise ValueError(
            f"openpi and LeRobot's own π0 know SigLIP So400m at {VISION.image_size} pixels and Gemma as "
            f"{' or '.join(VARIANTS)} with {VOCABULARY} words, and this policy is another size: only this package "
            "runs it"
        )
    return cast(tuple[str, str], found)


def _in_tree_joints(config: Pi0Config) -> tuple[list[str], list[str] | None]:
    """Words and names by which LeRobot's step finds the absolute joints."""
    names = config.action_feature_names
    if config.anchor is None:
        return config.absolute_joints, names
    size, relative = cast(PolicyFeature, config.action_feature).shape[0], _anchored(config)
    names = names or [f"action {i:02}." for i in range(size)]
    for words in (config.absolute_joints, [name for i, name in enumerate(names) if i not in relative]):
        if [i for i in range(size) if not _is_absolute(names, i, words)] == relative:
            return words, names
    raise ValueError(
        f"LeRobot's own π0 tells relative joints from absolute ones by words in their names, and {names} has no "
        f"words for {[names[i] for i in relative]} alone"
    )


def _anchored(config: Pi0Config) -> list[int]:
    """The relative dimensions of actions. Raises ValueError unless each belongs to the state's of its number."""
    assert config.anchor is not None
    if config.anchor.actions != config.anchor.states:
        raise ValueError(
            "openpi and LeRobot's own π0 take an action to be relative to the dimension of the state with the "
            f"same number; here actions {config.anchor.actions} are relative to {config.anchor.states} of the state"
        )
    return sorted(config.anchor.actions)


def _openpi_norm_stats(config: Pi0Config, statistics: Prepared) -> dict[str, Any]:
    """openpi's file: what openpi adds to deviations and ranges is taken off again."""
    found = {}
    for theirs, ours, kind in (("state", OBS_STATE, "STATE"), ("actions", ACTION, "ACTION")):
        if config.normalization_mapping[kind] is not NormalizationMode.MEAN_STD:
            raise ValueError(
                f"openpi's π0 normalises by mean and standard deviation, and this policy's {kind} by "
                f"{config.normalization_mapping[kind].value}"
            )
        of = {name: np.ravel(np.asarray(value, np.float64)) for name, value in statistics[ours].items()}
        saved = {"mean": of["mean"], "std": np.maximum(of["std"] - EPSILON, 0)}
        if {"q01", "q99"} <= of.keys():
            saved |= {"q01": of["q01"], "q99": np.maximum(of["q99"] - EPSILON, of["q01"])}
        found[theirs] = {name: value.tolist() for name, value in saved.items()}
    return found


def _told(policy: Policy) -> list[str]:
    """What a person should look at, since it came from flags or defaults."""
    config = policy.config
    state, action = (
        cast(PolicyFeature, of).shape[0] for of in (config.robot_state_feature, config.action_feature)
    )
    cameras = ", ".join(f"{slot} ← {key}" for slot, key in config.cameras.items())
    lines = [
        f"State of {state}, chunks of {config.chunk_size} actions of {action}, computed in {config.dtype}. "
        f"Cameras: {cameras}.",
    ]
    if policy.statistics is None:
        lines.append("Without statistics: fine-tune it before it drives a robot.")
    return lines


def _rename_map(folder: Path) -> dict[str, str]:
    steps = _read_json(folder / "policy_preprocessor.json").get("steps", [])
    maps = [step["config"]["rename_map"] for step in steps if "rename_map" in step.get("config", {})]
    return maps[0] if maps else {}


# Weights, and the proof.


def _write_weights(policy: Policy, folder: Path, flags: ConvertConfig) -> dict[str, str]:
    """The weights in the target's layout; returns their digests by our names."""
    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    meta = {name: tensor.to(dtype=dtype) for name, tensor in policy.meta.items()}
    names = {name: name for name in meta}  # theirs → ours
    prefix = "" if flags.to == "openpi-pytorch" else "model."
    if flags.to == "lerobot_pi0":
        names = {prefix + name: name for name in meta}
    else:
        names = {prefix + theirs: ours for theirs, ours in to_openpi(names).items()}
    wanted = {theirs: meta[ours] for theirs, ours in names.items()}
    if flags.to != "lerobot_pi0":
        # Both load strictly, and neither uses it.
        vocabulary, width = policy.config.vlm.vocab_size, policy.config.expert.width
        head = torch.empty(vocabulary, width, dtype=meta["token_embedding.weight"].dtype, device="meta")
        wanted[prefix + EXPERT_HEAD] = head

    def read(theirs: str) -> Tensor:
        if theirs in names:
            return policy.tensors[names[theirs]]
        return torch.zeros(1, dtype=wanted[theirs].dtype).expand(wanted[theirs].shape)

    digests = write_safetensors(folder / WEIGHTS_FILE, wanted, read)
    return {ours: digests[theirs] for theirs, ours in names.items()}


def _proof(policy: Policy, folder: Path, digests: dict[str, str], flags: ConvertConfig) -> str:
    """Read the target back, compare it with what was read from the source, and say so."""
    written = Checkpoint(folder)
    if written.keys() != digests.keys():
        raise RuntimeError(
            f"{folder} does not read back as it was written: {written.keys() ^ digests.keys()}"
        )
    whole, parameters, dtypes = hashlib.blake2b(digest_size=8), 0, set()
    for name in sorted(digests):
        tensor = written[name]
        if digest(tensor) != digests[name]:
            raise RuntimeError(
                f"{name} reads back from {folder} differently from what was written: a faulty disk?"
            )
        whole.update(f"{name} {digests[name]}".encode())
        parameters += tensor.numel()
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    text = (
        f"{len(digests)} tensors, {parameters:,} parameters ({' and '.join(sorted(dtypes))}), from {policy.layout}; "
        f"read back, all equal ({whole.hexdigest()})."
    )
    if flags.to == "lerobot_pi0":
        ours = Pi0Policy.from_pretrained(folder, config=replace(policy.config, device="cpu"))
        write_certificate(ours, folder)
        text += " Its golden actions are beside it."
    in_tree = folder if flags.to == "lerobot" else policy.folder if policy.layout == IN_TREE else None
    if in_tree is None or not (parameters <= _COMPARED if flags.compare is None else flags.compare):
        return text
    difference, largest = _compare(policy, folder, in_tree)
    if not difference <= _TOLERANCE * max(largest, 1):
        raise RuntimeError(
            f"LeRobot's own π0 and ours act differently on the same weights, by {difference:.1e} (the largest "
            f"action is {largest:.2f}): nothing was written. Please report this"
        )
    return (
        f"{text} Run as LeRobot's own π0 and as ours: actions differ by {difference:.1e}, of {largest:.2f}."
    )


def _compare(policy: Policy, target: Path, in_tree: Path) -> tuple[float, float]:
    """Largest difference of a chunk in float32 between ours and LeRobot's own π0, and the largest action."""
    from lerobot.policies.pi0 import PI0Config, PI0Policy

    # What makes relative actions absolute is in its processors.
    config = replace(policy.config, device="cpu", dtype="float32", relative_actions=False, anchor=None)
    with torch.device("meta"):
        ours = Pi0Policy(config).eval()
    load_weights(ours.model, Checkpoint(target), dict.fromkeys(policy.meta, torch.float32))
    batch, noise = fixed_input(ours)
    size = config.vision.image_size  # the model's own, lest resizing be compared
    batch = {key: of[:, :, :size] / 255 if key in config.image_features else of for key, of in batch.items()}
    wanted = ours.predict_action_chunk(batch, noise=noise)
    theirs_config = PI0Config.from_pretrained(in_tree)
    assert isinstance(theirs_config, PI0Config)
    theirs_config.device, theirs_config.dtype = "cpu", "float32"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = PI0Policy.from_pretrained(in_tree, config=theirs_config)
    found = theirs.predict_action_chunk(batch, noise=noise)
    return (found - wanted).abs().max().item(), wanted.abs().max().item()
