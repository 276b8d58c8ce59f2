"""Counts of what a chunk asks of the machine, and of what a compiled one must not ask.

A kernel-like operation is one that torch dispatches and that reads or writes the elements of a tensor: on a
GPU it would be a launch. Views, other changes of shape or strides alone, and allocations are none. In
compiled code it is a call of a generated kernel or of a library's.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lerobot_pi0.model import Observation
from lerobot_pi0.sampling.sampler import Sampler

from . import intree, ours
from .inputs import NUM_STEPS, batch, network, noise, sizes
from .worker import Measure, Measurement, Setup

# No alias of an argument by their schema, and still no kernel.
_NO_KERNEL = re.compile(r"aten::(empty|empty_like|empty_strided|new_empty|new_empty_strided|_unsafe_view)$")
_KERNEL_CALL = re.compile(
    r"^\s+(?:\w+ = )?(?:cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE
)
# What makes the host wait, or copies a number from it.
_HOST = re.compile(r"aten\.(_local_scalar_dense|item|nonzero|is_nonzero|equal|lift_fresh_copy)|device_put")


class OperationCounter(TorchDispatchMode):
    """Counts kernel-like operations by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kernel(func):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class CostCounter(TorchDispatchMode):
    """Adds up, while it is active, the least seconds that operations take: each for its floating-point
    operations or for the bytes that it reads and writes, whichever takes longer."""

    def __init__(self, flops_per_second: float, bytes_per_second: float):
        super().__init__()
        self._rates, self.seconds = (flops_per_second, bytes_per_second), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_kernel(func):
            return out
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        # Of a table only the rows that are looked up are read.
        read = args if "embedding" not in func._schema.name else out
        num_bytes = sum(_nbytes(leaf) for leaf in tree_leaves((read, out)))
        self.seconds += max(flops / self._rates[0], num_bytes / self._rates[1])
        return out


def _nbytes(of: Any) -> int:
    """What is in memory of a tensor: an expanded one stands there once."""
    if not isinstance(of, Tensor):
        return 0
    return min(of.numel() * of.element_size(), of.untyped_storage().nbytes())


def _is_kernel(func: Any) -> bool:
    """Whether an operator reads or writes elements."""
    aliases = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and not _NO_KERNEL.match(func._schema.name)


def count(function: Callable[[], object]) -> int:
    """Kernel-like operations that torch dispatches in a call."""
    with OperationCounter() as counter:
        function()
    return counter.counts.total()


def count_compiled(function: Callable[..., object], *args: object) -> int:
    """Kernel calls in the code that inductor generates for a call. The code is neither built nor run."""
    codes = []
    generate = GraphLowering.codegen

    def stop(lowering: GraphLowering) -> None:
        codes.append(generate(lowering)[0].value)
        raise _GeneratedError

    # Code that is not run need not be for vectors that are known to work: to find that out torch builds a
    # program for each kind of them, and imports itself in a process of its own to load it.
    settings = {"fx_graph_cache": False, "cpp.vec_isa_ok": True}
    torch._dynamo.reset()
    with patch.object(GraphLowering, "codegen", stop), inductor_config.patch(settings):
        try:
            torch.compile(function, fullgraph=True)(*args)
        except InductorError as error:
            if not codes:
                raise RuntimeError("torch.compile generated no code") from error
    return len(_KERNEL_CALL.findall(codes[0]))


def sampler_operations(setup: Setup) -> tuple[int, int]:
    """Kernel calls of a compiled chunk, and of one denoising step, at the setup's depths.

    Counted at a fraction of the depths and at few steps, in whose product the count is linear.
    """
    vision, vlm, expert = sizes(setup)
    observation, start = ours.skeleton(setup).observation(batch(setup)), noise(setup)

    def at(part: int, num_steps: int) -> int:
        shallow = replace(vision, depth=3 * part), replace(vlm, depth=2 * part), expert
        sampler = Sampler(network(setup.model, *shallow).bfloat16(), "fused")
        sampler.sample(observation, start, num_steps)  # makes the tables of times, outside the graph
        return count_compiled(sampler.sample, observation, start, num_steps)

    parts = vision.depth // 3
    assert (vision.depth, vlm.depth) == (3 * parts, 2 * parts)
    base, deeper, longer, both = at(1, 2), at(2, 2), at(1, 3), at(2, 3)
    per_part, per_step = deeper - base, longer - base
    per_part_and_step = both - base - per_part - per_step
    step = per_step + (parts - 1) * per_part_and_step
    return base + (parts - 1) * per_part + (NUM_STEPS - 2) * step, step


def in_chunks(setup: Setup) -> Measure:
    """Operations of our chunk: compiled, and (`eager_…`) as it runs on a CPU."""
    policy, given, start = ours.build(setup), batch(setup), noise(setup)

    def chunk(num_steps: int) -> int:
        policy.config.num_inference_steps = num_steps
        policy.predict_action_chunk(given, noise=start)  # what the first one prepares is not counted
        return count(lambda: policy.predict_action_chunk(given, noise=start))

    def measure() -> Measurement:
        whole, step = sampler_operations(setup)
        eager = chunk(NUM_STEPS)
        return Measurement(
            {
                "operations": whole,
                "per_step": step,
                "eager_operations": eager,
                "eager_per_step": eager - chunk(NUM_STEPS - 1),
            }
        )

    return measure


def in_tree_chunks(setup: Setup) -> Measure:
    """Operations of a chunk of LeRobot's own policy, which runs eagerly."""
    policy, start = intree.build(setup), noise(setup)
    given = batch(setup, intree.policy_prompt_length(setup))

    def chunk(num_steps: int) -> int:
        policy.model.config.num_inference_steps = num_steps
        return count(lambda: intree.predict(policy, given, start))

    def measure() -> Measurement:
        whole = chunk(NUM_STEPS)
        return Measurement({"operations": whole, "per_step": whole - chunk(NUM_STEPS - 1)})

    return measure


def static_sample(setup: Setup) -> Measure:
    """What stops a compiled chunk: graph breaks, recompilations for other prompts and states of the same
    padded length, and operations that make the host wait or copy from it.
    """
    sampler = Sampler(ours.build(setup).model, "fused")
    observation, start = ours.skeleton(setup).observation(batch(setup)), noise(setup)

    sampler.sample(observation, start, NUM_STEPS)  # makes the tables of times, outside the graph
    lengths = range(1, 1 + observation.tokens.shape[1], 3)
    calls = [(_other(observation, length), start + length, NUM_STEPS) for length in lengths]

    def measure() -> Measurement:
        figures = compiled_events(sampler.sample, calls)
        return Measurement(figures | {"total": sum(figures.values())})

    return measure


def compiled_events(function: Callable[..., object], calls: Sequence[tuple[object, ...]]) -> dict[str, float]:
    """Graph breaks of the first call, recompilations that the others cause, and in all graphs operations that
    make the host wait for a device or copy a number to it.
    """
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep))
    compiled(*calls[0])
    breaks, first = counters["graph_break"].total(), len(graphs)
    for call in calls[1:]:
        compiled(*call)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return {
        "graph_breaks": breaks,
        "recompilations": len(graphs) - first,
        "host_synchronisations": sum(bool(_HOST.search(target)) for target in targets),
    }


def flops(setup: Setup) -> Measure:
    """10⁹ floating-point operations of a chunk, counted on the meta device: `sample`, and in-tree's."""
    mine, theirs = ours.skeleton(setup), intree.skeleton(setup).to("meta")
    start = noise(setup).to("meta")

    def measure() -> Measurement:
        with FlopCounterMode(display=False) as own:
            observation = mine.observation(_on_meta(batch(setup)))
            mine.model.sample(observation, start, NUM_STEPS)
        with FlopCounterMode(display=False) as other:
            given = _on_meta(batch(setup, intree.policy_prompt_length(setup)))
            intree.predict(theirs, given, start)
        return Measurement(
            {"gflop_ours": own.get_total_flops() / 1e9, "gflop_in_tree": other.get_total_flops() / 1e9}
        )

    return measure


class _GeneratedError(Exception):
    """Ends a compilation whose code is all that is wanted."""


def _other(observation: Observation, length: int) -> Observation:
    """Another prompt, of `length` tokens, and another state."""
    mask = torch.arange(observation.tokens.shape[1]).expand_as(observation.tokens) < length
    return replace(
        observation, tokens=observation.tokens * mask, token_mask=mask, state=observation.state + length
    )


def _on_meta(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to("meta") for key, value in given.items()}
