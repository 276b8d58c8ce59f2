"""Checkpoint files: found on disk or on the hub, opened, and loaded strictly."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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

from lerobot_pi0.checkpoints.layouts import family_of, from_published, unused_head
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_json
from lerobot_pi0.errors import CheckpointError, MissingFileError

WEIGHTS_FILE = "model.safetensors"


WEIGHTS_INDEX = "model.safetensors.index.json"


ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside adapters that stand alone
ADAPTER_WEIGHTS = "adapter_model.safetensors"


WHOLE = "whole:"  # begins a fingerprint of whole tensors; those of earlier versions have no beginning


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
    found = {name: tensors[name] for name in wanted if name in tensors}
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: quantized or complex weights cannot "
                "be loaded. Convert the checkpoint back to bfloat16 or float32 first"
            )
    misshaped = [
        f"{name} is {tuple(tensor.shape)}, the config says {tuple(wanted[name].shape)}"
        for name, tensor in sorted(found.items())
        if tensor.shape != wanted[name].shape
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
        raise MissingFileError(f"{folder} is a file: give the folder that it stands in")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*_CHECKPOINT_FILES, *also], **download))
    except HFValidationError as error:
        raise MissingFileError(
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
        raise MissingFileError(f"the checkpoint '{name}' cannot be downloaded: {why}") from error


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by our names: one `model.safetensors`, or shards with an index.

    `family`: the model that they are of.
    The files are held open: the tensors stay those of now when the folder is saved over, moved or deleted.
    Each access maps its tensor into memory anew: what was read of it is given back when it is dropped.
    Raises FileNotFoundError when there is none, CheckpointError for a damaged file, a missing shard, a
    tensor that stands twice, adapters without a base or another family of models.
    """

    def __init__(self, folder: Path):
        index, shard_of = folder / WEIGHTS_INDEX, {}
        if (folder / WEIGHTS_FILE).is_file():
            names: Iterable[str] = (WEIGHTS_FILE,)
        elif index.is_file():
            shard_of = read_json(index).get("weight_map")
            if not isinstance(shard_of, dict) or not shard_of:
                raise CheckpointError(f"{index} is damaged (no object 'weight_map'): {COPY_AGAIN}")
            names = {str(name): name for name in shard_of.values()}.values()
        elif (folder / ADAPTER_CONFIG).is_file():
            base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise CheckpointError(
                f"{folder} holds adapters over the weights of '{base}' and no weights of its own. LeRobot's "
                "commands load both with --policy.path; for anything else, make one checkpoint of them: "
                f"lerobot-pi0 merge --adapter={folder} --output=..."
            )
        else:
            raise MissingFileError(
                f"{folder} holds no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}. Point at the folder that a "
                "checkpoint was saved in (lerobot-train: outputs/…/checkpoints/last/pretrained_model), or at "
                "a repository on the hub."
            )
        self._open: dict[Path, BinaryIO] = {}
        places: dict[str, tuple[Path, str]] = {}
        for file in (inside(folder, name, index) for name in names):
            if not file.is_file():
                raise CheckpointError(
                    f"{index} names the shard {file.name}, which is missing: copy or download it again"
                )
            self._open[file] = file.open("rb")
            try:
                with self._reader(file) as opened:
                    names_here = list(opened.keys())
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is damaged or cut off ({error}): copy or download it again"
                ) from error
            held = [name for name in names_here if shard_of.get(name, file.name) == file.name]
            if twice := sorted(places.keys() & set(held)):
                other = places[twice[0]][0]
                raise CheckpointError(f"{twice[0]} stands in {other} and in {file}: keep one of them")
            places |= {name: (file, name) for name in held}
        self.is_ours = "model.token_embedding.weight" in places
        self.family = family_of(places)
        self._places = from_published(places)
        head = unused_head(places)
        self._head = None if head is None else places[head]

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self._places[name]
        with self._reader(file) as opened:
            return opened.get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, _: Any) -> "Checkpoint":
        return self  # nothing of it changes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}

    def head_differs(self) -> bool:
        """Whether the files hold a text head that is not equal to the embedding that it is tied to."""
        if self._head is None:
            return False
        file, name = self._head
        table = self["token_embedding.weight"]
        with self._reader(file) as opened:
            return not torch.equal(opened.get_tensor(name).to(table.dtype), table)

    def fingerprint(self) -> str:
        """Identifies these weights: a digest of names, shapes, dtypes and all values."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self):
            tensor = self[name]
            digest.update(_heading(name, tensor))
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return WHOLE + digest.hexdigest()

    def fingerprint_of_heads(self) -> str:
        """The fingerprint of earlier versions, of the first 4 KB of every tensor."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self):
            tensor = self[name]
            head = tensor.flatten()[: 4096 // tensor.itemsize].view(torch.uint8).numpy()
            digest.update(_heading(name, tensor) + head.tobytes())
        return digest.hexdigest()

    def _reader(self, file: Path) -> Any:
        """safetensors' reader of a file as it was when it was opened."""
        if file not in self._open:
            raise CheckpointError(f"a copy of a policy from another process cannot read {file}: load it anew")
        # By its descriptor, because its path may lead elsewhere by now. Windows keeps open files where they
        # are.
        path = f"/dev/fd/{self._open[file].fileno()}" if os.name == "posix" else file
        return safe_open(path, framework="pt")


def inside(folder: Path, name: str, source: Path) -> Path:
    """The file of this name in a folder. Raises CheckpointError if `source` names one that lies elsewhere."""
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{source} names the file {name!r}, which is not in its folder: it is damaged")
    return folder / name


def _heading(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode()
