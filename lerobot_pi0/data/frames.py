"""Columns of a LeRobot dataset, read from its parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import dataset_key


def data_files(dataset: Any) -> list[Path]:
    """The files with a dataset's frames; none when it is streamed, and has metadata alone on this disk."""
    root = getattr(dataset, "root", None)
    return sorted(Path(root).glob("data/*/*.parquet")) if root else []


def read_columns(
    dataset: Any,
    columns: Sequence[str],
    indices: np.ndarray | None = None,
    episodes: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Columns (frames, dims) of a dataset's frames on disk, all or those of `indices` and `episodes`, and
    "index" (frames,), ascending.

    They are called as the policy calls them. Empty when there are none.
    """
    chosen = {"index": indices, "episode_index": episodes}
    filters = [(name, "in", {int(i) for i in of}) for name, of in chosen.items() if of is not None] or None
    features = getattr(dataset, "features", {})
    stored = {name: dataset_key(name, features) for name in columns}
    tables = [read_parquet(file, [*stored.values(), "index"], filters) for file in data_files(dataset)]
    if not sum(table.num_rows for table in tables):
        return {}

    def array(name: str) -> np.ndarray:
        chunks = [chunk for table in tables for chunk in table.column(name).chunks]
        flat = [chunk.flatten() if hasattr(chunk, "flatten") else chunk for chunk in chunks]
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in flat])

    index = array("index")
    order = np.argsort(index, kind="stable")
    found = {name: array(of).reshape(len(index), -1)[order] for name, of in stored.items()}
    return {"index": index[order], **found}


def read_parquet(file: Path, columns: Sequence[str], filters: Any = None) -> pyarrow.Table:
    """Columns of a parquet file. Raises UserError that names the file when it cannot be read."""
    try:
        return pyarrow.parquet.read_table(file, columns=list(columns), filters=filters)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read ({reason}): copy or download the dataset again") from error


def episode_borders(frames: dict[str, np.ndarray]) -> np.ndarray:
    """Which frames (frames,) are the first of an episode, or come after a gap."""
    changes = (np.diff(frames["episode_index"][:, 0]) != 0) | (np.diff(frames["index"]) != 1)
    return np.append(True, changes)
