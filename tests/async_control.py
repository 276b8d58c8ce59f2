"""`lerobot-pi0 serve`, and LeRobot's own client with the simulated robot, each in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lerobot_pi0.control.trace import read_trace


@contextmanager
def server(checkpoint: Path, folder: Path, fps: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """`lerobot-pi0 serve` in a process of its own; its address."""
    with (folder / "server.txt").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lerobot_pi0.cli",
                "serve",
                f"--policy.path={checkpoint}",
                "--port=0",
                f"--fps={fps}",
                f"--trace={folder / 'policy'}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            line = r"serving on (127\.0\.0\.1:\d+)"
            found = wait_until(lambda: re.search(line, (folder / "server.txt").read_text()), process)
            yield process, found[1]
        finally:
            process.kill()
            process.wait()


@contextmanager
def remote_client(address: str, checkpoint: Path, run: Path, fps: int) -> Iterator[subprocess.Popen]:
    """LeRobot's own client, as a person starts it at the robot; ended with the block at the latest."""
    run.mkdir()
    with (run / "client.txt").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lerobot.async_inference.robot_client",
                "--robot.type=simulated_so101",
                "--robot.id=remote",
                f"--robot.trace={run}",
                "--policy_type=lerobot_pi0",
                f"--pretrained_name_or_path={checkpoint}",
                f"--server_address={address}",
                "--actions_per_chunk=50",
                f"--fps={fps}",
                "--task=reach the block",
            ],
            cwd=run,  # it leaves a folder "logs" where it stands
            env=os.environ | {"HF_LEROBOT_HOME": str(run / "home")},
            # Not ignored, as it is in what a shell starts in the background: Ctrl-C ends the client.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def sent(run: Path) -> list[float]:
    """When each action reached the robot."""
    try:
        return [event["t"] for event in read_trace(run) if event["event"] == "action"]
    except FileNotFoundError:
        return []


def wait_until(condition: Any, process: subprocess.Popen) -> Any:
    """What it returns as soon as that is true."""
    for _ in range(600):
        if value := condition():
            return value
        assert process.poll() is None, f"{process.args} ended"
        time.sleep(0.5)
    raise AssertionError(f"{process.args}: nothing within five minutes")
