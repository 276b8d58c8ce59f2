"""Meta-World's tasks: instructions, names, control rate."""

import json
from functools import cache
from importlib.resources import files

from lerobot_pi0.demo.suites import split_tasks

# Meta-World's control rate: MuJoCo steps of 2.5 ms, five per action.
FPS = 80

ACTION_NAMES = ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")

POSITION_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_effort")

STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")

# Tasks in the same scene that ask for opposite things.
OPPOSITES = {
    "faucet-open-v3": "faucet-close-v3",
    "faucet-close-v3": "faucet-open-v3",
    "drawer-open-v3": "drawer-close-v3",
    "drawer-close-v3": "drawer-open-v3",
    "window-open-v3": "window-close-v3",
    "window-close-v3": "window-open-v3",
}


@cache
def task_instructions() -> dict[str, str]:
    """Meta-World's tasks and LeRobot's sentence for each: {"faucet-open-v3": "Rotate the faucet ..."}."""
    text = files("lerobot").joinpath("envs", "metaworld_config.json").read_text(encoding="utf-8")
    return json.loads(text)["TASK_DESCRIPTIONS"]


def parse_tasks(tasks: str) -> list[str]:
    """Split "faucet-open-v3,plate-slide-v3" into names and check each of them.

    Raises:
        ValueError: if a name is unknown (the known ones are listed), given twice, or if there is none.
    """
    return split_tasks(tasks, task_instructions(), "Meta-World", "faucet-open-v3")
