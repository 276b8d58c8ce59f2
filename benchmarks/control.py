"""The simulated robot under injected latency: does it keep its rate, and does it move smoothly?

    python -m benchmarks.control record     demonstrations of the arm that follows the block (5 minutes)
    python -m benchmarks.control train      a small policy, and then the same for real-time chunking
    python -m benchmarks.control run        every way from chunk to chunk at every latency (half an hour)

Everything is in `outputs/control`; what is there is reused. `run` wants a quiet machine: it happens in real
time, through `lerobot-pi0 rollout`, with a camera in a process of its own.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from benchmarks.chunking import PREDICT, predictor
from lerobot_pi0.control.rollout import parse, rollout
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.control.trace_report import make_report, read_run
from lerobot_pi0.demo.command import Command, Job
from lerobot_pi0.demo.command import run as run_jobs
from lerobot_pi0.demo.demo import TRAINING_ENVIRONMENT
from lerobot_pi0.modeling_pi0 import Pi0Policy

ROOT = Path("outputs", "control")
TASK, FPS, SECONDS = "follow the red block", 30, 65
# Seconds on top of the policy's own, and the execution horizon that `lerobot-pi0 latency` suggests for both:
# twice the delay.
LATENCIES = {0.0: 10, 0.1: 16, 0.3: 28, 0.6: 46}
LONGEST_DELAY = 20  # steps: 0.6 s, and what the policy itself takes
STEPS, MORE_STEPS = 1200, 500
# Name: which policy, which of LeRobot's engines, which of `chunking`'s ways.
WAYS = {
    "sync": ("plain", "sync", "naive"),
    "naive": ("plain", "rtc", "naive"),
    "in-tree": ("plain", "rtc", "in-tree"),
    "guided": ("plain", "rtc", "rtc"),
    "trained": ("trained", "rtc", "rtc"),
}


def record() -> str:
    """Demonstrations, by the scripted teleoperator."""
    arguments = (
        "--robot.type=simulated_so101",
        "--robot.moves_on=true",
        "--robot.camera_fps=15",
        "--teleop.type=scripted_so101",
        "--dataset.repo_id=local/simulated_follow",
        f"--dataset.root={ROOT / 'demonstrations'}",
        f"--dataset.single_task={TASK}",
        "--dataset.num_episodes=30",
        "--dataset.episode_time_s=8",
        "--dataset.reset_time_s=0",
        f"--dataset.fps={FPS}",
        "--dataset.push_to_hub=false",
        "--play_sounds=false",
    )
    run_jobs(Job("record", Command("lerobot-record", arguments), ROOT / "record.log", "Recording"))
    return f"recorded: {ROOT / 'demonstrations'}"


def train() -> str:
    """A small policy, and that policy trained on for real-time chunking."""
    data = ("--dataset.repo_id=local/simulated_follow", f"--dataset.root={ROOT / 'demonstrations'}")
    schedule = ("--policy.optimizer_lr=4e-4", f"--policy.scheduler_decay_steps={MORE_STEPS}")
    new = ("--config_path=configs/simulated_robot.yaml", f"--steps={STEPS}")
    onwards = (
        f"--policy.path={checkpoint('plain')}",
        f"--policy.rtc_training_max_delay={LONGEST_DELAY}",
        "--policy.push_to_hub=false",
        *schedule,
        f"--steps={MORE_STEPS}",
        "--batch_size=32",
        "--num_workers=0",
        "--log_freq=50",
        "--env_eval_freq=0",
    )
    for name, arguments in (("plain", new), ("trained", onwards)):
        if not checkpoint(name).exists():
            command = Command(
                "lerobot-train", (*arguments, *data, f"--output_dir={ROOT / name}"), TRAINING_ENVIRONMENT
            )
            run_jobs(Job(name, command, ROOT / f"{name}.log", "Training"))
    return f"trained: {checkpoint('plain')}, {checkpoint('trained')}"


def checkpoint(name: str) -> Path:
    return ROOT / name / "checkpoints" / "last" / "pretrained_model"


def run() -> str:
    """Each way at each latency that was not run yet; then the table."""
    for latency in LATENCIES:
        for way in WAYS:
            if not (result := ROOT / "runs" / f"{way}_{latency}" / "result.json").exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(one(way, latency, result.parent), indent=2))
    return table()


def one(way: str, latency: float, folder: Path) -> dict[str, Any]:
    """Drive the robot, and say how that went."""
    policy, engine, how = WAYS[way]
    arguments = [
        f"--policy.path={checkpoint(policy)}",
        "--robot.type=simulated_so101",
        f"--robot.trace={folder}",
        "--robot.moves_on=true",
        "--robot.camera_fps=12",
        f"--task={TASK}",
        f"--fps={FPS}",
        f"--duration={SECONDS}",
        "--return_to_initial_position=false",
        f"--inference.type={engine}",
    ]
    if engine == "rtc":
        arguments.append(f"--inference.rtc.execution_horizon={LATENCIES[latency]}")
    with late(latency, how, RTCConfig(execution_horizon=LATENCIES[latency])):
        print(f"{way} at {latency} s\n{rollout(parse(arguments), folder)}", file=sys.stderr)
    seen = read_run(folder)
    report, std = make_report(seen), seen.start["std"]
    changes: dict[bool, list[float]] = {True: [], False: []}
    for episode in seen.episodes:
        for before, after in pairwise(episode):
            change = max(abs(after["values"][joint] - before["values"][joint]) / std[joint] for joint in std)
            changes[before["chunk"] != after["chunk"]].append(change)
    discontinuity, step = (float(np.median(changes[at_boundary])) for at_boundary in (True, False))
    placed = max(event["placed"] for event in read_trace(folder) if "placed" in event)
    return {
        "rate": report.loop_timing.rate,
        "stalls": report.loop_timing.stalls,
        "stalled": report.loop_timing.stalled,
        "discontinuity": discontinuity,
        "discontinuity_p95": float(np.quantile(changes[True], 0.95)),
        "step": step,
        "boundaries": report.boundaries,
        "latency": report.latency.get("p50"),
        "age": report.age.get("p50"),
        "reached": placed - 1,
    }


@contextmanager
def late(latency: float, way: str, rtc: RTCConfig) -> Iterator[None]:
    """The policy's chunks take longer by `latency` meanwhile, and are made in a way of `chunking`."""

    def predict(policy: Pi0Policy, batch: dict[str, Any], **given: Any) -> Any:
        time.sleep(latency)
        # Without real-time chunking the policy has no settings of it, which would make it warm up.
        settings = policy.config.rtc_config
        chunk = predictor(policy, way, rtc)(
            batch, given.get("inference_delay") or 0, given.get("prev_chunk_left_over")
        )
        policy.config.rtc_config = settings
        return chunk

    kind: Any = Pi0Policy
    kind.predict_action_chunk = predict
    try:
        yield
    finally:
        kind.predict_action_chunk = PREDICT


def table() -> str:
    lines = [
        "| latency | way | rate, Hz | stalls | stalled, s | discontinuity / step | p95 | "
        "step, std | observation's age, s | blocks reached |",
        "|" + "---|" * 10,
    ]
    for latency in LATENCIES:
        for way in WAYS:
            file = ROOT / "runs" / f"{way}_{latency}" / "result.json"
            if not file.exists():
                continue
            result = json.loads(file.read_text())
            step, pace = (
                result["step"],
                f"{result['rate']:.1f} | {result['stalls']} | {result['stalled']:.1f}",
            )
            lines.append(
                f"| {latency} s | {way} | {pace} | {result['discontinuity'] / step:.2f} | "
                f"{result['discontinuity_p95'] / step:.2f} | {step:.3f} | {result['age']:.2f} | "
                f"{result['reached']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    EXPERIMENTS = {"record": record, "train": train, "run": run}
    if sys.argv[1:] not in [[name] for name in EXPERIMENTS]:
        raise SystemExit(f"usage: python -m benchmarks.control {'|'.join(EXPERIMENTS)}")
    print(EXPERIMENTS[sys.argv[1]]())
