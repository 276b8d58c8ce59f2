"""One side of a comparison in a process of its own: prepares a task once, then measures it as often as asked.

The coordinator talks to it through a pipe and hears of its death; what a worker prints goes to a log file.
A task is a function that is given a `Setup`, builds what it needs, and returns the function that measures
once.
"""

import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .flags import Model

# A new interpreter for each worker: its memory and its threads are its own.
CONTEXT = multiprocessing.get_context("spawn")

# "tiny" is for tests; "narrow" has the published depths at a small width, for counting operations; "small" is
# large enough for arithmetic to take the time, and small enough for one core.
Size = Literal["full", "small", "narrow", "tiny"]


@dataclass(frozen=True)
class Setup:
    """The parameters of a task. `checkpoint` is the folder that `inputs.write_checkpoint` filled."""

    size: Size
    checkpoint: Path
    demo: Path
    threads: int
    model: Model = "pi0"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    int8: bool = False
    cameras: int = 2  # in the batch
    absent_cameras: int = 0  # configured, but not in the batch
    language_model: Literal["gemma_2b", "gemma_300m"] = "gemma_2b"
    device: str = "cpu"
    batch_size: int = 1
    prompt: int | None = None  # tokens; None: the model's own number
    horizon: int | None = None  # actions of a chunk; None: the size's own number


@dataclass(frozen=True)
class Measurement:
    """Figures by name (`seconds`, …), and the actions (chunk, action) where the task computes a chunk.

    The worker adds `peak_bytes`, its largest resident memory so far.
    """

    figures: dict[str, float]
    actions: Tensor | None = None


type Measure = Callable[[], Measurement]
type Task = Callable[[Setup], Measure]


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message says which."""


def timed(function: Callable[[], Tensor]) -> Measurement:
    """Seconds of one call, whose result is a chunk of actions with the batch of one in front."""
    start = time.perf_counter()
    actions = function()
    return Measurement({"seconds": time.perf_counter() - start}, actions[0].float())


def time_pops(policy: Any, given: dict[str, Any], count: int) -> Measurement:
    """Median microseconds of `select_action` while the queue holds actions."""
    policy.action_queue.extend(torch.zeros(count, 1, 1))
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        policy.select_action(given)
        seconds.append(time.perf_counter() - start)
    return Measurement({"microseconds": 1e6 * statistics.median(seconds)})


@dataclass
class Worker:
    """A process that has prepared `task` ("module:function" of this package). A context: left, it is gone."""

    task: str
    setup: Setup
    log: Path
    timeout: float  # seconds for preparing, and for each measurement
    _process: multiprocessing.process.BaseProcess = field(init=False, repr=False)
    _connection: Connection = field(init=False, repr=False)

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, self.task, self.setup, self.log))
        self._process.start()
        theirs.close()  # or its death would not close the pipe
        try:
            self._receive("prepare")
        except WorkerError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # an idle worker then leaves
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def measure(self) -> Measurement:
        """One repetition. Raises WorkerError."""
        try:
            self._connection.send("measure")
        except OSError:
            raise self._death("before it was asked to measure") from None
        return self._receive("measure")

    def _receive(self, what: str) -> Measurement:
        try:
            if not self._connection.poll(self.timeout):
                raise WorkerError(f"{self.task} did not {what} within {self.timeout:.0f} s")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._death(f"while it should {what}") from None

    def _death(self, when: str) -> WorkerError:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            how = signal.Signals(-code).name + (", out of memory perhaps" if code == -signal.SIGKILL else "")
        else:  # Python's last words
            how = (self.log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        return WorkerError(f"{self.task} died {when}: {how} (log: {self.log})")


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage remembers what was there before the process became another program
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(connection: Connection, task: str, setup: Setup, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    adjust = Path("/proc/self/oom_score_adj")
    if adjust.exists():
        adjust.write_text("1000")  # when memory ends, let it be this process and not the coordinator
    torch.set_num_threads(setup.threads)
    module, function = task.split(":")
    measure = getattr(import_module(f".{module}", __package__), function)(setup)
    try:
        connection.send(Measurement({"peak_bytes": peak_bytes()}))
        while connection.recv():
            done = measure()
            connection.send(Measurement(done.figures | {"peak_bytes": peak_bytes()}, done.actions))
    except (EOFError, ConnectionError):  # the coordinator has what it wants
        return
