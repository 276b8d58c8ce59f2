"""Where this package leans on the internals of LeRobot, PEFT or torch, or changes what LeRobot does.

One function per place. Each says what it does, why, and where the other side is; LeRobot's files are relative
to `lerobot/`. All of it holds on the versions in `TESTED`: `tests/test_lerobot_compat.py` lists every name
and signature that is relied on, and fails with the name that is gone or has changed. The rest of the package
uses public and documented names only.

Three contracts have no function here, because they are attributes that LeRobot looks up on our classes:

    Pi0Config.compile_model            rollout/context.py sets it to --use_torch_compile
    Pi0Policy._fsdp_wrap_modules       LeRobot after 0.6.1 reads it for FSDP2: what is sharded as one
    Pi0Policy._get_default_peft_targets, _build_peft_config, _validate_peft_config, _save_pretrained
                                       policies/pretrained.py calls them: adapters and saving
"""

import logging
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lerobot_pi0.errors import UserError

if TYPE_CHECKING:
    from lerobot.policies.rtc import ActionQueue
    from lerobot.rollout import RolloutContext
    from lerobot.rollout.inference import InferenceEngine, RTCInferenceEngine
    from lerobot.rollout.robot_wrapper import ThreadSafeRobot

logger = logging.getLogger(__name__)

# The versions of LeRobot that the tests were run with.
TESTED = ("0.6.1",)


@cache
def check_version() -> None:
    """Warn once per process when LeRobot is none of the versions that the tests were run with."""
    found = version("lerobot")
    if found not in TESTED:
        logger.warning(
            "LeRobot %s is installed; this package was tested with %s only. "
            "To go back: pip install 'lerobot==%s'",
            found,
            ", ".join(TESTED),
            TESTED[-1],
        )


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


def silence_torchcodec_notice() -> None:
    """Hide the warning, of sixty lines, that torchcodec cannot be loaded; LeRobot then decodes with PyAV.

    LeRobot logs it when it is imported (utils/import_utils.py, `get_safe_default_video_backend`;
    lerobot#4307), and has no setting for it.
    """
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)


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


def policy_path(arguments: Sequence[str]) -> tuple[str, str | None] | None:
    """`--policy.path` and `--policy.pretrained_revision` among the arguments of a command of LeRobot.

    configs/parser.py, `get_path_arg` and `parse_arg`: a path may also stand in the file of --config_path.
    """
    from lerobot.configs import parser

    path = parser.get_path_arg("policy", arguments)
    return None if path is None else (path, parser.parse_arg("policy.pretrained_revision", arguments))


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


def replace_robot_and_engine(
    ctx: "RolloutContext",
    robot: "Callable[[ThreadSafeRobot], ThreadSafeRobot]",
    engine: "Callable[[InferenceEngine], InferenceEngine]",
) -> None:
    """Put our wrappers of the robot and the inference engine into the context that a strategy is given.

    LeRobot has no callbacks in its control loop, and its engines are a closed set
    (rollout/inference/factory.py). The strategies read both from the context (rollout/context.py).
    """
    with internals("lerobot-pi0 rollout"):
        ctx.hardware.robot_wrapper = robot(ctx.hardware.robot_wrapper)
        ctx.policy.inference = engine(ctx.policy.inference)


def replace_queue_methods(
    queue: "ActionQueue",
    *,
    get: Callable[..., Any],
    merge: Callable[..., Any],
    clear: Callable[..., Any],
    get_left_over: Callable[..., Any],
) -> None:
    """Replace the four methods of LeRobot's action queue that its inference thread and control loop call.

    policies/rtc/action_queue.py; the engine makes the queue itself (rollout/inference/rtc.py, `start`).
    Two faults are corrected by it: `merge` drops ceil(latency · fps) actions of a chunk, which is often one
    more than were sent meanwhile, and as many of the first one (lerobot#4454); and a chunk that was computed
    from an observation before a reset is executed after it.
    """
    with internals("lerobot-pi0 rollout"):
        for name, method in {
            "get": get,
            "merge": merge,
            "clear": clear,
            "get_left_over": get_left_over,
        }.items():
            getattr(queue, name)  # AttributeError when LeRobot calls it otherwise by now
            setattr(queue, name, method)


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


def in_any_thread[**P, T](graph: Callable[P, T]) -> Callable[P, T]:
    """A compiled function that any thread may call, one after the other.

    torch keeps its CUDA graphs in thread-local storage of the one thread that has imported them
    (torch/_inductor/cudagraph_trees.py, `local`), and fails in others (pytorch#123177): real-time chunking
    and servers run the policy in threads of their own.
    """
    from torch._inductor.cudagraph_trees import local

    own = {"tree_manager_containers": {}, "tree_manager_locks": defaultdict(threading.Lock), **vars(local)}

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in own.items():
            vars(local).setdefault(name, value)
        return graph(*args, **kwargs)

    return call
