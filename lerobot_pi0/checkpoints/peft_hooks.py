"""LeRobot's hooks for PEFT (`lerobot-train --peft`), as a mixin of the policy; `adapters` says what they
give.
"""

import logging
from typing import Any

from lerobot_pi0.checkpoints import adapters
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.model import Network
from lerobot_pi0.training.lora import summary

logger = logging.getLogger(__name__)


class PeftHooks:
    """Stands before LeRobot's `PreTrainedPolicy` among a policy's bases."""

    config: Pi0Config
    model: Network
    base: adapters.Base | None

    def wrap_with_peft(self, peft_config: Any = None, peft_cli_overrides: dict | None = None) -> Any:
        """The policy with new LoRA adapters, which train in its stead."""
        parent: Any = super()
        wrapped = parent.wrap_with_peft(peft_config, peft_cli_overrides)
        assert self.base is not None
        adapters.name_base(wrapped, self.config, self.base)
        logger.info(summary(self.model))
        return wrapped

    def adapter_config(self, settings: dict[str, Any]) -> Any:
        """PEFT's config of new adapters, of the values of `--peft`."""
        return self._build_peft_config(settings)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return adapters.default_targets(self.model)

    def _build_peft_config(self, cli_overrides: dict) -> Any:
        parent: Any = super()
        return parent._build_peft_config(adapters.lora_settings(self.config, cli_overrides))

    def _validate_peft_config(self, peft_config: Any) -> None:
        if self.base is None:
            raise UserError(
                "adapters over random weights are of no use: start from a checkpoint (--policy.path=... or "
                f"--policy.pretrained_path={self.config.published_base}), or train without --peft"
            )
        adapters.check_settings(peft_config)
