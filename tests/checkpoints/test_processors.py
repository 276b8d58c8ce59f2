"""Which steps a checkpoint's processor pipelines may have."""

import json
from pathlib import Path
from typing import Any

import pytest
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import ProcessorStepRegistry
from tiny_policy import MODELS, statistics, tiny_config, tiny_policy

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.checkpoints.golden_actions import GOLDEN_ACTIONS_FILE
from lerobot_pi0.checkpoints.processors import STEPS, check_processors
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import CheckpointError


def save(folder: Path, model: str, **changes: Any) -> Pi0Config:
    config = tiny_config(model, **changes)
    given = None if config.adapt_to_pi else statistics()  # of these joints there are no others
    for pipeline in make_pre_post_processors(config, dataset_stats=given):
        pipeline.save_pretrained(folder)
    return config


@pytest.fixture
def saved(tmp_path) -> Path:
    save(tmp_path, "pi0")
    return tmp_path


def test_the_steps_of_our_own_checkpoints_pass_and_are_the_list(tmp_path):
    steps = set()
    for model, adapts in (("pi0", False), ("pi05", True)):
        config = save(tmp_path / model, model, adapt_to_pi=adapts)
        check_processors(tmp_path / model, config)
        for file in (tmp_path / model).glob("policy_p*processor.json"):
            steps |= {step["registry_name"] for step in json.loads(file.read_text())["steps"]}
    assert steps == STEPS
    assert set(ProcessorStepRegistry.list()) >= STEPS


def test_the_prompts_of_the_other_model_are_refused(tmp_path):
    save(tmp_path, "pi0")
    with pytest.raises(CheckpointError, match=r"has 0 steps 'lerobot_pi05_tokenizer' instead of one"):
        check_processors(tmp_path, tiny_config("pi05"))


def test_prompts_without_the_state_where_the_config_has_it_there_are_refused(tmp_path):
    save(tmp_path, "pi05", state_in_prompt=False)
    with pytest.raises(CheckpointError, match=r"--policy.state_in_prompt=true, but .* has false"):
        check_processors(tmp_path, tiny_config("pi05"))


def test_other_joints_than_the_configs_are_refused(tmp_path):
    config = save(tmp_path, "pi0", adapt_to_pi=True)
    with pytest.raises(CheckpointError, match=r"--policy.adapt_to_pi=false, but .* has 1 steps"):
        check_processors(tmp_path, tiny_config())
    file = tmp_path / "policy_postprocessor.json"
    described = json.loads(file.read_text())
    described["steps"][:2] = reversed(described["steps"][:2])
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"'lerobot_pi0_adapt_from_pi' on the wrong side"):
        check_processors(tmp_path, config)
    described["steps"].pop(0)
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"--policy.adapt_to_pi=true, but .* has 0 steps"):
        check_processors(tmp_path, config)


def test_a_state_that_is_written_before_it_is_normalized_is_refused(tmp_path):
    config = save(tmp_path, "pi05")
    file = tmp_path / "policy_preprocessor.json"
    described = json.loads(file.read_text())
    described["steps"][3:5] = reversed(described["steps"][3:5])
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"before it is normalized"):
        check_processors(tmp_path, config)


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
        check_processors(saved, tiny_config())
    assert str(saved / file) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"steps": {}}', '{"steps": ["class"]}'])
def test_a_damaged_file_is_named(saved, text):
    (saved / "policy_preprocessor.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json"):
        check_processors(saved, tiny_config())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [{"a": {}}, True, 0, 1.5])
def test_a_size_of_the_state_that_is_none_is_refused(tmp_path, model, size):
    config = save(tmp_path, model)
    file = tmp_path / "policy_preprocessor.json"
    described = json.loads(file.read_text())
    step = next(step for step in described["steps"] if "state_size" in step["config"])
    step["config"]["state_size"] = size
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json has the sizes"):
        check_processors(tmp_path, config)


@pytest.mark.parametrize(
    "name",
    [
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "policy_preprocessor_step_2_lerobot_pi0_tokenizer.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    ],
)
def test_a_file_that_is_missing_beside_the_others_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing.*copy or download"):
        check_processors(saved, tiny_config())


def test_a_checkpoint_without_processors_and_golden_actions_is_said_to_be(tmp_path, caplog):
    tiny_policy().save_pretrained(tmp_path)
    (tmp_path / GOLDEN_ACTIONS_FILE).unlink()
    with caplog.at_level("INFO"):
        Pi0Policy.from_pretrained(tmp_path)
    assert f"{tmp_path} has no processors" in caplog.text
    assert f"{tmp_path} has no golden actions" in caplog.text
