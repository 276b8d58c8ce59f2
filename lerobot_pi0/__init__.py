"""π0, the vision-language-action model, as a policy plugin for LeRobot.

Importing this package imports nothing else. The policy type `lerobot_pi0`, the environment, the robot and the
teleoperator are registered by `lerobot_policy_pi0`, which LeRobot's commands import by themselves.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lerobot_pi0.configuration_pi0 import Pi0Config
    from lerobot_pi0.modeling_pi0 import Pi0Policy

__all__ = ["Pi0Config", "Pi0Policy"]


def __getattr__(name: str) -> Any:
    """`Pi0Config` and `Pi0Policy` on first use: help on the command line waits for neither."""
    if name == "Pi0Config":
        from lerobot_pi0.configuration_pi0 import Pi0Config

        return Pi0Config
    if name == "Pi0Policy":
        from lerobot_pi0.modeling_pi0 import Pi0Policy

        return Pi0Policy
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
