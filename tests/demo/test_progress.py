"""An evaluation's progress, from the bars that lerobot-eval prints."""

import io

from lerobot_pi0.demo.command import LastLine
from lerobot_pi0.demo.progress import BATCHES, EvaluationProgress


def bar(batches: int, of: int, rate: str = "") -> str:
    shown = f", running_success_rate={rate}%" if rate else ""
    return f"{BATCHES}:  50%|██   | {batches}/{of} [00:01<00:01,  2.00s/it{shown}]"


def test_the_task_the_episode_and_the_successes_are_said():
    progress = EvaluationProgress("evaluate", ["open", "close"], episodes=25, batch=10)
    assert progress(bar(0, 3)) == "evaluate: open (1 of 2): episode 0 of 25, solved 0"
    # As tqdm prints them: the rate of the batch that has just ended, and then the count.
    assert progress(bar(0, 3, "90.0")) == "evaluate: open (1 of 2): episode 10 of 25, solved 9"
    assert progress(bar(1, 3, "90.0")) == "evaluate: open (1 of 2): episode 10 of 25, solved 9"
    assert progress(bar(1, 3, "95.0")) == "evaluate: open (1 of 2): episode 20 of 25, solved 19"
    assert progress(bar(2, 3, "95.0")) == "evaluate: open (1 of 2): episode 20 of 25, solved 19"
    assert progress(bar(2, 3, "96.0")) == "evaluate: open (1 of 2): episode 25 of 25, solved 24"
    assert progress(bar(3, 3, "96.0")) == "evaluate: open (1 of 2): episode 25 of 25, solved 24\n"
    assert progress(bar(0, 3)) == "evaluate: close (2 of 2): episode 0 of 25, solved 0"


def test_the_end_of_a_task_is_said_once():
    progress = EvaluationProgress("evaluate", ["open"], episodes=1, batch=1)
    progress(bar(0, 1))
    assert progress(bar(1, 1, "100.0")).endswith("\n")
    assert not progress(bar(1, 1, "100.0")).endswith("\n")


def test_what_stays_stays_while_others_go_on():
    stream = io.StringIO()
    line = LastLine(stream)
    line.show("one", "one: 1 of 2")
    line.show("other", "other: done\n")
    line.close()
    assert stream.getvalue().splitlines() == ["one: 1 of 2", "other: done", "one: 1 of 2"]
