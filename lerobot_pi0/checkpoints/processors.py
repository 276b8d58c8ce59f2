"""The processor pipelines of a checkpoint: which steps may stand in them.

LeRobot imports and calls whatever class a step in `policy_preprocessor.json` names (processor/pipeline.py,
`from_pretrained`). A checkpoint is data: here only the steps that a policy of this package is saved with are
accepted.
"""

from pathlib import Path

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


def check_processors(folder: Path) -> None:
    """Check the steps of a checkpoint's pipelines, before LeRobot loads them. A missing file passes.

    Raises CheckpointError for a damaged file, a step that is not one of `STEPS`, and a state file outside the
    folder.
    """
    for file in map(folder.joinpath, PIPELINES):
        if not file.is_file():
            continue
        for step in read_steps(file):
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
