"""`lerobot-pi0 serve`, and LeRobot's own client with the simulated robot, each in a process of its own."""

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forked import Program, command

from lerobot_pi0.control.trace import read_trace


@contextmanager
def server(checkpoint: Path, folder: Path, fps: int) -> Iterator[tuple[Program, str]]:
    """`lerobot-pi0 serve` in a process of its own; its address."""
    flags = [f"--policy.path={checkpoint}", "--port=0", f"--fps={fps}", f"--trace={folder / 'policy'}"]
    with Program(folder / "server.txt", command, "lerobot-pi0", "serve", *flags) as program:
        line = r"serving on (127\.0\.0\.1:\d+)"
        yield program, program.wait_until(lambda: re.search(line, program.output))[1]


def remote_client(address: str, checkpoint: Path, run: Path, fps: int) -> Program:
    """LeRobot's own client, as a person starts it at the robot. It leaves a folder "logs" where it stands."""
    run.mkdir()
    flags = [
        "--robot.type=simulated_so101",
        "--robot.id=remote",
        f"--robot.trace={run}",
        "--policy_type=lerobot_pi0",
        f"--pretrained_name_or_path={checkpoint}",
        f"--server_address={address}",
        "--actions_per_chunk=50",
        f"--fps={fps}",
        "--task=reach the block",
    ]
    return Program(run / "client.txt", client, flags)


def client(flags: list[str]) -> None:
    """`python -m lerobot.async_inference.robot_client`."""
    sys.argv = ["robot_client", *flags]
    runpy.run_module("lerobot.async_inference.robot_client", run_name="__main__")


def sent(run: Path) -> list[float]:
    """When each action reached the robot."""
    try:
        return [event["t"] for event in read_trace(run) if event["event"] == "action"]
    except FileNotFoundError:
        return []
