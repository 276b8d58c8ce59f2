"""What a control loop did, as a file: JSON lines with times of the monotonic clock, which all processes of
a machine share.

A RUN is a folder of `*.jsonl` files, one for each process that writes (robot.jsonl, policy.jsonl). A robot
that connects again appends to its file. Events:

    start        what runs: robot type, fps, joints, kind ("sync", "rtc", "async"), chunk size, …; `opened`:
                 when the one that writes began to, by the wall clock. One may write several, of episodes
    observation  joints {name: value}, cameras {name: when its picture was taken}
    action       values {name: value} as they were sent to the robot; `chunk` and `step` where known
    inference    observed, began, ended: when the observation was taken, and the policy began and ended;
                 actions [[…]] in robot units; the delays, in control steps, where known: `given` to the
                 policy, `dropped` from the new chunk, `consumed` from the old one meanwhile
    stop         why
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lerobot_pi0.errors import MissingFileError, OutputExistsError

logger = logging.getLogger(__name__)

POLICY_FILE = "policy.jsonl"


class Trace:
    """Appends events to a file, from any thread. What a killed process wrote before is there.

    A trace that cannot be written any more, for example on a full disk, ends with a logged error: it raises
    nothing, because the robot that it is of is moving.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = file.open("a", buffering=1, encoding="utf-8"), threading.Lock()
        self._opened = time.time()

    def write(self, event: str, t: float | None = None, **fields: Any) -> None:
        """Append an event, at `t` of `time.monotonic()` (now)."""
        if event == "start":
            fields["opened"] = self._opened
        line = json.dumps({"event": event, "t": time.monotonic() if t is None else t, **fields})
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.write(line + "\n")
            except OSError as error:
                logger.error("the trace ends here, %s cannot be written: %s", self._file.name, error)
                self._close()

    def close(self) -> None:
        """No more is written."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # what is still in its buffer
            self._file.close()


def new_policy_trace(folder: Path) -> Path:
    """The file for a policy's trace in a folder. Raises FileExistsError if there is one, not an empty one."""
    file = folder / POLICY_FILE
    if file.exists() and file.stat().st_size:
        raise OutputExistsError(f"{file} is the trace of another run: give another --trace, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return file


def read_trace(run: Path) -> Iterator[dict[str, Any]]:
    """The events of a RUN, of all its files, in the order of their times, each with the `file` that it is
    from ("robot"), and with a number of those that wrote to that file one after the other (`writer`, from 0).
    Lines that are no events are left out, as one that was cut.

    Raises FileNotFoundError when there is no event in the folder.
    """
    events = [event for file in sorted(run.glob("*.jsonl")) for event in _events(file)]
    if not events:
        raise MissingFileError(
            f"{run} holds no trace (*.jsonl). `lerobot-pi0 rollout --trace={run} ...` writes one"
        )
    yield from sorted(events, key=lambda event: event["t"])


def _events(file: Path) -> Iterator[dict[str, Any]]:
    opened: list[Any] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not (
            isinstance(event, dict)
            and isinstance(event.get("event"), str)
            and isinstance(event.get("t"), int | float)
        ):
            continue
        if event["event"] == "start" and opened[-1:] != [event.get("opened")]:
            opened.append(event.get("opened"))
        yield event | {"file": file.stem, "writer": max(len(opened) - 1, 0)}
