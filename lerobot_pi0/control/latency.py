"""`lerobot-pi0 latency`: how long this machine takes for a chunk, stage by stage, and how to run with that.

Measured on an example observation of the checkpoint's own features: no robot, no dataset.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.utils.constants import OBS_STATE

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.control.flags import LatencyConfig
from lerobot_pi0.control.timing import (
    RtcTiming,
    Suggestion,
    execution_horizon,
    lerobot_rtc_timing,
    rtc_timing,
    suggest,
)
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.policy import LoadedPolicy, load_policy

Frame = dict[str, np.ndarray]

STAGES = {
    "prepare": "the preprocessor",
    "encode": "images and prompt, once per chunk",
    "denoise": "{steps} steps from noise, by {solver}",
    "finish": "the postprocessor",
    "chunk": "all of it, from the robot's observation to its actions",
    "guided": "the same in real-time chunking",
}


@dataclass(frozen=True)
class Latencies:
    """Seconds of each repetition, by stage, and of the first chunk, for which much is made once."""

    first: float
    stages: dict[str, list[float]]

    def worst(self, stage: str = "chunk") -> float | None:
        """What 99 in 100 chunks stay below; None for a stage that was not measured."""
        return quantile(self.stages[stage], 99) if stage in self.stages else None


def main(config: LatencyConfig) -> str:
    """Run `lerobot-pi0 latency`. Raises ValueError for a rate or number that cannot be."""
    if config.fps is not None and not (config.fps > 0 and math.isfinite(config.fps)):
        raise UserError(f"--fps must be a number of actions per second, got {config.fps}")
    if config.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {config.repeats}")
    loaded = load_policy(config.policy)
    data = loaded.config.training_data
    fps = config.fps or (30.0 if data is None else data.fps)
    latencies = measure(loaded, config.repeats, fps)
    suggestion = suggestion_for(loaded.config, latencies, fps)
    plain = suggestion_for(loaded.config, latencies, fps, lerobot_rtc_timing)
    return (
        _as_json(latencies, suggestion, plain)
        if config.json
        else _as_text(config.policy.path, loaded.config, latencies, suggestion, plain, fps)
    )


def measure(
    loaded: LoadedPolicy, repeats: int, fps: float, rtc: RTCConfig | None = None, stages: bool = True
) -> Latencies:
    """Time a first chunk and `repeats` more, from a robot's observation to its actions.

    "guided": chunks that go on from the one before, as real-time chunking with `rtc` (LeRobot's defaults) at
    `fps` asks for them, where the policy can. Without `stages`, only it and the whole. The policy's queue of
    actions and `rtc_config` are as before.
    """
    policy, config = loaded.policy, loaded.config
    device, frame = next(policy.parameters()).device, example_frame(config)
    known = config.training_data.tasks if config.training_data is not None else []
    task = known[0] if known else "pick up the red block"
    seconds: dict[str, list[float]] = {}

    def timed[**P, T](stage: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.setdefault(stage, []).append(time.perf_counter() - began)
        return result

    def prepare() -> dict[str, Any]:
        given = prepare_observation_for_inference(cast(Any, dict(frame)), device, task)
        return loaded.preprocess(cast(Any, given))

    def chunk(**remainder: Any) -> torch.Tensor:
        actions = policy.predict_action_chunk(prepare(), **remainder)
        loaded.postprocess(actions)
        return actions

    guard = policy.action_space.guard
    with torch.no_grad(), nullcontext() if guard is None else guard.not_counting():
        actions = timed("first", chunk)
        timed("second", chunk)
        before, left = config.rtc_config, None
        if policy.supports_rtc():
            half = config.chunk_size // 2
            delay = min(math.ceil(seconds["second"][0] * fps), half)
            config.rtc_config = rtc or RTCConfig(execution_horizon=execution_horizon(delay, half))
            policy.init_rtc_processor()
            rest = actions[0, half:][: config.rtc_config.execution_horizon]  # as LeRobot cuts it
            left = {"inference_delay": delay, "prev_chunk_left_over": rest}
            chunk(**left)  # makes what it needs once
            if policy.sampler.records:  # also of prompts of the length to which these are padded now
                chunk()
                policy.plan(policy.encode(prepare()))
        for _ in range(repeats):  # in turns: what else the machine does is the same for all
            timed("chunk", chunk)
            if left is not None:
                with beside_the_loop(config):
                    timed("guided", chunk, **left)
            if stages:
                batch = timed("prepare", prepare)
                if config.backend != "compile":  # of one graph there are no stages
                    timed("denoise", policy.plan, timed("encode", policy.encode, batch))
                timed("finish", loaded.postprocess, actions)
        if left is not None:
            config.rtc_config = before
            policy.init_rtc_processor()
    (first,) = seconds["first"]
    return Latencies(first, {stage: seconds[stage] for stage in STAGES if stage in seconds})


@contextmanager
def beside_the_loop(config: Pi0Config) -> Iterator[None]:
    """Meanwhile the products of a policy on a CPU leave one core to the control loop and the cameras, unless
    OMP_NUM_THREADS says how many threads they may have.

    With all of them, each product waits for the thread whose core is taken: on two cores, chunks that are
    made beside a loop take twice as long. A compiled policy is left alone: its graphs are for a number of
    threads, and would be compiled again.
    """
    threads = torch.get_num_threads()
    if config.device == "cpu" and config.backend != "compile" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(threads - 1, 1))
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def suggestion_for(
    config: Pi0Config, latencies: Latencies, fps: float, rule: RtcTiming = rtc_timing
) -> Suggestion:
    """How to run a policy on the machine where it was measured: with `lerobot-pi0 rollout`, or by `rule`."""
    whole = latencies.worst()
    assert whole is not None
    return suggest(fps, config.chunk_size, config.n_action_steps, whole, latencies.worst("guided"), rule)


def example_frame(config: Pi0Config) -> Frame:
    """An observation as LeRobot takes it from a robot: uint8 pictures (h, w, 3), a float32 state (d,)."""
    example = config.example_observation()
    pictures = {camera: example[camera][0].permute(1, 2, 0).numpy() for camera in config.cameras.values()}
    return pictures | {OBS_STATE: example[OBS_STATE][0].numpy()}


def quantile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the given ones do not exceed."""
    return float(np.percentile(np.asarray(values), percent, method="higher"))


def _as_text(
    path: str,
    config: Pi0Config,
    latencies: Latencies,
    suggestion: Suggestion,
    plain: Suggestion,
    fps: float,
) -> str:
    kind = {"auto": "", "compile": ", compiled"}.get(config.backend, f", {config.backend}")
    lines = [
        f"{path}: chunks of {config.chunk_size} actions, {len(config.cameras)} camera"
        f"{'s'[: len(config.cameras) != 1]}, {config.dtype} on {config.device}{kind}",
        "",
        f"{'':<9}{'p50':>10}{'p99':>10}",
    ]
    for stage, seconds in latencies.stages.items():
        p50, p99 = (1000 * quantile(seconds, percent) for percent in (50, 99))
        what = STAGES[stage].format(steps=config.num_inference_steps, solver=config.solver)
        lines.append(f"{stage:<9}{p50:>7.1f} ms{p99:>7.1f} ms  {what}")
    lines += [f"{'first':<9}{1000 * latencies.first:>7.1f} ms{'':>10}  the first chunk after loading", ""]
    flags = [f"--fps={fps:g}", *suggestion.flags]
    lines += [f"At {fps:g} fps: {suggestion.timing}.", "", *(f"    {flag}" for flag in flags), ""]
    if plain != suggestion:
        lines += [f"That is with lerobot-pi0 rollout. With lerobot-rollout, which drops more: {plain}.", ""]
    lines.append(f"The highest rate without stalls on this machine is {suggestion.highest_fps:.3g} fps.")
    if suggestion.timing.stall:
        lines.append(
            "What makes a chunk faster: --policy.solver=ab2 --policy.num_inference_steps=6 (about as "
            "accurate as 10 of Euler), --policy.backend=int8 (CPU), --policy.backend=compile (GPU). Or lower "
            "--fps: the robot then does the same more slowly."
        )
    return "\n".join(lines)


def _as_json(latencies: Latencies, suggestion: Suggestion, plain: Suggestion) -> str:
    figures = {
        stage: {"p50_s": quantile(seconds, 50), "p99_s": quantile(seconds, 99)}
        for stage, seconds in latencies.stages.items()
    }
    result = {
        "first_s": latencies.first,
        "stages": figures,
        "suggestion": asdict(suggestion),
        "lerobot_rollout": asdict(plain),
    }
    return json.dumps(result, indent=2)
