"""Weights from a source to a safetensors file, a piece of a tensor at a time, each with its digest.

safetensors' own `save_file` takes all tensors at once, and no version of it appends. The format is a JSON
header with the place of each tensor, behind its length in eight bytes, and then the tensors as they are in
memory: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lerobot_pi0.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_PIECE = 2**24  # numbers that are cast, hashed and written at once


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write `read(name)` for each name of `tensors`, which has its shape and dtype (meta tensors will do).

    What is read is cast to that dtype. Returns the digest of each tensor, as `digest` gives it.
    Raises CheckpointError for NaN and infinite values.
    """
    # Wide ones first: then each tensor stands at a multiple of its own numbers' size.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].itemsize
        place = {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], **place}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in names:
            digests[name] = _write(out, name, tensors[name], read)
    return digests


def _write(out: BinaryIO, name: str, like: Tensor, read: Callable[[str], Tensor]) -> str:
    """Write one tensor, and let it go. Returns its digest."""
    hashed, tensor = hashlib.blake2b(digest_size=16), read(name)
    if tensor.shape != like.shape:
        raise RuntimeError(f"{name} is {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    for piece in _pieces(tensor):
        piece = piece.to(like.dtype)
        if not piece.isfinite().all():
            raise CheckpointError(
                f"'{name}' holds NaN or infinite values: the training diverged, or the checkpoint is damaged"
            )
        data = _bytes(piece)
        hashed.update(data)
        out.write(data)
    return hashed.hexdigest()


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's values."""
    hashed = hashlib.blake2b(digest_size=16)
    for piece in _pieces(tensor):
        hashed.update(_bytes(piece))
    return hashed.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, some rows at a time."""
    if tensor.ndim < 2:
        yield tensor
        return
    row = max(tensor[:1].numel(), 1)
    yield from tensor.split(max(_PIECE // row, 1))


def _bytes(piece: Tensor) -> memoryview:
    return memoryview(piece.contiguous().flatten().view(torch.uint8).numpy())
