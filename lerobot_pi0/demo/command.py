"""LeRobot's commands as a person would type them, run as subprocesses with a log file and a progress bar."""

import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import IO

from tqdm import tqdm

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
    """A command, what to call it, where its output goes, and how to read its progress.

    `bar` is how the description of the command's own progress bar begins; it draws `bars` of them one after
    the other.
    """

    name: str
    command: Command
    log: Path
    bar: str
    bars: int = 1
    first_step: int = 0


def run(*jobs: Job) -> None:
    """Run jobs side by side until all have succeeded.

    When one fails, or at Ctrl-C, the others are ended at once: what a command leaves behind counts only
    when it is complete.

    Raises:
        RuntimeError: when one fails, with the last lines of its output and the path of its log.
    """
    for job in jobs:
        logger.info("%s: %s\n    (log: %s)", job.name, job.command, job.log)
    processes = [job.command.start() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as readers:
        try:
            for result in as_completed(map(readers.submit, repeat(_follow), jobs, processes, count())):
                result.result()
        finally:
            for process in processes:
                process.terminate()


def _follow(job: Job, process: subprocess.Popen[bytes], position: int) -> None:
    """Copy a command's output into its log until it ends, but turn its progress bar into ours."""
    own_bar = re.compile(re.escape(job.bar) + r".*?\| *(\d+)/(\d+) \[")
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # In a CI log every refresh is a line.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    assert process.stdout is not None
    with (
        job.log.open("a", encoding="utf-8") as log,
        tqdm(desc=job.name, position=position, mininterval=interval, dynamic_ncols=True) as progress,
    ):
        log.write(f"{START.format(step=job.first_step)} {job.command}\n")
        finished_bars = previous = 0
        # newline="": a carriage return, with which a progress bar ends, stays one.
        for line in _lines(io.TextIOWrapper(process.stdout, errors="replace", newline="")):
            if found := own_bar.search(line):
                done, total = map(int, found.groups())
                finished_bars += done < previous
                previous = done
                progress.total = job.bars * total
                progress.update(finished_bars * total + done - progress.n)
            if message := BAR.sub("", line).rstrip():
                log.write(message + "\n")
                log.flush()
                last_lines.append(message)
                if loss := TRAINING_LOSS.search(message):
                    progress.set_postfix_str(f"loss {loss[1]}", refresh=False)
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
