"""Names of tensors in published π0 and π0.5 checkpoints ↔ names here, by model (`Family`).

Knows no LeRobot. Every torch layout in use is a renaming of openpi's PyTorch one, so there is a single table
per family; a JAX checkpoint, which stacks its layers, has another. Loading is strict: what is missing, left
over or of another shape is an error with names.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lerobot_pi0.errors import CheckpointError

_VLM = "paligemma_with_expert.paligemma.model."
_VISION = _VLM + "vision_tower.vision_model."
_LANGUAGE = _VLM + "language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_VLM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

# Modules, openpi's PyTorch name → ours. "#" is a layer's number. Parameters below a module keep their names.
_SHARED = {
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
        f"{theirs}layers.#.{name}_proj": f"{ours}layers.#.{name.rpartition('.')[2]}_proj"
        for theirs, ours in ((_LANGUAGE, "vlm."), (_EXPERT, "expert."))
        for name in (*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down")))
    },
}
_PARAMETERS = {_VISION + "embeddings.position_embedding.weight": "vision.position_embedding"}
# The expert's text head (or table), in published files but never used.
_UNUSED = r"^paligemma_with_expert\.gemma_expert\.(lm_head|model\.embed_tokens)\."


def _norms(theirs: str, ours: str, parameters: str = "") -> dict[str, str]:
    """The norms of a stack. `parameters`: the module in each norm that holds them, if it is not the norm."""
    names = {
        "layers.#.input_layernorm": "layers.#.attention_norm",
        "layers.#.post_attention_layernorm": "layers.#.mlp_norm",
        "norm": "norm",
    }
    return {f"{theirs}{name}{parameters}": f"{ours}{new}{parameters}" for name, new in names.items()}


@dataclass(frozen=True)
class Family:
    """A model, and the names of its tensors in published checkpoints."""

    name: str
    type: str  # of its policy here
    in_tree: str  # LeRobot's own policy type for it
    projections: tuple[str, ...]  # linear layers around the expert, which have the same names everywhere
    adaptive: bool  # whether the expert's norms are linear layers over a condition
    unused: re.Pattern[str]  # in published files, and never used

    @property
    def modules(self) -> dict[str, str]:
        """openpi's PyTorch names → ours, as in `_SHARED`."""
        expert = _norms(_EXPERT, "expert.", ".dense" if self.adaptive else "")
        return _SHARED | _norms(_LANGUAGE, "vlm.") | expert | {name: name for name in self.projections}


PI0 = Family(
    name="π0",
    type="lerobot_pi0",
    in_tree="pi0",
    projections=(
        "state_proj",
        "action_in_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
        "action_out_proj",
    ),
    adaptive=False,
    # With sinusoids, and old LeRobot's statistics.
    unused=re.compile(
        rf"{_UNUSED}|^sinusoid_embeds\.|^(normalize_inputs|normalize_targets|unnormalize_outputs)\."
    ),
)
PI05 = Family(
    name="π0.5",
    type="lerobot_pi05",
    in_tree="pi05",
    projections=("action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj"),
    adaptive=True,
    unused=re.compile(_UNUSED),
)
FAMILIES = (PI0, PI05)
_OF_PI05 = re.compile(r"(^|[./])time_mlp_in[./]|norm\.dense\.|norm_1/Dense_0/")  # and of no other family
_OTHERS = {"SmolVLA": re.compile(r"(^|\.)vlm_with_expert\.")}

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


def from_published[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a published checkpoint under the names of its network; a file of ours passes through.

    Layouts: ours; openpi PyTorch; LeRobot in-tree 0.6 (with or without `model.`); of π0 also LeRobot up to
    0.3, and transformers'. The embedding may be stored under the tied text head's name. Raises
    CheckpointError for another family.
    """
    family = family_of(state_dict)
    modules = family.modules
    named = _renamed(state_dict, _to_openpi)
    head = named.pop(_VLM_HEAD, None)
    if head is not None:
        named.setdefault(_LANGUAGE + "embed_tokens.weight", head)
    used = {name: tensor for name, tensor in named.items() if not family.unused.search(name)}
    return _renamed(used, lambda name: _PARAMETERS.get(name) or _rename_module(name, modules))


def unused_head(names: Iterable[str]) -> str | None:
    """The tied text head among the names of a published checkpoint, where the embedding stands there too: the
    embedding is used. None otherwise.
    """
    theirs = {_to_openpi(name): name for name in names}
    return theirs.get(_VLM_HEAD) if _LANGUAGE + "embed_tokens.weight" in theirs else None


def to_openpi[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """The reverse: names of openpi's PyTorch checkpoint, the embedding under the tied text head's name."""
    back = {ours: theirs for theirs, ours in family_of(state_dict).modules.items()}
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
            raise CheckpointError(f"'{other}' and '{name}' are the same tensor: delete one of them")
    return {new: tensors[name] for new, name in theirs.items()}


def _to_openpi(name: str) -> str:
    name = name.removeprefix("model.")
    for pattern, replacement in _TO_OPENPI:
        name, done = re.subn(pattern, replacement, name)
        if done:
            break
    return name


def _rename_module(name: str, table: Mapping[str, str]) -> str:
    """Rename by the module's pattern; an unknown name stays, and strict loading then reports it."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"(?<=\.layers\.)\d+(?=\.)", module)
    renamed = table.get(module if number is None else f"{module[: number.start()]}#{module[number.end() :]}")
    if renamed is None:
        return name
    return f"{renamed if number is None else renamed.replace('#', number.group())}.{parameter}"


def family_of(names: Iterable[str]) -> Family:
    """The model that tensors of these names belong to. π0 if nothing speaks for another one: loading then
    says what is missing.

    Raises CheckpointError for a model that has no policy here.
    """
    names = list(names)
    known = " or ".join(family.name for family in FAMILIES)
    for other, signature in _OTHERS.items():
        if found := next(filter(signature.search, names), None):
            raise CheckpointError(
                f"this is a {other} checkpoint (it holds '{found}'), not {known}: take LeRobot's policy for "
                "it"
            )
    language_model = any("language_model" in name or "PaliGemma/llm" in name for name in names)
    if language_model and not any("action_in_proj" in name for name in names):
        raise CheckpointError(
            "this checkpoint has a language model but no action expert (no 'action_in_proj'): "
            f"it is π0-FAST or a plain PaliGemma, not {known}"
        )
    return PI05 if any(map(_OF_PI05.search, names)) else PI0


def family_of_type(policy_type: str | None) -> Family | None:
    """The model of a policy of this type, ours or LeRobot's own; None where it is none of them."""
    return next((family for family in FAMILIES if policy_type in (family.type, family.in_tree)), None)
