"""Sections on the device itself: what it is, what it can do at best, and which attention kernels it has."""

import platform
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lerobot_pi0.sampling.linear import BACKENDS

from . import inputs, roofline
from .context import Context, Row, described

# Kernels of attention that torch may take, in no order.
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Linear backends of a GPU and of a processor.
FORMS = {True: ("fused", "fp8"), False: ("fused", "packed", "int8")}


def start(context: Context) -> None:
    """What the figures depend on, and how long weights take to be made. Nothing of the device is changed."""
    context.row("device", lambda: about(context))
    context.row("settings", settings)
    context.row("policy", lambda: made(context))


def about(context: Context) -> Row:
    clock = context.clock
    if not clock.on_gpu:
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    of = torch.cuda.get_device_properties(clock.device)
    free, total = torch.cuda.mem_get_info(clock.device)
    return {
        "name": of.name,
        "capability": f"{of.major}.{of.minor}",
        "multiprocessors": of.multi_processor_count,
        "memory_gb": total / 1e9,
        "free_gb": free / 1e9,
    }


def settings() -> Row:
    # torch's order of preference, by the numbers of `SDPBackend`.
    order = torch._C._get_sdp_priority_order()
    names = [SDPBackend(number).name for number in order if number >= 0]
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "attention_order": " ".join(names),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def made(context: Context) -> Row:
    begin = time.perf_counter()
    policy = context.policy()
    context.clock.synchronize()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "parameters": sum(parameter.numel() for parameter in policy.parameters())}


def ceilings(context: Context) -> None:
    """The best that the device does: copies, products at the model's shapes, launches of a graph."""
    context.row("copy", lambda: {"gb_per_s": copy_rate(context) / 1e9})
    context.row("square product, bf16", lambda: square_product(context))
    for name, stage in roofline.stages(context.setup).items():
        for form in FORMS[context.clock.on_gpu]:
            context.row(f"{name}, {form}", partial(stage_rate, context, stage, form))
    context.row("launches", lambda: launches(context))


def copy_rate(context: Context) -> float:
    """Bytes per second, read and written."""
    source = torch.empty((1 << 30) if context.clock.on_gpu else (1 << 26), dtype=torch.uint8)
    source = source.to(context.clock.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / context.clock.queued(lambda: target.copy_(source))


def square_product(context: Context) -> Row:
    size = 8192 if context.clock.on_gpu else 512
    a, b = (torch.randn(size, size, device=context.clock.device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflop_per_s": 2e-12 * size**3 / context.clock.queued(lambda: a @ b)}


def stage_rate(context: Context, stage: roofline.Stage, form: str) -> Row:
    """Products of a stage's layers over weights that no cache holds, without what the host does for them."""
    if form not in BACKENDS:
        return {"skipped": "this version has none"}
    dtype = getattr(torch, context.setup.dtype)

    def make(weight: Tensor, _: int) -> Callable[[Tensor], Tensor]:
        return BACKENDS[form]([weight])

    layers, xs = roofline.layer_runs(stage, dtype, make, context.setup.device)

    def run() -> None:
        for layer in layers:
            for product, x in zip(layer, xs, strict=True):
                product(x)

    with torch.no_grad():
        seconds = context.clock.queued(context.recorded(run))
    flops = len(layers) * sum(2 * stage.rows * ins * outs for ins, outs in stage.layer)
    num_bytes = len(layers) * dtype.itemsize * sum(ins * outs for ins, outs in stage.layer)
    return {
        "rows": stage.rows,
        "us_per_layer": 1e6 * seconds / len(layers),
        "tflop_per_s": flops / seconds / 1e12,
        "gb_per_s_of_weights": num_bytes / seconds / 1e9,
    }


def launches(context: Context) -> Row:
    """Microseconds per kernel of a graph of tiny ones, and launched one by one."""
    x, count = torch.zeros(32, device=context.clock.device), 1000

    def run() -> None:
        for _ in range(count):
            x.add_(1)

    one_by_one = context.clock.queued(run, calls=3)
    return {
        "us_in_graph": 1e6 * context.clock.queued(context.recorded(run)) / count,
        "us_one_by_one": 1e6 * one_by_one / count,
    }


def attention(context: Context) -> None:
    """The policy's attention by each kernel: microseconds, and whether gradients are finite."""
    for name, (q_shape, keys) in attention_shapes(context).items():
        for masked in (True, False):
            each = partial(attention_time, context, q_shape, keys, masked)
            context.row(f"{name}, {'mask' if masked else 'no mask'}", partial(by_each_kernel, each))
    # Where cuDNN's backward pass has given NaN (pytorch#196678), and a length where it has not.
    for keys in (192, 200):
        for dim in (64, 128, 256):
            each = partial(large_logits, context, keys, dim)
            context.row(f"finite gradients, {keys} keys of {dim}", partial(by_each_kernel, each))


def by_each_kernel(measure: Callable[[str], Row]) -> Row:
    """Figures by kernel; "none" of those that the device does not have for these shapes."""
    row: Row = {}
    for kernel in ("default", *KERNELS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in which torch says why it has none
            try:
                row |= {f"{kernel}{name}": value for name, value in measure(kernel).items()}
            except RuntimeError as error:
                none = re.match("No (available kernel|viable backend)", str(error))
                row[kernel] = "none" if none else described(error)
    return row


def attention_shapes(context: Context) -> dict[str, tuple[tuple[int, ...], int]]:
    """Queries (batch, heads, rows, size of a head) and keys, as `layers.attend` calls torch."""
    setup = context.setup
    vision, vlm, _ = inputs.sizes(setup)
    prefix = setup.cameras * vision.num_tokens + inputs.prompt_tokens(setup)
    chunk, heads, dim = inputs.chunk_size(setup), vlm.num_heads, vlm.head_dim
    per_image = vision.num_heads, vision.num_tokens, vision.width // vision.num_heads
    return {
        "vision": ((setup.cameras, *per_image), vision.num_tokens),
        "prefix": ((1, 1, heads * prefix, dim), prefix),
        "step": ((1, 1, heads * chunk, dim), prefix + 1 + chunk),
        "step, a batch of 8": ((8, 1, heads * chunk, dim), prefix + 1 + chunk),
    }


def attention_time(context: Context, q_shape: tuple[int, ...], keys: int, masked: bool, kernel: str) -> Row:
    batch, heads, _, dim = q_shape
    make: Any = partial(torch.randn, device=context.clock.device, dtype=getattr(torch, context.setup.dtype))
    q, k, v = make(q_shape), make(batch, heads, keys, dim), make(batch, heads, keys, dim)
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=q.device) if masked else None

    def forward() -> Tensor:
        return attend(q, k, v, mask, kernel)

    def both() -> None:
        attend(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask, kernel).sum().backward()

    with torch.no_grad():
        forward()  # or there is no such kernel, which a recording would not survive
        row: Row = {"_us": 1e6 * context.clock.queued(context.recorded(forward), calls=50, seconds=0.2)}
    try:
        return row | {"_with_backward_us": 1e6 * context.clock.queued(both, seconds=0.2)}
    except RuntimeError as error:
        return row | {"_with_backward_us": described(error)}


def large_logits(context: Context, keys: int, dim: int, kernel: str) -> Row:
    """Whether gradients are finite where all logits are near -120 and a mask comes that masks nothing."""
    make: Any = partial(torch.randn, device=context.clock.device, dtype=torch.bfloat16)
    level = 120**0.5 * dim**-0.25  # -level² · dim / √dim is -120
    q, k, v = (make(1, 1, rows, dim) * 0.01 for rows in (64, keys, keys))
    q, k, v = given = [x.requires_grad_() for x in (q + level, k - level, v)]
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=q.device)
    out = attend(q, k, v, mask, kernel)
    out.backward(torch.randn_like(out))
    return {"": all(x.grad is not None and bool(x.grad.isfinite().all()) for x in given)}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    """torch's attention by one kernel. Raises RuntimeError where the device has it not for these."""
    if kernel == "default":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
