"""The policy and the dataset that a tool's flags name, opened in one way for all of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from draccus.utils import ParsingError
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.device_utils import is_torch_device_available
from lerobot.utils.import_utils import require_package

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.planning import DatasetSource, read_dataset
from lerobot_pi0.statistics import check_statistics
from lerobot_pi0.weights import ADAPTER_CONFIG, CheckpointError, find_checkpoint

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")


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

    # Euler steps from noise to actions. Default: as in the checkpoint.
    num_inference_steps: int | None = None
    # On a CPU: multiply in 8-bit integers, a third faster.
    int8: bool = False
    # On a GPU: the whole of sampling as one graph, which is compiled at the start.
    compile: bool = False


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


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy in eval mode with its processors."""

    policy: Pi0Policy
    preprocess: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
    postprocess: PolicyProcessorPipeline[Any, Any]

    @property
    def config(self) -> Pi0Config:
        return self.policy.config


def read_config(flags: PolicyFlags) -> tuple[Pi0Config, Path]:
    """The config of a checkpoint of ours, and the folder that it was found in.

    Raises FileNotFoundError or CheckpointError that says what is wrong.
    """
    if not flags.path:
        raise ValueError("which policy? Name its checkpoint: --policy.path=outputs/…/pretrained_model")
    folder = find_checkpoint(flags.path, revision=flags.revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{flags.path}' has no config.json: it is no checkpoint of this policy")
    try:
        config = PreTrainedConfig.from_pretrained(folder)
    except (ValueError, ParsingError) as error:
        raise CheckpointError(
            f"the config.json of '{flags.path}' cannot be read ({str(error).strip().partition(chr(10))[0]}): "
            "copy or download it again, or install the version that wrote it"
        ) from error
    if not isinstance(config, Pi0Config):
        cure = (
            f"To make one of ours of its weights: lerobot-pi0 convert {flags.path} TARGET"
            if config.type == "pi0"
            else "That is another model, which LeRobot's own commands run"
        )
        raise CheckpointError(f"'{flags.path}' is a policy of type '{config.type}'. {cure}")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    if flags.device is not None:
        _check_device(flags.device)
    config = replace(config, **{name: given[name] for name in given if name not in ("path", "revision")})
    config.pretrained_path, config.pretrained_revision = folder, None
    return config, folder


def load_policy(flags: PolicyFlags) -> LoadedPolicy:
    """A checkpoint of this policy with its processors, in eval mode; adapters lie over their base.

    Raises FileNotFoundError or CheckpointError that says what is wrong.
    """
    config, folder = read_config(flags)
    for name in PIPELINES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{flags.path}' has no {name}, with which the policy was trained: copy or download the "
                "whole folder again"
            )
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            require_package("peft", extra="peft")
        except ImportError as error:
            raise CheckpointError(f"'{flags.path}' holds adapters: {error}") from error
        from peft import PeftConfig, PeftModel

        settings: Any = PeftConfig.from_pretrained(str(folder))
        policy = Pi0Policy.from_pretrained(
            settings.base_model_name_or_path, config=config, revision=settings.revision
        )
        PeftModel.from_pretrained(policy, str(folder), config=settings)  # puts them into the policy
        policy.eval()
    else:
        policy = Pi0Policy.from_pretrained(folder, config=config)
    preprocess, postprocess = make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={"device_processor": {"device": config.device}},
    )
    for pipeline in (preprocess, postprocess):
        for step in pipeline.steps:
            if statistics := getattr(step, "stats", None):  # none: a policy with random weights
                try:
                    check_statistics(config, statistics, f"'{flags.path}'")
                except ValueError as error:
                    raise CheckpointError(f"{error}, or the checkpoint's own") from error
    return LoadedPolicy(policy, cast(Any, preprocess), cast(Any, postprocess))


def _check_device(name: str) -> None:
    try:
        available = is_torch_device_available(name)
    except ValueError:  # no name of a device
        available = False
    if not available:
        raise ValueError(f"this machine has no device '{name}': name another one (cuda, mps, xpu, cpu)")


def dataset_metadata(flags: DatasetFlags) -> LeRobotDatasetMetadata:
    """What a dataset says of itself. Raises FileNotFoundError when there is none."""
    if not flags.repo_id and flags.root is None:
        raise ValueError("which dataset? Name it: --dataset.repo_id=user/name, or --dataset.root=FOLDER")
    return read_dataset(DatasetSource(_repo_id(flags), flags.root, flags.revision))


def check_episodes(chosen: list[int], metadata: LeRobotDatasetMetadata) -> None:
    """Raises ValueError for an episode that does not exist, and for none."""
    if not chosen or not set(chosen) <= set(range(metadata.total_episodes)):
        raise ValueError(
            f"--dataset.episodes={chosen}, but the dataset has episodes 0 to {metadata.total_episodes - 1}"
        )


def open_dataset(
    flags: DatasetFlags, chunk_size: int | None = None, episodes: list[int] | None = None
) -> LeRobotDataset:
    """A dataset, or those `episodes` of it; with a `chunk_size` each item has as many actions to come."""
    metadata = dataset_metadata(flags)
    deltas = {"action": [step / metadata.fps for step in range(chunk_size)]} if chunk_size else None
    return LeRobotDataset(
        _repo_id(flags),
        root=flags.root,
        revision=flags.revision,
        episodes=episodes,
        delta_timestamps=deltas,
    )


def _repo_id(flags: DatasetFlags) -> str:
    return flags.repo_id or f"local/{flags.root.name if flags.root else 'dataset'}"
