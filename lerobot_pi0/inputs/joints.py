"""Are a robot's joints those that a checkpoint was trained on, in the same order?

LeRobot hands a policy vectors without names, and names what comes back in the robot's order: where the two
orders differ, each joint gets the value of another.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import UserError

logger = logging.getLogger(__name__)


def check_joints(config: Pi0Config, state_names: Sequence[str], action_names: Sequence[str]) -> None:
    """Compare a robot's names of state and action with a checkpoint's, in their order.

    Raises UserError that shows both, what differs and how to correct it. A checkpoint that knows no
    names is checked for the number of joints alone, with a warning.
    """
    faults = []
    for kind, feature, trained, robot in (
        ("state", config.robot_state_feature, config.state_feature_names, list(state_names)),
        ("action", config.action_feature, config.action_feature_names, list(action_names)),
    ):
        if trained is not None and trained != robot:
            faults.append(_fault(kind, trained, robot))
        elif feature is not None and len(robot) != feature.shape[0]:
            faults.append(
                f"{kind}: the checkpoint has {feature.shape[0]} dimensions, without names, the robot has "
                f"{len(robot)}: {robot}"
            )
    if faults:
        raise UserError(
            "the robot's joints are not those that the checkpoint was trained on. LeRobot hands over "
            "vectors without names, so joints would get each other's values.\n" + "\n".join(faults)
        )
    if config.state_feature_names is None or config.action_feature_names is None:
        logger.warning(
            "the checkpoint does not know what its joints are called (its dataset did not say): their order "
            "cannot be checked. The robot's has to be that of the recording; it is %s, actions %s",
            list(state_names),
            list(action_names),
        )


@dataclass(frozen=True)
class Difference:
    """How the names of a robot or a dataset differ from those that a policy was trained with."""

    missing: list[str]
    added: list[str]
    # The old name → the new one, where only names differ: each new one stands in the place of an old one.
    renamed: dict[str, str]
    permuted: bool  # those that both have are in another order


def compare_names(trained: Sequence[str], found: Sequence[str]) -> Difference:
    """What differs, in names and in their order."""
    missing = [name for name in trained if name not in found]
    added = [name for name in found if name not in trained]
    permuted = [name for name in trained if name in found] != [name for name in found if name in trained]
    renamed = {old: new for old, new in zip(trained, found, strict=False) if old in missing and new in added}
    only_names = not permuted and len(trained) == len(found) and len(renamed) == len(missing)
    return Difference(missing, added, renamed if only_names else {}, permuted)


def _fault(kind: str, trained: list[str], robot: list[str]) -> str:
    differ = compare_names(trained, robot)
    lines = [f"{kind}, checkpoint: {trained}", f"{kind}, robot:      {robot}"]
    if differ.permuted:
        lines.append(
            f"{kind}, permuted: the robot has them in another order. Use the robot (type and configuration) "
            "that the dataset was recorded with, or record with this one"
        )
    elif differ.renamed:
        pairs = ", ".join(f"'{old}' → '{new}'" for old, new in differ.renamed.items())
        lines.append(
            f"{kind}, renamed: {pairs}. If these are the same joints in the same units: write "
            f'"{kind}_feature_names": {json.dumps(robot)} into the checkpoint\'s config.json, or give '
            f"`lerobot-pi0 rollout` --policy.{kind}_feature_names='{json.dumps(robot)}'"
        )
        return "\n".join(lines)
    if differ.missing:
        lines.append(f"{kind}, missing from the robot: {differ.missing}")
    if differ.added:
        lines.append(f"{kind}, added by the robot: {differ.added}")
    if differ.missing or differ.added:
        lines.append(
            f"{kind}: a checkpoint runs with the joints that it was trained on. Use that robot "
            "(--robot.type, and its options), or train on data of this one"
        )
    return "\n".join(lines)
