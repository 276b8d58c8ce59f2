"""What a person sees of an evaluation while it runs: the task, the episode, the successes so far."""

import re
from collections.abc import Sequence

# How lerobot-eval's bar over the batches of a task begins, and what of it counts.
BATCHES = "Stepping through eval batches"
COUNTS = re.compile(r"(\d+)/(\d+) \[")
RATE = re.compile(r"running_success_rate=([\d.]+)%")


class EvaluationProgress:
    """Turns the bars of one lerobot-eval, which do not name the task, into sentences."""

    def __init__(self, name: str, tasks: Sequence[str], episodes: int, batch: int) -> None:
        """Args: what is evaluated; its tasks in their order; episodes of each, and how many run at once."""
        self._name = name
        self._tasks = tasks
        self._episodes = episodes
        self._batch = batch
        self._task = 0
        self._batches = 0
        self._rate = ""

    def __call__(self, bar: str) -> str:
        """The sentence after a bar; a task's last one ends in a newline, and should stay."""
        counts, rate = COUNTS.search(bar), RATE.search(bar)
        assert counts is not None
        batches, of = int(counts[1]), int(counts[2])
        if batches < self._batches:
            self._task += 1
        # The rate of a batch is shown before the batch is counted.
        done = batches + (batches == self._batches and rate is not None and rate[1] != self._rate)
        ended = batches == of and self._batches < of
        self._batches, self._rate = batches, rate[1] if rate else ""
        episodes = min(done * self._batch, self._episodes)
        solved = round(float(rate[1]) / 100 * episodes) if rate else 0
        task = f"{self._tasks[self._task]} ({self._task + 1} of {len(self._tasks)})"
        end = "\n" if ended else ""
        return f"{self._name}: {task}: episode {episodes} of {self._episodes}, solved {solved}{end}"
