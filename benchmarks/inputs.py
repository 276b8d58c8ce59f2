"""What both sides are given: sizes, one seeded observation, and a checkpoint of seeded values on disk.

Nothing here depends on a side, except how far its processor pads the prompt.
"""

from math import ceil
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from lerobot_pi0.checkpoints.files import WEIGHTS_FILE
from lerobot_pi0.checkpoints.layouts import to_openpi
from lerobot_pi0.conversion.streaming import write_safetensors
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Network, Pi0, Pi05, SiglipConfig
from lerobot_pi0.tools.made_up_weights import MadeUpWeights

from .flags import Model
from .worker import Setup

NUM_STEPS = 10
# An instruction; in π0.5 also "Task: , State: ;\nAction: " and eight numbers of up to three digits.
PROMPT_TOKENS = {"pi0": 12, "pi05": 54}
PADDED_DIM = 32  # of state and action; the features fill it, so that a comparison leaves nothing out

_EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def sizes(setup: Setup) -> tuple[SiglipConfig, GemmaConfig, ExpertConfig]:
    """Vision tower, language model, expert. Eight query heads everywhere: the in-tree code has them fixed."""
    if setup.size == "full":
        small = setup.language_model == "gemma_300m"
        return (
            SiglipConfig(),
            GemmaConfig(width=1024, mlp_dim=4096) if small else GemmaConfig(),
            ExpertConfig(),
        )
    if setup.size == "small":
        return (
            SiglipConfig(image_size=112, patch_size=14, width=256, depth=6, mlp_dim=1024, num_heads=4),
            GemmaConfig(width=512, depth=6, mlp_dim=3072, head_dim=64, vocab_size=1024),
            ExpertConfig(width=256, mlp_dim=1024),
        )
    vision_depth, depth = (27, 18) if setup.size == "narrow" else (2, 3)
    expert = ExpertConfig(width=32, mlp_dim=48)
    width, mlp_dim = (expert.width, expert.mlp_dim) if setup.language_model == "gemma_300m" else (64, 96)
    return (
        SiglipConfig(image_size=28, patch_size=14, width=32, depth=vision_depth, mlp_dim=48, num_heads=2),
        GemmaConfig(width=width, depth=depth, mlp_dim=mlp_dim, head_dim=16, vocab_size=128),
        expert,
    )


def chunk_size(setup: Setup) -> int:
    """Actions in a chunk."""
    return setup.horizon or (50 if setup.size in ("full", "small") else 10)


def prompt_tokens(setup: Setup) -> int:
    """Tokens of the prompt that are no padding."""
    return setup.prompt or PROMPT_TOKENS[setup.model]


def camera(number: int) -> str:
    """The key of a camera in a batch."""
    return f"observation.images.camera{number}"


def features(setup: Setup) -> dict[str, Any]:
    """`input_features` and `output_features` of a policy's config, absent cameras included."""
    image_size = sizes(setup)[0].image_size
    cameras = {
        camera(number): PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))
        for number in range(setup.cameras + setup.absent_cameras)
    }
    return {
        "input_features": cameras | {OBS_STATE: PolicyFeature(FeatureType.STATE, (PADDED_DIM,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (PADDED_DIM,))},
    }


def batch(setup: Setup, max_length: int | None = None) -> dict[str, Any]:
    """A processed batch, images in [0, 1]: as LeRobot's pipelines hand it to a policy.

    The prompt is padded to `max_length` tokens, as in-tree's processor does it, or as ours, to a multiple
    of 8.
    """
    vision, vlm, _ = sizes(setup)
    prompt, size = prompt_tokens(setup), setup.batch_size
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(setup.cameras, size, 3, vision.image_size, vision.image_size, generator=generator)
    length = max_length or 8 * ceil(prompt / 8)
    tokens = torch.zeros(size, length, dtype=torch.long)
    tokens[:, :prompt] = torch.randint(1, vlm.vocab_size, (size, prompt), generator=generator)
    made = {
        **{camera(number): image for number, image in enumerate(images)},
        OBS_STATE: torch.randn(size, PADDED_DIM, generator=generator),
        OBS_LANGUAGE_TOKENS: tokens,
        OBS_LANGUAGE_ATTENTION_MASK: (torch.arange(length) < prompt).expand(size, length),
    }
    return {key: value.to(setup.device) for key, value in made.items()}


def noise(setup: Setup) -> Tensor:
    """Where sampling starts, (batch, chunk, padded size)."""
    return _normal(setup, 2)


def actions(setup: Setup) -> Tensor:
    """What training aims at, (batch, chunk, padded size)."""
    return _normal(setup, 3)


def _normal(setup: Setup, seed: int) -> Tensor:
    shape = setup.batch_size, chunk_size(setup), PADDED_DIM
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(setup.device)


def network(model: Model, vision: SiglipConfig, vlm: GemmaConfig, expert: ExpertConfig) -> Network:
    """Our network of these sizes."""
    if model == "pi05":
        return Pi05(vision, vlm, expert, PADDED_DIM, torch.bfloat16)
    return Pi0(vision, vlm, expert, PADDED_DIM, PADDED_DIM, torch.bfloat16)


def weight_shapes(setup: Setup) -> dict[str, Tensor]:
    """The tensors of a checkpoint by openpi's names, bfloat16, on the meta device.

    The expert's unused text head is there because the in-tree loader is strict.
    """
    vision, vlm, expert = sizes(setup)
    with torch.device("meta"):
        model = network(setup.model, vision, vlm, expert)
        head = torch.empty(vlm.vocab_size, expert.width, dtype=torch.bfloat16)
    return to_openpi(model.bfloat16().state_dict()) | {_EXPERT_HEAD: head}


def weights(setup: Setup) -> dict[str, Tensor]:
    """A checkpoint's tensors, made on the setup's device: 6.5 GB at full size."""
    values = MadeUpWeights(setup.device)
    return {name: values.like(tensor) for name, tensor in weight_shapes(setup).items()}


def write_checkpoint(setup: Setup) -> None:
    """`setup.checkpoint` with made-up bfloat16 values under openpi's names, which both sides read; once."""
    file = setup.checkpoint / WEIGHTS_FILE
    if file.is_file():
        return
    tensors, values = weight_shapes(setup), MadeUpWeights()
    setup.checkpoint.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    write_safetensors(unfinished, tensors, lambda name: values.like(tensors[name]))
    unfinished.replace(file)


def read_through(folder: Path) -> None:
    """Read a checkpoint's file once, so that it is in the page cache."""
    with (folder / WEIGHTS_FILE).open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
