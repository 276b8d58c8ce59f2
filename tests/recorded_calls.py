"""A stand-in for a CUDA graph on a CPU: torch's operations of one run, which are run again on the same
memory.

As in a CUDA graph, Python does not run again, whatever it read from outside stays as it was, and what would
wait for the device, or copy a number to it, is an error.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lerobot_pi0.sampling import cuda_graph
from lerobot_pi0.sampling.cuda_graph import Recorded

HOST = ("_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "nonzero", "is_nonzero", "equal", "randn")


class RecordedCalls(TorchDispatchMode):
    """The operations of what runs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in HOST, f"{func} in a graph"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[RecordedCalls]:
    """Let `Graphs` record by this instead of `torch.cuda`: a list that fills with what is recorded."""
    recordings: list[RecordedCalls] = []

    def record(function: Callable[[], Any], device: torch.device) -> Recorded:
        function()
        with RecordedCalls() as recorded:
            outputs = function()
        recordings.append(recorded)
        return Recorded(recorded.replay, outputs)

    monkeypatch.setattr(cuda_graph, "record", record)
    return recordings
