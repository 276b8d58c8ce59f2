"""Where this package leans on the internals of LeRobot, PEFT or torch, or changes what LeRobot does.

One function per place. Each says what it does, why, and where the other side is; LeRobot's files are relative
to `lerobot/`. All of it holds on the versions in `TESTED` and `SNAPSHOTS`: `tests/test_lerobot_compat.py`
lists every name and signature that is relied on, and fails with the name that is gone or has changed. The
rest of the package uses LeRobot's public and documented names only. Internals of torch and PEFT are also used
where the work is done: oneDNN's operators and parameters' versions in `sampling/`, adapters in
`training/lora.py`, compilation, the average of the weights, and the estimate of memory.

Where versions differ, a function asks for the name that only one of them has, never for a version. What is
"after 0.6.1" below is so in the snapshot of LeRobot's main.

Four contracts have no function here, because they are attributes that LeRobot looks up on our classes:

    Pi0Config.compile_model            rollout/context.py sets it to --use_torch_compile
    Pi0Policy._fsdp_wrap_modules       LeRobot after 0.6.1 reads it for FSDP2: what is sharded as one
    Pi0Policy.drop_queued_actions      LeRobot after 0.6.1 calls it when the instruction changes
    Pi0Policy._get_default_peft_targets, _build_peft_config, _validate_peft_config, _save_pretrained
                                       policies/pretrained.py calls them: adapters and saving
"""

import contextlib
import difflib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, wraps
from importlib.metadata import distribution, version
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from weakref import ref

from lerobot_pi0.errors import CommandError, MissingFileError, UserError

if TYPE_CHECKING:
    from lerobot.policies.rtc import ActionQueue
    from lerobot.processor import TokenizerProcessorStep
    from lerobot.rollout import RolloutConfig, RolloutContext, RolloutStrategy
    from lerobot.rollout.inference import InferenceEngine, RTCInferenceEngine
    from lerobot.rollout.robot_wrapper import ThreadSafeRobot

logger = logging.getLogger(__name__)

# The releases of LeRobot that the tests were run with.
TESTED = ("0.6.1",)
# Snapshots of its main that they were run with: the commit, and what it is called in a message.
SNAPSHOTS = {"7427f31801f944f5ec9ce53cda02862ce7d1638b": "main of 2026-08-23"}


@cache
def check_version() -> None:
    """Warn once per process when LeRobot is none of the versions that the tests were run with."""
    found, commit = version("lerobot"), installed_commit()
    if commit in SNAPSHOTS if commit else found in TESTED:
        return
    logger.warning(
        "LeRobot %s is installed; this package was tested with %s only. "
        "To go back: pip install 'lerobot==%s'",
        f"{found} (commit {commit[:9]})" if commit else found,
        ", ".join([*TESTED, *(f"{name} ({commit[:9]})" for commit, name in SNAPSHOTS.items())]),
        TESTED[-1],
    )


@cache
def log_versions() -> None:
    """Log once per process what runs, as `lerobot-pi0 --version` says it, and `check_version`."""
    logger.info("%s", ", ".join(versions()))
    check_version()


def versions() -> list[str]:
    """This package, LeRobot, torch and transformers, each with its version."""
    names = ("lerobot_policy_pi0", "lerobot", "torch", "transformers")
    return [f"{name} {version(name)}" for name in names]


def installed_commit() -> str | None:
    """The commit of LeRobot that is installed from its repository; "unknown" of a folder without one, and
    None of a release.

    Its main has the number of a release that comes later. pip and uv write down where a package is from
    (direct_url.json, of the specification of direct URLs).
    """
    text = distribution("lerobot").read_text("direct_url.json")
    if text is None:
        return None
    origin = json.loads(text)
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return commit
    if "dir_info" not in origin:  # a file, as one of a release may be
        return None
    folder = unquote(urlsplit(origin["url"]).path)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", folder, "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


@contextmanager
def internals(what: str) -> Iterator[None]:
    """Raise UserError that names LeRobot's version when one of its internals is not there."""
    try:
        yield
    except (AttributeError, ImportError, KeyError) as error:
        raise UserError(
            f"{what} needs an internal of LeRobot that version {version('lerobot')} does not have ({error}). "
            f"This package was tested with LeRobot {', '.join(TESTED)}: pip install 'lerobot=={TESTED[-1]}'"
        ) from error


# The command line


def shorten_torchcodec_notice() -> None:
    """Make one line, logged once, of the sixty that LeRobot logs whenever it finds that torchcodec cannot be
    loaded.

    LeRobot looks for it whenever it makes flags of a dataset or opens one (utils/import_utils.py,
    `get_safe_default_video_backend`; lerobot#4307), logs the loader's tracebacks, and has no setting for it.
    """
    logging.getLogger("lerobot.utils.import_utils").addFilter(_TORCHCODEC_NOTICE)


class _OneLine(logging.Filter):
    """Passes one notice about torchcodec, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self._was_logged = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record."""
        if "torchcodec" not in record.getMessage():
            return True
        passes, self._was_logged = not self._was_logged, True
        record.args = ()
        record.msg = (
            "videos are decoded with PyAV: torchcodec cannot be loaded (it needs the libraries of FFmpeg)"
        )
        return passes


_TORCHCODEC_NOTICE = _OneLine()


def quiet_video_encoder() -> None:
    """Let SVT-AV1, with which LeRobot encodes videos, log errors alone: it writes 17 lines for each video.

    The library reads this variable when it encodes. LeRobot sets the level of libav's messages alone
    (datasets/video_utils.py, `encode_video_frames`).
    """
    os.environ.setdefault("SVT_LOG", "1")


def parse_flags[T](program: str, arguments: Sequence[str], config_class: type[T]) -> T:
    """Parse flags as a command of LeRobot does, `--policy.path` and its overrides included.

    LeRobot reads `--policy.path` from `sys.argv`, deep within its config classes (configs/parser.py,
    `get_path_arg` and `get_cli_overrides`), and offers no parameter for it: for the time of the call, the
    arguments stand there.
    Raises what draccus, argparse and the config classes raise.
    """
    from lerobot.configs import parser

    def parsed(config: Any) -> Any:
        return config

    parsed.__annotations__["config"] = config_class  # where `parser.wrap` looks for the class
    before, sys.argv = sys.argv, [program, *arguments]
    try:
        given: Any = parser.wrap()(parsed)
        return given()
    finally:
        sys.argv = before


def parsing_failure(error: BaseException) -> BaseException:
    """The error that says why flags or a config were not parsed.

    draccus raises a bare ParsingError, "Couldn't instantiate class …", for a ValueError or TypeError of a
    dataclass (parsers/decoding.py, `decode_dataclass`), and wraps that again for a field with several types:
    the message of the dataclass is in the cause.
    """
    from draccus.utils import ParsingError

    link: BaseException | None = error
    while link is not None:
        if type(link) is ParsingError and link.__cause__ is not None:
            return link.__cause__
        link = link.__cause__
    return error


def parsing_failure_line(error: BaseException) -> str:
    """The first line of what `parsing_failure` says."""
    return str(parsing_failure(error)).strip().partition("\n")[0]


def check_checkpoint_name(name: str) -> None:
    """Raises MissingFileError for what is neither a path nor like a name on the hub (user/name).

    LeRobot asks the hub for each path that is not there (configs/policies.py, `from_pretrained`).
    """
    if not Path(name).expanduser().exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise MissingFileError(f"there is no folder {name}, and it is no name of a repository on the hub")


def policy_path(arguments: Sequence[str]) -> tuple[str, str | None] | None:
    """`--policy.path` and `--policy.pretrained_revision` among the arguments of a command of LeRobot.

    configs/parser.py, `get_path_arg` and `parse_arg`: a path may also stand in the file of --config_path.
    """
    from lerobot.configs import parser

    path = parser.get_path_arg("policy", arguments)
    return None if path is None else (path, parser.parse_arg("policy.pretrained_revision", arguments))


def command_of_lerobot(arguments: Sequence[str]) -> str | None:
    """The command of LeRobot that runs with this `sys.argv`, for example lerobot-train; None if none does."""
    program = Path(arguments[0]).stem.replace("_", "-") if arguments else ""
    return program if program.startswith("lerobot-") and program != "lerobot-pi0" else None


def print_user_errors(arguments: Sequence[str]) -> None:
    """Let a command of LeRobot end with the message of a UserError, in place of a traceback.

    LeRobot's commands catch nothing (scripts/lerobot_train.py, `main`), and what a policy raises stands below
    the frames of all who called it. Other errors keep their traceback. The exit code is 1 for both.
    """
    program, before = command_of_lerobot(arguments), sys.excepthook
    if program is None:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        reason = parsing_failure(error)
        if isinstance(reason, UserError):
            sys.stderr.write(f"{program}: error: {reason}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what LeRobot's commands are certain to refuse, in one line in place of their hundreds.

    Plugins are imported before the flags are parsed (configs/parser.py, `wrap`; utils/import_utils.py,
    `register_third_party_plugins`, which catches every Exception). Looks at `sys.argv` of a command of
    LeRobot: files that are not there, settings that this package's policies do not have, and, to train, a
    dataset that is neither here nor on the hub. Raises SystemExit with code 2, as argparse does.
    """
    program = command_of_lerobot(arguments)
    if program is None:
        return
    problem = _missing_file(arguments[1:]) or _unknown_setting(arguments[1:])
    if problem is None and program == "lerobot-train":
        problem = _missing_dataset(arguments[1:])
    if problem is not None:
        sys.stderr.write(f"{program}: error: {problem}\n")
        raise SystemExit(2)


def _missing_file(arguments: Sequence[str]) -> str | None:
    """What to say of a --config_path or --policy.path that is not there."""
    from lerobot.configs import parser

    path, config = (parser.parse_arg(name, arguments) for name in ("policy.path", "config_path"))
    if config is not None and config.endswith((".yaml", ".yml", ".json")) and not Path(config).is_file():
        return f"--config_path={config} does not exist"
    try:
        check_checkpoint_name(path or ".")
    except MissingFileError as error:
        return f"--policy.path: {error}"
    return None


def _unknown_setting(arguments: Sequence[str]) -> str | None:
    """What to say of a flag that a policy of this package does not have; None if all are its own."""
    from lerobot.configs import PreTrainedConfig

    kind = str(training_setting("policy.type", arguments))
    if kind not in PreTrainedConfig.get_known_choices():
        return None
    config: Any = PreTrainedConfig.get_choice_class(kind)
    if not config.__module__.startswith("lerobot_pi0."):
        return None
    known = [*(field.name for field in fields(config)), "type", "path", "discover_packages_path"]
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--policy.").partition(".")[0]
        if argument.startswith("--policy.") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean --policy.{near[0]}?" if near else ""
            return f"--policy.{name} is no setting of {kind}.{hint}"
    return None


def _missing_dataset(arguments: Sequence[str]) -> str | None:
    """What to say of a dataset that LeRobot would neither find nor download; None if it may have it.

    It looks in --dataset.root, or else in its folder for local datasets and in its cache, and then on the hub
    (datasets/dataset_metadata.py, `LeRobotDatasetMetadata`).
    """
    from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE

    name, root = (training_setting(f"dataset.{part}", arguments) for part in ("repo_id", "root"))
    is_remote = training_setting("job.target", arguments) not in (None, "local")
    if name is None or is_remote or training_setting("dataset.repo_type", arguments) == "bucket":
        return None
    name, folder = str(name), HF_LEROBOT_HOME / str(name) if root is None else Path(str(root))
    if (folder / "meta" / "info.json").is_file():
        return None
    if root is None:
        if (HF_LEROBOT_HUB_CACHE / f"datasets--{name.replace('/', '--')}").is_dir():
            return None
        if why := _not_on_hub(name):
            return (
                f"the dataset '{name}' is not in {HF_LEROBOT_HOME}, and cannot be downloaded: {why}. For a "
                "folder elsewhere: --dataset.root=FOLDER"
            )
        return None
    if folder.is_dir() and any(folder.iterdir()):
        below = sorted(file.parents[1] for file in folder.glob("*/meta/info.json"))
        hint = f" One of those in it: --dataset.root={below[0]}" if below else ""
        return f"--dataset.root={root} holds no dataset (no meta/info.json).{hint}"
    if why := _not_on_hub(name):
        state = "is empty" if folder.is_dir() else "does not exist"
        return f"--dataset.root={root} {state}, and '{name}' cannot be downloaded into it: {why}"
    return None


def _not_on_hub(name: str) -> str | None:
    """Why a dataset cannot be had from the hub; None if it may be there."""
    from httpx import TransportError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if name.startswith("local/"):
        return "names that begin with local/ are those of datasets that were recorded here"
    try:
        HfApi().dataset_info(name, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        if not isinstance(error, GatedRepoError):
            return "the hub has no such dataset (a private one needs `hf auth login`)"
    except OfflineModeIsEnabled:
        return "the hub is not asked (HF_HUB_OFFLINE=1)"
    except TransportError as error:
        return f"the hub cannot be reached ({error})"
    except HfHubHTTPError:
        pass  # LeRobot may be luckier
    return None


# Training


def trained_episodes(dataset_meta: Any) -> list[int] | None:
    """The episodes that are trained on, of the dataset with these metadata; None: all.

    LeRobot hands a policy the metadata of the whole dataset, and not what --dataset.episodes and
    --dataset.eval_split leave of it (scripts/lerobot_train.py, `train`). Whoever calls has the dataset that
    these metadata belong to in a local variable: it is found in the frames of the callers, by identity.
    """
    from lerobot.datasets import LeRobotDataset, StreamingLeRobotDataset

    frame = sys._getframe() if dataset_meta is not None else None
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, LeRobotDataset | StreamingLeRobotDataset) and value.meta is dataset_meta:
                return value.episodes
        frame = frame.f_back
    return None


def training_setting(name: str, arguments: Sequence[str] | None = None) -> Any:
    """A setting of the `lerobot-train` that runs, which it does not tell the policy; None if it is not set.

    As it is typed among the arguments (default: those of this process), or else as the file of --config_path
    has it (configs/parser.py, `parse_arg`).
    """
    from draccus.cfgparsing import parse_string
    from lerobot.configs import parser

    if (typed := parser.parse_arg(name, arguments)) is not None:
        return parse_string(typed)
    file = parser.parse_arg("config_path", arguments)
    if file is None or not Path(file).is_file():
        return None
    found: Any = parse_string(Path(file).read_text("utf-8"))  # YAML, and so JSON
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def dataset_key(key: str, features: Mapping[str, Any]) -> str:
    """What a dataset with these features calls the policy's `key`.

    After 0.6.1 --rename_map of `lerobot-train` may rename state and action (policies/factory.py,
    `make_policy`); the policy gets metadata and statistics under the dataset's names.
    """
    if key in features:
        return key
    renamed = training_setting("rename_map") or {}
    return next((old for old, new in renamed.items() if new == key and old in features), key)


def normalize_by(dataset_meta: Any, statistics: Mapping[str, Any]) -> None:
    """Make LeRobot build the processors with the policy's statistics in place of the dataset's.

    `lerobot-train` makes the policy first and then the processors, with `dataset.meta.stats`
    (scripts/lerobot_train.py, `train`); a policy has no hook to hand over statistics of its own, as it needs
    for quantiles that are missing, for relative actions and for --policy.statistics=checkpoint.
    """
    dataset_meta.stats = statistics


def build_new_processors(config: Any) -> None:
    """Make LeRobot ask our factory for processors, instead of loading those of the weights' checkpoint.

    LeRobot makes the processors after the policy, from the folder in `config.pretrained_path` if there is one
    (policies/factory.py, `make_pre_post_processors`). A checkpoint of another layout has other ones (another
    prompt, a gated tokenizer).
    """
    config.pretrained_path = config.pretrained_revision = None


def make_card_by(policy: Any) -> None:
    """Make LeRobot ask a policy for its model card.

    After 0.6.1 a function makes the card, for all policies alike (common/train_utils.py,
    `generate_model_card`, called by `publish_trained_model`): without licence, installation and base of ours.
    """
    from lerobot.common import train_utils

    found: Any = getattr(train_utils, "generate_model_card", None)
    if found is None:  # the policy is asked
        return
    lerobots = getattr(found, "__wrapped__", found)
    weak = ref(policy)  # this function stays when the policy goes

    @wraps(lerobots)
    def card(model_cfg: Any, cfg: Any = None, dataset_meta: Any = None) -> Any:
        policy = weak()
        if policy is None or policy.config is not model_cfg or cfg is None:
            return lerobots(model_cfg, cfg, dataset_meta)
        named = cfg.dataset.repo_id, model_cfg.type, model_cfg.license, model_cfg.tags
        return policy.generate_model_card(*named, cfg=cfg, dataset_meta=dataset_meta)

    vars(train_utils)["generate_model_card"] = card


# Conversion


def tokenizer_step(name: str, max_length: int) -> "TokenizerProcessorStep":
    """The tokenizer step of LeRobot's own policies, to be saved with its tokenizer's name alone.

    The tokenizer itself is gated, and is not needed to write the step. LeRobot asks for it when the step is
    made (processor/tokenizer_processor.py, `__post_init__`), and after 0.6.1 when it is saved
    (`save_artifacts`).
    """
    from lerobot.processor import TokenizerProcessorStep

    step: Any = TokenizerProcessorStep(
        tokenizer=object(), max_length=max_length, padding_side="right", padding="max_length"
    )
    step.tokenizer, step.tokenizer_name = None, name
    step.save_artifacts = lambda _: {}
    return step


# Rollout


def is_policy_joint(name: str) -> bool:
    """Does LeRobot hand this feature of a robot to the policy, as part of its state or its action?

    rollout/context.py, `build_rollout_context`: joint positions and base velocities alone.
    """
    return name.endswith((".pos", ".vel"))


def disconnect_devices(error: BaseException) -> None:
    """Disconnect the robot and teleoperator that a failed `build_rollout_context` was about to use.

    When it fails after it has connected them (rollout/context.py; lerobot#4584), it leaves them connected and
    hands no reference out: they are found in the frames of the traceback.
    """
    from lerobot.robots import Robot
    from lerobot.teleoperators import Teleoperator

    used = [value for frame, _ in traceback.walk_tb(error.__traceback__) for value in frame.f_locals.values()]
    for device in used:
        if isinstance(device, Robot | Teleoperator) and device.is_connected:
            device.disconnect()


@contextmanager
def robots_state_order() -> Iterator[None]:
    """Let LeRobot build a rollout that hands the policy the state in the order in which the robot has it.

    After 0.6.1 it puts the state into the order of the *actions* (rollout/context.py,
    `_align_state_feature_order`), and the policy gets one joint's value for another's where its data had
    states and actions in two orders. That the robot's order is the data's is checked before.
    """
    from lerobot.rollout import context

    name = "_align_state_feature_order"
    lerobots = vars(context).get(name)
    if lerobots is None:
        yield
        return
    vars(context)[name] = lambda features, _: features
    try:
        yield
    finally:
        vars(context)[name] = lerobots


def hide_slow_loop_notices() -> None:
    """Hide what LeRobot's control loop logs whenever one round took longer than a control step.

    It says so of each chunk that the loop waits for, and of rounds that no action was late by
    (rollout/strategies/base.py, `run`; after 0.6.1 utils/cycle_timer.py). Called after LeRobot's
    `init_logging`, which makes the handlers.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_slow_loop_notice)


def _is_no_slow_loop_notice(record: logging.LogRecord) -> bool:
    is_loops = record.name.startswith(("lerobot.rollout.strategies.", "lerobot.utils.cycle_timer"))
    notices = ("Record loop is running slower", "Control loop is running slower")
    return not (is_loops and record.getMessage().startswith(notices))


@contextmanager
def pictures_as_they_are() -> Iterator[None]:
    """Let LeRobot's engines give the policy uint8 pictures, which it scales on its device.

    LeRobot makes them float32 on the CPU, in every tick (policies/utils.py,
    `prepare_observation_for_inference`): that takes milliseconds, and a GPU is sent four times the bytes.
    """
    from lerobot.rollout.inference import rtc, sync

    name = "prepare_observation_for_inference"
    lerobots = vars(sync)[name]

    def prepare(observation: dict[str, Any], device: Any, *rest: Any) -> dict[str, Any]:
        import torch

        pictures = {key: x for key, x in observation.items() if "image" in key and x.dtype == "uint8"}
        others = {key: value for key, value in observation.items() if key not in pictures}
        return lerobots(others, device, *rest) | {
            # A copy: the camera may write into its own.
            key: torch.tensor(picture).to(device).permute(2, 0, 1)[None]
            for key, picture in pictures.items()
        }

    vars(sync)[name] = vars(rtc)[name] = prepare
    try:
        yield
    finally:
        vars(sync)[name] = vars(rtc)[name] = lerobots


def fed_state_names(ctx: "RolloutContext") -> list[str]:
    """What the dimensions of the state are called, in the order in which the engine hands them to the policy.

    rollout/inference: the one engine builds its batch by `hw_features`, the other one by `dataset_features`.
    """
    with internals("lerobot-pi0 rollout"):
        is_rtc = ctx.runtime.cfg.inference.type == "rtc"
        features: Any = ctx.data.hw_features if is_rtc else ctx.data.dataset_features
        return list(features["observation.state"]["names"])


def is_interactive(cfg: "RolloutConfig") -> bool:
    """Whether a person starts and ends each run by typing (--interactive, after LeRobot 0.6.1)."""
    return getattr(cfg, "interactive", False)


def end_of_loop(cfg: "RolloutConfig", shutdown: Event) -> Event:
    """What ends the control loop: the process's shutdown, or with --interactive also the end of a run.

    scripts/lerobot_rollout.py, `rollout`.
    """
    if not is_interactive(cfg):
        return shutdown
    from lerobot.rollout import LinkedEvent  # pyrefly: ignore[missing-module-attribute]

    return LinkedEvent(shutdown)


def drive(strategy: "RolloutStrategy", ctx: "RolloutContext") -> None:
    """Run a strategy that was set up, at once, or with --interactive as it is told to.

    scripts/lerobot_rollout.py, `rollout`. An interactive session catches what ends a run
    (rollout/controller.py): here that is a CommandError.
    """
    if not is_interactive(ctx.runtime.cfg):
        strategy.run(ctx)
        return
    from lerobot.rollout import InteractiveSession  # pyrefly: ignore[missing-module-attribute]

    session = InteractiveSession(strategy, ctx)
    session.run()
    if session.controller.failed and not ctx.policy.inference.failed:
        reason = (session.controller.failure_traceback or "").strip().rpartition("\n")[2]
        raise CommandError(f"the run failed: {reason}")


def replace_robot_and_engine(
    ctx: "RolloutContext",
    robot: "Callable[[ThreadSafeRobot], ThreadSafeRobot]",
    engine: "Callable[[InferenceEngine], Any]",
) -> None:
    """Put our wrappers of the robot and the inference engine into the context that a strategy is given.

    LeRobot has no callbacks in its control loop, and its engines are a closed set
    (rollout/inference/factory.py). The strategies read both from the context (rollout/context.py).
    """
    with internals("lerobot-pi0 rollout"):
        ctx.hardware.robot_wrapper = robot(ctx.hardware.robot_wrapper)
        ctx.policy.inference = engine(ctx.policy.inference)


def replace_queue_methods(queue: "ActionQueue", **replaced: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace methods of LeRobot's action queue that its inference thread and control loop call.

    `replaced`: for `get`, `merge`, `clear` and `get_left_over` a function from LeRobot's method to the one in
    its place. After 0.6.1 the loop calls `get_with_task`, which gives an action with its instruction, and the
    thread gives `merge` the instruction too: in the place of `get` stands what the loop calls.
    policies/rtc/action_queue.py; the engine makes the queue itself (rollout/inference/rtc.py, `start`).
    Two faults are corrected by it: `merge` drops ceil(latency · fps) actions of a chunk, which is often one
    more than were sent meanwhile, and as many of the first one (lerobot#4454); and a chunk that was computed
    from an observation before a reset is executed after it (in 0.6.1).
    """
    with internals("lerobot-pi0 rollout"):
        for name, replace in replaced.items():
            called = "get_with_task" if name == "get" and hasattr(queue, "get_with_task") else name
            setattr(queue, called, replace(getattr(queue, called)))


def on_observation_taken(engine: "RTCInferenceEngine", callback: Callable[[], None]) -> None:
    """Call `callback` whenever LeRobot's inference thread takes an observation, under the lock of it.

    rollout/inference/rtc.py, `_rtc_loop`: the thread reads the private dict `_obs_holder` under `_obs_lock`.
    """
    with internals("lerobot-pi0 rollout"), engine._obs_lock:
        engine._obs_holder = _Holder(engine._obs_holder, callback)


def forget_observation(engine: "RTCInferenceEngine", callback: Callable[[], None]) -> None:
    """Drop the observation that the inference thread would take next, and call `callback` under its lock.

    LeRobot's `reset` keeps it (rollout/inference/rtc.py; lerobot#3747): an episode would begin with actions
    for where the last one ended.
    """
    with internals("lerobot-pi0 rollout"), engine._obs_lock:
        engine._obs_holder["obs"] = None
        callback()


class _Holder(dict[str, Any]):
    """LeRobot's dict of the last observation, with a callback."""

    def __init__(self, holder: dict[str, Any], callback: Callable[[], None]):
        super().__init__(holder)
        self._callback = callback

    def get(self, key: str, default: Any = None) -> Any:
        """The one way in which LeRobot's thread asks."""
        self._callback()
        return super().get(key, default)


class LastError(logging.Handler):
    """Keeps the last error that a logger was given, without tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what the record says."""
        if "Traceback" not in (message := record.getMessage()):
            self.last = message


@contextmanager
def inference_errors() -> Iterator[LastError]:
    """The last error of LeRobot's inference thread.

    The thread only logs its errors, and the engine's `failed` has no reason (rollout/inference/rtc.py).
    """
    errors, log = LastError(), logging.getLogger("lerobot.rollout.inference.rtc")
    log.addHandler(errors)
    try:
        yield errors
    finally:
        log.removeHandler(errors)


# torch


@cache
def let_idle_threads_sleep() -> None:
    """Let torch's idle threads on a CPU sleep, also where `OMP_WAIT_POLICY=PASSIVE` was not set in time.

    GNU's OpenMP, which torch has on Linux, lets a thread that waits for the others spin for 300,000 rounds,
    and for 1,000 if there are more of its threads than cores (its manual, `GOMP_SPINCOUNT`). Beside another
    process the long wait takes most of a core. It reads its variables when torch is imported, and plugins
    are imported later; so there are more threads: a second team, which sleeps. Other OpenMP libraries stay
    as they are.
    """
    import torch

    is_there = threading.Event()

    def hold_a_team() -> None:
        torch.ones(2**16 * torch.get_num_threads()).add_(1)  # large enough for all threads
        is_there.set()
        threading.Event().wait()

    if "OMP_WAIT_POLICY" in os.environ or torch.get_num_threads() == 1:
        return
    threading.Thread(target=hold_a_team, name="second OpenMP team", daemon=True).start()
    is_there.wait()
