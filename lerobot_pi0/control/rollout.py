"""`lerobot-pi0 rollout`: a drop-in for `lerobot-rollout`, with pre-flight checks and a trace.

Nothing moves unless the robot's joints and cameras are those of the checkpoint and LeRobot can run the flags.
The latency of a chunk is measured first, and logged as what it means for the robot. A run that sent no
action, or whose policy failed, is an error. `--trace` keeps what happened for `lerobot-pi0 trace`.
"""

import logging
import math
from argparse import ArgumentError
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any, cast

import draccus
import lerobot.scripts.lerobot_rollout  # noqa: F401  # registers the robots, cameras and teleoperators
import numpy as np
from huggingface_hub.errors import HFValidationError
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from lerobot.robots import make_robot_from_config
from lerobot.rollout import RolloutConfig, RolloutContext, build_rollout_context, create_strategy
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_IMAGES, OBS_STATE
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.process import ProcessSignalHandler
from lerobot.utils.utils import init_logging
from lerobot.utils.visualization_utils import init_visualization, shutdown_visualization

from lerobot_pi0.checkpoints.files import find_checkpoint
from lerobot_pi0.checkpoints.processors import check_processors
from lerobot_pi0.checkpoints.reading import read_json
from lerobot_pi0.configuration_pi0 import Pi0Config, TrainingData
from lerobot_pi0.control.instrumentation import Instrumentation, timing
from lerobot_pi0.control.latency import Latencies, beside_the_loop, measure, quantile, suggestion_for
from lerobot_pi0.control.loop_timing import loop_timing
from lerobot_pi0.control.trace import Trace, new_policy_trace
from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.errors import CommandError, UnavailableError, UserError
from lerobot_pi0.inputs.joints import check_joints
from lerobot_pi0.inputs.policy import LoadedPolicy
from lerobot_pi0.lerobot_compat import (
    disconnect_devices,
    drive,
    end_of_loop,
    fed_state_names,
    hide_slow_loop_notices,
    inference_errors,
    is_interactive,
    is_policy_joint,
    log_versions,
    parse_flags,
    parsing_failure,
    pictures_as_they_are,
    policy_path,
    robots_state_order,
)
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling.guard import LEAST, MARGIN

logger = logging.getLogger(__name__)

WARM_CHUNKS = 3  # measured before the run


def main(arguments: list[str]) -> str:
    """Run `lerobot-pi0 rollout`. Raises OSError, RuntimeError or ValueError that says what is wrong."""
    folder, arguments = _own_flags(arguments)
    return rollout(parse(arguments), folder)


def parse(arguments: list[str]) -> RolloutConfig:
    """The flags of `lerobot-rollout`, parsed by it.

    Raises ValueError for flags that it does not take, FileNotFoundError for a policy that cannot be had.
    """
    register_third_party_plugins()
    try:
        return parse_flags("lerobot-pi0 rollout", arguments, RolloutConfig)
    except (ArgumentError, draccus.ParsingError, OSError, HFValidationError) as error:
        reason = parsing_failure(error)
        if isinstance(reason, OSError | HFValidationError) and (named := policy_path(arguments)):
            path, revision = named
            find_checkpoint(path, revision=revision, ignore_patterns="*.safetensors")  # says what is wrong
        raise UserError(f"{reason}") from error


def rollout(cfg: RolloutConfig, folder: Path | None = None) -> str:
    """Drive a robot as `lerobot-rollout` does, with a trace in `folder` if there is one; returns a summary.

    Raises ValueError before the robot is connected when its joints or cameras are not the checkpoint's or a
    flag cannot be, RuntimeError when no action was sent or the policy gave up.
    """
    config = cfg.policy
    assert config is not None
    log_versions()
    if not isinstance(config, Pi0Config):
        raise UserError(
            f"'{config.pretrained_path}' is a policy of type '{config.type}': lerobot-rollout runs it"
        )
    check_flags(cfg)
    if config.pretrained_path is not None:
        path, revision = str(config.pretrained_path), config.pretrained_revision
        check_processors(find_checkpoint(path, revision=revision, ignore_patterns="*.safetensors"), config)
    check_robot(cfg, config)
    check_rate(cfg.fps, config.training_data)
    # LeRobot's flag is ours. Its warm-up, which throws chunks away, has nothing to do after our measurement.
    config.backend = "compile" if cfg.use_torch_compile else config.backend
    cfg.use_torch_compile = False
    file = None if folder is None else new_policy_trace(folder)
    init_logging()
    hide_slow_loop_notices()  # the summary says how many stalls there were, and what each waited for
    signals = ProcessSignalHandler(use_threads=True, display_pid=False)
    try:
        with robots_state_order():
            ctx = build_rollout_context(cfg, end_of_loop(cfg, cast(Event, signals.shutdown_event)))
    except Exception as error:
        disconnect_devices(error)
        if isinstance(error, ConnectionError):
            raise UnavailableError(f"the robot does not answer: {error}") from error
        if isinstance(error, ValueError):
            raise UserError(f"{error}") from error
        raise
    strategy = create_strategy(cfg.strategy)
    trace = None
    try:
        policy = next(module for module in ctx.policy.policy.modules() if isinstance(module, Pi0Policy))
        try:
            check_state_order(fed_state_names(ctx), config)
            check_pose(ctx.hardware.robot_wrapper.get_observation(), ctx.policy.preprocessor, config)
            check_latency(cfg, _measured(cfg, ctx, policy), config)
        except (RuntimeError, UserError):
            ctx.hardware.initial_position = None  # the robot has not left it: no way back
            raise
        trace = None if file is None else Trace(file)
        recorded = Instrumentation(ctx, policy, trace, _start(cfg, ctx, config))
        if cfg.display_data:
            init_visualization(
                cfg.display_mode, session_name="rollout", ip=cfg.display_ip, port=cfg.display_port
            )
        with (
            inference_errors() as errors,
            pictures_as_they_are(),
            beside_the_loop(config) if cfg.inference.type == "rtc" else nullcontext(),
        ):
            try:
                strategy.setup(ctx)
                drive(strategy, ctx)
            except KeyboardInterrupt:
                signals.shutdown_event.set()
            except Exception as error:
                recorded.finish(f"{type(error).__name__}: {error}")
                if isinstance(error, ConnectionError):
                    raise UnavailableError(
                        f"the robot does not answer any more, after {recorded.num_actions} actions: {error}"
                    ) from error
                raise
            recorded.finish("asked to stop" if signals.shutdown_event.is_set() else "done")
    finally:
        strategy.teardown(ctx)
        if trace is not None:
            trace.close()
        if cfg.display_data:
            shutdown_visualization(cfg.display_mode)
    failed = recorded.engine.failed
    if is_interactive(cfg) and not (failed or errors.last or recorded.num_actions):
        return "no action was sent to the robot: the session ended before a run of the policy"
    if failed or not recorded.num_actions:
        raise CommandError(_why_it_failed(recorded, failed, errors.last, signals.shutdown_event.is_set()))
    return _summary(recorded, folder, errors.last)


def check_flags(cfg: RolloutConfig) -> None:
    """Flags that LeRobot would object to once the robot is connected, or not at all.

    Raises ValueError that names the flag.
    """
    if not (cfg.task or "").strip():  # draccus makes None of an empty flag
        raise UserError(
            "the policy has no instruction: say what it is to do, in the words of its training data, "
            'with --task="..."'
        )
    if not (cfg.fps > 0 and math.isfinite(cfg.fps)):
        raise UserError(f"--fps must be a number of actions per second, got {cfg.fps:g}")
    if cfg.interpolation_multiplier < 1:
        raise UserError(f"--interpolation_multiplier must be at least 1, got {cfg.interpolation_multiplier}")
    mode = getattr(getattr(cfg.inference, "rtc", None), "mode", None)
    if mode == "trained":
        raise UserError(
            "--inference.rtc.mode=trained is for LeRobot's own π0.5. This policy goes on from the last chunk "
            "as it was trained to (--policy.rtc_training_max_delay) without a flag: leave it out"
        )
    if cfg.dataset is not None:
        check_recorded_rate(cfg)
    if cfg.dataset is not None and cfg.dataset.single_task != cfg.task:
        raise UserError(
            f"--task='{cfg.task}' and --dataset.single_task='{cfg.dataset.single_task}' differ, and LeRobot "
            "would give the policy the second: leave one of them out"
        )
    if cfg.dataset is not None and not cfg.resume:
        user, slash, name = cfg.dataset.repo_id.rpartition("/")
        if not cfg.dataset.repo_id.split("/", 1)[-1].startswith("rollout_"):
            raise UserError(
                f"LeRobot wants names of recorded rollouts to begin with rollout_, and "
                f"'{cfg.dataset.repo_id}' does not: --dataset.repo_id={user}{slash}rollout_{name}"
            )
        if cfg.dataset.root is not None and Path(cfg.dataset.root).exists():
            raise UserError(
                f"there is something in {cfg.dataset.root} already: record to another --dataset.root, or go "
                "on with the dataset in it, --resume=true"
            )


def check_recorded_rate(cfg: RolloutConfig) -> None:
    """Does a recording say the rate at which LeRobot adds frames to it? Raises ValueError that names flags.

    Strategies add one at every tick of the loop, also between two of the policy's actions; DAgger leaves
    those out.
    """
    assert cfg.dataset is not None
    dagger = cfg.strategy is not None and cfg.strategy.type == "dagger"
    added = cfg.fps * (1 if dagger else cfg.interpolation_multiplier)
    rate = f"--fps={cfg.fps:g} with --interpolation_multiplier={cfg.interpolation_multiplier}"
    root = Path(cfg.dataset.root or HF_LEROBOT_HOME / cfg.dataset.repo_id)
    if cfg.resume and (root / "meta/info.json").is_file():
        if (recorded := read_json(root / "meta/info.json").get("fps")) != added:
            raise UserError(
                f"the dataset in {root} has {recorded} frames per second, and {rate} would add {added:g} per "
                "second: give the --fps that it was recorded with, or record to another --dataset.repo_id"
            )
    elif cfg.dataset.fps != added:
        raise UserError(
            f"{rate} records {added:g} frames per second and the recording would say {cfg.dataset.fps}: give "
            f"both, --fps={cfg.fps:g} --dataset.fps={added:g}"
        )


def check_robot(cfg: RolloutConfig, config: Pi0Config) -> None:
    """Are the robot's joints and cameras those of the checkpoint? It is made for that, and not connected.

    Raises ValueError that says what is not.
    """
    assert cfg.robot is not None
    robot = make_robot_from_config(cfg.robot)
    observations: Mapping[str, Any] = robot.observation_features
    # As LeRobot's rollout chooses what the policy gets and gives.
    check_joints(
        config,
        [name for name, kind in observations.items() if kind is float and is_policy_joint(name)],
        [name for name in robot.action_features if is_policy_joint(name)],
    )
    cameras = [f"{OBS_IMAGES}.{name}" for name, kind in observations.items() if isinstance(kind, tuple)]
    given = {cfg.rename_map.get(camera, camera) for camera in cameras}
    if missing := [camera for camera in config.cameras.values() if camera not in given]:
        free = [
            camera for camera in cameras if cfg.rename_map.get(camera, camera) not in config.cameras.values()
        ]
        pairs = ", ".join(f'"{free[i] if i < len(free) else "…"}": "{key}"' for i, key in enumerate(missing))
        raise UserError(
            f"the policy was trained with {missing}, which the robot does not give: it has {cameras}"
            + (f", renamed by {cfg.rename_map}" if cfg.rename_map else "")
            + f". Give the robot these cameras, or say which is which: --rename_map='{{{pairs}}}'"
        )


def check_state_order(names: list[str], config: Pi0Config) -> None:
    """Is what LeRobot hands the policy as the state in the order of the training data?

    `names` are those of the engine that it has built, because it may put joints into an order of its own.
    Raises ValueError that shows both.
    """
    trained = config.state_feature_names
    if trained is not None and names != trained:
        raise UserError(
            f"LeRobot would hand the policy the state as {names}, and it was trained with {trained}: joints "
            "would get each other's values. Use the robot (type and configuration) that the dataset was "
            "recorded with"
        )


def check_pose(observation: Mapping[str, Any], preprocessor: Any, config: Pi0Config) -> None:
    """Warn, joint by joint, about a robot that stands outside of where the training data has been.

    By more than a tenth of a joint's range; the ranges are those of the normalizer's statistics.
    """
    steps = [step for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep)]
    statistics = (steps[0].stats or {}).get(OBS_STATE, {}) if steps else {}
    if config.state_feature_names is None or not {"min", "max"} <= statistics.keys():
        return
    low, high = (np.asarray(statistics[name], dtype=float).ravel() for name in ("min", "max"))
    margin = np.maximum(MARGIN * (high - low), LEAST)
    here = np.array([[observation.get(name, np.nan) for name in config.state_feature_names]], dtype=float)
    here = policy_columns(config, {OBS_STATE: here})[OBS_STATE][0]
    far = [
        f"{name} at {here[i]:.4g} (in the data {low[i]:.4g} to {high[i]:.4g})"
        for i, name in enumerate(config.state_feature_names)
        if name in observation and not low[i] - margin[i] <= here[i] <= high[i] + margin[i]
    ]
    if far:
        how = {
            "clamp": "It approaches by steps of the data",
            "refuse": "The policy refuses a first action that is far from there",
            "free": "Nothing limits its first movement",
        }
        logger.warning(
            "the robot stands where the training data has never been: %s. %s (--policy.first_action=%s); "
            "better move it first to where an episode of the data begins",
            ", ".join(far),
            how[config.first_action],
            config.first_action,
        )


def check_rate(fps: float, data: TrainingData | None) -> None:
    """Warn about a rate that is not that of the training data."""
    if data is not None and abs(fps - data.fps) > 0.01 * data.fps:
        logger.warning(
            "the policy was trained at %g actions per second and runs at %g: each movement takes %.3g times "
            "as long. --fps=%g is as it was recorded",
            data.fps,
            fps,
            data.fps / fps,
            data.fps,
        )


def check_latency(cfg: RolloutConfig, latencies: Latencies, config: Pi0Config) -> None:
    """Log what the measured latency means for this run, with settings that would do better if there are any.

    Raises RuntimeError for real-time chunking with a latency of a whole chunk.
    """
    stage = "guided" if cfg.inference.type == "rtc" and "guided" in latencies.stages else "chunk"
    worst = latencies.worst(stage)
    assert worst is not None
    size, inference = config.chunk_size, cast(Any, cfg.inference)
    ran = timing(cfg, size, config.n_action_steps, worst)
    better = suggestion_for(config, latencies, cfg.fps)
    advice = f"Better: {better}" if better.timing.rate > ran.rate else f"Nothing does better: {better}"
    if inference.type == "rtc":
        best = timing(cfg, size, config.n_action_steps, min(latencies.stages[stage]))
        if best.delay >= size:
            raise CommandError(
                f"{ran}. The policy cannot go on from a chunk of {size} actions that is over when the next "
                f"one comes: real-time chunking is of no use here. {advice}"
            )
        horizon = inference.rtc.execution_horizon
        if inference.rtc.enabled and min(ran.delay, size) > horizon:
            logger.warning(
                "a chunk takes %d control steps, but the policy is given only the first %d of the actions "
                "that are executed meanwhile: the robot will jump. Set --inference.rtc.execution_horizon=%d",
                ran.delay,
                horizon,
                min(2 * ran.delay, size),
            )
    if ran.stall:
        logger.warning("%s. %s", ran, advice)
    else:
        logger.info("%s", ran)


def _own_flags(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """What is ours of the arguments, and the rest."""
    folder, rest = None, []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name != "--trace":
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value or value.startswith("--"):
            raise UserError("--trace needs a folder: --trace=FOLDER")
        folder = Path(value)
    return folder, rest


def _measured(cfg: RolloutConfig, ctx: RolloutContext, policy: Pi0Policy) -> Latencies:
    """Latencies of a few chunks from an example observation."""
    logger.info("measuring how long a chunk takes ...")
    loaded = LoadedPolicy(policy, cast(Any, ctx.policy.preprocessor), ctx.policy.postprocessor)
    rtc = getattr(cfg.inference, "rtc", None)
    return measure(loaded, WARM_CHUNKS, cfg.fps, rtc, stages=False)


def _start(cfg: RolloutConfig, ctx: RolloutContext, config: Pi0Config) -> dict[str, Any]:
    """What the trace says of the run."""
    start: dict[str, Any] = {
        "robot": ctx.hardware.robot_wrapper.robot_type,
        "kind": cfg.inference.type,
        "fps": cfg.fps,
        "interpolation": cfg.interpolation_multiplier,
        "joints": ctx.data.ordered_action_keys,
        "policy": str(config.pretrained_path),
        "task": cfg.task,
        "chunk_size": config.chunk_size,
        "n_action_steps": config.n_action_steps,
    }
    inference: Any = cfg.inference
    if inference.type == "rtc":
        start["queue_threshold"] = inference.queue_threshold
        start["execution_horizon"] = inference.rtc.execution_horizon
    steps = [step for step in ctx.policy.postprocessor.steps if isinstance(step, UnnormalizerProcessorStep)]
    for step in steps:
        if "std" in (stats := (step.stats or {}).get(ACTION, {})):
            std = np.asarray(stats["std"], dtype=float).tolist()
            start["std"] = dict(zip(ctx.data.ordered_action_keys, std, strict=False))
    return start


def _why_it_failed(recorded: Instrumentation, failed: bool, error: str | None, interrupted: bool) -> str:
    sent = (
        f"{recorded.num_actions} actions were sent"
        if recorded.num_actions
        else "no action was sent to the robot"
    )
    if failed:
        return f"{sent}: the policy gave up ({error or 'LeRobot does not say why'})"
    if error:
        return f"{sent}: the policy failed ({error})"
    if interrupted:
        return f"{sent}: the run was interrupted before the first"
    if not recorded.latencies:
        duration = f" (--duration={recorded.cfg.duration:g} s)" if recorded.cfg.duration else ""
        return f"{sent}: no chunk was ready before the run ended{duration}"
    usual = recorded.timing(quantile(recorded.latencies, 50))
    return f"{sent}: {usual}. `lerobot-pi0 latency` says what would do"


def _summary(recorded: Instrumentation, folder: Path | None, error: str | None) -> str:
    fps = recorded.cfg.fps * recorded.cfg.interpolation_multiplier
    run = loop_timing(recorded.times, fps, recorded.waits)
    lines = [str(run)]
    if recorded.latencies:
        p50, p95 = (1000 * quantile(recorded.latencies, percent) for percent in (50, 95))
        lines.append(f"{len(recorded.latencies)} chunks, latency p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    if run.stalls:
        lines.append(run.causes)
    if run.waits:
        lines.append("`lerobot-pi0 latency` says which settings would wait less")
    guard = recorded.policy.action_space.guard
    if guard is not None and guard.summary:
        lines.append(guard.summary)
    if error:
        lines.append(f"the policy failed on the way ({error})")
    lines.append(
        "--trace=FOLDER keeps what happened"
        if folder is None
        else f"more, and plotted: lerobot-pi0 trace {folder}"
    )
    return "\n".join(lines)
