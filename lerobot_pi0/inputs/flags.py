"""The flags that several commands share: which policy, which dataset. Imports neither LeRobot nor torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lerobot_pi0.errors import MissingFileError

# As `configuration_pi0` has them, which imports LeRobot.
Backend = Literal["auto", "eager", "compile", "int8", "fp8"]
Solver = Literal["euler", "ab2"]


@dataclass
class PolicyFlags:
    """`--policy.*` of a tool."""

    # Checkpoint of this policy: a folder or a repository on the hub; adapters are loaded over their base.
    path: str = ""
    # Branch, tag or commit on the hub.
    revision: str | None = None
    # Where the policy runs. Default: where its checkpoint says, or what this machine has.
    device: str | None = None


@dataclass
class ControlPolicyFlags(PolicyFlags):
    """`--policy.*` of a tool that drives a robot."""

    # Steps from noise to actions. Default: as in the checkpoint.
    num_inference_steps: int | None = None
    # How: euler, or ab2 (six steps are about as accurate as ten). Default: as in the checkpoint.
    solver: Solver | None = None
    # How chunks are computed: auto, eager (GPU: without a CUDA graph), compile (GPU: compiled at the start),
    # int8 (CPU: a third faster) or fp8 (GPU: 8-bit floats). Default: auto.
    backend: Backend | None = None
    # Retired, set --policy.backend to int8.
    int8: bool = False
    # Retired, set --policy.backend to compile.
    compile: bool = False


@dataclass
class DatasetSource:
    """Where the dataset is, with LeRobot's flags."""

    # Name of the dataset, on the hub or in LeRobot's folder for local ones.
    repo_id: str
    # Its folder, if it lies elsewhere.
    root: Path | None = None
    # Branch, tag or commit on the hub.
    revision: str | None = None


@dataclass
class DatasetFlags:
    """`--dataset.*` of a tool, as lerobot-train has them."""

    # Name of the dataset, on the hub or in --dataset.root.
    repo_id: str = ""
    # Folder of the dataset. Default: LeRobot's own place for it.
    root: Path | None = None
    # Branch, tag or commit on the hub.
    revision: str | None = None
    # Which episodes, for example '[0, 7]'. Default: the tool's choice.
    episodes: list[int] | None = None


def check_dataset_root(root: str | Path) -> None:
    """Raises MissingFileError for a folder without a dataset."""
    if not (Path(root) / "meta" / "info.json").is_file():
        raise MissingFileError(
            f"there is no dataset in {root} (no meta/info.json): --dataset.root is the folder of the dataset "
            "itself; leave it out to look on the hub"
        )
