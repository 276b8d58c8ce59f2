"""LeRobot's commands as a person would type them, run as subprocesses: a log file each, one progress bar."""

import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

from lerobot_pi0.errors import CommandError

logger = logging.getLogger(__name__)

MODULES = {
    "lerobot-eval": "lerobot.scripts.lerobot_eval",
    "lerobot-pi0": "lerobot_pi0.cli",
    "lerobot-record": "lerobot.scripts.lerobot_record",
    "lerobot-train": "lerobot.scripts.lerobot_train",
}
# A progress bar; lerobot-train writes its messages on the same line.
BAR = re.compile(r"[^|]*\d+%\|[^|]*\| *\d+/\d+ \[[^\]]*\]")
ANSI_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
TRAINING_LOSS = re.compile(r"\bloss:(\S+)")
# A line of the log that says from which step on a training run writes it.
START = "# from step {step}:"
LAST_LINES = 15


@dataclass(frozen=True)
class Command:
    """A command line: program and subcommand, flags, and the environment variables that it is run with."""

    program: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = (("HF_HUB_OFFLINE", "1"),)

    def __str__(self) -> str:
        """As a person would type it."""
        words = [*(f"{name}={value}" for name, value in self.environment), self.program]
        return " \\\n    ".join([" ".join(words), *map(shlex.quote, self.arguments)])

    def start(self) -> subprocess.Popen[bytes]:
        """Start it with this interpreter, whatever is first on PATH. Its output arrives in one pipe."""
        program, *subcommand = self.program.split()
        return subprocess.Popen(
            [sys.executable, "-m", MODULES[program], *subcommand, *self.arguments],
            env={**os.environ, **dict(self.environment), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@dataclass(frozen=True)
class Job:
    """A command, what to call it, where its output goes, and how its progress bar begins.

    `describe` turns a bar into what is shown of it. A text that ends in a newline stays.
    """

    name: str
    command: Command
    log: Path
    bar: str
    first_step: int = 0
    describe: Callable[[str], str] = str


def run(*jobs: Job) -> None:
    """Run jobs side by side until all have succeeded. Their progress is shown in one line.

    When one fails, or at Ctrl-C, the others are ended at once: what a command leaves behind counts only
    when it is complete.

    Raises:
        CommandError: when one fails, with the last lines of its output and the path of its log.
    """
    for job in jobs:
        logger.info("%s: %s\n    (log: %s)", job.name, job.command, job.log)
    processes = [job.command.start() for job in jobs]
    with closing(LastLine(sys.stderr)) as last_line, ThreadPoolExecutor(len(jobs)) as readers:
        try:
            pairs = zip(jobs, processes, strict=True)
            followed = [readers.submit(_follow, *pair, last_line) for pair in pairs]
            for result in as_completed(followed):
                result.result()
        finally:
            for process in processes:
                process.terminate()


class LastLine:
    """The last line of a terminal, which each text replaces; in a log, a line every half minute.

    Several writers share it: each has a part of its own. May be called from any thread.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._interval = 0.5 if self._is_terminal else 30.0
        self._shown_at = float("-inf")
        self._parts: dict[str, str] = {}
        self._lock = Lock()

    def show(self, writer: str, text: str) -> None:
        """Replace a writer's part, unless the last time was just now. A text with a newline stays."""
        with self._lock:
            if text.endswith("\n"):
                self._parts.pop(writer, None)
                self._write(text.removesuffix("\n"), "\n")
                return
            self._parts[writer] = text
            if time.monotonic() - self._shown_at >= self._interval:
                self._write(" | ".join(self._parts.values()), "" if self._is_terminal else "\n")
                self._shown_at = time.monotonic()

    def close(self) -> None:
        """Leave what was shown last on a line of its own."""
        with self._lock:
            if self._parts:
                self._write(" | ".join(self._parts.values()), "\n")
                self._parts.clear()

    def _write(self, text: str, end: str) -> None:
        columns = shutil.get_terminal_size().columns - 1
        start, text = ("\r\x1b[K", text[:columns]) if self._is_terminal else ("", text)
        self._stream.write(start + text + end)
        self._stream.flush()


def _follow(job: Job, process: subprocess.Popen[bytes], last_line: LastLine) -> None:
    """Copy a command's output into its log until it ends, but its progress bar to the terminal."""
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    assert process.stdout is not None
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"{START.format(step=job.first_step)} {job.command}\n")
        loss = ""
        # newline="": a carriage return, with which a progress bar ends, stays one.
        for line in _lines(io.TextIOWrapper(process.stdout, errors="replace", newline="")):
            if message := BAR.sub("", line).rstrip():
                log.write(message + "\n")
                log.flush()
                last_lines.append(message)
                if found := TRAINING_LOSS.search(message):
                    loss = f" loss {found[1]}"
            bar = BAR.search(line)
            if bar and bar[0].startswith(job.bar):
                last_line.show(job.name, f"{job.describe(bar[0])}{loss}")
    if process.wait() != 0:
        end = "\n".join(last_lines)
        raise CommandError(
            f"{job.name} failed with exit code {process.returncode}. The end of its output:\n\n{end}\n\n"
            f"All of it is in {job.log}. The command was\n{job.command}"
        )


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines that end in a newline or, as progress bars do, in a carriage return; without colours."""
    buffer = ""
    while chunk := stream.read(1):
        if chunk in "\r\n":
            yield ANSI_CODE.sub("", buffer)
            buffer = ""
        else:
            buffer += chunk
    yield ANSI_CODE.sub("", buffer)
