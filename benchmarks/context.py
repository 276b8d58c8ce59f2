"""What sections of the benchmark on a device share: its clock, the time left, and rows that may fail."""

import gc
import logging
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, get_args

import torch

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.configuration_pi0 import Backend

from . import inputs, ours
from .worker import Setup

logger = logging.getLogger("lerobot_pi0.bench")

type Row = dict[str, Any]  # figures, or "error", or "skipped"

_LONGEST_MESSAGE = 300  # of an error, in characters


class OutOfTimeError(RuntimeError):
    """A section has used up its time."""


class Clock:
    """Times calls on a device: what they take until it is done."""

    def __init__(self, device: str, quick: bool = False):
        """`quick`: as few calls as there can be, to try the benchmark itself."""
        self.device = torch.device(device)
        self.most = 2 if quick else 1000
        self.on_gpu = self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of a call."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def times(self, function: Callable[[], object], calls: int = 200, seconds: float = 4) -> Row:
        """Median and 99th percentile of calls one after the other, fewer if they take over `seconds`."""
        taken, calls = [self.once(function)], min(calls, self.most)
        while len(taken) < calls and sum(taken) < seconds:
            taken.append(self.once(function))
        largest = sorted(taken)[min(len(taken) - 1, round(0.99 * len(taken)))]
        return {"p50_ms": 1e3 * statistics.median(taken), "p99_ms": 1e3 * largest, "calls": len(taken)}

    def queued(self, function: Callable[[], object], calls: int = 20, seconds: float = 2) -> float:
        """Seconds of a call when none waits for the one before: what it occupies the device for, unless the
        host is slower. By CUDA's events on a GPU."""
        calls = max(1, min(calls, self.most, int(seconds / max(self.once(function), 1e-9))))
        if not self.on_gpu:
            return self.once(lambda: [function() for _ in range(calls)]) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def forget_peak(self) -> None:
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gigabytes(self) -> float | None:
        """Most that tensors held since `forget_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.on_gpu else None


@dataclass
class Context:
    """A run on one device. Sections write into `rows`; `done` has those of the sections before."""

    setup: Setup
    rows: dict[str, Row] = field(default_factory=dict)
    done: dict[str, dict[str, Row]] = field(default_factory=dict)
    ends: float = float("inf")  # of the section, by time.perf_counter

    def __post_init__(self) -> None:
        self.clock = Clock(self.setup.device, quick=self.setup.size == "tiny")

    @property
    def is_full(self) -> bool:
        """Of the published size; others are to try the benchmark itself."""
        return self.setup.size == "full"

    @property
    def backends(self) -> list[str]:
        """Settings of `--policy.backend` that the device has, the plainest first. On a CPU without `compile`,
        which takes minutes there and gains nothing."""
        others = ("compile", "fp8") if not self.clock.on_gpu else ("int8",)
        names = [name for name in get_args(Backend) if name not in others]
        return sorted(names, key=lambda name: name != "eager")

    def left(self) -> float:
        """Seconds that the section has left."""
        return self.ends - time.perf_counter()

    def row(self, name: str, function: Callable[[], Row]) -> Row:
        """A row of the section; one that fails has its error, and the next one goes on."""
        if self.left() <= 0:
            self.rows[name] = {"skipped": "the section's time is spent: give a larger --budget"}
            return self.rows[name]
        self.clock.forget_peak()
        try:
            self.rows[name] = function()
        except Exception as error:  # noqa: BLE001  # whatever a device does not do is a result
            self.rows[name] = {"error": described(error)}
        logger.info("    %s: %s", name, self.rows[name])
        return self.rows[name]

    def policy(self, **settings: Any) -> Pi0Policy:
        """Our policy with made-up weights on the device; fields of the setup, and settings of its config."""
        known = {name: value for name, value in settings.items() if hasattr(self.setup, name)}
        setup = replace(self.setup, **known)
        others = {name: value for name, value in settings.items() if name not in known}
        return ours.build(setup, inputs.weights(setup), **others)

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function as a CUDA graph, without what the host does for it; on a CPU as it is."""
        if not self.clock.on_gpu:
            return function
        function()  # what a first call prepares cannot be recorded
        self.clock.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


def described(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return text[:_LONGEST_MESSAGE]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the main thread, as soon as it runs Python, after so many seconds."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError(f"took longer than the {seconds:.0f} s that were left")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
