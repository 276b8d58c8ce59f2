"""Async control for a long time: LeRobot's own client drives the simulated robot, is killed and comes back.

SOAK_SECONDS=600 pytest -m soak tests/control/test_serve_for_long.py -s
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature
from tiny_policy import FRONT, tiny_policy

from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors
from lerobot_pi0.simulated_robot.simulation import HOME

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))  # of control, all clients together
CLIENTS = 4  # one after the other; all but the last one are killed
FPS, CHUNK = 30, 50
NAMES = [f"{joint}.pos" for joint in HOME]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A policy that knows nothing and moves the arm a little around its home."""
    vector = (len(NAMES),)
    policy = tiny_policy(
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        input_features={
            FRONT: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, vector),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, vector)},
        state_feature_names=NAMES,
        action_feature_names=NAMES,
    )
    policy.save_pretrained(tmp_path / "checkpoint")
    home: Any = {"mean": np.array(list(HOME.values()), np.float32), "std": np.full(vector, 2, np.float32)}
    stats = {"observation.state": home, "action": home}
    for pipeline in make_lerobot_pi0_pre_post_processors(policy.config, stats):
        pipeline.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_server_stands_still_while_clients_come_and_go(checkpoint, tmp_path):
    with server(checkpoint, tmp_path) as (process, address), memory_of(process.pid) as memory:
        for number in range(CLIENTS):
            run = tmp_path / f"client_{number}"
            client = start_client(address, checkpoint, run)
            wait_until(lambda run=run: sent(run), client)
            memory.append((time.monotonic(), f"client {number} drives"))
            time.sleep(SECONDS / CLIENTS)
            assert process.poll() is None
            assert client.poll() is None
            client.send_signal(signal.SIGKILL if number < CLIENTS - 1 else signal.SIGINT)
            client.wait(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    log = (tmp_path / "server.txt").read_text()
    chunks = [event for event in read_trace(tmp_path / "policy") if event["event"] == "inference"]
    latency = np.array([event["ended"] - event["began"] for event in chunks])
    print(f"\n{len(chunks)} chunks, policy p50 {np.median(latency):.3f} s, max {latency.max():.3f} s")
    longest = []
    for number in range(CLIENTS):
        times = sent(tmp_path / f"client_{number}")
        periods = np.diff(times)
        longest.append(periods.max())
        print(
            f"client {number}: {len(times)} actions, {(len(times) - 1) / (times[-1] - times[0]):.2f} Hz, "
            f"period p50 {1000 * np.median(periods):.1f} ms, p99 {1000 * np.quantile(periods, 0.99):.1f} ms, "
            f"max {1000 * periods.max():.0f} ms, {100 * np.mean(periods > 1.5 / FPS):.1f} % overrun"
        )
    driven = np.array(
        [value for value in memory if isinstance(value[1], float) and value[0] > first_time(memory)]
    )
    half = driven[len(driven) // 2 :]
    slope = np.polyfit(half[:, 0] / 60, half[:, 1], 1)[0]
    print(
        f"memory of the server: {driven[0, 1]:.1f} MB as the first client drives, {half[0, 1]:.1f} at half "
        f"time, {half[-1, 1]:.1f} at the end; slope of the second half {slope:+.2f} MB/min"
    )
    assert "Traceback" not in log
    assert log.count("loaded in") == 1
    assert max(longest) < 1.0  # a chunk lasts longer: it does not stop for any
    assert half[-1, 1] - driven[0, 1] < 20


def first_time(memory: list[tuple[float, Any]]) -> float:
    return next(when for when, value in memory if isinstance(value, str))


@contextmanager
def server(checkpoint: Path, folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
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
                f"--fps={FPS}",
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


def start_client(address: str, checkpoint: Path, run: Path) -> subprocess.Popen:
    """LeRobot's own client, as a person starts it at the robot."""
    run.mkdir()
    with (run / "client.txt").open("w") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lerobot.async_inference.robot_client",
                "--robot.type=simulated_so101",
                "--robot.id=soak",
                f"--robot.trace={run}",
                "--policy_type=lerobot_pi0",
                f"--pretrained_name_or_path={checkpoint}",
                f"--server_address={address}",
                f"--actions_per_chunk={CHUNK}",
                f"--fps={FPS}",
                "--task=reach the block",
            ],
            cwd=run,  # it leaves a folder "logs" where it stands
            env=os.environ | {"HF_LEROBOT_HOME": str(run / "home")},
            stdout=log,
            stderr=log,
        )


def sent(run: Path) -> list[float]:
    """When each action reached the robot."""
    if not (run / "robot.jsonl").is_file():
        return []
    return [event["t"] for event in read_trace(run) if event["event"] == "action"]


def wait_until(condition: Any, process: subprocess.Popen) -> Any:
    """What it returns as soon as that is true."""
    for _ in range(600):
        if value := condition():
            return value
        assert process.poll() is None, f"{process.args} ended"
        time.sleep(0.5)
    raise AssertionError(f"{process.args}: nothing within five minutes")


@contextmanager
def memory_of(pid: int) -> Iterator[list[tuple[float, Any]]]:
    """Resident memory of a process in MB, every second."""
    samples: list[tuple[float, Any]] = []
    stopped = threading.Event()

    def sample() -> None:
        for _ in itertools.count():
            status = Path(f"/proc/{pid}/status")
            found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
            if found:
                samples.append((time.monotonic(), int(found[1]) / 1024))
            if stopped.wait(1):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()
