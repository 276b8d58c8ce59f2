"""Checkpoints as openpi's JAX code leaves them, written leaf by leaf: OCDBT, zarr, zstd."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore


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
