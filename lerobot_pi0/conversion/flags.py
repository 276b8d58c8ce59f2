"""The flags of `lerobot-pi0 convert` and `lerobot-pi0 merge`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Dtype = Literal["bfloat16", "float32"]
Layout = Literal["lerobot_pi0", "lerobot", "openpi-pytorch"]


@dataclass
class ConvertConfig:
    """Convert a π0 or π0.5 between openpi (JAX, PyTorch), LeRobot's own, transformers' π0 and this package.

    What SOURCE is, is recognized: a folder, or a repository on the hub. Weights are bit for bit those of the
    source unless --dtype says otherwise.
    """

    # Checkpoint to read: openpi's JAX (with params/) or PyTorch, LeRobot's pi0 or pi05, transformers' PI0, or
    # ours.
    source: str
    # Folder to write, which must not exist.
    target: Path
    # Layout to write.
    to: Layout = "lerobot_pi0"
    # Of the weights in the file, and what the policy computes in. Default: as the source has them.
    dtype: Dtype | None = None
    # PaliGemma's tokenizer, if the source does not carry it: a folder with its tokenizer.json, or
    # a repository.
    tokenizer: str | None = None
    # openpi does not name a robot's cameras: which feature fills which slot, as --policy.cameras. Default:
    # the slots' own names (base, left_wrist, right_wrist), to be matched with --rename_map.
    cameras: dict[str, str] = field(default_factory=dict)
    # openpi keeps statistics by robot, in assets/<asset_id>: which of them to read, or the name to write.
    asset_id: str | None = None
    # Without statistics: a checkpoint to fine-tune, which cannot drive a robot as it is.
    statistics: bool = True
    # Dimensions of the robot's state. Default: as the source says, or its statistics.
    state_dim: int | None = None
    # The same of its action.
    action_dim: int | None = None
    # openpi's norm_stats.json, for a source without statistics.
    norm_stats: Path | None = None
    # openpi's action_horizon. Default: as the source says, 10 for openpi's DROID checkpoints of π0 by their
    # names, or 50; no default for π0.5.
    chunk_size: int | None = None
    # π0.5 alone: whether it was trained with the state in the prompt (openpi's discrete_state_input).
    state_in_prompt: bool | None = None
    # openpi's mask of actions that are relative to the state, as given to make_bool_mask: '[6, -1]'. Default:
    # that of openpi's ALOHA checkpoint of this name, or none are; no default for π0.5.
    delta_mask: list[int] | None = None
    # Whether it learned ALOHA's joints as openpi's (adapt_to_pi of openpi's LeRobotAlohaDataConfig). Default:
    # yes for sources with the name of one of openpi's ALOHA checkpoints, no for others.
    adapt_to_pi: bool | None = None
    # alpha of openpi's LoRA. Default: the rank.
    lora_alpha: float | None = None
    # Attention heads of a vision tower that is not SigLIP So400m, where the source does not say.
    vision_heads: int | None = None
    # Where one side is LeRobot's own: run it and ours, and compare. Needs 30 GB of memory at full size.
    # Default: small policies only.
    compare: bool | None = None


@dataclass
class MergeConfig:
    """Make one plain checkpoint of LoRA adapters and their base, and show that it acts the same."""

    # Where lerobot-train --peft left the adapters: a folder, or a repository on the hub.
    adapter: str
    # Folder to write, which must not exist.
    output: Path
