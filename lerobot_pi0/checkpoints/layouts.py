"""Names of tensors in published π0 checkpoints ↔ names here, and the reading of checkpoint files.

Knows no LeRobot. Every torch layout in use is a renaming of openpi's PyTorch one, so there is a single table;
a JAX checkpoint, which stacks its layers, has another. Loading is strict: what is missing, left over or of
another shape is an error with names.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from lerobot_pi0.errors import CheckpointError

_VLM = "paligemma_with_expert.paligemma.model."
_VISION = _VLM + "vision_tower.vision_model."
_LANGUAGE = _VLM + "language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_VLM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
PROJECTIONS = (
    "state_proj",
    "action_in_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "action_out_proj",
)

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
    **{name: name for name in PROJECTIONS},
}
_PARAMETERS = {_VISION + "embeddings.position_embedding.weight": "vision.position_embedding"}

# Other layouts, `model.` prefix off → openpi's PyTorch one: LeRobot up to 0.3; transformers' π0, whose
# files have other names than its state_dict.
_TO_OPENPI = (
    (r"^paligemma_with_expert\.paligemma\.(model\.)?language_model\.model\.", _LANGUAGE),
    (r"^paligemma_with_expert\.paligemma\.language_model\.lm_head\.", _VLM_HEAD.removesuffix("weight")),
    (r"^paligemma_with_expert\.paligemma\.(vision_tower|multi_modal_projector)\.", _VLM + r"\1."),
    (r"^vlm\.(?=vision_tower\.|language_model\.|multi_modal_projector\.)", _VLM),
    (r"^dit\.", _EXPERT),
    (r"^embed_action_time\.", ""),
)
# In published files but never used: the expert's text head (or table), sinusoids, old LeRobot's statistics.
_UNUSED = re.compile(
    r"^paligemma_with_expert\.gemma_expert\.(lm_head|model\.embed_tokens)\."
    r"|^sinusoid_embeds\.|^(normalize_inputs|normalize_targets|unnormalize_outputs)\."
)
_FAMILIES = {
    "π0.5": re.compile(r"(^|[./])time_mlp_in[./]|layernorm\.dense\.|pre_attention_norm_1/Dense_0"),
    "SmolVLA": re.compile(r"(^|\.)vlm_with_expert\."),
}


def from_published[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a published π0 checkpoint under the names of `Pi0`; a file of ours passes through.

    Layouts: ours; openpi PyTorch; LeRobot in-tree 0.6 (with or without `model.`); LeRobot up to 0.3;
    transformers' π0. The embedding may be stored under the tied text head's name. Raises CheckpointError for
    another family.
    """
    refuse_other_families(state_dict)
    named = _renamed(state_dict, _to_openpi)
    head = named.pop(_VLM_HEAD, None)
    if head is not None:
        named.setdefault(_LANGUAGE + "embed_tokens.weight", head)
    used = {name: tensor for name, tensor in named.items() if not _UNUSED.search(name)}
    return _renamed(used, _ours)


def unused_head(names: Iterable[str]) -> str | None:
    """The tied text head among the names of a published checkpoint, where the embedding stands there too: the
    embedding is used. None otherwise.
    """
    theirs = {_to_openpi(name): name for name in names}
    return theirs.get(_VLM_HEAD) if _LANGUAGE + "embed_tokens.weight" in theirs else None


def to_openpi[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """The reverse: names of openpi's PyTorch checkpoint, the embedding under the tied text head's name."""
    back = {ours: theirs for theirs, ours in _MODULES.items()}
    parameters = {ours: theirs for theirs, ours in _PARAMETERS.items()}
    named = {
        parameters.get(name) or _rename_module(name, back): tensor for name, tensor in state_dict.items()
    }
    named[_VLM_HEAD] = named.pop(_LANGUAGE + "embed_tokens.weight")
    return named


def _renamed[T](tensors: Mapping[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """Raises CheckpointError when two names become one."""
    theirs: dict[str, str] = {}
    for name in tensors:
        if (other := theirs.setdefault(rename(name), name)) != name:
            raise CheckpointError(f"'{other}' and '{name}' are the same tensor of π0: delete one of them")
    return {new: tensors[name] for new, name in theirs.items()}


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
    number = re.search(r"(?<=\.layers\.)\d+(?=\.)", module)
    renamed = table.get(module if number is None else f"{module[: number.start()]}#{module[number.end() :]}")
    if renamed is None:
        return name
    return f"{renamed if number is None else renamed.replace('#', number.group())}.{parameter}"


def refuse_other_families(names: Iterable[str]) -> None:
    """Raise CheckpointError if tensors of these names belong to another model than π0."""
    names = list(names)
    for family, signature in _FAMILIES.items():
        found = next((name for name in names if signature.search(name)), None)
        if found:
            raise CheckpointError(
                f"this is a {family} checkpoint (it holds '{found}'), not π0: take LeRobot's policy for it"
            )
    language_model = any("language_model" in name or "PaliGemma/llm" in name for name in names)
    if language_model and not any("action_in_proj" in name for name in names):
        raise CheckpointError(
            "this checkpoint has a language model but no action expert (no 'action_in_proj'): "
            "it is π0-FAST or a plain PaliGemma, not π0"
        )
