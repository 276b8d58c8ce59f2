"""How published checkpoints were trained: horizon, state in the prompt, relative actions, ALOHA's joints.

Their files do not say it, and a policy that is run otherwise fails without an error. So nothing is taken from
here in silence: messages list it, and the user gives it as flags. What ALOHA's alone have, and the horizon of
π0, is taken by name, and reported.
"""

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from lerobot_pi0.configuration_pi05 import Pi05Config


@dataclass(frozen=True)
class Training:
    """What openpi's train config of a checkpoint says, under the names of our flags."""

    chunk_size: int
    state_in_prompt: bool
    delta_mask: tuple[int, ...] | None  # openpi's make_bool_mask; None: each of its robots has its own
    asset_id: str | None = None  # of its statistics
    adapt_to_pi: bool = False


# By the name of openpi's train config, and LeRobot's name of the same weights (src/openpi/training/config.py
# and misc/polaris_config.py at commit 15a9616).
TRAININGS = {
    "pi05_base": Training(50, True, None),
    "pi05_libero": Training(10, False, (), "physical-intelligence/libero"),
    "pi05_libero_base": Training(10, False, (), "physical-intelligence/libero"),
    "pi05_droid": Training(15, True, (), "droid"),
    "pi05_droid_finetune": Training(16, True, (), "droid"),
    "pi05_full_droid_finetune": Training(16, True, (7, -1), "droid"),
    "pi05_droid_jointpos_polaris": Training(15, True, (7, -1), "droid"),
    "pi05_aloha": Training(50, True, (6, -1, 6, -1), "trossen", adapt_to_pi=True),
    "pi05_aloha_pen_uncap": Training(50, True, (6, -1, 6, -1), "trossen", adapt_to_pi=True),
}


# The mask of relative actions of openpi's π0 for ALOHA, all of which adapt the joints.
PI0_ALOHA = dict.fromkeys(
    ("pi0_aloha", "pi0_aloha_towel", "pi0_aloha_tupperware", "pi0_aloha_pen_uncap"), (6, -1, 6, -1)
) | {"pi0_aloha_sim": ()}

# The horizon of openpi's π0 for DROID; all others have 50.
PI0_HORIZON = dict.fromkeys(
    ("pi0_droid", "pi0_droid_jointpos_polaris", "pi0_droid_jointpos_100k_polaris"), 10
)


def training_of(checkpoint: str | Path) -> tuple[str, Training] | None:
    """The published checkpoint that a repository or a path is named after, and how it was trained."""
    name = _name(checkpoint, TRAININGS)
    return None if name is None else (name, TRAININGS[name])


def aloha_mask(checkpoint: str | Path) -> tuple[int, ...] | None:
    """The mask of relative actions of the π0 for ALOHA that a path is named after; None for other names."""
    name = _name(checkpoint, PI0_ALOHA)
    return None if name is None else PI0_ALOHA[name]


def pi0_horizon(checkpoint: str | Path) -> int:
    """Actions in a chunk of the π0 that a path is named after; openpi's default for other names."""
    name = _name(checkpoint, PI0_HORIZON)
    return 50 if name is None else PI0_HORIZON[name]


def _name(checkpoint: str | Path, known: Container[str]) -> str | None:
    parts = re.split(r"[/\\]|--", str(checkpoint))  # "--": in the cache of the hub
    return next((part for part in reversed(parts) if part in known), None)


def as_flags(training: Training) -> str:
    """How a checkpoint was trained, as flags of `lerobot-pi0 convert`."""
    flags = f"--chunk_size={training.chunk_size} --state_in_prompt={str(training.state_in_prompt).lower()}"
    flags += " --adapt_to_pi=true" * training.adapt_to_pi
    mask = training.delta_mask
    return f"{flags} --statistics=false" if mask is None else f"{flags} --delta_mask='{list(mask)}'"


def assumptions(checkpoint: str | Path, config: Pi05Config) -> str:
    """What a policy assumes of weights that it starts from, and when that is wrong: one line of the log."""
    taken = (
        f"chunks of {config.chunk_size} actions (--policy.chunk_size), "
        f"state_in_prompt={str(config.state_in_prompt).lower()}, "
        f"relative_actions={str(config.relative_actions).lower()}, the statistics of the {config.statistics}"
    )
    named = training_of(checkpoint)
    known = f" ({named[0]} with {as_flags(named[1])})" if named else ""
    return (
        f"'{checkpoint}' may not say how its π0.5 was trained{known}. Assumed: {taken}. What was otherwise "
        "has to be learnt: such a policy acts wrongly after few steps of training, or none"
    )
