"""The least time that a chunk can take here: its exact minimum of operations at this machine's GEMM rate.

The rate is measured, per stage, at the stage's number of rows and on matrices of the model's shapes, with the
better of torch's own product and oneDNN's over a weight reordered beforehand.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import NUM_STEPS, chunk_size, prompt_tokens, sizes
from .worker import Measure, Measurement, Setup

logger = logging.getLogger("lerobot_pi0.bench")

# Weights of a stage stream from memory in a real chunk: enough of them that they do not stay in a cache.
_STREAMED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Stage:
    """A part of a chunk with one number of rows. `layer` holds the (in, out) of a layer's products.

    The exact minimum is of `layers` such layers, of what else is multiplied, and of scores with `keys` keys.
    """

    rows: int
    layer: tuple[tuple[int, int], ...]
    layers: int
    flops: float  # all of it, once
    numbers: int  # weights, keys and values that it reads, once
    repeats: int = 1

    def seconds(self, flops_per_second: float, bytes_per_second: float, itemsize: int) -> float:
        """The least that it takes, all repeats: for its operations, or for what it has to read."""
        reading = self.numbers * itemsize / bytes_per_second
        return self.repeats * max(self.flops / flops_per_second, reading)


def stages(setup: Setup) -> dict[str, Stage]:
    """Vision, prefill, denoising: rows, shapes, and the fewest floating-point operations for the actions.

    Without what no action depends on: padding, absent cameras, the last prefix layer's output, and the state
    token's part of a denoising step. Two operations per multiply-add; only products of matrices count.
    """
    vision, vlm, expert = sizes(setup)
    size, steps_rows = setup.batch_size, setup.batch_size * chunk_size(setup)
    patches, heads = vision.num_tokens, vlm.num_heads * vlm.head_dim
    images, tokens = setup.cameras * patches, setup.cameras * patches + prompt_tokens(setup)
    keys_values = 2 * vlm.num_kv_heads * vlm.head_dim

    def products(layer: tuple[tuple[int, int], ...], rows: int) -> int:
        return sum(2 * rows * ins * outs for ins, outs in layer)

    def weights(layer: tuple[tuple[int, int], ...]) -> int:
        return sum(ins * outs for ins, outs in layer)

    width, mlp = vision.width, vision.mlp_dim
    tower = ((width, 3 * width), (width, width), (width, mlp), (mlp, width))
    ends = ((3 * vision.patch_size**2, width), (width, vlm.width))
    scores = vision.depth * 4 * size * images * patches * width
    of_vision = vision.depth * products(tower, size * images) + products(ends, size * images) + scores
    in_vision = vision.depth * weights(tower) + weights(ends)

    def decoder(width: int, mlp: int) -> tuple[tuple[int, int], ...]:
        return ((width, heads + keys_values), (heads, width), (width, 2 * mlp), (mlp, width))

    language = decoder(vlm.width, vlm.mlp_dim)
    last = ((vlm.width, keys_values),)
    of_prefill = (vlm.depth - 1) * (products(language, size * tokens) + 4 * size * tokens**2 * heads)
    of_prefill += products(last, size * tokens)
    in_prefill = (vlm.depth - 1) * weights(language) + weights(last)

    acting = decoder(expert.width, expert.mlp_dim)
    # The embedding of actions (folded into one product) and the way out; of π0 also the time MLP's second
    # layer, and the state's keys. What depends on the time alone is computed before.
    ends, keys = ((32, expert.width), (expert.width, 32)), tokens + chunk_size(setup)
    if setup.model == "pi0":
        ends, keys = (*ends, (expert.width, expert.width)), keys + 1
    of_step = vlm.depth * (products(acting, steps_rows) + 4 * steps_rows * keys * heads)
    of_step += products(ends, steps_rows)
    in_step = vlm.depth * (weights(acting) + size * keys * keys_values) + weights(ends)
    return {
        "vision": Stage(size * images, tower, vision.depth, of_vision, in_vision),
        "prefill": Stage(size * tokens, language, vlm.depth, of_prefill, in_prefill),
        "denoising": Stage(steps_rows, acting, vlm.depth, of_step, in_step, NUM_STEPS),
    }


def bound(setup: Setup) -> Measure:
    """Seconds of the exact minimum at the best rates measured; `seconds_plain` at torch's own product's."""
    dtype = getattr(torch, setup.dtype)
    candidates = {"plain": _plain}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() or dtype == torch.float32:
        candidates["packed"] = _packed
    prepared = {
        name: {kind: layer_runs(stage, dtype, make) for kind, make in candidates.items()}
        for name, stage in stages(setup).items()
    }

    def measure() -> Measurement:
        figures = dict.fromkeys(("seconds", "seconds_plain"), 0.0)
        for name, stage in stages(setup).items():
            rates = {kind: _rate(stage, *prepared[name][kind]) for kind in candidates}
            flops = stage.flops * stage.repeats
            figures["seconds"] += flops / max(rates.values())
            figures["seconds_plain"] += flops / rates["plain"]
            figures[f"{name}_gflop"] = flops / 1e9
            for kind, rate in rates.items():
                figures[f"{name}_{kind}_gflops_per_second"] = rate / 1e9
        return Measurement(figures)

    return measure


type _Product = Callable[[Tensor], Tensor]


def _plain(weight: Tensor, rows: int) -> _Product:
    return lambda x: F.linear(x, weight)


def _packed(weight: Tensor, rows: int) -> _Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def layer_runs(
    stage: Stage, dtype: torch.dtype, make: Callable[[Tensor, int], _Product], device: str = "cpu"
) -> tuple[list[list[_Product]], list[Tensor]]:
    """Products of as many layers as do not fit a cache, and the inputs of each product."""
    layer_bytes = sum(ins * outs for ins, outs in stage.layer) * dtype.itemsize
    copies = min(stage.layers, 1 + _STREAMED_BYTES // layer_bytes)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device)

    inputs = [random(stage.rows, ins).to(dtype) for ins, _ in stage.layer]
    layers = [
        [make((random(outs, ins) * ins**-0.5).to(dtype), stage.rows) for ins, outs in stage.layer]
        for _ in range(copies)
    ]
    return layers, inputs


def _rate(stage: Stage, layers: list[list[_Product]], inputs: list[Tensor]) -> float:
    """Floating-point operations per second, best of three passes through all layers."""
    flops = len(layers) * sum(2 * stage.rows * ins * outs for ins, outs in stage.layer)
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            for layer in layers:
                for product, x in zip(layer, inputs, strict=True):
                    product(x)
            best = min(best, time.perf_counter() - start)
    return flops / best
