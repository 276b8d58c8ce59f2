"""Async control for a long time: LeRobot's own client drives the simulated robot, is killed and comes back.

SOAK_SECONDS=600 pytest -m soak tests/serving/test_serve_for_long.py -s -o faulthandler_timeout=0
"""

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from async_control import remote_client, sent, server
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
    began: list[float] = []
    with server(checkpoint, tmp_path, FPS) as (process, address), memory_of(process.pid) as memory:
        for number in range(CLIENTS):
            run = tmp_path / f"client_{number}"
            with remote_client(address, checkpoint, run, FPS) as client:
                client.wait_until(lambda run=run: sent(run))
                began.append(time.monotonic())
                time.sleep(SECONDS / CLIENTS)
                assert process.returncode is None
                assert client.returncode is None
                client.send_signal(signal.SIGKILL if number < CLIENTS - 1 else signal.SIGINT)
                client.wait(60)
        ended = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.succeed(60)
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
    np.savetxt(tmp_path / "memory.txt", memory)
    driven = np.array([sample for sample in memory if began[0] < sample[0] < ended])
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


@contextmanager
def memory_of(pid: int) -> Iterator[list[tuple[float, float]]]:
    """Resident memory of a process in MB, every second."""
    samples: list[tuple[float, float]] = []
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
