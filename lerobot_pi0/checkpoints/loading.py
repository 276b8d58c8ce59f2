"""A policy's checkpoint: resolved, opened, loaded strictly, saved atomically."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import draccus
import torch
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lerobot_pi0.checkpoints import adapters
from lerobot_pi0.checkpoints.files import WEIGHTS_FILE, Checkpoint, find_checkpoint, load_weights
from lerobot_pi0.checkpoints.golden_actions import GOLDEN_ACTIONS_FILE
from lerobot_pi0.checkpoints.layouts import Family, family_of_type
from lerobot_pi0.checkpoints.processors import check_processors, state_size
from lerobot_pi0.checkpoints.published import assumptions
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_json
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.lerobot_compat import build_new_processors, parsing_failure_line
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig

logger = logging.getLogger(__name__)

# What every version has written into a config, and its weights do not say.
SIZES = ("dtype", "chunk_size", "n_action_steps", "num_inference_steps", "max_state_dim", "max_action_dim")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint that a policy is made from, with the config that the policy will have."""

    folder: Path
    config: Pi0Config
    base: adapters.Base

    @property
    def is_ours(self) -> bool:
        """Whether it is a checkpoint of this policy, and not of a published layout."""
        return self.base.checkpoint.is_ours

    @property
    def is_below_adapters(self) -> bool:
        """Whether LeRobot puts adapters over these weights."""
        return adapters.loads_adapters(self.config)

    @property
    def statistics(self) -> str | Path | None:
        """Where the normalization statistics are: an adapter's folder has its own, not those of its base."""
        return self.config.pretrained_path if self.is_below_adapters else self.folder

    def load(self, network: nn.Module, dtype: torch.dtype, keeps: Callable[[nn.Parameter], bool]) -> None:
        """Put the weights into a network on the meta device, in this dtype, or in the file's where `keeps`
        says so.

        Parameters that adapters replace are float32.
        """
        dtypes = {name: None if keeps(parameter) else dtype for name, parameter in network.named_parameters()}
        if self.is_below_adapters:
            dtypes |= adapters.dtypes_in_full(network, self.config)
        try:
            load_weights(network, self.base.checkpoint, dtypes, self.config.device)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        logger.info("%d tensors from %s, all of them used", len(self.base.checkpoint), self.folder)


def open_source(
    policy_type: str, name: str | Path, folder: Path, config: PreTrainedConfig | None, revision: str | None
) -> Source:
    """Open the checkpoint that was found in `folder` under a name, with its own config or another one.

    Raises CheckpointError for another policy's, for a damaged one, and for weights that the config's adapters
    were not trained over.
    """
    if config is None:
        if not is_own(policy_type, name, folder):
            found = read_policy_type(folder)
            kind = f"a policy of type '{found}'" if found else "no LeRobot policy"
            _check_family(policy_type, name, Checkpoint(folder).family)
            raise CheckpointError(
                f"'{name}' is {kind}. To take its weights for this policy, give it a config: "
                f"--policy.type={policy_type} --policy.pretrained_path={name}"
            )
        config = read_config(folder)
    if not isinstance(config, Pi0Config) or config.type != policy_type:
        raise TypeError(
            f"config is a {type(config).__name__}, of type '{config.type}': this policy is of type "
            f"'{policy_type}'"
        )
    source = Source(folder, config, adapters.Base.of(name, revision, folder, Checkpoint(folder)))
    _check_family(policy_type, name, source.base.checkpoint.family)
    # LeRobot's commands load the pipelines next: those of the adapters, or the checkpoint's own.
    if source.is_below_adapters:
        assert config.pretrained_path is not None
        above = find_checkpoint(config.pretrained_path, revision=config.pretrained_revision)
        adapters.read_settings(above)
        _check_complete(above)
        adapters.check_base(config, source.base)
        check_processors(above, config)
    elif source.is_ours:
        _check_complete(folder)
        check_processors(folder, config)
        if state_size(folder) not in (None, config.state_size):
            build_new_processors(config)
            logger.info("the state has another size than in %s: the processors are new", folder)
    if not source.is_ours:
        config.base_checkpoint, config.base_revision = str(name), source.base.revision
    if not source.is_ours and not source.is_below_adapters:
        # An adapter's folder has our processors. For new ones a --rename_map finds no step to go to.
        build_new_processors(config)
        logger.info("weights of another layout: the processors are new, and --rename_map has no effect")
        if isinstance(config, Pi05Config):
            logger.info(assumptions(name, config))
    return source


def is_own(policy_type: str, name: str | Path, folder: Path) -> bool:
    """Whether a checkpoint is one of this policy's own, by its config: its weights need not be there yet.

    Raises CheckpointError for a checkpoint of the other model, π0 or π0.5.
    """
    found = read_policy_type(folder)
    if family := family_of_type(found):
        _check_family(policy_type, name, family)
    return found == policy_type


def _check_family(policy_type: str, name: str | Path, found: Family) -> None:
    """Raises CheckpointError for a checkpoint of another model than the policy's."""
    wanted = family_of_type(policy_type)
    if wanted is not None and found is not wanted:
        raise CheckpointError(
            f"'{name}' is a checkpoint of {found.name}, and --policy.type={policy_type} is {wanted.name}: "
            f"their action experts differ. Set --policy.type={found.type}, or start from a checkpoint of "
            f"{wanted.name}"
        )


def _check_complete(folder: Path) -> None:
    """Raises CheckpointError for a config of ours without a size: the default's would be taken for it."""
    file = folder / CONFIG_NAME
    saved = read_json(file) if file.is_file() else {}
    if not str(saved.get("type")).startswith("lerobot_pi"):
        return  # weights without a config of their own
    parts = {"vision": SiglipConfig, "vlm": GemmaConfig, "expert": ExpertConfig}
    missing = [name for name in SIZES if name not in saved]
    for part, kind in parts.items():
        found = saved.get(part)
        names = found if isinstance(found, dict) else {}
        missing += [f"{part}.{of.name}" for of in fields(kind) if of.name not in names]
    if missing:
        raise CheckpointError(f"{file} is damaged: it has no {missing}. {COPY_AGAIN.capitalize()}")


def read_policy_type(folder: Path) -> str | None:
    """What LeRobot calls the policy in a checkpoint; None where it is not LeRobot's."""
    file = folder / CONFIG_NAME
    return read_json(file).get("type") if file.is_file() else None


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a policy of any type. Raises CheckpointError that names the file."""
    file = folder / CONFIG_NAME
    read_json(file)  # LeRobot's errors on what is no JSON object do not name the file
    try:
        return PreTrainedConfig.from_pretrained(folder)
    except (ValueError, draccus.ParsingError) as error:
        raise CheckpointError(
            f"{file} is damaged or of another version ({parsing_failure_line(error)}): {COPY_AGAIN}, or "
            "install the version that wrote it"
        ) from error


def save(folder: Path, config: Pi0Config, tensors: Mapping[str, Tensor]) -> None:
    """Write config and weights. Each file replaces the one in its place when it is complete.

    A killed process then leaves no half of a file, and weights that are memory-mapped from the file in its
    place keep their values.
    """
    (folder / GOLDEN_ACTIONS_FILE).unlink(missing_ok=True)  # of the weights that were here before
    config._save_pretrained(folder)
    unfinished = folder / f"{WEIGHTS_FILE}.unfinished"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"format": "pt"})
    unfinished.replace(folder / WEIGHTS_FILE)
