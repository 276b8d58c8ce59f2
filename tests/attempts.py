"""Whether the simulated arm reached the block, by its trace: one attempt for each place of the block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.simulated_robot.simulation import FOR, NEAR


@dataclass(frozen=True)
class Attempt:
    """What the arm did while the block lay in one place."""

    # The middle of the block at first: x, y, z.
    block: tuple[float, float, float]
    # Seconds from the first observation until the tip was near, and stayed so for long enough. None: never.
    reached: float | None
    # The tip's least distance from its goal, in metres.
    closest: float


def attempts(run: Path) -> list[Attempt]:
    """The attempts of a RUN, a folder that was given as --robot.trace, in their order.

    A last attempt of less than a second, after the arm came home for the last time, is left out.
    Raises FileNotFoundError when there is no trace in the folder.
    """
    by_place: list[list[dict[str, Any]]] = []
    placed = None
    for event in read_trace(run):
        if event["file"] != "robot":  # a policy's, in the same folder
            continue
        if event["event"] == "start":
            placed = None
        elif event["event"] == "observation":
            if event["placed"] != placed:
                by_place.append([])
            placed = event["placed"]
            by_place[-1].append(event)
    return [detect_success(events) for events in by_place if events[-1]["t"] - events[0]["t"] > 1]


def detect_success(observations: list[dict[str, Any]]) -> Attempt:
    """One attempt, of the observations while the block lay in one place."""
    reached, near_since = None, None
    for event in observations:
        if event["distance"] > NEAR:
            near_since = None
        elif near_since is None:
            near_since = event["t"]
        elif reached is None and event["t"] - near_since >= FOR:
            reached = near_since - observations[0]["t"]
    x, y, z = observations[0]["block"]
    return Attempt((x, y, z), reached, min(event["distance"] for event in observations))
