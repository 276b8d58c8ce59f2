"""π0 and π0.5, vision-language-action models, as a policy plugin for LeRobot.

Importing this package imports nothing else. The policy types `lerobot_pi0` and `lerobot_pi05`, the
environment, the robot and the teleoperator are registered by `lerobot_policy_pi0`, which LeRobot's commands
import by themselves.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lerobot_pi0.configuration_pi0 import Pi0Config
    from lerobot_pi0.configuration_pi05 import Pi05Config
    from lerobot_pi0.modeling_pi0 import Pi0Policy
    from lerobot_pi0.modeling_pi05 import Pi05Policy

__all__ = ["Pi0Config", "Pi0Policy", "Pi05Config", "Pi05Policy"]

_MODULES = {
    "Pi0Config": "configuration_pi0",
    "Pi05Config": "configuration_pi05",
    "Pi0Policy": "modeling_pi0",
    "Pi05Policy": "modeling_pi05",
}


def __getattr__(name: str) -> Any:
    """Configs and policies on first use: help on the command line waits for none of them."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
