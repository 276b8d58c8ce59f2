"""Settings of `--teleop.type=scripted_so101`. Plugin discovery imports this module, but no simulator."""

from dataclasses import dataclass

from lerobot.teleoperators.config import TeleoperatorConfig

from lerobot_pi0.errors import UserError

# What a reach takes at most, and what the way home takes until the arm rests, in seconds.
REACH_TIME, HOME_TIME = 2.0, 2.0


@TeleoperatorConfig.register_subclass("scripted_so101")
@dataclass
class ScriptedSO101Config(TeleoperatorConfig):
    """When the script reaches and when it goes home: as long as lerobot-record gives it for either."""

    # The same as --dataset.episode_time_s.
    episode_time_s: float = 3.0
    # The same as --dataset.reset_time_s.
    reset_time_s: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("episode_time_s", REACH_TIME), ("reset_time_s", HOME_TIME)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--teleop.{name} must be at least {least}, got {getattr(self, name)}: the script needs "
                    f"as much. Give it what --dataset.{name} has"
                )
