"""Prefixes of a dataset's frames, kept on disk: with the vision-language model frozen, each is computed once.

π0's prefix depends on images and prompt alone. The cache fills while training: what a batch needs and is not
there yet is computed and stored; after the first epoch the vision-language model has nothing left to do. It
belongs to certain weights, settings and pixels, which are compared each time: what differs is refused.

    contents.json   what the prefixes were computed from; written last, so that without it nothing is valid
    checksums       8 bytes per frame: CRC-32 of images and prompt, CRC-32 of the record; zero is not stored
    records         per frame room for the longest prefix, (token, layer, key or value, head, dim); sparse
    lock            held by the process that writes
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from lerobot_pi0.model import Observation, Pi0
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.sharding import is_sharded

if TYPE_CHECKING:
    from jaxtyping import Int
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    from lerobot_pi0.configuration_pi0 import Pi0Config

logger = logging.getLogger(__name__)

# In a dataset's folder, where the hub's client never uploads from: pushing the dataset leaves the cache out,
# which can be a thousand times as large.
FOLDER = Path(".cache", "huggingface", "lerobot_pi0_prefixes")

# float16 is eight times as exact as bfloat16; a prefix beyond its range (65504) is refused.
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float16}


@dataclass(frozen=True)
class PrefixSource:
    """All that prefixes depend on besides a frame's own pixels and prompt, and the shape that they have."""

    weights: str  # `fingerprint`
    dataset: str
    revision: str | None
    frames: int
    cameras: list[str]  # in the order in which the model sees them
    image_size: int
    image_tokens: int  # of all cameras
    prompt_tokens: int  # at most
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # that they are computed in
    format: int = 1  # of the files, and of what is computed

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.layers, 2, self.kv_heads, self.head_dim)

    @property
    def record_size(self) -> int:
        """Bytes of a frame's record, most of which a prefix of the usual length fills."""
        return 2 * (self.image_tokens + self.prompt_tokens) * math.prod(self.token_shape)


# The settings that put a difference right; all others mean other weights or another dataset.
FLAGS = {
    "cameras": "--policy.cameras",
    "image_size": "--policy.vision.image_size",
    "image_tokens": "--policy.vision.patch_size",
    "prompt_tokens": "--policy.tokenizer_max_length",
    "dtype": "--policy.dtype",
}


def fingerprint(model: Pi0) -> str:
    """A hash of all weights that a prefix depends on, in hexadecimal; about 1 GB per second."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (model.vision, model.token_embedding, model.vlm):
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def open_prefix_cache(config: Pi0Config, model: Pi0, dataset: LeRobotDatasetMetadata) -> PrefixCache:
    """The cache of these weights and this dataset, in the dataset's folder; a new one if there is none.

    Raises ValueError where weights that a prefix depends on are trained or sharded, and as `PrefixCache`.
    """
    if is_sharded(model):
        raise ValueError(
            "--policy.cache_prefix=true needs whole weights, to know which ones its prefixes were computed "
            "from, and FSDP has cut them into shards: train without FSDP (one GPU, or DDP), or with "
            "--policy.cache_prefix=false"
        )
    for part in ("vision", "token_embedding", "vlm"):
        for name, parameter in getattr(model, part).named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"--policy.cache_prefix=true, but '{part}.{name}' is trained, and with it every prefix "
                    "changes. Train the expert alone (--policy.freeze=vlm, and adapters with "
                    "--peft.target_modules in the expert only), or without the cache "
                    "(--policy.cache_prefix=false)"
                )
    source = PrefixSource(
        weights=fingerprint(model),
        dataset=dataset.repo_id,
        revision=dataset.revision,
        frames=dataset.total_frames,
        cameras=list(config.cameras.values()),
        image_size=config.vision.image_size,
        image_tokens=len(config.cameras) * config.vision.num_tokens,
        prompt_tokens=config.tokenizer_max_length,
        layers=config.vlm.depth,
        kv_heads=config.vlm.num_kv_heads,
        head_dim=config.vlm.head_dim,
        dtype=config.dtype,
    )
    return PrefixCache(Path(dataset.root) / FOLDER / source.weights[:16], source)


class PrefixCache:
    """A folder with the prefixes of a dataset's frames. Several processes may fill and read it at once."""

    def __init__(self, folder: Path, source: PrefixSource):
        """Opens or creates it, after a log message that says how large it can become.

        Raises ValueError when the folder holds prefixes of another source, when a file is damaged or when the
        disk has too little room; OSError when nothing can be written there.
        """
        self.folder, self.source = folder, source
        self._dtype = STORED_DTYPES[source.dtype]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"no prefix cache can be made in {folder} ({error.strerror}): copy the dataset to where you "
                "can write and name it with --dataset.root, or train with --policy.cache_prefix=false"
            ) from error
        with self._lock():
            is_new = not self._path("contents.json").exists()
            if not is_new:
                self._check()
            self._announce(0 if is_new else int(np.count_nonzero(self._open_checksums())))
            if is_new:
                self._create()
        self._checksums = self._open_checksums()

    def lookup(
        self, observation: Observation, index: Int[Tensor, "*b"], compute: Callable[[Observation], Cache]
    ) -> Cache:
        """What `compute(observation)` gives, for the dataset's frames `index`, without a graph.

        `compute` is called once with the observations that are not stored yet, or not at all. Keys and values
        have its shapes and are its own bit for bit in bfloat16; those of masked prompt tokens are zero.
        Raises ValueError when a frame's images or prompt are not those that its prefix was computed from.
        """
        frames, checksums = index.flatten().tolist(), _checksums(observation)
        if not 0 <= min(frames) <= max(frames) < self.source.frames:
            raise ValueError(
                f"the batch has frames {min(frames)} to {max(frames)}, but '{self.source.dataset}' has only "
                f"{self.source.frames}: train on that dataset alone, or with --policy.cache_prefix=false"
            )
        if observation.tokens.shape[1] > self.source.prompt_tokens:
            raise ValueError(
                f"the prompt has {observation.tokens.shape[1]} tokens, the prefix cache has room for "
                f"{self.source.prompt_tokens}: set --policy.tokenizer_max_length, which a checkpoint's own "
                "tokenizer may exceed"
            )
        places = torch.arange(1, observation.tokens.shape[1] + 1, device=observation.tokens.device)
        lengths = (self.source.image_tokens + (observation.token_mask * places).amax(1)).tolist()
        missing = [row for row, frame in enumerate(frames) if not self._checksums[frame]]
        if missing:
            prefixes = self._compute(_select(observation, missing), compute)
            with self._lock():
                for row, prefix in zip(missing, prefixes, strict=True):
                    self._write(frames[row], prefix[: lengths[row]], checksums[row])
        num_tokens = self.source.image_tokens + observation.tokens.shape[1]
        prefixes = torch.empty((len(frames), num_tokens, *self.source.token_shape), dtype=self._dtype)
        for row, frame in enumerate(frames):
            self._read(frame, prefixes[row, : lengths[row]], checksums[row])
            prefixes[row, lengths[row] :] = 0
        return self._cache(prefixes, observation)

    def _cache(self, prefixes: Tensor, observation: Observation) -> Cache:
        prefixes = prefixes.to(observation.images.device, getattr(torch, self.source.dtype))
        layers = [
            (layer[:, :, 0].transpose(1, 2), layer[:, :, 1].transpose(1, 2)) for layer in prefixes.unbind(2)
        ]
        views = observation.image_mask.shape[1]
        image_mask = observation.image_mask.repeat_interleave(self.source.image_tokens // views, 1)
        return Cache(layers, torch.cat((image_mask, observation.token_mask), 1))

    def _compute(self, observation: Observation, compute: Callable[[Observation], Cache]) -> Tensor:
        """Prefixes as they are stored: (frame, token, layer, key or value, head, dim), on the CPU."""
        with torch.no_grad():
            layers = compute(observation).layers
        prefixes = torch.stack([torch.stack((k, v)) for k, v in layers]).permute(2, 4, 0, 1, 3, 5)
        prefixes = prefixes.to("cpu", self._dtype).contiguous()
        if not all(bound.isfinite() for bound in torch.aminmax(prefixes)):
            raise ValueError(
                f"keys or values of a prefix are not finite as {self._dtype}: --policy.dtype=bfloat16 has a "
                "larger range; if that does not help, the weights are broken"
            )
        return prefixes

    def _write(self, frame: int, record: Tensor, checksum: int) -> None:
        # Another process may have been faster, and what is stored never changes.
        if self._checksums[frame]:
            return
        data = _bytes(record)
        # Not through a mapping, where a full disk kills the process.
        with self._path("records").open("r+b", buffering=0) as file:
            file.seek(frame * self.source.record_size)
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        self._checksums[frame] = checksum << 32 | zlib.crc32(data)

    def _read(self, frame: int, record: Tensor, checksum: int) -> None:
        stored, data = int(self._checksums[frame]), _bytes(record)
        if stored >> 32 != checksum:
            raise ValueError(
                f"images or prompt of frame {frame} are not what its stored prefix was computed from. Either "
                "image augmentation is on: set --dataset.image_transforms.enable=false or "
                "--policy.cache_prefix=false. Or the dataset has changed, or the way it is read (video "
                f"backend, tokenizer, device): {self._delete()}"
            )
        with self._path("records").open("rb", buffering=0) as file:
            file.seek(frame * self.source.record_size)
            if file.readinto(data) < len(data) or zlib.crc32(data) != stored & 0xFFFFFFFF:
                raise ValueError(f"the record of frame {frame} in {file.name} is damaged: {self._delete()}")

    def _check(self) -> None:
        """Raises ValueError unless the folder's files are whole and their source is this one."""
        try:
            contents: dict[str, Any] = json.loads(self._path("contents.json").read_text())
        except ValueError as error:
            raise ValueError(f"{self._path('contents.json')} is damaged: {self._delete()}") from error
        expected = asdict(self.source)
        differences = [name for name in expected if contents.get(name) != expected[name]]
        if differences:
            flags = [FLAGS[name] for name in differences if name in FLAGS]
            found = "; ".join(
                f"{name}: {contents.get(name)!r}, now {expected[name]!r}" for name in differences
            )
            raise ValueError(
                f"the prefixes in {self.folder} were computed from something else. {found}. "
                + (f"Set {' and '.join(flags)} as before, or " if flags else "")
                + self._delete()
            )
        for name, size in self._sizes().items():
            path = self._path(name)
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise ValueError(f"{path} is damaged: {found:,} bytes, not {size:,}. {self._delete()}")

    def _announce(self, stored: int) -> None:
        """Logs the size on disk. Raises ValueError if what is missing does not fit."""
        source, record = self.source, self.source.record_size
        folders = [contents.parent for contents in self.folder.parent.glob("*/contents.json")]
        others = sorted(folder.name for folder in folders if folder != self.folder)
        logger.info(
            "prefix cache: up to %.3g GB in %s (%d frames, %.3g MB each, as %s); %d frames are there%s",
            source.frames * record / 1e9,
            self.folder,
            source.frames,
            record / 1e6,
            str(self._dtype).removeprefix("torch."),
            stored,
            f"; beside it prefixes of other weights: {', '.join(others)}" if others else "",
        )
        needed, free = (source.frames - stored) * record, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"the prefix cache needs up to {needed / 1e9:.3g} GB more in {self.folder} "
                f"({source.frames - stored:,} frames, {record / 1e6:.3g} MB each), and the disk has "
                f"{free / 1e9:.3g} GB free. Ways out: delete prefixes of other weights in "
                f"{self.folder.parent}; copy the dataset to a larger disk (--dataset.root), or only the "
                "episodes that you train on (lerobot-edit-dataset); use fewer cameras (--policy.cameras); or "
                "train with --policy.cache_prefix=false"
            )

    def _create(self) -> None:
        sizes = self._sizes()
        # No hole in the mapped file: there is no way to say that a mapped page finds no room.
        self._path("checksums").write_bytes(bytes(sizes["checksums"]))
        with self._path("records").open("wb") as file:
            file.truncate(sizes["records"])
        unfinished = self._path("contents.json.unfinished")
        unfinished.write_text(json.dumps(asdict(self.source), indent=2))
        unfinished.replace(self._path("contents.json"))

    def _sizes(self) -> dict[str, int]:
        return {"checksums": 8 * self.source.frames, "records": self.source.frames * self.source.record_size}

    def _open_checksums(self) -> np.memmap:
        return np.memmap(self._path("checksums"), np.uint64, "r+", shape=(self.source.frames,))

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _lock(self) -> AbstractContextManager[Any]:
        return WeakFileLock(self._path("lock"))

    def _delete(self) -> str:
        return (
            f"delete {self.folder}, and prefixes are computed anew; or train with --policy.cache_prefix=false"
        )


def _checksums(observation: Observation) -> list[int]:
    """CRC-32 of what each sample's prefix depends on: images, which of them are real, and prompt."""
    images, image_mask, tokens, token_mask = (
        tensor.cpu()
        for tensor in (observation.images, observation.image_mask, observation.tokens, observation.token_mask)
    )
    checksums = []
    for row, valid in enumerate(token_mask):
        checksum = zlib.crc32(_bytes(images[row]))
        for part in (image_mask[row], tokens[row, valid]):
            checksum = zlib.crc32(_bytes(part), checksum)
        checksums.append(checksum)
    return checksums


def _select(observation: Observation, rows: list[int]) -> Observation:
    if len(rows) == len(observation.images):
        return observation
    return Observation(**{name: tensor[rows] for name, tensor in vars(observation).items()})


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory: of itself if it is contiguous and on the CPU, else of a copy."""
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
