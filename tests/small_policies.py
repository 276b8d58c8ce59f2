"""Small policies of sizes that LeRobot's own can be made to have, and the command that converts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from tiny_policy import ACTION, STATE, statistics, tiny_config

from lerobot_pi0 import Pi0Config
from lerobot_pi0.checkpoints.layouts import PI0, Family
from lerobot_pi0.conversion import targets
from lerobot_pi0.conversion.convert import convert
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig

VISION = SiglipConfig(image_size=28, patch_size=14, width=32, depth=2, mlp_dim=48, num_heads=2)
# LeRobot's own have eight query heads written into their attention.
VLM = GemmaConfig(width=64, depth=3, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16, vocab_size=1024)
EXPERT = ExpertConfig(width=32, mlp_dim=48)
JOINTS = ["shoulder", "elbow", "wrist", "gripper"]


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that have names are small ones, and so is what LeRobot's code fixes."""
    heads = VLM.num_heads, VLM.num_kv_heads, VLM.head_dim
    variants = {
        "gemma_2b": (VLM.width, VLM.depth, VLM.mlp_dim, *heads),
        "gemma_300m": (EXPERT.width, VLM.depth, EXPERT.mlp_dim, *heads),
    }
    monkeypatch.setattr(targets, "VARIANTS", variants)
    monkeypatch.setattr(targets, "VISION", VISION)
    monkeypatch.setattr(targets, "VOCABULARY", VLM.vocab_size)
    paligemma = modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma
    gemma = modeling_pi0.PiGemmaForCausalLM

    def small_paligemma(config: Any) -> Any:
        text, tower = config.text_config, config.vision_config
        text.vocab_size = VLM.vocab_size
        tower.hidden_size, tower.intermediate_size = VISION.width, VISION.mlp_dim
        tower.num_hidden_layers, tower.num_attention_heads = VISION.depth, VISION.num_heads
        tower.projection_dim = VLM.width
        return paligemma(config)

    def small_gemma(config: Any) -> Any:
        config.vocab_size = VLM.vocab_size
        return gemma(config)

    for in_tree in (modeling_pi0, modeling_pi05):
        monkeypatch.setattr(in_tree, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
        monkeypatch.setattr(in_tree, "PiGemmaForCausalLM", small_gemma)
        monkeypatch.setattr(
            in_tree, "get_gemma_config", lambda variant: modeling_pi0.GemmaConfig(*variants[variant])
        )


def save(folder: Path, family: Family = PI0, **settings: Any) -> Path:
    """A checkpoint of ours as training leaves it."""
    config = small_config(family, **settings)
    torch.manual_seed(0)
    policy = policy_class(config)(config)
    for parameter in policy.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = torch.randn_like(parameter) * spread
    policy.save_pretrained(folder)
    prepared: Any = prepare_statistics(config, statistics())
    for pipeline in make_pre_post_processors(config, dataset_stats=prepared):
        pipeline.save_pretrained(folder)
    return folder


def small_config(family: Family = PI0, **settings: Any) -> Pi0Config:
    """Two cameras, the wrist's before the base's in the features, as a dataset may have them."""
    names = {"action_feature_names": JOINTS, "state_feature_names": [*JOINTS, "force"]}
    features = {
        "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
        "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 60, 80)),
    }
    sizes = {"vision": VISION, "vlm": VLM, "expert": EXPERT, "max_state_dim": 32, "max_action_dim": 32}
    assert tiny_config().output_features == {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}
    return tiny_config(family.in_tree, **{**sizes, **names, "input_features": features, **settings})


def run(source: Path, target: Path, **flags: Any) -> str:
    """What `lerobot-pi0 convert` prints."""
    return convert(ConvertConfig(str(source), target, **flags))
