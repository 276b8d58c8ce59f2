"""The section on how cost grows: with cameras, prompt, horizon, denoising steps, batch and samples.

Each axis is measured at a few values and fitted by a line. Beside it stands the line of the count: of each
operation of the same chunk or step, run on the meta device, its floating-point operations at the rate of a
matrix product or its bytes at the rate of a copy, whichever takes longer; both rates are measured here.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_pi0.sampling.sampler import Sampler
from lerobot_pi0.tools.memory import attention_of, loss_on_meta_device
from lerobot_pi0.tools.step_time import TrainingRun

from . import inputs, ours
from .context import Context, Row
from .device import copy_rate
from .operations import CostCounter
from .worker import Setup


@dataclass(frozen=True)
class Point:
    """Where cost is measured."""

    setup: Setup
    steps: int = inputs.NUM_STEPS
    samples: int = 1


@dataclass(frozen=True)
class Axis:
    """What is varied, over which values; `trains`: whether a training step depends on it."""

    name: str
    unit: str
    values: tuple[int, ...]
    trains: bool = True

    def at(self, setup: Setup, value: int) -> Point:
        match self.name:
            case "denoising steps":
                return Point(setup, steps=value)
            case "samples":
                return Point(setup, samples=value)
        field = {"cameras": "cameras", "prompt": "prompt", "horizon": "horizon", "batch": "batch_size"}[
            self.name
        ]
        changes: dict[str, Any] = {field: value}
        return Point(replace(setup, **changes))


def axes(context: Context) -> list[Axis]:
    large = context.clock.on_gpu and context.is_full
    tiny = context.setup.size == "tiny"
    short = (lambda values: values[:2]) if tiny else (lambda values: values)
    return [
        Axis("cameras", "camera", short((1, 2, 3))),
        Axis("prompt", "token", short((8, 64, 128, 192) if large else (8, 32, 64, 128))),
        Axis("horizon", "action", short((10, 25, 50, 100))),
        Axis("denoising steps", "step", short((2, 5, 10, 20)), trains=False),
        Axis("batch", "observation", short((1, 4, 16, 64) if large else (1, 2, 4, 8))),
        Axis("samples", "sample", short((1, 4, 8, 16))),
    ]


def scaling(context: Context) -> None:
    """A row for each axis and kind: milliseconds at each value, fitted and counted milliseconds per unit."""
    setup = replace(context.setup, dtype="float32" if context.setup.device == "cpu" else "bfloat16")
    rates: Row = context.row("rates", lambda: measured_rates(context, setup))
    if "flop_per_s" not in rates:
        return
    for axis in axes(context):
        context.row(f"chunk, {axis.name}", partial(along, context, setup, axis, rates, "chunk"))
        if axis.trains:
            context.row(
                f"training step, {axis.name}", partial(along, context, setup, axis, rates, "training")
            )


def measured_rates(context: Context, setup: Setup) -> Row:
    """Of products at the size of the language model's, and of copies."""
    vision, vlm, _ = inputs.sizes(setup)
    rows, dtype = setup.cameras * vision.num_tokens + inputs.prompt_tokens(setup), getattr(torch, setup.dtype)
    x = torch.randn(rows, vlm.width, device=setup.device).to(dtype)
    weights = [torch.randn(vlm.width, vlm.mlp_dim, device=setup.device).to(dtype) for _ in range(vlm.depth)]

    def products() -> None:
        for weight in weights:
            x @ weight

    with torch.no_grad():
        seconds = min(context.clock.queued(products) for _ in range(3))
    flops = 2 * rows * vlm.width * vlm.mlp_dim * len(weights)
    return {"flop_per_s": flops / seconds, "bytes_per_s": copy_rate(context)}


def along(context: Context, setup: Setup, axis: Axis, rates: Row, kind: str) -> Row:
    measure, count = {"chunk": (chunk_ms, count_chunk), "training": (step_ms, count_step)}[kind]
    values, measured, counted = [], [], []
    for value in axis.values:
        if context.left() <= 0:
            break
        point = axis.at(setup, value)
        values.append(value)
        measured.append(measure(context, point))
        with CostCounter(rates["flop_per_s"], rates["bytes_per_s"]) as counter:
            count(point)
        counted.append(1e3 * counter.seconds)
    slope, start = np.polyfit(values, measured, 1) if len(values) > 1 else (float("nan"),) * 2
    expected, expected_start = np.polyfit(values, counted, 1) if len(values) > 1 else (float("nan"),) * 2
    line = slope * np.array(values) + start
    return {
        "unit": axis.unit,
        "values": values,
        "measured_ms": measured,
        "counted_ms": counted,
        "ms_per_unit": float(slope),
        "ms_at_none": float(start),
        "counted_ms_per_unit": float(expected),
        "counted_ms_at_none": float(expected_start),
        "off_the_line": float(np.abs(line / np.array(measured) - 1).max()),
    }


def policy_settings(point: Point) -> dict[str, Any]:
    length = inputs.batch(replace(point.setup, device="cpu", batch_size=1))[
        "observation.language.tokens"
    ].shape[1]
    return {"tokenizer_max_length": length, "num_inference_steps": point.steps}


def chunk_ms(context: Context, point: Point) -> float:
    """Of a chunk of each observation, or of several samples from an encoded one."""
    settings = policy_settings(point)
    policy = ours.build(point.setup, inputs.weights(point.setup), **settings)
    given, start = inputs.batch(point.setup), inputs.noise(point.setup)

    def run() -> Tensor:
        if point.samples == 1:
            return policy.predict_action_chunk(given, noise=start)
        return policy.plan(policy.encode(given), num_samples=point.samples)

    run()
    return fastest_half(context, run)


def fastest_half(context: Context, run: Any) -> float:
    """Milliseconds: the first quartile of a few calls, of which something else may have slowed some."""
    taken = sorted(context.clock.once(run) for _ in range(20 if context.clock.on_gpu else 4))
    return 1e3 * taken[len(taken) // 4]


def step_ms(context: Context, point: Point) -> float:
    """Of forward and backward of all parameters; the optimizer's part depends on no axis."""
    config = training_config(point)
    run = TrainingRun(config, device=point.setup.device)
    batch = run.batch(point.setup.batch_size)
    run.step(batch)
    taken = sorted(run.step(batch)["forward_backward"] for _ in range(5 if context.clock.on_gpu else 2))
    return 1e3 * taken[len(taken) // 4]


def training_config(point: Point) -> Any:
    settings = policy_settings(point) | {"augmentation": False, "num_flow_samples": point.samples}
    config = ours.config(point.setup, **settings)
    config.validate_features()
    return config


def count_chunk(point: Point) -> None:
    """The operations of `chunk_ms`, without values."""
    policy = ours.skeleton(point.setup, **policy_settings(point))
    given = {key: x.to("meta") for key, x in inputs.batch(replace(point.setup, device="cpu")).items()}
    sampler = Sampler(policy.model, "fused")
    start = inputs.noise(replace(point.setup, device="cpu")).to("meta")
    start = start.repeat_interleave(point.samples, 0)
    context = sampler.context(policy.observation(given), start.shape[1])
    sampler.actions(context.repeat(point.samples), start, point.steps)


def count_step(point: Point) -> None:
    """The operations of `step_ms`, without values."""
    policy = ours.skeleton(
        point.setup, **(policy_settings(point) | {"num_flow_samples": point.samples})
    ).train()
    given = {key: x.to("meta") for key, x in inputs.batch(replace(point.setup, device="cpu")).items()}
    with attention_of("gpu" if point.setup.device != "cpu" else "cpu"):
        loss_on_meta_device(policy, given).backward()


def sentence(name: str, row: Row) -> str:
    """A row in words."""
    kind, _, axis = name.partition(", ")
    share = row["ms_per_unit"] / max(row["measured_ms"][0], 1e-9)
    return (
        f"{axis}: a {kind} takes {row['ms_per_unit']:.3g} ms more per {row['unit']} "
        f"({share:.0%} of {row['measured_ms'][0]:.3g} ms at {row['values'][0]}), "
        f"{row['counted_ms_per_unit']:.3g} ms by the count"
    )


def plot(rows: dict[str, Row], file: Path) -> None:
    """Measured points with their line, and the counted line, for each axis: chunks above, training below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: row for name, row in rows.items() if "measured_ms" in row}
    names = list(dict.fromkeys(name.partition(", ")[2] for name in found))
    kinds = list(dict.fromkeys(name.partition(", ")[0] for name in found))
    figure, all_axes = pyplot.subplots(
        len(kinds),
        len(names),
        figsize=(2.6 * len(names), 2.6 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for line, kind in zip(all_axes, kinds, strict=True):
        for axes, name in zip(line, names, strict=True):
            row = found.get(f"{kind}, {name}")
            if row is None:
                axes.set_axis_off()
                continue
            x = np.array(row["values"])
            axes.plot(x, row["measured_ms"], "o", color="tab:blue", label="measured")
            axes.plot(x, row["ms_per_unit"] * x + row["ms_at_none"], color="tab:blue")
            axes.plot(x, row["counted_ms"], "--", color="tab:grey", label="counted")
            axes.set_ylim(bottom=0)
            axes.set_xlabel(name)
            axes.set_title(kind, fontsize=9)
        line[0].set_ylabel("ms")
    all_axes[0][0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
