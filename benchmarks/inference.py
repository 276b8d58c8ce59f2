"""Sections on chunks: by each backend, in parts, batches, real-time chunking, beside LeRobot's own π0."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.configuration_pi0 import Dtype

from . import inputs, intree, roofline
from .context import Context, Row
from .correctness import cosine, tf32_is
from .worker import Setup

TOP = 25  # kernels of a chunk that are listed


def chunk(context: Context) -> None:
    """`predict_action_chunk` of a batch of one, by each backend, number of cameras and precision."""
    for backend in context.backends:
        context.row(f"{backend}", partial(chunk_time, context, backend=backend))
    for cameras in (1, 3):
        context.row(f"auto, {cameras} cameras", partial(chunk_time, context, cameras=cameras))
    for name, tf32 in (("float32", False), ("float32, TF32", True)):
        context.row(f"auto, {name}", partial(in_float32, context, tf32))


def in_float32(context: Context, tf32: bool) -> Row:
    with tf32_is(tf32):
        return chunk_time(context, dtype="float32")


def chunk_time(context: Context, **settings: Any) -> Row:
    """Milliseconds of a chunk. `first_s` is of the first one, which records or compiles; `device_ms` what the
    sampler occupies the device for, and `host_ms` the rest."""
    clock, policy = context.clock, context.policy(**settings)
    setup = given_setup(context.setup, settings)
    given, start = inputs.batch(setup), inputs.noise(setup)
    clock.forget_peak()
    first = clock.once(lambda: policy.predict_action_chunk(given, noise=start))
    peak = clock.peak_gigabytes()
    policy.predict_action_chunk(given, noise=start)
    row = clock.times(lambda: policy.predict_action_chunk(given, noise=start))
    device = 1e3 * clock.queued(sampling(policy, given, start))
    return {
        **row,
        "first_s": first,
        "device_ms": device,
        "host_ms": row["p50_ms"] - device,
        "peak_gb": peak,
        "spread_ms": row["p99_ms"] - row["p50_ms"],
    }


def given_setup(setup: Setup, settings: dict[str, Any]) -> Setup:
    return replace(setup, **{name: value for name, value in settings.items() if hasattr(setup, name)})


@torch.no_grad()
def sampling(policy: Pi0Policy, given: dict[str, Any], start: Tensor) -> Callable[[], Tensor]:
    """A chunk without what a policy checks around it, which waits for the device."""
    observation = policy.observation(given)
    return lambda: policy.sampler.sample(observation, start)


def pieces(context: Context) -> None:
    """The parts of a chunk beside the least that they can take, and the kernels of a whole one."""
    for backend in context.backends:
        if backend != "int8":
            context.row(f"parts, {backend}", partial(parts, context, backend))
            context.row(f"kernels, {backend}", partial(kernels, context, backend))
    context.row("least by the measured rates", lambda: bounds(context))


def parts(context: Context, backend: str) -> Row:
    """Milliseconds on the device: vision, prefill (with the state), and one step."""
    clock, policy, steps = context.clock, context.policy(backend=backend), inputs.NUM_STEPS
    given, start = inputs.batch(context.setup), inputs.noise(context.setup)
    observation = policy.observation(given)
    policy.sampler.sample(observation, start)
    cache = policy.sampler.context(observation)
    network = policy.sampler.current().network
    images = observation.images.flatten(0, 1)

    def see() -> Tensor:
        with torch.no_grad():
            return network.vision(images, network.dtype)

    vision = clock.queued(context.recorded(see) if backend != "eager" else see)
    encoding = clock.queued(lambda: policy.sampler.context(observation))
    denoising = clock.queued(lambda: policy.sampler.sample_from(cache, start))
    return {
        "vision_ms": 1e3 * vision,
        "prefill_ms": 1e3 * (encoding - vision),
        "step_ms": 1e3 * denoising / steps,
        "denoising_ms": 1e3 * denoising,
    }


def kernels(context: Context, backend: str) -> Row:
    """How many kernels a chunk has, how long the device is busy with them, and the longest in all."""
    if not context.clock.on_gpu:
        return {"skipped": "kernels are a GPU's"}
    policy = context.policy(backend=backend)
    sample = sampling(policy, inputs.batch(context.setup), inputs.noise(context.setup))
    for _ in range(3):
        sample()
    context.clock.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        sample()
        context.clock.synchronize()
    ran = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    counts, times = Counter(event.name for event in ran), Counter[str]()
    for event in ran:
        times[event.name] += event.time_range.elapsed_us()
    begin, end = (
        edge(getattr(event.time_range, name) for event in ran)
        for edge, name in ((min, "start"), (max, "end"))
    )
    top = {f"{name[:80]} ×{counts[name]}": round(us, 1) for name, us in times.most_common(TOP)}
    return {
        "kernels": len(ran),
        "busy_ms": times.total() / 1e3,
        "from_first_to_last_ms": (end - begin) / 1e3,
        "top_us": top,
    }


def bounds(context: Context) -> Row:
    """The least milliseconds of each part: by operations at the rate of a square product, or by reading its
    weights at the rate of a copy, as `ceilings` found them; and the auto chunk's share of it."""
    found = context.done.get("ceilings", {})
    rate = found.get("square product, bf16", {}).get("tflop_per_s")
    copying = found.get("copy", {}).get("gb_per_s")
    if rate is None or copying is None:
        return {"skipped": "needs the section ceilings in the same run"}
    itemsize = getattr(torch, context.setup.dtype).itemsize
    least = {
        f"{name}_ms": 1e3 * stage.seconds(1e12 * rate, 1e9 * copying, itemsize)
        for name, stage in roofline.stages(context.setup).items()
    }
    chunk_ms = context.done.get("chunk", {}).get("auto", {}).get("p50_ms")
    total = sum(least.values())
    return {**least, "total_ms": total, "share_of_auto": total / chunk_ms if chunk_ms else None}


def batches(context: Context) -> None:
    """Throughput: chunks per second of batches."""
    for size in (1, 2, 4, 8, 16, 32) if context.is_full else (1, 2):
        context.row(f"batch {size}", partial(batch_time, context, size))


def batch_time(context: Context, size: int) -> Row:
    setup = replace(context.setup, batch_size=size)
    policy, given, start = context.policy(), inputs.batch(setup), inputs.noise(setup)
    context.clock.forget_peak()
    for _ in range(2):
        policy.predict_action_chunk(given, noise=start)
    row = context.clock.times(lambda: policy.predict_action_chunk(given, noise=start), 20, 1)
    return {**row, "chunks_per_s": 1e3 * size / row["p50_ms"], "peak_gb": context.clock.peak_gigabytes()}


def rtc(context: Context) -> None:
    """Real-time chunking, and more chunks from one observation."""
    backends = [name for name in context.backends if name != "int8"]
    for backend in backends:
        context.row(f"guided, {backend}", partial(continued, context, backend=backend))
    context.row("trained", partial(continued, context, rtc_training_max_delay=4))
    for count in (1, 8):
        context.row(f"plan ×{count}", partial(planned, context, count))


def continued(context: Context, **settings: Any) -> Row:
    """A chunk that continues the last one, of which four actions are committed."""
    policy, given, start = (
        context.policy(**settings),
        inputs.batch(context.setup),
        inputs.noise(context.setup),
    )
    policy.config.rtc_config = RTCConfig(
        enabled=True, execution_horizon=inputs.chunk_size(context.setup) // 2
    )
    left = policy.predict_action_chunk(given, noise=start)[:, 4:]

    def go_on() -> Tensor:
        return policy.predict_action_chunk(given, noise=start, inference_delay=4, prev_chunk_left_over=left)

    first = context.clock.once(go_on)
    return context.clock.times(go_on, 50, 2) | {"first_s": first, "finite": bool(go_on().isfinite().all())}


def planned(context: Context, count: int) -> Row:
    """Chunks from an observation that was encoded before."""
    policy, given = context.policy(), inputs.batch(context.setup)
    encoded = policy.encode(given)
    policy.plan(encoded, num_samples=count)
    return context.clock.times(lambda: policy.plan(encoded, num_samples=count), 50, 2)


def in_tree(context: Context) -> None:
    """LeRobot's own policy on the same device, weights and inputs, a call of each in turn."""
    context.row("bf16, eager", partial(beside, context, "bfloat16"))
    context.row("float32, eager", partial(beside, context, "float32"))


def beside(context: Context, dtype: Dtype, compiled: bool = False) -> Row:
    """Both sides' chunks: ours in bfloat16 by `auto`, whatever the precision of in-tree's."""
    setup = replace(context.setup, dtype=dtype)
    policy, start = context.policy(), inputs.noise(setup)
    given = inputs.batch(setup)
    settings: dict[str, Any] = {"compile_model": True} if compiled else {}
    # LeRobot sets TF32 itself where it compiles.
    with tf32_is(False) if not compiled else nullcontext():
        context.clock.forget_peak()
        theirs = intree.build(setup, weights=inputs.weights(setup), **settings)
        theirs_given = inputs.batch(setup, intree.policy_prompt_length(setup))
        pair = (
            lambda: policy.predict_action_chunk(given, noise=start),
            lambda: intree.predict(theirs, theirs_given, start),
        )
        first = [context.clock.once(call) for call in pair]
        actions = [call() for call in pair]
        taken = [
            [context.clock.once(call) for call in pair] for _ in range(30 if context.clock.on_gpu else 2)
        ]
    ours_ms, theirs_ms = (1e3 * sorted(side)[len(side) // 2] for side in zip(*taken, strict=True))
    return {
        "ours_ms": ours_ms,
        "in_tree_ms": theirs_ms,
        "ratio": sorted(b / a for a, b in taken)[len(taken) // 2],
        "in_tree_first_s": first[1],
        "cosine": cosine(*actions),
        "peak_gb_of_both": context.clock.peak_gigabytes(),
    }


def optional(context: Context) -> None:
    """What takes minutes: LeRobot's own policy compiled as its own code does it."""
    if not context.clock.on_gpu:
        context.rows["in-tree, compiled"] = {"skipped": "takes minutes on a CPU"}
        return
    context.row("in-tree, compiled", partial(beside, context, "bfloat16", compiled=True))
