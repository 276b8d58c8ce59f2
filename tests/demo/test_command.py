"""Commands run as subprocesses: what a person sees of them, and what happens when one fails."""

import os
from pathlib import Path

import pytest

from lerobot_pi0.demo import command
from lerobot_pi0.demo.command import Command, Job, run

# Writes as lerobot-train does: a bar that ends in a carriage return, and messages behind it on the same line.
PROGRAM = """
import pathlib, sys, time
first, last = map(int, sys.argv[1:3])
print("hello", flush=True)
for step in range(1, last - first + 1):
    bar = f"\\rTraining:  50%|██   | {step}/{last - first} [00:01<00:01,  2.0step/s]"
    sys.stderr.write(f"{bar}\\x1b[32mINFO\\x1b[0m step:{first + step} loss:0.{first + step} lr:1e-3\\n")
file = pathlib.Path(sys.argv[-1])
if "fail after" in sys.argv:
    while not file.exists():
        time.sleep(0.01)
if "wait" in sys.argv:
    file.touch()
    time.sleep(60)
    file.with_suffix(".done").touch()
if "fail" in sys.argv or "fail after" in sys.argv:
    sys.exit("out of luck")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "fake_train.py").write_text(PROGRAM)
    monkeypatch.setitem(command.MODULES, "lerobot-train", "fake_train")
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def make(name: str, *arguments: str) -> Job:
        line = Command("lerobot-train", arguments, (("PYTHONPATH", search),))
        return Job(name, line, tmp_path / "logs" / f"{name}.log", "Training")

    return make


def test_a_command_is_shown_as_a_shell_takes_it():
    line = Command("lerobot-train", ("--task=open the door", "--steps=3"), (("HF_HUB_OFFLINE", "1"),))
    assert str(line) == "HF_HUB_OFFLINE=1 lerobot-train \\\n    '--task=open the door' \\\n    --steps=3"


def test_the_log_holds_the_messages_but_not_the_progress_bar(job):
    training = job("train", "0", "3")
    run(training)
    first, *rest = [line for line in training.log.read_text().splitlines() if not line.startswith("  ")]
    assert first.startswith("# from step 0: ")
    assert rest == ["hello"] + [f"INFO step:{step} loss:0.{step} lr:1e-3" for step in (1, 2, 3)]


def test_progress_and_loss_are_shown(job, capsys):
    run(job("train", "0", "3"))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss 0.3" in shown


def test_a_failure_shows_the_end_of_the_output_the_log_and_the_command(job):
    training = job("train", "0", "40", "fail")
    with pytest.raises(RuntimeError, match=r"train failed with exit code 1") as failure:
        run(training)
    message = str(failure.value)
    assert "out of luck" in message
    assert "step:40 " in message
    assert "step:20 " not in message
    assert str(training.log) in message
    assert str(training.command) in message


def test_when_one_command_fails_those_beside_it_are_ended(job, tmp_path):
    file = tmp_path / "waits"
    with pytest.raises(RuntimeError, match="unlucky failed"):
        run(job("patient", "0", "1", "wait", str(file)), job("unlucky", "0", "1", "fail after", str(file)))
    assert not file.with_suffix(".done").exists()


def test_a_second_run_adds_to_the_log(job):
    training = job("train", "0", "1")
    run(training)
    run(training)
    assert Path(training.log).read_text().count("hello") == 2
