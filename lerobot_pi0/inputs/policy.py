"""The policy and the dataset that a tool's flags name, opened in one way for all of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.device_utils import is_torch_device_available
from lerobot.utils.import_utils import require_package

from lerobot_pi0.checkpoints import loading
from lerobot_pi0.checkpoints.adapters import put_in, read_settings
from lerobot_pi0.checkpoints.files import ADAPTER_CONFIG, find_checkpoint
from lerobot_pi0.checkpoints.processors import PIPELINES, check_processors
from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_state, read_steps
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.statistics import check_statistics
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.inputs.flags import PolicyFlags
from lerobot_pi0.modeling_pi0 import Pi0Policy


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
        raise UserError("which policy? Name its checkpoint: --policy.path=outputs/…/pretrained_model")
    folder = find_checkpoint(flags.path, revision=flags.revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"'{flags.path}' has no config.json: it is no checkpoint of this policy. Name the folder that "
            "lerobot-train saved (outputs/…/checkpoints/last/pretrained_model), or convert openpi's weights "
            "first: lerobot-pi0 convert SOURCE TARGET"
        )
    config = loading.read_config(folder)
    if not isinstance(config, Pi0Config):
        fix = (
            f"To make one of ours of its weights: lerobot-pi0 convert {flags.path} TARGET"
            if config.type in ("pi0", "pi05")
            else "That is another model, which LeRobot's own commands run"
        )
        raise CheckpointError(f"'{flags.path}' is a policy of type '{config.type}'. {fix}")
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
    try:
        config.validate_features()
    except UserError as error:
        raise CheckpointError(f"the config.json of '{flags.path}' cannot be used: {error}") from error
    for name in PIPELINES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{flags.path}' has no {name}, with which the policy was trained: copy or download the "
                "whole folder again"
            )
    check_processors(folder, config)
    for name in PIPELINES:
        for step in read_steps(folder / name):
            read_state(folder, step)  # errors that name the file, before the weights are loaded
    if (folder / ADAPTER_CONFIG).is_file():
        policy = load_adapters(flags.path, folder, config)
    else:
        policy = policy_class(config).from_pretrained(folder, config=config)
    try:
        preprocess, postprocess = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": config.device}},
        )
    except UserError as error:
        raise CheckpointError(f"the processors in '{flags.path}' cannot be loaded: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # LeRobot's, of a step's settings
        raise CheckpointError(
            f"the processors in '{flags.path}' cannot be loaded ({error}): {COPY_AGAIN}"
        ) from error
    for pipeline in (preprocess, postprocess):
        for step in pipeline.steps:
            if statistics := getattr(step, "stats", None):  # none: a policy with random weights
                try:
                    check_statistics(config, statistics, f"'{flags.path}'")
                except ValueError as error:
                    raise CheckpointError(str(error)) from error
    return LoadedPolicy(policy, cast(Any, preprocess), cast(Any, postprocess))


def policy_class(config: Pi0Config) -> type[Pi0Policy]:
    """The policy that a config is of."""
    return cast(type[Pi0Policy], get_policy_class(config.type))


def load_adapters(name: str, folder: Path, config: Pi0Config) -> Pi0Policy:
    """The base with the adapters of `folder` in it, in eval mode. `name` is what the user called them.

    Raises CheckpointError without PEFT, and what loading the base raises.
    """
    try:
        require_package("peft", extra="peft")
    except ImportError as error:
        raise CheckpointError(f"'{name}' holds adapters: {error}") from error
    config.pretrained_path = folder
    settings = read_settings(folder)
    policy = policy_class(config).from_pretrained(
        settings.base_model_name_or_path, config=config, revision=settings.revision
    )
    put_in(policy, folder, settings)
    return policy.eval()


def _check_device(name: str) -> None:
    try:
        available = is_torch_device_available(name)
    except ValueError:  # no name of a device
        available = False
    if not available:
        raise UserError(f"this machine has no device '{name}': name another one (cuda, mps, xpu, cpu)")
