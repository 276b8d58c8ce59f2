"""What a tool is given and cannot use is said in a sentence."""

import json
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file
from tiny_dataset import make_checkpoint
from tiny_policy import tiny_policy

from lerobot_pi0 import configuration_pi0
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.inputs import flags, policy
from lerobot_pi0.inputs.dataset import DatasetFlags, dataset_metadata
from lerobot_pi0.inputs.policy import PolicyFlags, load_policy
from lerobot_pi0.model import flow


@pytest.mark.parametrize(
    "text", ["{", '{"type": "lerobot_pi0", "chunk_size": "many"}', '{"type": "nobodys"}']
)
def test_a_config_that_cannot_be_read_is_an_error_with_its_place(tmp_path, text):
    tiny_policy().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'config.json'} is damaged"):
        load_policy(PolicyFlags(path=str(tmp_path)))


def test_flags_that_import_no_lerobot_offer_what_the_policy_has():
    assert get_args(flags.Backend) == get_args(configuration_pi0.Backend)
    assert get_args(flags.Solver) == get_args(flow.Solver)


@pytest.mark.parametrize(
    ("kind", "fix"),
    [("pi0", "lerobot-pi0 convert"), ("pi05", "lerobot-pi0 convert"), ("act", "another model")],
)
def test_another_policy_is_refused_by_its_type(tmp_path, kind, fix):
    (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
    with pytest.raises(CheckpointError, match=rf"is a policy of type '{kind}'.*{fix}"):
        load_policy(PolicyFlags(path=str(tmp_path)))


def test_a_checkpoint_without_its_processors_is_an_error(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "policy_postprocessor.json").unlink()
    with pytest.raises(CheckpointError, match=f"'{tmp_path}' has no policy_postprocessor.json"):
        load_policy(PolicyFlags(path=str(tmp_path)))


def test_damaged_settings_of_a_processor_are_an_error(tmp_path):
    file = make_checkpoint(tmp_path / "policy") / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    pipeline["steps"][2]["config"] = {}
    file.write_text(json.dumps(pipeline))
    with pytest.raises(CheckpointError, match=f"{file} has the sizes"):
        load_policy(PolicyFlags(path=str(file.parent)))


def test_statistics_of_another_robot_are_an_error(tmp_path):
    make_checkpoint(tmp_path)
    for file in tmp_path.glob("policy_p*normalizer*.safetensors"):
        cut = {
            name: of[:-1] if of.ndim and "image" not in name else of for name, of in load_file(file).items()
        }
        save_file(cut, file)
    with pytest.raises(CheckpointError, match=r"has statistics of \d+ dimensions for 'observation.state'"):
        load_policy(PolicyFlags(path=str(tmp_path)))


def test_adapters_without_peft_are_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")

    def absent(*_, **__) -> None:
        raise ImportError("'peft' is required but not installed")

    monkeypatch.setattr(policy, "require_package", absent)
    with pytest.raises(CheckpointError, match="holds adapters: 'peft' is required"):
        load_policy(PolicyFlags(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (DatasetFlags(), ValueError, "--dataset.repo_id=user/name"),
        (
            DatasetFlags(repo_id="nobody/nothing"),
            FileNotFoundError,
            "is not in LeRobot's folder",
        ),
    ],
)
def test_a_dataset_that_is_not_there_is_an_error_with_what_to_give(flags, error, message):
    with pytest.raises(error, match=message):
        dataset_metadata(flags)


def test_a_folder_without_a_dataset_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no dataset in {tmp_path}"):
        dataset_metadata(DatasetFlags(root=tmp_path))
