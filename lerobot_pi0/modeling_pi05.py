"""π0.5 as a LeRobot policy: `Pi0Policy` over another network."""

import torch

from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.model import Pi05
from lerobot_pi0.modeling_pi0 import Pi0Policy


class Pi05Policy(Pi0Policy):
    """π0.5, which sees the state in the prompt (`Pi05TokenizerStep`) instead of as a token."""

    config_class = Pi05Config  # pyrefly: ignore[bad-assignment]
    name = "lerobot_pi05"  # pyrefly: ignore[bad-assignment]
    config: Pi05Config  # pyrefly: ignore[bad-override-mutable-attribute]

    @staticmethod
    def make_network(config: Pi05Config) -> Pi05:
        """The network that a config describes, with random weights."""
        sizes = config.vision, config.vlm, config.expert, config.max_action_dim
        return Pi05(*sizes, getattr(torch, config.dtype))
