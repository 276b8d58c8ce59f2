"""The flags of `lerobot-pi0 latency`, `rollout` and `trace`."""

from dataclasses import dataclass, field
from pathlib import Path

from lerobot_pi0.inputs.flags import ControlPolicyFlags

ROLLOUT_HELP = """usage: lerobot-pi0 rollout [--trace=FOLDER] FLAGS OF lerobot-rollout

lerobot-rollout for this policy, with checks: the robot's joints and cameras against the checkpoint's, the
time that a chunk takes against what the chunks hide, and an error when no action was sent.

  --trace=FOLDER  keep what happens, for `lerobot-pi0 trace FOLDER`; the folder has no trace yet

All other flags are LeRobot's: `lerobot-rollout --help`, with --robot.type=... for those of a robot."""


@dataclass
class LatencyConfig:
    """How long a chunk of actions takes on this machine, and which flags of rollout suit that."""

    policy: ControlPolicyFlags = field(default_factory=ControlPolicyFlags)
    # Actions per second that the robot is to get; without it the training data's, or 30 where the checkpoint
    # does not know it.
    fps: float | None = None
    # Chunks to measure, after the first.
    repeats: int = 20
    # Print JSON instead of text.
    json: bool = False


@dataclass
class TraceReportConfig:
    """How a run went, from the trace that it left, and a plot of it in RUN/trace.png."""

    # Folder that `lerobot-pi0 rollout --trace` wrote into, or the policy server and the simulated robot.
    run: Path
    # Print JSON instead of text.
    json: bool = False
