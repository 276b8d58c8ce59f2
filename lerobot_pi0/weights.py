"""Names of tensors in published π0 checkpoints ↔ names here, and the reading of checkpoint files.

Knows no LeRobot. Every torch layout in use is a renaming of openpi's PyTorch one, so there is a single table;
a JAX checkpoint, which stacks its layers, has another. Loading is strict: what is missing, left over or of
another shape is an error with names.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside adapters that stand alone

# What a checkpoint of any layout is made of. A repository may hold training states too, many times larger.
_CHECKPOINT_FILES = [
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    "model-*.safetensors",
    "config.json",
    "train_config.json",
    "policy_p*processor*",
    "assets/*norm_stats.json",
    "golden_actions.safetensors",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
]

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


class CheckpointError(ValueError):
    """A checkpoint cannot be taken as π0 weights. The message says why and what to do."""


def from_published[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a published π0 checkpoint under the names of `Pi0`; a file of ours passes through.

    Layouts: ours; openpi PyTorch; LeRobot in-tree 0.6 (with or without `model.`); LeRobot up to 0.3;
    transformers' π0. The embedding may be stored under the tied text head's name. Raises CheckpointError for
    another family.
    """
    _refuse_other_families(state_dict)
    named = {_to_openpi(name): tensor for name, tensor in state_dict.items()}
    head = named.pop(_VLM_HEAD, None)
    if head is not None:
        named.setdefault(_LANGUAGE + "embed_tokens.weight", head)
    return {_ours(name): tensor for name, tensor in named.items() if not _UNUSED.search(name)}


def to_openpi[T](state_dict: Mapping[str, T]) -> dict[str, T]:
    """The reverse: names of openpi's PyTorch checkpoint, the embedding under the tied text head's name."""
    back = {ours: theirs for theirs, ours in _MODULES.items()}
    parameters = {ours: theirs for theirs, ours in _PARAMETERS.items()}
    named = {
        parameters.get(name) or _rename_module(name, back): tensor for name, tensor in state_dict.items()
    }
    named[_VLM_HEAD] = named.pop(_LANGUAGE + "embed_tokens.weight")
    return named


@dataclass(frozen=True)
class JaxPart:
    """Where a tensor of ours is in openpi's JAX checkpoint: `cut` makes it of a leaf, or of a layer of it."""

    leaf: str
    layer: int | None
    cut: Callable[[np.ndarray], np.ndarray]


def openpi_jax_parts(leaves: Mapping[str, tuple[int, ...]]) -> dict[str, JaxPart]:
    """Our names → their parts of an openpi JAX checkpoint; `leaves` has the shapes by '/'-joined path.

    Leaf by leaf and layer by layer, so that who reads in this order reads everything once.
    Raises CheckpointError for a leaf it does not know, LoRA leaves among them: merge those first.
    """
    _refuse_other_families(leaves)
    parts = {}
    for path, shape in leaves.items():
        if path not in _JAX_LEAVES:
            raise CheckpointError(f"'{path}' {shape} is no leaf of a plain π0 checkpoint of openpi")
        cuts = _JAX_LEAVES[path].items()
        if "#" not in next(iter(cuts))[0]:
            parts |= {name: JaxPart(path, None, cut) for name, cut in cuts}
            continue
        for layer in range(shape[0]):
            parts |= {name.replace("#", str(layer)): JaxPart(path, layer, cut) for name, cut in cuts}
    return parts


def from_openpi_jax(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors of an openpi JAX checkpoint (leaves by '/'-joined path, layers stacked), by the names of `Pi0`.

    Raises CheckpointError for a leaf it does not know, LoRA leaves among them. `conversion.orbax` reads
    openpi's files, and merges LoRA.
    """
    leaves = {path.removeprefix("params/").removesuffix("/value"): leaf for path, leaf in params.items()}
    parts = openpi_jax_parts({path: leaf.shape for path, leaf in leaves.items()})
    return {
        name: as_tensor(part.cut(leaves[part.leaf] if part.layer is None else leaves[part.leaf][part.layer]))
        for name, part in parts.items()
    }


def as_tensor(array: np.ndarray) -> Tensor:
    """The tensor of a numpy array; bfloat16 (of ml_dtypes) too, which torch does not take from numpy."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Put tensors into a model built on the meta device, as its parameters, each in its dtype of `dtypes`.

    Without one it stays in its own. A tensor of the right dtype is taken as it is, without a copy, so
    a memory-mapped file stays one.
    Raises CheckpointError with counts and first names when anything is missing, left over or mis-shaped.
    """
    wanted = model.state_dict()
    check_fit(wanted, tensors)
    found = {name: tensors[name] for name in wanted}
    placed = {name: found.pop(name).to(device, dtypes[name] if dtypes else None) for name in wanted}
    model.load_state_dict(placed, strict=True, assign=True)


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that the tensors are the model's `wanted` ones, by name and shape. Meta tensors will do.

    Raises CheckpointError with counts and first names when anything is missing, left over or mis-shaped.
    """
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    found = {name: tensors[name].shape for name in wanted if name in tensors}
    misshaped = [
        f"{name} is {tuple(shape)}, the config says {tuple(wanted[name].shape)}"
        for name, shape in sorted(found.items())
        if shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({len(wanted)} tensors). {'; '.join(problems)}. Sizes "
            "come from the config (vision, vlm, expert, max_state_dim, max_action_dim): they must be the "
            "checkpoint's."
        )


def find_checkpoint(name: str | Path, also: Sequence[str] = (), **download: Any) -> Path:
    """The folder of a checkpoint: a local one, or a repository of the hub, downloaded into its cache.

    `also`: patterns of files that are downloaded besides those that a checkpoint in torch is made of.
    `download` goes to huggingface_hub.snapshot_download: revision, token, cache_dir, local_files_only, ….
    Raises FileNotFoundError that says why it cannot be had and what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that it stands in")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*_CHECKPOINT_FILES, *also], **download))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {folder}, and it is no name of a repository on the hub"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        match error:
            case RevisionNotFoundError():
                why = f"it has no revision '{download.get('revision')}'"
            case GatedRepoError():
                why = f"it is gated: accept its licence at huggingface.co/{name} and run `hf auth login`"
            case RepositoryNotFoundError():
                why = "there is no such folder and no such repository (a private one needs `hf auth login`)"
            case LocalEntryNotFoundError():
                why = (
                    "there is no such folder, it is not in the local cache, and the hub cannot be reached "
                    "(no network, or HF_HUB_OFFLINE=1)"
                )
            case _:
                why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"the checkpoint '{name}' cannot be had: {why}") from error


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by our names: one `model.safetensors`, or shards with an index.

    Each access maps its tensor into memory anew: what was read of it is given back when it is dropped.
    Raises FileNotFoundError when there is none, CheckpointError for a damaged file, a missing shard,
    adapters without a base or another family of models.
    """

    def __init__(self, folder: Path):
        index = folder / WEIGHTS_INDEX
        if (folder / WEIGHTS_FILE).is_file():
            names: Iterable[str] = (WEIGHTS_FILE,)
        elif index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index} is damaged ({error!r}): copy or download it again") from error
        elif (folder / ADAPTER_CONFIG).is_file():
            base = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
            raise CheckpointError(
                f"{folder} holds adapters over the weights of '{base}' and no weights of its own. LeRobot's "
                "commands load both with --policy.path; for anything else, make one checkpoint of them: "
                f"lerobot-pi0 merge --adapter={folder} --output=..."
            )
        else:
            raise FileNotFoundError(
                f"{folder} holds no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}. Point at the folder that a "
                "checkpoint was saved in (lerobot-train: outputs/…/checkpoints/last/pretrained_model), or at "
                "a repository on the hub."
            )
        places: dict[str, tuple[Path, str]] = {}
        for file in (folder / name for name in names):
            if not file.is_file():
                raise CheckpointError(
                    f"{index} names the shard {file.name}, which is missing: copy or download it again"
                )
            try:
                with safe_open(file, framework="pt") as opened:
                    places |= {name: (file, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is damaged or cut off ({error}): copy or download it again"
                ) from error
        self.is_ours = "model.token_embedding.weight" in places
        self._places = from_published(places)

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self._places[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def fingerprint(self) -> str:
        """What tells these weights from others: names, shapes, dtypes and the first 4 KB of every tensor."""
        by_file: dict[Path, list[tuple[str, str]]] = defaultdict(list)
        for name, (file, theirs) in self._places.items():
            by_file[file].append((name, theirs))
        entries = {}
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name, theirs in names:
                    tensor = opened.get_tensor(theirs)
                    head = tensor.flatten()[: 4096 // tensor.itemsize].view(torch.uint8).numpy().tobytes()
                    entries[name] = f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + head
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(entries):
            digest.update(entries[name])
        return digest.hexdigest()


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


def _refuse_other_families(names: Iterable[str]) -> None:
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


def _jax_leaves() -> dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]]:
    """Leaves of an openpi JAX checkpoint → our names, each with how its array is cut from the leaf.

    "#" in a name: layers are stacked in front, and the cut is of one layer. JAX kernels are [in, out],
    torch's [out, in].
    """

    def same(array: np.ndarray) -> np.ndarray:
        return array

    def kernel(array: np.ndarray) -> np.ndarray:
        return array.T

    def heads(array: np.ndarray) -> np.ndarray:  # (heads, width, head) → (heads · head, width)
        return array.transpose(0, 2, 1).reshape(-1, array.shape[1])

    def heads_out(array: np.ndarray) -> np.ndarray:  # (heads, head, width) → (width, heads · head)
        return array.reshape(-1, array.shape[-1]).T

    image, block = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    leaves: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
        image + "embedding/kernel": {"vision.patch_embedding.weight": lambda a: a.transpose(3, 2, 0, 1)},
        image + "embedding/bias": {"vision.patch_embedding.bias": same},
        image + "pos_embedding": {"vision.position_embedding": lambda a: a[0]},
        attention + "out/kernel": {"vision.layers.#.o_proj.weight": heads_out},
        attention + "out/bias": {"vision.layers.#.o_proj.bias": same},
        "PaliGemma/llm/embedder/input_embedding": {"token_embedding.weight": same},
    }
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        leaves[f"{attention}{theirs}/kernel"] = {
            f"vision.layers.#.{ours}.weight": lambda a: a.reshape(len(a), -1).T
        }
        leaves[f"{attention}{theirs}/bias"] = {f"vision.layers.#.{ours}.bias": lambda a: a.reshape(-1)}
    for theirs, ours in (
        (block + "MlpBlock_0/Dense_0", "vision.layers.#.up_proj"),
        (block + "MlpBlock_0/Dense_1", "vision.layers.#.down_proj"),
        (image + "head", "vision.projector"),
        *((name, name) for name in PROJECTIONS),
    ):
        leaves |= {f"{theirs}/kernel": {f"{ours}.weight": kernel}, f"{theirs}/bias": {f"{ours}.bias": same}}
    for theirs, ours in (
        (block + "LayerNorm_0", "vision.layers.#.attention_norm"),
        (block + "LayerNorm_1", "vision.layers.#.mlp_norm"),
        (image + "Transformer/encoder_norm", "vision.norm"),
    ):
        leaves |= {f"{theirs}/scale": {f"{ours}.weight": same}, f"{theirs}/bias": {f"{ours}.bias": same}}
    for suffix, stack in (("", "vlm"), ("_1", "expert")):
        theirs, ours = "PaliGemma/llm/layers/", f"{stack}.layers.#."
        leaves |= {
            f"{theirs}attn/q_einsum{suffix}/w": {ours + "q_proj.weight": heads},
            f"{theirs}attn/kv_einsum{suffix}/w": {
                ours + "k_proj.weight": lambda a: heads(a[0]),
                ours + "v_proj.weight": lambda a: heads(a[1]),
            },
            f"{theirs}attn/attn_vec_einsum{suffix}/w": {ours + "o_proj.weight": heads_out},
            f"{theirs}mlp{suffix}/gating_einsum": {
                ours + "gate_proj.weight": lambda a: a[0].T,
                ours + "up_proj.weight": lambda a: a[1].T,
            },
            f"{theirs}mlp{suffix}/linear": {ours + "down_proj.weight": kernel},
            f"{theirs}pre_attention_norm{suffix}/scale": {ours + "attention_norm.weight": same},
            f"{theirs}pre_ffw_norm{suffix}/scale": {ours + "mlp_norm.weight": same},
            f"PaliGemma/llm/final_norm{suffix}/scale": {f"{stack}.norm.weight": same},
        }
    return leaves


_JAX_LEAVES = _jax_leaves()
