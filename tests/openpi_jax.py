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
    read: Callable[[int], np.ndarray],
    chunk: tuple[int, ...] | None = None,
) -> None:
    """One array, of whose first axis part i is `read(i)`; in one piece, as orbax writes it, or in chunks."""
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
    if chunk is not None and chunk[0] == 1:
        for i in range(shape[0]):
            array[i].write(read(i)).result()
    else:
        whole = np.empty(shape, dtype)
        for i in range(shape[0]):
            whole[i] = read(i)
        array.write(whole).result()


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
            leaf.__getitem__,
            None if chunk is None else chunk(leaf.shape),
        )
    if statistics is not None:
        write_statistics(folder, "robot", statistics)
    return folder


def write_statistics(folder: Path, asset_id: str, statistics: Mapping[str, Any]) -> None:
    file = folder / "assets" / asset_id / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": statistics}))
