"""The flags of `lerobot-pi0 serve`."""

from dataclasses import dataclass, field
from pathlib import Path

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.flags import ControlPolicyFlags


@dataclass
class ServeConfig:
    """Serve a policy to LeRobot's async robot client, until Ctrl-C.

    At the robot: python -m lerobot.async_inference.robot_client --policy_type=lerobot_pi0
    --server_address=HOST:PORT --pretrained_name_or_path=CHECKPOINT --actions_per_chunk=50 --robot.type=…
    CHECKPOINT is the server's --policy.path.
    """

    policy: ControlPolicyFlags = field(default_factory=ControlPolicyFlags)
    # Serve whatever checkpoint a client names, a folder of this machine or a repository on the hub, on the
    # client's --policy_device, in place of --policy.path.
    any_policy: bool = False
    # Address to listen on. There is no password: leave it at this machine, and come from another one through
    # `ssh -L 8080:127.0.0.1:8080`.
    host: str = "127.0.0.1"
    # Port to listen on; 0 is any that is free.
    port: int = 8080
    # Actions per second of the robot, as its client has it.
    fps: int = 30
    # Folder for policy.jsonl: each answered observation. It has none yet. `lerobot-pi0 trace` also needs the
    # actions that were sent, which only the simulated robot writes, with --robot.trace.
    trace: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be between 0 and 65535, got {self.port}")
        if not (self.policy.path or self.any_policy):
            raise UserError(
                "which policy? Name its checkpoint, --policy.path=outputs/…/pretrained_model; or let each "
                "client name one, --any_policy=true: whoever reaches the server then has it load any folder "
                "of this machine and any repository on the hub"
            )
        if self.policy.path and self.any_policy:
            raise UserError("--any_policy is in place of --policy.path: give one of them")
        if self.fps < 1:
            raise UserError(f"--fps must be at least 1, got {self.fps}")
