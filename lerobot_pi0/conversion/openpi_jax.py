"""Leaves of openpi's JAX checkpoints and how each becomes one of our tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lerobot_pi0.checkpoints.layouts import Family, family_of
from lerobot_pi0.errors import CheckpointError


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
    family = family_of(leaves)
    known, parts = _jax_leaves(family), {}
    for path, shape in leaves.items():
        if path not in known:
            raise CheckpointError(
                f"'{path}' {shape} is no leaf of openpi's plain {family.name} checkpoints: this one has "
                "another architecture, or is damaged; download it again"
            )
        cuts = known[path].items()
        if "#" not in next(iter(cuts))[0]:
            parts |= {name: JaxPart(path, None, cut) for name, cut in cuts}
            continue
        for layer in range(shape[0]):
            parts |= {name.replace("#", str(layer)): JaxPart(path, layer, cut) for name, cut in cuts}
    return parts


def as_tensor(array: np.ndarray) -> Tensor:
    """The tensor of a numpy array; bfloat16 (of ml_dtypes) too, which torch does not take from numpy."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _jax_leaves(family: Family) -> dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]]:
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
        *((name, name) for name in family.projections),
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
        }
        for norm, name in (
            (f"{theirs}pre_attention_norm{suffix}", ours + "attention_norm"),
            (f"{theirs}pre_ffw_norm{suffix}", ours + "mlp_norm"),
            (f"PaliGemma/llm/final_norm{suffix}", f"{stack}.norm"),
        ):
            if family.adaptive and stack == "expert":
                leaves[f"{norm}/Dense_0/kernel"] = {f"{name}.dense.weight": kernel}
                leaves[f"{norm}/Dense_0/bias"] = {f"{name}.dense.bias": same}
            else:
                leaves[f"{norm}/scale"] = {f"{name}.weight": same}
    return leaves
