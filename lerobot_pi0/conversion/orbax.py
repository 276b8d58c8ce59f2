"""openpi's JAX checkpoints: orbax's files, read a layer at a time under our names, LoRA merged.

A leaf holds all layers of one kind; the largest has 4.8 GB in float32, and is often compressed as one piece.
orbax restores whole leaves, with JAX. So this reads with tensorstore, which orbax itself writes with, and
unpacks such a piece in passing.
"""

import bisect
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lerobot_pi0.checkpoints.layouts import family_of
from lerobot_pi0.conversion.openpi_jax import as_tensor, openpi_jax_parts
from lerobot_pi0.errors import CheckpointError, CommandError

_AT_ONCE = 2**28  # bytes that are unpacked in memory; a larger leaf goes through a temporary file
_LORA = ("lora_a", "lora_b")


PARAMS = "params"  # openpi's folder of parameters, beside that of the training's state


def find_params(folder: Path) -> Path | None:
    """The folder of an orbax checkpoint's parameters: `folder` itself or `params` in it; None without one."""
    for found in (folder / PARAMS, folder):
        if (found / "_METADATA").is_file() or (found / "manifest.ocdbt").is_file():
            return found
    return None


@dataclass(frozen=True)
class _Leaf:
    """An array of the checkpoint, in zarr's format."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    compressor: str | None

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def is_one_stream(self) -> bool:
        """Whether it is stored as one piece that can be unpacked in passing."""
        return self.chunk == self.shape and self.compressor in (None, "zstd")


class OrbaxCheckpoint(Mapping[str, Tensor]):
    """The tensors of an openpi JAX checkpoint by our names, LoRA merged, each read when it is asked for.

    `family`: the model that they are of.
    In the order of iteration everything is read once. With LoRA a tensor is as wide as its adapters.
    `scratch`: a folder for the temporary file. `lora_alpha`: openpi's, which no checkpoint holds; default:
    the rank, as in openpi's own configurations.
    Raises CheckpointError for a damaged checkpoint or one of another family.
    """

    def __init__(self, params: Path, scratch: Path, lora_alpha: float | None = None):
        if find_spec("tensorstore") is None:
            raise CommandError(
                f"{params} is a checkpoint of openpi's JAX code, which is read with tensorstore: "
                "pip install 'lerobot_policy_pi0[openpi]'"
            )
        import tensorstore

        self._scratch, self._alpha = scratch, lora_alpha
        is_ocdbt = (params / "manifest.ocdbt").is_file()
        base = {"driver": "file", "path": f"{params.absolute()}/"}
        self._store: Any = {"driver": "ocdbt", "base": base} if is_ocdbt else base
        self._params = params
        try:
            self._files = tensorstore.KvStore.open(self._store).result()
            keys = [key.decode() for key in self._files.list().result()]
            found = {
                key.removesuffix("/.zarray"): json.loads(self._files.read(key).result().value)
                for key in keys
                if key.endswith("/.zarray")
            }
        except ValueError as error:
            raise self._damaged(error) from error
        if not found:
            raise CheckpointError(
                f"{params} holds no arrays that can be read"
                + (": it is of orbax's newer format (zarr3)" if any("zarr.json" in k for k in keys) else "")
            )
        everything = {
            key.removeprefix("params.").removesuffix(".value").replace(".", "/"): _leaf(key, array)
            for key, array in found.items()
        }
        self._lora = {path: leaf for path, leaf in everything.items() if path.endswith(_LORA)}
        self._leaves = {path: leaf for path, leaf in everything.items() if path not in self._lora}
        self.family = family_of(self._leaves)
        self._parts = openpi_jax_parts({path: leaf.shape for path, leaf in self._leaves.items()})
        unknown = {path for path in self._lora if self._over(path) not in self._leaves}
        if unknown:
            raise CheckpointError(f"'{min(unknown)}' is LoRA over a leaf that the checkpoint does not have")
        self._last: tuple[Any, np.ndarray] | None = None
        self._unpacked: tuple[str, IO[bytes]] | None = None  # a temporary file

    @property
    def has_lora(self) -> bool:
        return bool(self._lora)

    def meta(self) -> dict[str, Tensor]:
        """Shape and dtype of each tensor, as meta tensors, without reading them."""
        tensors = {}
        for name, part in self._parts.items():
            leaf = self._leaves[part.leaf]
            shape = part.cut(np.broadcast_to(np.uint8(0), leaf.shape[(part.layer is not None) :])).shape
            kind = as_tensor(np.empty(0, leaf.dtype)).dtype
            kind = torch.promote_types(kind, torch.float32) if self._adapters(part.leaf) else kind
            tensors[name] = torch.empty(shape, dtype=kind, device="meta")
        return tensors

    def heads(self) -> tuple[int, int, int]:
        """Attention heads of the vision tower, and of the language model for queries and for keys."""
        attention = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
        layers = "PaliGemma/llm/layers/attn/"
        try:
            vision = self._leaves[attention].shape[2]
            queries = self._leaves[f"{layers}q_einsum/w"].shape[1]
            return vision, queries, self._leaves[f"{layers}kv_einsum/w"].shape[2]
        except KeyError as error:
            raise CheckpointError(f"{self._params} is incomplete: it has no {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        if part.layer is None:
            return as_tensor(part.cut(self._merged(part.leaf, None)))
        which = part.leaf, part.layer
        if self._last is None or self._last[0] != which:
            self._last = None
            self._last = which, self._merged(*which)
        return as_tensor(part.cut(self._last[1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _adapters(self, path: str) -> list[_Leaf]:
        """A and B of the LoRA over a leaf, or nothing."""
        return [leaf for lora, leaf in sorted(self._lora.items()) if self._over(lora) == path]

    def _over(self, lora: str) -> str:
        """The leaf that a leaf of LoRA is over: q_einsum/lora_a → q_einsum/w, linear_lora_a → linear."""
        stem = lora.removesuffix("lora_a").removesuffix("lora_b")
        return f"{stem}w" if stem.endswith("/") else stem.removesuffix("_")

    def _merged(self, path: str, layer: int | None) -> np.ndarray:
        """A leaf, or one layer of it, with its LoRA."""
        weights, adapters = self._read(self._leaves[path], layer), self._adapters(path)
        if not adapters:
            return weights
        a, b = (self._read(leaf, layer).astype(np.float32) for leaf in adapters)
        scale = 1.0
        if "/attn/" in path:  # openpi scales attention alone
            scale = 1.0 if self._alpha is None else self._alpha / b.shape[-2]
        if "attn_vec_einsum" in path:  # openpi adds the heads up between A and B
            b = b.sum(0)
        return weights.astype(np.float32) + np.float32(scale) * (a @ b)

    def _read(self, leaf: _Leaf, layer: int | None) -> np.ndarray:
        by_layer = layer is not None and leaf.chunk[0] == 1
        if leaf.size > _AT_ONCE and not by_layer:
            whole = self._unpacked_leaf(leaf)
            return whole if layer is None else whole[layer]
        return self._slice(leaf, () if layer is None else (layer,))

    def _slice(self, leaf: _Leaf, region: tuple[int | slice, ...]) -> np.ndarray:
        import tensorstore

        store = {**self._store, "path": f"{self._store.get('path', '')}{leaf.key}/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
            return array[region].read().result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error

    def _unpacked_leaf(self, leaf: _Leaf) -> np.ndarray:
        """A large leaf, unpacked into a temporary file. It is mapped anew each time, and so given back."""
        if self._unpacked is None or self._unpacked[0] != leaf.key:
            if self._unpacked is not None:
                self._unpacked[1].close()
            self._unpacked, file = None, TemporaryFile(dir=self._scratch)  # noqa: SIM115
            if leaf.is_one_stream:
                self._stream(leaf, file)
            else:
                array = np.memmap(file, leaf.dtype, "w+", shape=leaf.shape)
                steps = (range(0, n, step) for n, step in zip(leaf.shape, leaf.chunk, strict=True))
                for start in itertools.product(*steps):
                    ends = zip(start, leaf.chunk, leaf.shape, strict=True)
                    region = tuple(slice(i, min(i + step, n)) for i, step, n in ends)
                    array[region] = self._slice(leaf, region)
            self._unpacked = leaf.key, file
        return np.memmap(self._unpacked[1], leaf.dtype, "c", shape=leaf.shape)

    def _stream(self, leaf: _Leaf, file: Any) -> None:
        import pyarrow

        key = f"{leaf.key}/{'.'.join('0' * len(leaf.shape))}"
        try:
            packed = io.BufferedReader(_Value(self._files, key), 2**24)
            source = packed if leaf.compressor is None else pyarrow.CompressedInputStream(packed, "zstd")
            while block := source.read(2**24):
                file.write(block)
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        if file.tell() != leaf.size:
            raise self._damaged(f"{leaf.key} has {file.tell()} bytes of {leaf.size}")
        file.flush()

    def _damaged(self, why: object) -> CheckpointError:
        reason = str(why).partition("\n")[0][:300]
        return CheckpointError(f"{self._params} is damaged or incomplete ({reason}): download it again")


class _Value(io.RawIOBase):
    """A stored value as a file, of which nothing is held."""

    def __init__(self, files: Any, key: str):
        self._files, self._key, self._position = files, key, 0
        # A range beyond the end is an error, and nothing says where that is.
        end = next(2**bits for bits in itertools.count() if not self._has(2**bits))
        self._size = bisect.bisect_left(range(end), True, key=lambda at: not self._has(at))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if self._position == end:
            return 0
        block = self._files.read(self._key, byte_range=slice(self._position, end)).result().value
        buffer[: len(block)] = block
        self._position = end
        return len(block)

    def _has(self, at: int) -> bool:
        """Whether there is a byte at this position."""
        try:
            return len(self._files.read(self._key, byte_range=slice(at, at + 1)).result().value) == 1
        except ValueError:
            return False


def _leaf(key: str, array: dict[str, Any]) -> _Leaf:
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if array["dtype"] == "bfloat16" else array["dtype"])
    compressor = array["compressor"]
    return _Leaf(
        key,
        tuple(array["shape"]),
        dtype,
        tuple(array["chunks"]),
        None if compressor is None else compressor["id"],
    )
