"""π0 and π0.5 as networks: pure torch, no LeRobot, no transformers, no strings as keys.

Letters in shapes: B batch, V camera views, L prompt tokens, P prefix tokens, A actions in a chunk, E padded
size of state and action, S tokens of a pass, T keys attended, H query heads, K key/value heads, D head size.
"""

from lerobot_pi0.model.gemma import ExpertConfig, GemmaConfig
from lerobot_pi0.model.network import Network
from lerobot_pi0.model.observation import Observation
from lerobot_pi0.model.pi0 import Pi0
from lerobot_pi0.model.pi05 import Pi05
from lerobot_pi0.model.siglip import SiglipConfig

__all__ = ["ExpertConfig", "GemmaConfig", "Network", "Observation", "Pi0", "Pi05", "SiglipConfig"]
