"""The flags of `lerobot-pi0 record` and `lerobot-pi0 demo`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from lerobot_pi0.demo.suites import OPTIONS, Recording, SuiteName, load_suite
from lerobot_pi0.errors import UserError

# With names, because draccus finds no help for a field whose type holds quotation marks.
WandbMode = Literal["online", "offline"]
DemoPolicy = Literal["pi0", "pi05"]


@dataclass
class DemoConfig:
    """Record demonstrations, train a small policy, evaluate it. A second start goes on."""

    # The simulator.
    suite: SuiteName = "metaworld"
    # Which model is trained: pi0 (π0) or pi05 (π0.5).
    policy: DemoPolicy = "pi0"
    # Where everything goes. Default: outputs/demo, with another suite or policy
    # outputs/demo_<suite>_<policy>, with --quick that name and _quick.
    output_dir: Path | None = None
    # Two tasks, a few episodes, 10 training steps: shows that all parts work, not that the policy learns.
    quick: bool = False
    # Log the training to Weights & Biases, through LeRobot.
    wandb: bool = False
    # How: offline needs no account and no network, and `wandb sync` uploads it later.
    wandb_mode: WandbMode = "offline"
    # Settings of lerobot-train. Default: the package's configs/demo.yaml, with another suite
    # demo_<suite>.yaml.
    train_config: Path | None = None
    # Tasks, separated by commas. Default: the suite's.
    tasks: str | None = None
    # How far objects are moved at most, as in `lerobot-pi0 record`. Default: the suite's.
    moved: float | None = None
    # Demonstrations of each task. Default: the suite's (Meta-World: 60), with --quick 2.
    episodes_per_task: int | None = None
    # Episodes in which each task is evaluated. Default: the suite's (Meta-World: 40), with --quick 1.
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
    """Record scripted experts as a LeRobotDataset. What is left out, the suite knows."""

    # Folder of the dataset. A finished recording with the same settings is reused.
    root: Path
    # The simulator.
    suite: SuiteName = "metaworld"
    # Names of tasks, separated by commas. Default: those of the demo.
    tasks: str | None = None
    # Successful demonstrations of each task.
    episodes_per_task: int | None = None
    # Name of the dataset, as in --dataset.repo_id. Nothing is uploaded. Default: local/<suite>_demo.
    repo_id: str | None = None
    # Seed of the first episode. lerobot-eval meets other scenes than those of the default.
    seed: int | None = None
    # Width and height of the camera image in pixels; in ALOHA its width, of which the height is 3/4.
    image_size: int | None = None
    # How strongly the executed movement is disturbed. In Meta-World the standard deviation; actions lie in
    # [-1, 1]. In ALOHA that of pushes of the hands, in metres; with 0, all begin in the arms' own pose, too.
    noise: float | None = None
    # Steps within which the expert has to succeed.
    episode_length: int | None = None
    # Steps that the expert goes on after success. A chunk is not learnt beyond the end of its episode: where
    # its last actions are executed too, as under delay, give them something to learn from.
    after_success: int | None = None
    # Meta-World: draw the dots that mark the goal. reach, push and pick-place cannot be solved without them.
    show_goal: bool = False
    # Meta-World: write down where the hand is sent, in metres, instead of its displacement in centimetres.
    # Evaluate with --env.position_actions=true.
    position_actions: bool = False
    # How far objects are displaced at most along x and y, in metres: in LIBERO the target and the basket, in
    # Meta-World beyond its own places.
    moved: float | None = None

    def __post_init__(self) -> None:
        self.recording()

    def recording(self) -> Recording:
        """These settings, and the suite's for what is left out.

        Raises:
            UserError: for a value that is out of range, an unknown task, or a setting of another suite.
        """
        suite = load_suite(self.suite)
        given = {
            field.name: value
            for field in fields(self)
            if field.name not in ("root", "suite") and (value := getattr(self, field.name)) is not None
        }
        for name in OPTIONS.keys() - set(suite.options):
            if given.get(name, OPTIONS[name]) != OPTIONS[name]:
                raise UserError(
                    f"--{name} means nothing in {suite.title} (--suite={suite.name}). Leave it out."
                )
        recording = replace(suite.defaults, **given)
        suite.parse_tasks(recording.tasks)
        return recording
