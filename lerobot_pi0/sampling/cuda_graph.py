"""CUDA graphs of what a sampler does: the kernels of a chunk are recorded once and then launched as one.

A `Sampler` runs `sample`, `context` and `actions` through the `Graphs` that it is given, over eager code or
over compiled pieces. `PolicySampler` gives it some where the policy is on a CUDA device, unless
`--policy.backend=eager`.

Each graph is of a key: what is computed, by how many steps, and the shapes of what is given. The first call
of a key runs the function twice (which compiles, tunes and allocates what there is to) and records it: tenths
of a second over eager code. Later calls copy what they are given to where the graph reads it, replay, and
copy the outputs out of the graph's memory, which the next graph writes over. Weights are read where they were
when it was recorded, so a graph must not outlive the sampler that holds them.

Any thread may call: one at a time, on the stream that is the default one of all threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lerobot_pi0.errors import UserError

_WARM_UPS = 2
_ONE_AT_A_TIME = threading.Lock()  # torch records one graph at a time, and all share their memory


@dataclass(frozen=True)
class Recorded:
    """A function that runs again on the same memory, and its outputs there."""

    replay: Callable[[], None]
    outputs: Any


class Graphs:
    """Graphs of functions, recorded when they are first called."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[list[Tensor], Recorded]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__[T](self, key: Hashable, function: Callable[..., T], *given: Any) -> T:
        """function(*given): tensors, also in dataclasses, lists and tuples. Its outputs are as well.

        `key` stands for all that decides what the function does besides what it is given. Raises UserError if
        the device cannot record it.
        """
        key = key, *(of if not isinstance(of, Tensor) else (of.shape, of.dtype) for of in leaves(given))
        with _ONE_AT_A_TIME:
            if key not in self._graphs:
                inputs = mapped(given, torch.clone)
                places = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
                self._graphs[key] = places, record(lambda: function(*inputs), places[0].device)
            places, graph = self._graphs[key]
            torch._foreach_copy_(places, [leaf for leaf in leaves(given) if isinstance(leaf, Tensor)])
            graph.replay()
            return mapped(graph.outputs, torch.clone)


def record(function: Callable[[], Any], device: torch.device) -> Recorded:
    """A CUDA graph of a function without arguments, on a device."""
    stream, memory = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, a camera's for example, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    except RuntimeError as error:
        raise UserError(
            f"the device cannot record a chunk as a CUDA graph ({error}): --policy.backend=eager does without"
        ) from error
    return Recorded(graph.replay, outputs)


@functools.cache
def side_stream(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    """Where graphs are recorded, and the memory that they share: one for all, or each has a workspace of its
    own."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def leaves(given: Any) -> Iterator[Any]:
    """What dataclasses, lists and tuples hold, in order, and of which type a dataclass is."""
    if is_dataclass(given):
        yield type(given)
        given = tuple(vars(given).values())
    if isinstance(given, list | tuple):
        for part in given:
            yield from leaves(part)
    else:
        yield given


def mapped[T](given: T, function: Callable[[Tensor], Any]) -> T:
    """`given`, with a function of each tensor that it is or holds in its place."""
    any_given: Any = given
    if isinstance(given, Tensor):
        return function(any_given)
    if is_dataclass(given):
        return replace(any_given, **{name: mapped(value, function) for name, value in vars(given).items()})
    if isinstance(given, list | tuple):
        return type(any_given)(mapped(part, function) for part in given)
    return given
