"""Which steps a checkpoint's processor pipelines may have."""

import json
from pathlib import Path
from typing import Any

import pytest
from lerobot.processor import ProcessorStepRegistry
from tiny_policy import statistics, tiny_config

from lerobot_pi0.checkpoints.processors import STEPS, check_processors
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors


@pytest.fixture
def saved(tmp_path) -> Path:
    for pipeline in make_lerobot_pi0_pre_post_processors(tiny_config(), statistics()):
        pipeline.save_pretrained(tmp_path)
    return tmp_path


def test_the_steps_of_our_own_checkpoints_pass_and_are_the_list(saved):
    check_processors(saved)
    files = saved.glob("policy_p*processor.json")
    steps = {step["registry_name"] for file in files for step in json.loads(file.read_text())["steps"]}
    assert steps == STEPS
    assert set(ProcessorStepRegistry.list()) >= STEPS


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (
            {"class": "subprocess.Popen", "config": {"args": "id"}},
            "the step 'subprocess.Popen', which",
        ),
        ({"registry_name": "tokenizer_processor"}, "the step 'tokenizer_processor', which is not loaded"),
        ({}, "the step None"),
        ({"registry_name": "device_processor", "state_file": "../../x.safetensors"}, "outside of its folder"),
        ({"registry_name": "device_processor", "state_file": "/etc/x"}, "outside of its folder"),
        ({"registry_name": "device_processor", "state_file": 3}, "outside of its folder"),
    ],
)
def test_any_other_step_is_refused_with_its_file(saved, file, step, reason):
    described: dict[str, Any] = json.loads((saved / file).read_text())
    described["steps"].append(step)
    (saved / file).write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=reason) as error:
        check_processors(saved)
    assert str(saved / file) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"steps": {}}', '{"steps": ["class"]}'])
def test_a_damaged_file_is_named(saved, text):
    (saved / "policy_preprocessor.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json"):
        check_processors(saved)
