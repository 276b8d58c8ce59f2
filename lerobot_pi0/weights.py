"""Names of tensors in published π0 checkpoints ↔ names here, and the reading of checkpoint files. Knows no LeRobot.

Every torch layout in use is a renaming of openpi's PyTorch one, so there is a single table; a stacked JAX checkpoint is
first cut into that layout. Loading is strict: what is missing, left over or of another shape is an error with names.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_VLM = "paligemma_with_expert.paligemma.model."
_VISION = _VLM + "vision_tower.vision_model."
_LANGUAGE = _VLM + "language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_VLM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

# Modules, openpi's PyTorch name → ours. "#" is a layer's number. Parameters below a module keep their names.
_MODULES = {
    _VISION + "embeddings.patch_embedding": "vision.patch_embedding",
    _VISION + "encoder.layers.#.layer_norm1": "vision.layers.#.attention_norm",
    _VISION + "encoder.layers.#.layer_norm2": "vision.layers.#.mlp_norm",
    _VISION + "encoder.layers.#.self_attn.q_proj": "vision.layers.#.q_proj",
    _VISION + "encoder.layers.#.self_attn.k_proj": "vision.layers.#.k_proj",
    _VISION + "encoder.layers.#.self_attn.v_proj": "vision.layers.#.v_proj",
    _VISION + "encoder.layers.#.self_attn.out_proj": "vision.layers.#.o_proj",
    _VISION + "encoder.layers.#.mlp.fc1": "vision.layers.#.up_proj",
    _VISION + "encoder.layers.#.mlp.fc2": "vision.layers.#.down_proj",
    _VISION + "post_layernorm": "vision.norm",
    _VLM + "multi_modal_projector.linear": "vision.projector",
    _LANGUAGE + "embed_tokens": "token_embedding",
    **{
        theirs + name: ours + renamed
        for theirs, ours in ((_LANGUAGE, "vlm."), (_EXPERT, "expert."))
        for name, renamed in {
            "layers.#.input_layernorm": "layers.#.attention_norm",
            "layers.#.self_attn.q_proj": "layers.#.q_proj",
            "layers.#.self_attn.k_proj": "layers.#.k_proj",
            "layers.#.self_attn.v_proj": "layers.#.v_proj",
            "layers.#.self_attn.o_proj": "layers.#.o_proj",
            "layers.#.post_attention_layernorm": "layers.#.mlp_norm",
            "layers.#.mlp.gate_proj": "layers.#.gate_proj",
            "layers.#.mlp.up_proj": "layers.#.up_proj",
            "layers.#.mlp.down_proj": "layers.#.down_proj",
            "norm": "norm",
        }.items()
    },
    **{
        name: name
        for name in (
            "state_proj",
            "action_in_proj",
            "action_time_mlp_in",
            "action_time_mlp_out",
            "action_out_proj",
        )
    },
}
_PARAMETERS = {_VISION + "embeddings.position_embedding.weight": "vision.position_embedding"}

# Other layouts → openpi's PyTorch one: LeRobot up to 0.3 (its `model.` prefix already off), transformers' native π0.
_TO_OPENPI = (
    (r"^paligemma_with_expert\.paligemma\.language_model\.model\.", _LANGUAGE),
    (r"^paligemma_with_expert\.paligemma\.language_model\.lm_head\.", _VLM_HEAD.removesuffix("weight")),
    (r"^paligemma_with_expert\.paligemma\.(vision_tower|multi_modal_projector)\.", _VLM + r"\1."),
    (r"^vlm\.(?=vision_tower\.|language_model\.|multi_modal_projector\.)", _VLM),
    (r"^dit\.", _EXPERT),
    (r"^embed_action_time\.", ""),
)
# In published files but never used: the expert's text head (or table), sinusoids, and old LeRobot's statistics.
_UNUSED = re.compile(
    r"^paligemma_with_expert\.gemma_expert\.(lm_head|model\.embed_tokens)\."
    r"|^sinusoid_embeds\.|^(normalize_inputs|normalize_targets|unnormalize_outputs)\."
)
_FAMILIES = {
    "π0.5": re.compile(
        r"(^|\.)time_mlp_in\.|layernorm\.dense\.|Dense_0/kernel$.*norm|pre_attention_norm_1/Dense_0"
    ),
    "SmolVLA": re.compile(r"(^|\.)vlm_with_expert\."),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be taken as π0 weights. The message says why and what to do."""


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published π0 checkpoint under the names of `Pi0`; a file of ours passes through.

    Layouts: ours; openpi PyTorch; LeRobot in-tree 0.6 (with or without `model.`); LeRobot up to 0.3; transformers' π0.
    The embedding may be stored under the tied text head's name. Raises CheckpointError for another family of models.
    """
    _refuse_other_families(state_dict)
    named = {_to_openpi(name): tensor for name, tensor in state_dict.items()}
    head = named.pop(_VLM_HEAD, None)
    if head is not None:
        named.setdefault(_LANGUAGE + "embed_tokens.weight", head)
    return {_ours(name): tensor for name, tensor in named.items() if not _UNUSED.search(name)}


def to_openpi(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: names of openpi's PyTorch checkpoint, with the embedding under the tied text head's name."""
    back = {ours: theirs for theirs, ours in _MODULES.items()}
    parameters = {ours: theirs for theirs, ours in _PARAMETERS.items()}
    named = {
        parameters.get(name) or _rename_module(name, back): tensor for name, tensor in state_dict.items()
    }
    named[_VLM_HEAD] = named.pop(_LANGUAGE + "embed_tokens.weight")
    return named


def from_openpi_jax(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors of an openpi JAX checkpoint (leaves by '/'-joined path, layers stacked) under the names of `Pi0`.

    Raises CheckpointError for a leaf it does not know, LoRA leaves among them: merge those first.
    """
    leaves = {path.removeprefix("params/").removesuffix("/value"): leaf for path, leaf in params.items()}
    _refuse_other_families(leaves)
    out = {}
    for path, leaf in leaves.items():
        cut = next(
            ((cut, match) for pattern, cut in _JAX_CUTS if (match := re.fullmatch(pattern, path))), None
        )
        if cut is None:
            raise CheckpointError(f"'{path}' {leaf.shape} is no leaf of a plain π0 checkpoint of openpi")
        function, match = cut
        out |= function(leaf, *match.groups())
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in out.items()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Put tensors into a model built on the meta device, in place of its parameters; `dtypes` gives each one's dtype.

    A tensor of the right dtype is taken as it is, without a copy, so a memory-mapped file stays one.
    Raises CheckpointError with counts and first names when anything is missing, left over or mis-shaped.
    """
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    misshaped = [
        f"{name} is {tuple(tensors[name].shape)}, the config says {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({len(wanted)} tensors). " + "; ".join(problems) + ". "
            "Sizes come from the config (vision, vlm, expert, max_state_dim, max_action_dim): "
            "they must be those that the checkpoint was made with."
        )
    model.load_state_dict({name: tensors[name].to(dtypes[name]) for name in wanted}, strict=True, assign=True)


def find_checkpoint(name: str | Path, **download: Any) -> Path:
    """The folder of a checkpoint: a local one, or a repository of the hub, downloaded into its cache.

    `download` goes to huggingface_hub.snapshot_download: revision, token, cache_dir, local_files_only, force_download.
    Raises FileNotFoundError that says why it cannot be had and what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that it stands in")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], **download))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {folder}, and it is no name of a repository on the hub"
        ) from error
    except RevisionNotFoundError:
        why = f"it has no revision '{download.get('revision')}'"
    except GatedRepoError:
        why = f"it is gated: accept its licence at huggingface.co/{name} and run `hf auth login`"
    except RepositoryNotFoundError:
        why = "there is neither such a folder nor such a repository (a private one needs `hf auth login`)"
    except LocalEntryNotFoundError:
        why = "there is no such folder, it is not in the local cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE=1)"
    except HfHubHTTPError:
        why = str(error).splitlines()[0]
    raise FileNotFoundError(f"the checkpoint '{name}' cannot be had: {why}")


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, memory-mapped: one `model.safetensors`, or shards with an index.

    Raises FileNotFoundError when there is none, CheckpointError for a damaged file or a missing shard.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS_FILE).is_file():
        names: Iterable[str] = (WEIGHTS_FILE,)
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}. Point at the folder that a checkpoint was saved in "
            "(with lerobot-train: outputs/…/checkpoints/last/pretrained_model), or at a repository on the hub."
        )
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{index} names the shard {name}, which is missing: copy or download it again"
            )
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118: no mapping
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / name} is damaged or cut off ({error}): copy or download it again"
            ) from error
    return tensors


def _to_openpi(name: str) -> str:
    name = name.removeprefix("model.")
    for pattern, replacement in _TO_OPENPI:
        name, done = re.subn(pattern, replacement, name)
        if done:
            break
    return name


def _ours(name: str) -> str:
    return _PARAMETERS.get(name) or _rename_module(name, _MODULES)


def _rename_module(name: str, table: Mapping[str, str]) -> str:
    """Rename by the module's pattern; an unknown name stays, and strict loading then reports it."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.layers\.(\d+)\.|^layers\.(\d+)\.", module)
    pattern = re.sub(r"(?<=layers\.)\d+(?=\.)", "#", module)
    renamed = table.get(pattern)
    if renamed is None:
        return name
    return f"{renamed.replace('#', number.group(1) or number.group(2)) if number else renamed}.{parameter}"


def _refuse_other_families(names: Iterable[str]) -> None:
    names = list(names)
    for family, signature in _FAMILIES.items():
        found = next((name for name in names if signature.search(name)), None)
        if found:
            raise CheckpointError(
                f"this is a {family} checkpoint (it holds '{found}'), not π0: take LeRobot's policy for it"
            )
    if any("language_model" in name for name in names) and not any(
        "action_in_proj" in name for name in names
    ):
        raise CheckpointError(
            "this checkpoint has a language model but no action expert (no 'action_in_proj'): "
            "it is π0-FAST or a plain PaliGemma, not π0"
        )


# How each leaf of an openpi JAX checkpoint is cut: (layers stacked in front) → our names, torch's [out, in].
def _per_layer(template: str, transform):
    return lambda leaf, *stack: {
        template.format(*(_STACKS[s] for s in stack), i): transform(layer) for i, layer in enumerate(leaf)
    }


_STACKS = {"": "vlm", None: "vlm", "_1": "expert"}
_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_SIGLIP = "PaliGemma/img/"
_GEMMA = "PaliGemma/llm/"


def _dense(module: str):
    return lambda leaf, kind: {f"{module}.{_KINDS[kind]}": leaf.T if kind == "kernel" else leaf}


def _vision_norm(leaf, which, kind):
    name = ("attention_norm", "mlp_norm")[int(which)]
    return {f"vision.layers.{i}.{name}.{_KINDS[kind]}": layer for i, layer in enumerate(leaf)}


def _vision_mlp(leaf, which, kind):
    name = ("up_proj", "down_proj")[int(which)]
    return {f"vision.layers.{i}.{name}.{_KINDS[kind]}": layer.T for i, layer in enumerate(leaf)}


def _vision_attention(leaf, which, kind):
    def cut(layer):
        if kind == "bias":
            return layer.reshape(-1)
        return layer.reshape(-1, layer.shape[-1]).T if which == "out" else layer.reshape(layer.shape[0], -1).T

    name = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}[which]
    return {f"vision.layers.{i}.{name}.{_KINDS[kind]}": cut(layer) for i, layer in enumerate(leaf)}


def _gemma_keys_values(leaf, stack):
    def cut(heads):
        return heads.transpose(0, 2, 1).reshape(-1, heads.shape[1])

    return {
        f"{_STACKS[stack]}.layers.{i}.{name}.weight": cut(layer[which])
        for i, layer in enumerate(leaf)
        for which, name in enumerate(("k_proj", "v_proj"))
    }


def _gemma_gating(leaf, stack):
    return {
        f"{_STACKS[stack]}.layers.{i}.{name}.weight": layer[which].T
        for i, layer in enumerate(leaf)
        for which, name in enumerate(("gate_proj", "up_proj"))
    }


def _gemma_norm(leaf, which, stack):
    name = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}[which]
    return {f"{_STACKS[stack]}.layers.{i}.{name}.weight": layer for i, layer in enumerate(leaf)}


_JAX_CUTS = (
    (
        _SIGLIP + "embedding/kernel",
        lambda leaf: {"vision.patch_embedding.weight": leaf.transpose(3, 2, 0, 1)},
    ),
    (_SIGLIP + "embedding/bias", lambda leaf: {"vision.patch_embedding.bias": leaf}),
    (_SIGLIP + "pos_embedding", lambda leaf: {"vision.position_embedding": leaf[0]}),
    (_SIGLIP + "Transformer/encoderblock/LayerNorm_([01])/(scale|bias)", _vision_norm),
    (_SIGLIP + "Transformer/encoderblock/MlpBlock_0/Dense_([01])/(kernel|bias)", _vision_mlp),
    (
        _SIGLIP
        + "Transformer/encoderblock/MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias)",
        lambda leaf, which, kind: (
            {f"vision.layers.{i}.o_proj.bias": layer for i, layer in enumerate(leaf)}
            if (which, kind) == ("out", "bias")
            else _vision_attention(leaf, which, kind)
        ),
    ),
    (_SIGLIP + "Transformer/encoder_norm/(scale|bias)", _dense("vision.norm")),
    (_SIGLIP + "head/(kernel|bias)", _dense("vision.projector")),
    (_GEMMA + "embedder/input_embedding", lambda leaf: {"token_embedding.weight": leaf}),
    (
        _GEMMA + "layers/attn/q_einsum(_1)?/w",
        _per_layer("{}.layers.{}.q_proj.weight", lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1])),
    ),
    (_GEMMA + "layers/attn/kv_einsum(_1)?/w", _gemma_keys_values),
    (
        _GEMMA + "layers/attn/attn_vec_einsum(_1)?/w",
        _per_layer("{}.layers.{}.o_proj.weight", lambda w: w.reshape(-1, w.shape[-1]).T),
    ),
    (_GEMMA + "layers/mlp(_1)?/gating_einsum", _gemma_gating),
    (_GEMMA + "layers/mlp(_1)?/linear", _per_layer("{}.layers.{}.down_proj.weight", lambda w: w.T)),
    (_GEMMA + "layers/(pre_attention_norm|pre_ffw_norm)(_1)?/scale", _gemma_norm),
    (_GEMMA + "final_norm(_1)?/scale", lambda leaf, stack: {f"{_STACKS[stack]}.norm.weight": leaf}),
    *(
        (f"{name}/(kernel|bias)", _dense(name))
        for name in (
            "state_proj",
            "action_in_proj",
            "action_time_mlp_in",
            "action_time_mlp_out",
            "action_out_proj",
        )
    ),
)
