"""The flags of `lerobot-pi0 record` and `lerobot-pi0 demo`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lerobot_pi0.demo.metaworld import parse_tasks
from lerobot_pi0.errors import UserError

# With names, because draccus finds no help for a field whose type holds quotation marks.
WandbMode = Literal["online", "offline"]
DemoPolicy = Literal["pi0", "pi05"]


@dataclass
class DemoConfig:
    """Record demonstrations in Meta-World, train a small policy, evaluate it. A second start goes on."""

    # Which model is trained: pi0 (π0) or pi05 (π0.5).
    policy: DemoPolicy = "pi0"
    # Where everything goes. Default: outputs/demo, with --policy=pi05 outputs/demo_pi05; with --quick that
    # name and _quick.
    output_dir: Path | None = None
    # Two tasks, a few episodes, 10 training steps: shows that all parts work, not that the policy learns.
    quick: bool = False
    # Log the training to Weights & Biases, through LeRobot.
    wandb: bool = False
    # How: offline needs no account and no network, and `wandb sync` uploads it later.
    wandb_mode: WandbMode = "offline"
    # Settings of lerobot-train. Default: the package's configs/demo.yaml, with --policy=pi05 demo_pi05.yaml.
    train_config: Path | None = None
    # Demonstrations of each task. Default: 40, with --quick 2.
    episodes_per_task: int | None = None
    # Episodes in which each task is evaluated. Default: 40, with --quick 1.
    eval_episodes: int | None = None

    def __post_init__(self) -> None:
        for name in ("episodes_per_task", "eval_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        if self.train_config is not None and not self.train_config.is_file():
            raise UserError(f"--train_config={self.train_config}: there is no such file.")


@dataclass
class RecordConfig:
    """Record scripted Meta-World experts as a LeRobotDataset."""

    # Folder of the dataset. A finished recording with the same settings is reused.
    root: Path
    # Meta-World tasks, separated by commas.
    tasks: str = "faucet-open-v3,faucet-close-v3,door-unlock-v3,plate-slide-v3"
    # Successful demonstrations of each task.
    episodes_per_task: int = 40
    # Name of the dataset, as in --dataset.repo_id. Nothing is uploaded.
    repo_id: str = "local/metaworld_demo"
    # Seed of the first episode. lerobot-eval starts at 1000, so that it meets other scenes.
    seed: int = 100_000
    # Width and height of the camera image in pixels.
    image_size: int = 96
    # Standard deviation of the disturbance of the executed hand movement; actions lie in [-1, 1].
    noise: float = 0.2
    # Steps within which the expert has to succeed.
    episode_length: int = 200
    # Steps that the expert goes on after success. A chunk is not learnt beyond the end of its episode: where
    # its last actions are executed too, as under delay, give them something to learn from.
    after_success: int = 0
    # Draw the dots that mark the goal. reach, push and pick-place cannot be solved without them.
    show_goal: bool = False
    # Write down where the hand is sent, in metres, instead of its displacement in centimetres. Evaluate with
    # --env.position_actions=true.
    position_actions: bool = False

    def __post_init__(self) -> None:
        parse_tasks(self.tasks)
        for name, least in (
            ("episodes_per_task", 1),
            ("episode_length", 1),
            ("image_size", 32),  # the AV1 encoder brings the process down below
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("noise", "after_success"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, but is {getattr(self, name)}.")

    def settings(self) -> dict[str, Any]:
        """What determines the recorded frames: everything but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "root"}
