"""Settings of π0.5: those of π0, with other defaults, and the state in the prompt."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs import NormalizationMode, PreTrainedConfig

from lerobot_pi0.configuration_pi0 import Pi0Config


@PreTrainedConfig.register_subclass("lerobot_pi05")
@dataclass
class Pi05Config(Pi0Config):
    """Settings of `--policy.type=lerobot_pi05`. The defaults are those of openpi's `pi05_aloha` and of
    pi05_base.
    """

    model_name: ClassVar[str] = "π0.5"
    published_base: ClassVar[str] = "lerobot/pi05_base"
    quantiles_of_frames: ClassVar[bool] = True
    default_normalization: ClassVar[dict[str, NormalizationMode]] = {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.QUANTILES,
        "ACTION": NormalizationMode.QUANTILES,
    }

    # For conversion to LeRobot's pi05 alone: here the state goes into the prompt, and is not padded.
    max_state_dim: int = 32
    # Write the normalized state into the prompt, as integers from -1 to 255. Nothing else shows the state to
    # the network: with false, as openpi trained pi05_libero, it does not know where the robot's joints are.
    state_in_prompt: bool = True
    # Prompt tokens, the state among them; a longer prompt loses its end, with a warning.
    tokenizer_max_length: int = 200

    @property
    def padded_state_dim(self) -> int:
        """Size of the state in the observation: the robot's own, of whatever size."""
        assert self.state_size is not None
        return self.state_size
