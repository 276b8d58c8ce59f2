"""Programs in processes of their own, forked by a server that has imported LeRobot once.

To import it takes 10 seconds and more. The server (that of multiprocessing) starts with the first program and
ends with the tests. It is no copy of pytest's process: what tests patch there, the checks of shapes and other
threads are not in what it forks.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Self

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(f"lerobot.scripts.lerobot_{name}" for name in ("train", "eval", "record", "rollout", "replay")),
        "lerobot_pi0.cli",
        "lerobot_pi0.modeling_pi0",
        "lerobot_pi0.processor_pi0",
        "lerobot_policy_pi0",
        "comments_read",
        "peft",
        "safetensors.torch",
    ]
)
LIMIT = 600.0  # seconds that a program may take on a busy machine


@cache
def start_server() -> None:
    """Start it with this folder where it looks for modules: the `sys.path` that it is given it ignores."""
    import pytest  # not in what is forked

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


class Program:
    """A function in a process of its own, which starts in the folder of `log`, where what it prints goes.

    As a context manager it is killed at the end of the block, if it runs still.
    """

    def __init__(self, log: Path, function: Callable[..., Any], *arguments: Any, **environment: str):
        self.log = log
        log.touch()
        start_server()
        given = (log, os.environ | environment, function, arguments)
        self._process = FORKS.Process(target=_begin, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative for a signal."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = LIMIT) -> Self:
        self._process.join(seconds)
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"no end within {seconds} s:\n{self.output[-4000:]}")
        return self

    def succeed(self, seconds: float = LIMIT) -> Self:
        self.wait(seconds)
        assert self.returncode == 0, f"exit code {self.returncode}:\n{self.output[-4000:]}"
        return self

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """What the condition returns as soon as that is true."""
        end = time.monotonic() + LIMIT
        while not (value := condition()):
            assert self.returncode is None, self.output[-4000:]
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.05)
        return value

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _begin(log: Path, environment: dict[str, str], function: Callable[..., Any], arguments: Any) -> None:
    """What a new interpreter would do, in the forked process."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyrefly: ignore[missing-attribute]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(log.parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and Weights & Biases relies on


def script(code: str, *arguments: str) -> None:
    """As `python -c code arguments` runs it."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def command(name: str, *arguments: str) -> None:
    """As the console script does; of `lerobot-train` or `lerobot-pi0`."""
    print("###", name, *arguments)
    sys.argv = [name, *arguments]
    own = name == "lerobot-pi0"
    module = "lerobot_pi0.cli" if own else f"lerobot.scripts.{name.replace('-', '_')}"
    importlib.import_module(module).main()


def commands(lines: list[list[str]]) -> None:
    """One after the other, until one fails."""
    for line in lines:
        command(*line)
