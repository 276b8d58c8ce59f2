"""What a control loop did, as a file: JSON lines with times of the monotonic clock, which all processes of
a machine share.

A RUN is a folder of `*.jsonl` files, one for each process that writes (robot.jsonl, policy.jsonl). Events:

    start        what runs: robot type, fps, joints, kind ("sync", "rtc", "async"), chunk size, …
    observation  joints {name: value}, cameras {name: when its picture was taken}
    action       values {name: value} as they were sent to the robot; `chunk` and `step` where known
    inference    observed, began, ended: when the observation was taken, and the policy began and ended;
                 actions [[…]] in robot units; the delays, in control steps, where known: `given` to the
                 policy, `dropped` from the new chunk, `consumed` from the old one meanwhile
    stop         why
"""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Trace:
    """Appends events to a file, from any thread. What a killed process wrote before is there."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = file.open("a", buffering=1, encoding="utf-8"), threading.Lock()

    def write(self, event: str, t: float | None = None, **fields: Any) -> None:
        """Append an event, at `t` of `time.monotonic()` (now)."""
        line = json.dumps({"event": event, "t": time.monotonic() if t is None else t, **fields})
        with self._lock:
            if not self._file.closed:
                self._file.write(line + "\n")

    def close(self) -> None:
        """No more is written."""
        with self._lock:
            self._file.close()


def read_trace(run: Path) -> Iterator[dict[str, Any]]:
    """The events of a RUN, of all its files, in the order of their times, each with the `file` that it is
    from ("robot"). A cut last line is left out.

    Raises FileNotFoundError when there is no trace in the folder.
    """
    files = sorted(run.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{run} holds no trace (*.jsonl). `lerobot-pi0 rollout --trace={run} ...` writes one"
        )
    events = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line) | {"file": file.stem})
            except json.JSONDecodeError:
                continue
    yield from sorted(events, key=lambda event: event["t"])
