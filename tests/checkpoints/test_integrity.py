"""A policy acts by the weights that were opened, and by nothing else: moved folders, duplicates, copies."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import batch, noise, tiny_config
from torch import Tensor

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.checkpoints.files import Checkpoint
from lerobot_pi0.checkpoints.layouts import from_published
from lerobot_pi0.errors import CheckpointError


def policy(seed: int = 0) -> Pi0Policy:
    torch.manual_seed(seed)
    return Pi0Policy(tiny_config()).eval()


def chunk(of: Pi0Policy) -> Tensor:
    return of.predict_action_chunk(batch(), noise=noise())


def saved(folder: Path, seed: int = 0) -> Path:
    policy(seed).save_pretrained(folder)
    return folder


def save_in_shards(folder: Path, stale: bool) -> None:
    """Two shards with an index; with `stale`, each holds a copy of a tensor of the other one."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, held in shards.items():
        others = [name for name in (names[0], "model.vision.projector.weight") if stale and name not in held]
        copies = {name: torch.randn_like(tensors[name]) for name in others}
        save_file({name: tensors[name] for name in held} | copies, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("change", ["another checkpoint", "deleted"])
def test_the_first_chunk_is_that_of_the_weights_that_were_opened(tmp_path, change):
    wanted = chunk(policy(0))
    (tmp_path / "last").symlink_to(saved(tmp_path / "000100", 0))
    loaded = Pi0Policy.from_pretrained(tmp_path / "last")
    (tmp_path / "last").unlink()
    if change == "deleted":
        shutil.rmtree(tmp_path / "000100")
    else:
        (tmp_path / "last").symlink_to(saved(tmp_path / "000200", 1))
    torch.testing.assert_close(chunk(loaded), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("source", ["made", "loaded"])
def test_a_policy_can_be_copied_after_its_first_chunk(tmp_path, how, source):
    original = policy() if source == "made" else Pi0Policy.from_pretrained(saved(tmp_path / "saved"))
    wanted = chunk(original)
    if how == "deepcopy":
        copied = copy.deepcopy(original)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(original))
    else:
        torch.save(original, tmp_path / "policy.pt")
        copied = torch.load(tmp_path / "policy.pt", weights_only=False)
    shutil.rmtree(tmp_path / "saved", ignore_errors=True)
    assert torch.equal(chunk(copied), wanted)
    with torch.no_grad():
        copied.model.action_out_proj.bias.add_(1)
    assert not torch.allclose(chunk(copied), wanted)
    assert torch.equal(chunk(original), wanted)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    file = saved(tmp_path / "saved") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"state_proj.weight": tensors["model.state_proj.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"'model.state_proj.weight'.*'state_proj.weight'.*same tensor"):
        Pi0Policy.from_pretrained(file.parent)
    with pytest.raises(CheckpointError, match="are the same tensor"):
        from_published({"model.a.b": 1, "a.b": 2})


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_copies_in_shards_the_index_says_which_is_meant(tmp_path, stale):
    save_in_shards(saved(tmp_path / "saved"), stale)
    torch.testing.assert_close(chunk(Pi0Policy.from_pretrained(tmp_path / "saved")), chunk(policy()))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", 7])
def test_an_index_may_not_name_files_outside_its_folder(tmp_path, name: Any):
    folder = saved(tmp_path / "saved")
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json.*not in its folder"):
        Pi0Policy.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_quantized_and_complex_weights_are_refused(tmp_path, dtype):
    file = saved(tmp_path / "saved") / "model.safetensors"
    tensors, name = load_file(file), "model.state_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    with pytest.raises(CheckpointError, match=r"state_proj.weight is (float8|complex64|int8)"):
        Pi0Policy.from_pretrained(file.parent)


def test_the_fingerprint_sees_every_value(tmp_path):
    file = saved(tmp_path / "saved") / "model.safetensors"
    before, heads = Checkpoint(file.parent).fingerprint(), Checkpoint(file.parent).fingerprint_of_heads()
    tensors = load_file(file)
    tensors["model.token_embedding.weight"][-1, -1] += 1
    save_file(tensors, file)
    assert Checkpoint(file.parent).fingerprint() != before
    assert Checkpoint(file.parent).fingerprint_of_heads() == heads  # which earlier versions wrote
