"""The processor pipelines of a checkpoint: which steps may and must stand in them, with finite statistics.

LeRobot imports and calls whatever class a step in `policy_preprocessor.json` names (processor/pipeline.py,
`from_pretrained`). A checkpoint is data: here only the steps that a policy of this package is saved with are
accepted.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lerobot_pi0.checkpoints.reading import read_steps
from lerobot_pi0.errors import CheckpointError

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")
# By the names under which LeRobot and this package register them.
STEPS = frozenset(
    (
        "device_processor",
        "lerobot_pi0_tokenizer",
        "normalizer_processor",
        "rename_observations_processor",
        "to_batch_processor",
        "unnormalizer_processor",
    )
)


ENDS = {"max": "min", "q99": "q01", "q90": "q10"}
# What each pipeline needs: without it actions are in other units than the robot's.
NEEDED = dict(zip(PIPELINES, ("normalizer_processor", "unnormalizer_processor"), strict=True))


def check_processors(folder: Path) -> None:
    """Check the steps of a checkpoint's pipelines, before LeRobot loads them. A missing file passes.

    Raises CheckpointError for a damaged file, a step that is not one of `STEPS`, a state file outside the
    folder, a missing step of `NEEDED`, one with other settings than its counterpart, and statistics that are
    NaN or infinite or cannot be divided by.
    """
    settings: dict[str, Any] = {}
    for file in map(folder.joinpath, PIPELINES):
        if not file.is_file():
            continue
        steps = read_steps(file)
        normalizing = [step for step in steps if step.get("registry_name") == NEEDED[file.name]]
        if len(normalizing) != 1:
            raise CheckpointError(
                f"{file} has {len(normalizing)} steps '{NEEDED[file.name]}' instead of one: actions would "
                "not be in the robot's units. Copy or download it again"
            )
        config = normalizing[0].get("config") or {}
        settings[file.name] = config.get("eps"), config.get("norm_map")
        for step in steps:
            name = step.get("registry_name")
            if name not in STEPS:
                raise CheckpointError(
                    f"{file} names the step {name or step.get('class')!r}, which is not loaded: a checkpoint "
                    f"must not run code of its own, and a policy of this type has only {sorted(STEPS)}. Take "
                    "the step out of the file if you trust it and need not have it"
                )
            state = step.get("state_file")
            if state is not None and (not isinstance(state, str) or Path(state).name != state):
                raise CheckpointError(f"{file} names the state file {state!r}, outside of its folder")
        if (state := normalizing[0].get("state_file")) and (folder / state).is_file():
            _check_statistics(folder / state, has_epsilon=bool(config.get("eps")))
    if len(settings) == 2 and len({repr(of) for of in settings.values()}) == 2:
        raise CheckpointError(
            f"the pipelines in {folder} normalize by one setting and unnormalize by another ({settings}): "
            "copy or download them again"
        )


def _check_statistics(file: Path, has_epsilon: bool) -> None:
    """Raises CheckpointError for what cannot be divided by."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): copy or download it again") from error
    for name, value in tensors.items():
        key, _, statistic = name.rpartition(".")
        if not name.startswith(("action.", "observation.state.")) or not value.is_floating_point():
            continue
        spread = value if statistic == "std" else None
        if statistic in ENDS and f"{key}.{ENDS[statistic]}" in tensors:
            spread = value - tensors[f"{key}.{ENDS[statistic]}"]
        bad = ~value.isfinite()
        if spread is not None:
            bad |= spread < 0 if has_epsilon else spread <= 0
        if bad.any():
            raise CheckpointError(
                f"{file} has {value[bad].flatten()[0].item():g} in '{name}', which nothing can be normalized "
                "by: copy or download it again"
            )
