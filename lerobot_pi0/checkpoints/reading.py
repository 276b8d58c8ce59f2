"""Readers of the file formats of a checkpoint folder. Each raises CheckpointError that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lerobot_pi0.errors import CheckpointError, MissingFileError

COPY_AGAIN = "copy or download it again"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises MissingFileError, or CheckpointError for what is no JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{file} is missing: {COPY_AGAIN}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): {COPY_AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, expected a JSON object: {COPY_AGAIN}")
    return found


def read_steps(file: Path) -> list[dict[str, Any]]:
    """The steps in the JSON file of a processor pipeline of LeRobot, each with a dict `config`."""
    steps = read_json(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{file} has no list of 'steps': {COPY_AGAIN}")
    steps = [{**step, "config": step.get("config") or {}} for step in steps]
    if wrong := [step for step in steps if not isinstance(step["config"], dict)]:
        raise CheckpointError(f"{file} has a step whose 'config' is {wrong[0]['config']!r}: {COPY_AGAIN}")
    return steps


@contextmanager
def open_safetensors(file: Path, framework: Literal["pt", "np"] = "pt") -> Iterator[Any]:
    """`safetensors.safe_open`, with errors that name the file, those of reading tensors included."""
    try:
        with safe_open(file, framework=framework) as opened:
            yield opened
    except FileNotFoundError as error:
        raise MissingFileError(f"{file} is missing: {COPY_AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut off ({error}): {COPY_AGAIN}") from error


def read_tensors(file: Path, framework: Literal["pt", "np"] = "pt") -> dict[str, Any]:
    """All tensors of a safetensors file by name."""
    with open_safetensors(file, framework) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def read_state(folder: Path, step: dict[str, Any]) -> dict[str, Any]:
    """The state of a step of a processor pipeline, as numpy arrays; empty for a step without one.

    Raises CheckpointError for a state file outside of the folder.
    """
    name = step.get("state_file")
    if not name:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{folder} names the state file {name!r}, which is not in it: {COPY_AGAIN}")
    return read_tensors(folder / name, "np")
