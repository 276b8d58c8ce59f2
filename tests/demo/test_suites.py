"""What every suite of the demo has to say of itself, without its simulator."""

from importlib.resources import files
from typing import Any

import pytest
from tokenizers import Tokenizer

from lerobot_pi0.demo.demo import Demo
from lerobot_pi0.demo.flags import DemoConfig, RecordConfig
from lerobot_pi0.demo.suites import MODULES, OPTIONS, Suite, load_suite


@pytest.fixture(params=MODULES)
def suite(request) -> Suite:
    return load_suite(request.param)


def test_its_defaults_are_tasks_that_it_knows_with_a_sentence_for_each(suite):
    tasks = suite.parse_tasks(suite.defaults.tasks)
    assert set(suite.parse_tasks(suite.quick_tasks)) <= set(tasks)
    assert len({suite.instruction(task) for task in tasks}) == len(tasks)
    for wrong in ("no-such-task", "", f"{tasks[0]},{tasks[0]}"):
        with pytest.raises(ValueError, match="task"):
            suite.parse_tasks(wrong)


def test_settings_that_it_does_not_have_are_refused_and_not_written_down(suite, tmp_path):
    assert OPTIONS.keys() & suite.defaults.settings().keys() == set(suite.options)
    for option in OPTIONS.keys() - set(suite.options):
        settings: dict[str, Any] = {"suite": suite.name, option: 1}
        with pytest.raises(ValueError, match=f"--{option} means nothing in {suite.title}"):
            RecordConfig(root=tmp_path, **settings)


def test_its_first_evaluation_has_all_tasks_as_instructed(suite):
    recording = suite.defaults
    tasks = suite.parse_tasks(recording.tasks)
    first, *others = suite.evaluations(tasks, recording, recording.episode_length, 4)
    assert first.name == "evaluate"
    assert set(first.tasks) == set(tasks)
    assert first.has_baseline
    for evaluation in (first, *others):
        assert set(evaluation.tasks) <= set(tasks)
        assert evaluation.flags[0].startswith("--env.type=")
    assert len({evaluation.name for evaluation in (first, *others)}) == len(others) + 1


def test_a_prompt_of_pi05_has_room_for_its_instruction_and_its_state(suite, tmp_path):
    demo = Demo(DemoConfig(suite=suite.name, policy="pi05", output_dir=tmp_path))
    (training,) = demo.train()
    (room,) = (
        int(flag.partition("=")[2]) for flag in training.command.arguments if "tokenizer_max_length" in flag
    )
    tokenizer = Tokenizer.from_str(files("lerobot_pi0").joinpath("tokenizers", "small.json").read_text())
    (numbers,) = suite.features(suite.defaults)["observation.state"]["shape"]
    state = " ".join(["255"] * numbers)
    for task in demo.tasks:
        prompt = f"Task: {suite.instruction(task)}, State: {state};\nAction: "
        assert len(tokenizer.encode(prompt).ids) <= room
