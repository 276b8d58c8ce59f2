"""A π0 or π0.5 of some 100,000 parameters, one camera, five joints and four actions, and batches for it."""

from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Network, SiglipConfig
from lerobot_pi0.model.pi05 import AdaptiveRMSNorm
from lerobot_pi0.modeling_pi0 import Pi0Policy

MODELS = ("pi0", "pi05")
VISION = SiglipConfig(image_size=32, patch_size=8, width=32, depth=2, mlp_dim=64, num_heads=2)
VLM = GemmaConfig(width=48, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=1024)
EXPERT = ExpertConfig(width=32, mlp_dim=64)
FRONT = "observation.images.front"
STATE, ACTION, CHUNK = 5, 4, 6

# The same sizes on a command line.
SIZES = [
    "--policy.vision.image_size=32",
    "--policy.vision.patch_size=8",
    "--policy.vision.width=32",
    "--policy.vision.depth=2",
    "--policy.vision.mlp_dim=64",
    "--policy.vision.num_heads=2",
    "--policy.vlm.width=48",
    "--policy.vlm.depth=2",
    "--policy.vlm.mlp_dim=96",
    "--policy.vlm.num_heads=4",
    "--policy.vlm.num_kv_heads=1",
    "--policy.vlm.head_dim=16",
    "--policy.vlm.vocab_size=1024",
    "--policy.expert.width=32",
    "--policy.expert.mlp_dim=64",
    "--policy.max_state_dim=8",
    "--policy.max_action_dim=8",
    "--policy.chunk_size=6",
    "--policy.n_action_steps=3",
]


def tiny_config(model: str = "pi0", /, **changes: Any) -> Pi0Config:
    settings: dict[str, Any] = {
        "vision": VISION,
        "vlm": VLM,
        "expert": EXPERT,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "chunk_size": CHUNK,
        "n_action_steps": 3,
        "tokenizer": "small",
        "dtype": "float32",
        "device": "cpu",
        "input_features": {
            FRONT: PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
    }
    return {"pi0": Pi0Config, "pi05": Pi05Config}[model](**settings | changes)


def tiny_policy(model: str = "pi0", /, **changes: Any) -> Pi0Policy:
    """In eval mode, as `from_pretrained` gives it. The norms of π0.5 modulate, as after some training."""
    torch.manual_seed(0)
    policy = policy_class(config := tiny_config(model, **changes))(config).eval()
    for module in policy.modules():
        if isinstance(module, AdaptiveRMSNorm):
            torch.nn.init.normal_(module.dense.weight, std=0.2)
    return policy


def tiny_network(model: str = "pi0", /) -> Network:
    return tiny_policy(model).model


def statistics() -> dict[str, dict[str, Tensor]]:
    def of(size: int) -> dict[str, Tensor]:
        scale = torch.arange(1, size + 1).float()
        ends = dict.fromkeys(("min", "q01", "q10"), -scale) | dict.fromkeys(("max", "q99", "q90"), scale)
        return {"mean": scale / 10, "std": scale / 5, **ends}

    return {"observation.state": of(STATE), "action": of(ACTION)}


def raw_batch(size: int = 2, seed: int = 0) -> dict[str, Any]:
    """As LeRobot's data loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        FRONT: torch.rand(size, 3, 48, 64, generator=generator),
        "observation.state": torch.randn(size, STATE, generator=generator),
        "action": torch.randn(size, CHUNK, ACTION, generator=generator),
        "action_is_pad": torch.zeros(size, CHUNK, dtype=torch.bool),
        "task": ["open the door", "close the drawer", "push"][:size],
        "index": torch.arange(size) + 10 * seed,
    }


def batch(size: int = 2, seed: int = 0, model: str = "pi0") -> dict[str, Any]:
    """Processed, as the policy takes it."""
    preprocess, _ = make_pre_post_processors(tiny_config(model), dataset_stats=statistics())
    return preprocess(raw_batch(size, seed))


def first(given: dict[str, Any]) -> dict[str, Any]:
    """The batch of its first sample."""
    return {key: value[:1] for key, value in given.items() if isinstance(value, Tensor | list)}


def noise(size: int = 2) -> Tensor:
    return torch.randn(size, CHUNK, 8, generator=torch.Generator().manual_seed(7))
