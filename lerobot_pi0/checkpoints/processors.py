"""The processor pipelines of a checkpoint: which steps may and must stand in them, with finite statistics.

LeRobot imports and calls whatever class a step in `policy_preprocessor.json` names (processor/pipeline.py,
`from_pretrained`). A checkpoint is data: here only the steps that a policy of this package is saved with are
accepted.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lerobot_pi0.checkpoints.reading import COPY_AGAIN, read_steps, read_tensors
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import CheckpointError

logger = logging.getLogger(__name__)

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")
# By the names under which LeRobot and this package register them.
STEPS = frozenset(
    (
        "device_processor",
        "lerobot_pi0_adapt_from_pi",
        "lerobot_pi0_adapt_to_pi",
        "lerobot_pi05_float_vectors",
        "lerobot_pi05_tokenizer",
        "lerobot_pi0_tokenizer",
        "normalizer_processor",
        "rename_observations_processor",
        "to_batch_processor",
        "unnormalizer_processor",
    )
)


ENDS = {"max": "min", "q99": "q01", "q90": "q10"}
# What each pipeline must have once: without the first one, actions are in other units than the robot's.
NEEDED = dict(
    zip(PIPELINES, (("normalizer_processor", "device_processor"), ("unnormalizer_processor",)), strict=True)
)
# What each has with the config's `adapt_to_pi`, and not without.
ADAPTING = dict(zip(PIPELINES, ("lerobot_pi0_adapt_to_pi", "lerobot_pi0_adapt_from_pi"), strict=True))
VECTORS = (OBS_STATE, ACTION)
# No statistic in a robot's units is larger. With normalized actions within `action_space.LARGEST`,
# unnormalized ones are finite in float32 (up to 3.4e38).
LARGEST = 1e29


def tokenizer_step(config: Pi0Config) -> str:
    """The registered name of the step that writes the prompts of a policy."""
    return f"{config.type}_tokenizer"


def state_size(folder: Path) -> int | None:
    """Size of the robot's state that a checkpoint's pipelines take; None where they do not say it."""
    file = folder / PIPELINES[0]
    steps = read_steps(file) if file.is_file() else []
    return next((size for step in steps if (size := step["config"].get("state_size")) is not None), None)


def check_processors(folder: Path, config: Pi0Config) -> None:
    """Check the steps of a checkpoint's pipelines, before LeRobot loads them. Without both files it passes.

    Raises CheckpointError for a damaged file, one that is missing beside the other or that a step names, a
    step that is not one of `STEPS`, a state file outside the folder, a missing step of `NEEDED`, prompts that
    are not those of the config, a normalizer that leaves the state out, one with other settings or statistics
    than its counterpart, and statistics that are NaN or infinite or cannot be divided by.
    """
    settings: dict[str, Any] = {}
    statistics: list[dict[str, Tensor]] = []
    files = [folder / name for name in PIPELINES]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == 1:
        raise CheckpointError(f"{missing[0]} is missing, with which the policy was trained: {COPY_AGAIN}")
    if missing:
        logger.info("%s has no processors (%s): only a program that has others can run it", folder, PIPELINES)
        return
    for file in files:
        steps = read_steps(file)
        for step in steps:
            _check_step(file, step)
        names = [step["registry_name"] for step in steps]
        prompts = (tokenizer_step(config),) if file.name == PIPELINES[0] else ()
        for name in (*NEEDED[file.name], *prompts):
            if (found := names.count(name)) != 1:
                raise CheckpointError(
                    f"{file} has {found} steps '{name}' instead of one: the policy would not act as it was "
                    f"trained to. {COPY_AGAIN.capitalize()}"
                )
        if prompts:
            _check_prompts(file, steps, config)
        _check_joints(file, names, config)
        normalizing = steps[names.index(NEEDED[file.name][0])]
        given, state = normalizing["config"], normalizing.get("state_file")
        settings[file.name] = given.get("eps"), given.get("norm_map"), state is not None
        keys = given.get("normalize_observation_keys")
        if names.count("normalizer_processor") and (
            OBS_STATE not in (given.get("features") or ()) or (keys is not None and OBS_STATE not in keys)
        ):
            raise CheckpointError(f"{file} leaves '{OBS_STATE}' as it is, not normalized: {COPY_AGAIN}")
        if state:
            statistics.append(_read_statistics(folder / state, has_epsilon=bool(given.get("eps"))))
    if len(settings) == 2 and len({repr(of) for of in settings.values()}) == 2:
        raise CheckpointError(
            f"the pipelines in {folder} normalize by one setting and unnormalize by another ({settings}: "
            "epsilon, modes, whether there are statistics): copy or download them again"
        )
    if len(statistics) == 2:
        for name in statistics[0].keys() & statistics[1].keys():
            if not torch.equal(statistics[0][name], statistics[1][name]):
                raise CheckpointError(
                    f"the pipelines in {folder} have different statistics ('{name}'), so what is normalized "
                    "by one is not unnormalized by the other: copy or download them again"
                )


def _check_prompts(file: Path, steps: list[dict[str, Any]], config: Pi0Config) -> None:
    """Raises CheckpointError for a step with impossible settings, or other prompts than the config says."""
    names = [step["registry_name"] for step in steps]
    place = names.index(tokenizer_step(config))
    sizes = [steps[place]["config"].get(name) for name in ("max_length", "vocab_size")]
    # Of the state: in π0 the tokenizer step has it; checkpoints of earlier versions do not.
    sizes += [step["config"]["state_size"] for step in steps if step["config"].get("state_size") is not None]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{file} has the sizes {sizes} of prompts, vocabulary and state: {COPY_AGAIN}")
    wanted = getattr(config, "state_in_prompt", None)  # π0 has no such setting
    found = steps[place]["config"].get("state_in_prompt")
    if found != wanted:
        raise CheckpointError(
            f"--policy.state_in_prompt={str(wanted).lower()}, but {file} has {str(found).lower()}, and a "
            "checkpoint keeps its processors: leave the flag out. To train these weights with other prompts, "
            f"write the value into the step '{names[place]}' of that file"
        )
    if wanted and place < names.index("normalizer_processor"):
        raise CheckpointError(
            f"{file} writes the state into the prompt before it is normalized: {COPY_AGAIN}"
        )


def _check_joints(file: Path, names: list[str], config: Pi0Config) -> None:
    """Raises CheckpointError for other joints than the config says, or ones in the wrong place."""
    step, found = ADAPTING[file.name], names.count(ADAPTING[file.name])
    if found != config.adapt_to_pi:
        raise CheckpointError(
            f"--policy.adapt_to_pi={str(config.adapt_to_pi).lower()}, but {file} has {found} steps '{step}', "
            "and a checkpoint keeps its processors: leave the flag out. To train these weights with other "
            "joints, start from them with new processors (--policy.pretrained_path of openpi's or LeRobot's "
            "own weights)"
        )
    before, after = NEEDED[file.name][0], step
    if file.name == PIPELINES[0]:
        before, after = after, before
    if found and names.index(before) > names.index(after):
        raise CheckpointError(
            f"{file} has '{step}' on the wrong side of the normalizer, whose statistics are of openpi's "
            f"joints: {COPY_AGAIN}"
        )


def _check_step(file: Path, step: dict[str, Any]) -> None:
    """Raises CheckpointError for a step that is not one of `STEPS`, and a state file outside the folder."""
    name, state = step.get("registry_name"), step.get("state_file")
    if not isinstance(name, str) or name not in STEPS:
        raise CheckpointError(
            f"{file} names the step {name or step.get('class')!r}, which is not loaded: a checkpoint must "
            f"not run code of its own, and a policy of this type has only {sorted(STEPS)}. Delete the step "
            "from the file if the policy does not need it"
        )
    if state is not None and (not isinstance(state, str) or Path(state).name != state):
        raise CheckpointError(f"{file} names the state file {state!r}, outside of its folder: {COPY_AGAIN}")
    if state is not None and not (file.parent / state).is_file():
        raise CheckpointError(f"{file.parent / state} is missing, which {file.name} names: {COPY_AGAIN}")


def _read_statistics(file: Path, has_epsilon: bool) -> dict[str, Tensor]:
    """The statistics of state and action. Raises CheckpointError for what cannot be divided by."""
    tensors = read_tensors(file)
    tensors = {name: value for name, value in tensors.items() if name.rpartition(".")[0] in VECTORS}
    for name, value in tensors.items():
        key, _, statistic = name.rpartition(".")
        if not value.is_floating_point():
            continue
        spread = value if statistic == "std" else None
        if (low := tensors.get(f"{key}.{ENDS.get(statistic)}")) is not None:
            if (low.shape, low.dtype) != (value.shape, value.dtype):
                raise CheckpointError(
                    f"{file} has '{name}' and '{key}.{ENDS[statistic]}' of different shapes or types "
                    f"({tuple(value.shape)} {value.dtype}, {tuple(low.shape)} {low.dtype}): {COPY_AGAIN}"
                )
            spread = value - low
        bad = ~(value.abs() <= LARGEST)
        if spread is not None:
            bad |= spread < 0 if has_epsilon else spread <= 0
        if bad.any():
            raise CheckpointError(
                f"{file} has {value[bad].flatten()[0].item():g} in '{name}', which nothing can be normalized "
                f"by: {COPY_AGAIN}"
            )
    return tensors
