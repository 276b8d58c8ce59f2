"""LoRA adapters on the network (Hu et al., 2021): where they go, how they compute, whose weights they need.

LeRobot's `--peft` and the PEFT library make, save and load them. Adapters are useless over other weights than
those they were trained over, so a policy's config keeps a fingerprint of these, and it is checked at loading.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lerobot_pi0.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WHOLE, Checkpoint, find_checkpoint
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, open_safetensors, read_json
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import CheckpointError, MissingFileError, UserError

RANK = 16  # openpi's for the language model; its expert has twice that
_LINEAR = r"(q|k|v|o|gate|up|down)_proj"
_EXPERT = r"expert\..*"
# The ways of initializing adapters that leave the base's weights as they are.
_INITS = (True, "gaussian", "orthogonal")


def _is_number(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# What decides how adapters act: PEFT writes all of it, and takes its defaults for what is missing.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "r": _is_number,
    "lora_alpha": _is_number,
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "target_modules": lambda value: isinstance(value, str) or _is_names(value),
    "modules_to_save": lambda value: value is None or _is_names(value),
    "fan_in_fan_out": lambda value: value is False,
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True)
class Base:
    """The checkpoint that a policy's weights came from, as adapters over it have to name it."""

    name: str  # a repository on the hub, or an absolute path
    revision: str | None  # the commit, where there is one
    checkpoint: Checkpoint

    @classmethod
    def of(cls, name: str | Path, revision: str | None, folder: Path, checkpoint: Checkpoint) -> "Base":
        """Of a checkpoint that was found in `folder`: a branch of the hub, or checkpoints/last, may move."""
        if Path(name).expanduser().is_dir():
            return cls(str(folder.resolve()), revision, checkpoint)
        commit = folder.name if folder.parent.name == "snapshots" else revision
        return cls(str(name), commit, checkpoint)


def default_targets(network: nn.Module) -> dict[str, Any]:
    """What adapts where `--peft` does not say: openpi's choice, attention and MLP of both stacks.

    What embeds state, actions and time, and what reads actions, trains in full. Adaptive norms stay as they
    are.
    """
    return {
        "target_modules": rf"model\.(vlm|expert)\.layers\.\d+\.{_LINEAR}",
        "modules_to_save": [
            name for name, module in network.named_children() if isinstance(module, nn.Linear)
        ],
    }


def lora_settings(config: Pi0Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `--peft`, completed. What reaches what:

    `r` (LeRobot's default is 16, as openpi's) is the rank in the language model; the expert has twice that.
    alpha is the rank of each stack, as in openpi; `lora_alpha`, if given, is that of both.
    With `target_modules` both mean what PEFT says, but alpha is still `r` if not given.
    `full_training_modules` replaces the projections around the expert ([] for none).
    What `--policy.freeze` names, or what has no influence on the actions, gets no adapters, whatever the
    targets: with freeze=vlm the expert alone does, and the language model runs without a graph.
    Raises ValueError for another method than LoRA.
    """
    method = given.get("method_type") or "LORA"
    if method.upper() != "LORA":
        raise UserError(f"--peft.method_type={method}: this policy has LoRA adapters only (LORA)")
    rank, alpha = given.get("r") or RANK, given.get("lora_alpha")
    settings = {**given, "r": rank, "lora_alpha": alpha or rank, "exclude_modules": _without_effect(config)}
    if not given.get("target_modules"):
        settings["rank_pattern"] = {_EXPERT: 2 * rank}
        if alpha is None:
            settings["alpha_pattern"] = {_EXPERT: 2 * rank}
    return settings


def check_settings(peft_config: Any) -> None:
    """Raises ValueError for what sampling and `merge` would not take into account."""
    if peft_config.peft_type != "LORA" or peft_config.use_dora:
        kind = "DoRA" if peft_config.peft_type == "LORA" else peft_config.peft_type.value
        raise UserError(f"this policy has plain LoRA adapters only, not {kind}")
    if peft_config.lora_bias:
        raise UserError("this policy has LoRA adapters without a bias of their own only: set lora_bias=False")
    if peft_config.init_lora_weights not in _INITS:
        raise UserError(
            f"--peft.init_type={peft_config.init_lora_weights} would change the base's weights, which are "
            "not saved with the adapters: take gaussian or orthogonal, or leave it out"
        )


def read_settings(folder: Path) -> Any:
    """PEFT's config of saved adapters.

    Raises CheckpointError for damaged files, for adapters that do not name their base, and for what sampling
    and `merge` would not take into account.
    """
    from peft import PeftConfig

    file = folder / ADAPTER_CONFIG
    given = read_json(file)
    if missing := [key for key in ("peft_type", "base_model_name_or_path") if not given.get(key)]:
        raise CheckpointError(f"{file} has no {missing}: {COPY_AGAIN}")
    if wrong := [key for key, is_right in _SETTINGS.items() if not is_right(given.get(key, ...))]:
        raise CheckpointError(f"{file} has no {wrong}, or not as PEFT writes them: {COPY_AGAIN}")
    with open_safetensors(folder / ADAPTER_WEIGHTS):
        pass
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        check_settings(settings)
    except UserError as error:
        raise CheckpointError(f"{file}: {error}, and train again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or of another version of PEFT ({error!r})") from error
    return settings


def put_in(network: nn.Module, folder: Path, settings: Any) -> None:
    """Put saved adapters into a network that is their base. Raises CheckpointError where they do not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    file = folder / ADAPTER_WEIGHTS
    with open_safetensors(file) as opened:
        found = set(opened.keys())
        kinds = {name: opened.get_slice(name).get_dtype() for name in found}
    if bad := sorted(name for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")):
        raise CheckpointError(f"{file} has {bad[0]} in {kinds[bad[0]]}, which is no float: {COPY_AGAIN}")
    try:
        wrapped = PeftModel.from_pretrained(network, str(folder), config=settings)
    except (
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:  # KeyError: a module that trained in full is missing
        raise CheckpointError(f"{file} does not fit {ADAPTER_CONFIG} or its base ({error})") from error
    if differing := sorted(found ^ get_peft_model_state_dict(wrapped).keys()):
        # PEFT leaves out what has no place, and initializes what is missing.
        raise CheckpointError(
            f"{file} does not hold what {ADAPTER_CONFIG} names: {len(differing)} tensors are missing or have "
            f"no place, the first one {differing[0]}. {COPY_AGAIN.capitalize()}"
        )


def find_base(name: str | Path, config: Any, **download: Any) -> Path:
    """`find_checkpoint`; where it is the base of a config's adapters, its errors say so."""
    try:
        return find_checkpoint(name, **download)
    except FileNotFoundError as error:
        if not (isinstance(config, Pi0Config) and loads_adapters(config)):
            raise
        at = f" at revision '{download['revision']}'" if download.get("revision") else ""
        raise MissingFileError(
            f"the adapters in '{config.pretrained_path}' need the weights that they were trained over, "
            f"'{name}'{at}: {error}. Ways out: (1) bring that checkpoint back, or back online; (2) if it has "
            f"moved, write its new place into {ADAPTER_CONFIG} (base_model_name_or_path; the weights are "
            "checked); (3) where the base is at hand, make one checkpoint of both: "
            f"lerobot-pi0 merge --adapter={config.pretrained_path} --output=..."
        ) from error


def loads_adapters(config: Pi0Config) -> bool:
    """Whether LeRobot loads a policy as the base of adapters, which lie in the config's `pretrained_path`."""
    return config.use_peft and config.pretrained_path is not None


def check_base(config: Pi0Config, base: Base) -> None:
    """Raises CheckpointError when the config's adapters were trained over other weights than the base's."""
    if config.base_fingerprint is None:
        return
    is_whole = config.base_fingerprint.startswith(WHOLE)
    found = base.checkpoint.fingerprint() if is_whole else base.checkpoint.fingerprint_of_heads()
    if config.base_fingerprint != found:
        raise CheckpointError(
            f"the adapters in '{config.pretrained_path}' were trained over other weights than "
            f"'{base.name}' holds now (fingerprint {config.base_fingerprint}, found {found}). Bring those "
            f"back, or name their place or revision in {ADAPTER_CONFIG} (base_model_name_or_path, revision); "
            "or train new adapters over these"
        )


def name_base(peft_model: Any, config: Pi0Config, base: Base) -> None:
    """Write down which weights new adapters are over: in PEFT's config, and the fingerprint in ours."""
    for peft_config in peft_model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = base.name, base.revision
    config.base_fingerprint = base.checkpoint.fingerprint()


def dtypes_in_full(model: nn.Module, config: Pi0Config) -> dict[str, torch.dtype]:
    """Parameters that the config's adapters replace: PEFT copies a value into what the base holds there, and
    in bfloat16 it would be rounded."""
    assert config.pretrained_path is not None
    folder = find_checkpoint(config.pretrained_path, revision=config.pretrained_revision)
    modules = read_json(folder / ADAPTER_CONFIG).get("modules_to_save") or []
    return {
        name: torch.float32
        for name, _ in model.named_parameters()
        if any(re.search(rf"(^|\.){re.escape(module)}\.", f"model.{name}") for module in modules)
    }


def _without_effect(config: Pi0Config) -> str:
    """Modules where adapters would learn nothing: frozen ones, and what no output depends on."""
    frozen = {"nothing": [], "vision": ["vision"], "vlm": ["vision", "token_embedding", "vlm"]}[config.freeze]
    last = config.vlm.depth - 1  # of which keys and values alone are used
    unused = rf"model\.vlm\.layers\.{last}\.(q|o|gate|up|down)_proj"
    return "|".join([*(rf"model\.{module}(\..*)?" for module in frozen), unused])
