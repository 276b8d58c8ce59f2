"""π0, the vision-language-action model, as a policy plugin for LeRobot. Importing it registers the policy
type `lerobot_pi0`.
"""

from typing import TYPE_CHECKING, Any

import lerobot_pi0.demo.environment  # registers the environment type `metaworld_fast`
import lerobot_pi0.processor_pi0  # registers the processor steps that saved checkpoints name
import lerobot_pi0.simulated_robot.config_scripted_so101  # registers the teleoperator `scripted_so101`
import lerobot_pi0.simulated_robot.config_simulated_so101  # registers the robot `simulated_so101`  # noqa: F401
from lerobot_pi0.configuration_pi0 import Pi0Config

if TYPE_CHECKING:
    from lerobot_pi0.modeling_pi0 import Pi0Policy

__all__ = ["Pi0Config", "Pi0Policy"]


def __getattr__(name: str) -> Any:
    """`Pi0Policy` on first use: plugin discovery runs in every LeRobot command and must stay cheap."""
    if name == "Pi0Policy":
        from lerobot_pi0.modeling_pi0 import Pi0Policy

        return Pi0Policy
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
