"""The flags of the tools. Imports neither LeRobot nor torch, so that their help is quick."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.flags import DatasetFlags, DatasetSource, PolicyFlags

Recipe = Literal["full", "lora", "expert"]
Model = Literal["pi0", "pi05"]


@dataclass
class AttentionConfig:
    """Show where the actions look in a frame of a dataset: a picture, and shares in words."""

    policy: PolicyFlags = field(default_factory=PolicyFlags)
    # The first of --dataset.episodes is looked at.
    dataset: DatasetFlags = field(default_factory=DatasetFlags)
    # Frame of the episode. Default: the one in its middle.
    frame: int | None = None
    # Layer of the expert, from 0. Default: the mean of all.
    layer: int | None = None
    # Head of attention, from 0. Default: the mean of all.
    head: int | None = None
    # The picture to write, or a folder for attention.png.
    output: Path = Path("outputs/attention.png")


@dataclass
class LanguageConfig:
    """Give a policy other instructions with the same pictures, and measure whether its actions follow."""

    policy: PolicyFlags = field(default_factory=PolicyFlags)
    dataset: DatasetFlags = field(default_factory=DatasetFlags)
    # Which instructions of the dataset to compare, by their number (task_index). Default: the first six.
    tasks: list[int] | None = None
    # Episodes of each task to look at, unless --dataset.episodes names them; held-out ones if there are any.
    episodes_per_task: int = 4
    # Frames of each episode, evenly spread.
    frames_per_episode: int = 4
    # Chunks sampled at each frame, from the same noise for all instructions.
    num_samples: int = 4
    # Print the numbers as JSON.
    json: bool = False

    def __post_init__(self) -> None:
        for name, least in (("episodes_per_task", 1), ("frames_per_episode", 1), ("num_samples", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.tasks is not None and len(set(self.tasks)) < 2:
            raise UserError(f"--tasks={self.tasks}: name two instructions or more, to compare them")


@dataclass
class ReportConfig:
    """Compare a policy's chunks with recorded actions and open-loop baselines: a page, pictures, numbers."""

    policy: PolicyFlags = field(default_factory=PolicyFlags)
    dataset: DatasetFlags = field(default_factory=DatasetFlags)
    # Folder for report.html, report.json and the pictures of the page.
    output: Path = Path("outputs/report")
    # Episodes to look at, unless --dataset.episodes names them: the first of each task, then the second, …,
    # of those that the policy was not trained on, if the checkpoint says so and there are any.
    max_episodes: int = 8
    # Frames from one chunk to the next. Default: the actions that the policy executes of each
    # (n_action_steps), or a multiple of it that gives at most 50 chunks per episode.
    stride: int | None = None
    # Chunks sampled at each frame, from different noise.
    num_samples: int = 8

    def __post_init__(self) -> None:
        for name in ("max_episodes", "stride", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")


@dataclass
class PlanFlags:
    """Which fine-tuning fits a GPU, how long it takes, and the command that starts it.

    Settings of the policy (--policy.*) that differ from the recipes' are flags too: --help-all lists them.
    """

    of_lerobot: ClassVar[tuple[str, ...]] = ("policy",)  # flags that are a config of LeRobot

    # The dataset to train on; only its metadata is read.
    dataset: DatasetSource
    # Memory of the GPU in GB, for example 24.
    gpu_memory: float
    # The model to fine-tune, from its published weights.
    model: Model = "pi0"
    # Plan for this one; without it, for the first of full, lora and expert that fits with a good batch size.
    recipe: Recipe | None = None
    # Take training steps on this machine, for at most a minute, and say how long the run will take here.
    measure: bool = False

    def __post_init__(self) -> None:
        if not (self.gpu_memory > 0 and math.isfinite(self.gpu_memory)):
            raise UserError(f"--gpu_memory is in GB and above 0, got {self.gpu_memory}")


@dataclass
class DoctorFlags:
    """Check a policy, a dataset, a robot or a simulator: what is wrong, worst first, and how to fix it.

    The robot that the policy is to drive is described by --robot.type=... and its options, as lerobot-rollout
    takes them; it is not connected to. The environment that it is to be evaluated in is described by
    --env.type=... and its options, as lerobot-eval takes them. --help-all lists both. Exit code 1 if there
    are errors; warnings and notes do not change it.
    """

    of_lerobot: ClassVar[tuple[str, ...]] = ("robot", "env")  # flags that are configs of LeRobot

    # The checkpoint; left out, the dataset is examined as one for a new policy.
    policy: PolicyFlags = field(default_factory=PolicyFlags)
    # The dataset that it was trained on, or is to be.
    dataset: DatasetFlags = field(default_factory=DatasetFlags)
    # Camera of dataset, robot or environment → camera of the policy, as LeRobot's commands take it.
    rename_map: dict[str, str] = field(default_factory=dict)
    # Folder for cameras.png, which shows what the policy sees, and page.txt.
    output: Path | None = None
    # Print JSON instead of a page.
    json: bool = False
