"""The flags of `lerobot-pi0 doctor`, and its exit code."""

import logging
from dataclasses import dataclass

from lerobot.envs import EnvConfig
from lerobot.robots import Robot, RobotConfig, make_robot_from_config

# Registers the robots and cameras that LeRobot has.
from lerobot.scripts import lerobot_rollout  # noqa: F401
from lerobot.utils.import_utils import register_third_party_plugins

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import check_episodes
from lerobot_pi0.tools.doctor.cameras import contact_sheet
from lerobot_pi0.tools.doctor.checks import examine
from lerobot_pi0.tools.doctor.finding import Severity
from lerobot_pi0.tools.doctor.inputs import UNREADABLE, Inputs
from lerobot_pi0.tools.doctor.page import as_json, page
from lerobot_pi0.tools.flags import DoctorFlags

register_third_party_plugins()  # before flags are parsed: --robot.type may be one of theirs, or ours


@dataclass
class DoctorConfig(DoctorFlags):
    """Flags of `lerobot-pi0 doctor`."""

    # The robot that it is to drive, as lerobot-rollout takes it (--robot.type=…); it is not connected to.
    robot: RobotConfig | None = None
    # The environment that it is to be evaluated in, as lerobot-eval takes it (--env.type=…): it is made,
    # reset twice, and moved for a second.
    env: EnvConfig | None = None


def main(config: DoctorConfig) -> tuple[str, int]:
    """The page, or JSON, and the exit code."""
    logging.getLogger("lerobot_pi0").setLevel(logging.ERROR)  # what is worth saying is on the page
    policy = config.policy if config.policy.path else None
    dataset = config.dataset if config.dataset.repo_id or config.dataset.root else None
    if policy is None and dataset is None:
        raise UserError(
            "which policy or dataset? Name one or both: --policy.path=outputs/…/pretrained_model, "
            "--dataset.repo_id=user/name"
        )
    inputs = Inputs(policy, dataset, _robot(config.robot), config.rename_map, config.env)
    if inputs.metadata and config.dataset.episodes is not None:
        check_episodes(config.dataset.episodes, inputs.metadata)
    answers = examine(inputs)
    text = page(inputs, answers)
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        shown = "page.txt"
        if dataset:
            try:
                contact_sheet(inputs, config.output / "cameras.png")
                shown = "cameras.png, page.txt"
            except UNREADABLE as reason:
                text += f"\n\ncameras.png could not be made: {reason}"
        (config.output / "page.txt").write_text(text + "\n", encoding="utf-8")
        text += f"\n\nIn {config.output}: {shown}"
    if config.json:
        text = as_json(inputs, answers)
    return text, int(any(answer.finding.severity is Severity.ERROR for answer in answers))


def _robot(config: RobotConfig | None) -> Robot | None:
    """The robot, not connected. Raises ValueError when its software is not installed."""
    if config is None:
        return None
    try:
        return make_robot_from_config(config)
    except ImportError as reason:
        raise UserError(
            f"the robot '{config.type}' cannot be made to ask for its joints and cameras: {reason}"
        ) from reason
