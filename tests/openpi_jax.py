"""openpi's JAX checkpoints: their arrays under our names, and as files of orbax (OCDBT, zarr, zstd)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from torch import Tensor

from lerobot_pi0.conversion.openpi_jax import as_tensor, openpi_jax_parts


def from_openpi_jax(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors by the names of `Pi0`, of leaves by '/'-joined path with their layers stacked."""
    leaves = {path.removeprefix("params/").removesuffix("/value"): leaf for path, leaf in params.items()}
    parts = openpi_jax_parts({path: leaf.shape for path, leaf in leaves.items()})
    return {
        name: as_tensor(part.cut(leaves[part.leaf] if part.layer is None else leaves[part.leaf][part.layer]))
        for name, part in parts.items()
    }


def write_leaf(
    params: Path,
    path: str,
    shape: tuple[int, ...],
    dtype: Any,
    numbers: np.ndarray | Callable[[int], np.ndarray],
    chunk: tuple[int, ...] | None = None,
) -> None:
    """An array, or what gives each part of its first axis; in one piece, as orbax writes it, or in chunks."""
    store = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{params}/"},
            "path": f"params.{path.replace('/', '.')}.value/",
        },
        "metadata": {"chunks": list(chunk or shape), "compressor": {"id": "zstd", "level": 1}},
    }
    array = tensorstore.open(store, create=True, dtype=np.dtype(dtype), shape=shape).result()
    if callable(numbers):
        numbers = np.stack([numbers(i) for i in range(shape[0])])
    array.write(numbers).result()


def write_checkpoint(
    folder: Path,
    leaves: Mapping[str, np.ndarray],
    statistics: Mapping[str, Any] | None = None,
    chunk: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None,
) -> Path:
    """params/ with these leaves, and assets/robot/norm_stats.json."""
    for path, leaf in leaves.items():
        write_leaf(
            folder / "params",
            path,
            leaf.shape,
            leaf.dtype,
            leaf,
            None if chunk is None else chunk(leaf.shape),
        )
    if statistics is not None:
        write_statistics(folder, "robot", statistics)
    return folder


def write_statistics(folder: Path, asset_id: str, statistics: Mapping[str, Any]) -> None:
    file = folder / "assets" / asset_id / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": statistics}))
