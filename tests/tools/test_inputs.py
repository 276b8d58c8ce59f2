"""What a tool is given and cannot use is said in a sentence."""

import json

import pytest
from tiny_policy import tiny_policy

from lerobot_pi0.tools.inputs import DatasetFlags, PolicyFlags, dataset_metadata, load_policy
from lerobot_pi0.weights import CheckpointError


@pytest.mark.parametrize(
    "text", ["{", '{"type": "lerobot_pi0", "chunk_size": "many"}', '{"type": "nobodys"}']
)
def test_a_config_that_cannot_be_read_is_an_error_with_its_place(tmp_path, text):
    tiny_policy().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json of '{tmp_path}' cannot be read"):
        load_policy(PolicyFlags(path=str(tmp_path)))


def test_another_policy_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"type": "act"}))
    with pytest.raises(CheckpointError, match=r"is a policy of type 'act'.*lerobot-pi0 convert"):
        load_policy(PolicyFlags(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (DatasetFlags(), ValueError, "--dataset.repo_id=user/name"),
        (DatasetFlags(repo_id="nobody/nothing"), FileNotFoundError, "'nobody/nothing' cannot be had"),
    ],
)
def test_a_dataset_that_is_not_there_is_an_error_with_what_to_give(flags, error, message):
    with pytest.raises(error, match=message):
        dataset_metadata(flags)


def test_a_folder_without_a_dataset_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no dataset in {tmp_path}"):
        dataset_metadata(DatasetFlags(root=tmp_path))
