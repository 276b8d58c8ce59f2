"""Settings of `--robot.type=simulated_so101`. Plugin discovery imports this module, but no simulator."""

from dataclasses import dataclass
from pathlib import Path

from lerobot.robots.config import RobotConfig

from lerobot_pi0.errors import UserError


@RobotConfig.register_subclass("simulated_so101")
@dataclass
class SimulatedSO101Config(RobotConfig):
    """Settings of the simulated arm; all have a default."""

    # Says where the block lies, first and after each return of the arm to its home.
    seed: int = 0
    # The block moves on as soon as the arm has reached it: a task without end. Default: when the arm is home.
    moves_on: bool = False
    # The camera's picture in pixels, and pictures per second.
    camera_width: int = 96
    camera_height: int = 96
    camera_fps: int = 30
    # Folder for a record of every observation and action (robot.jsonl). Default: none.
    trace: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("camera_width", "camera_height", "camera_fps"):
            if getattr(self, name) < 1:
                raise UserError(f"--robot.{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"--robot.seed must be at least 0, got {self.seed}")
