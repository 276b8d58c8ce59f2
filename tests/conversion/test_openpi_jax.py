"""openpi's own checkpoints (orbax), converted by the command, do what openpi's JAX code did with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from openpi_jax import from_openpi_jax, write_checkpoint, write_statistics
from small_policies import run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from lerobot_pi0.checkpoints import files as checkpoint_files
from lerobot_pi0.checkpoints.files import Checkpoint
from lerobot_pi0.checkpoints.layouts import FAMILIES, PI0, PI05, Family
from lerobot_pi0.conversion import orbax
from lerobot_pi0.conversion.orbax import OrbaxCheckpoint
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model import Observation
from lerobot_pi0.modeling_pi0 import Pi0Policy

TESTS = Path(__file__).parent.parent
GOLDEN = {PI0: TESTS / "golden", PI05: TESTS / "golden_pi05"}
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PLAIN, LORA = GOLDEN[PI0] / "golden_checkpoint", GOLDEN[PI0] / "golden_checkpoint_lora"
END_TO_END = {PI0: 3e-4, PI05: 1e-3}  # as in tests/model/test_golden.py
ROUNDING = 5e-5  # with openpi's embedding of time; LoRA makes larger velocities, of up to 6
FLAGS: dict[str, Any] = {"tokenizer": "small", "chunk_size": 10}
OF_BOTH = {PI0: FLAGS, PI05: FLAGS | {"state_in_prompt": True, "delta_mask": []}}


def read(name: str, family: Family = PI0) -> dict[str, Tensor]:
    file = GOLDEN[family] / f"golden_{name}.npz"
    return {key: torch.from_numpy(value) for key, value in np.load(file).items()}


@pytest.fixture(scope="module")
def family(request) -> Family:
    """π0, or what `of_both` says."""
    return getattr(request, "param", PI0)


of_both = pytest.mark.parametrize("family", FAMILIES, ids=["pi0", "pi05"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def leaves(family) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN[family] / "golden_params.npz"))


@pytest.fixture(scope="module")
def lora_leaves(leaves, family) -> dict[str, np.ndarray]:
    lora = np.load(GOLDEN[family] / "golden_lora_f32.npz")
    return leaves | {key.removeprefix("param/"): lora[key] for key in lora if key.startswith("param/")}


@pytest.fixture
def stored_time_embedding(monkeypatch, family) -> None:
    """openpi's own embedding of each stored time: its fastest sinusoid amplifies rounding 1,571 times."""
    f32 = read("f32", family)
    stored = dict(zip(read("inputs", family)["time"].tolist(), f32["time_emb"], strict=True))
    stored |= dict(zip(f32["sample_times_10"].tolist(), f32["time_emb_steps_10"], strict=True))

    def embed_time(time: Tensor, _: int) -> Tensor:
        return torch.stack([stored[t] for t in time.flatten().tolist()]).unflatten(0, time.shape)

    monkeypatch.setattr("lerobot_pi0.model.network.embed_time", embed_time)


def load(folder: Path) -> Pi0Policy:
    config: Any = PreTrainedConfig.from_pretrained(folder)
    config.dtype = "float32"
    return policy_class(config).from_pretrained(folder, config=config)


def distances(folder: Path, family: Family, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences of velocity, loss and actions from openpi's."""
    inputs, network = read("inputs", family), load(folder).model
    observation = Observation(
        images=torch.stack([inputs[f"image/{name}"] for name in CAMERAS], 1).permute(0, 1, 4, 2, 3).float()
        / 255
        * 2
        - 1,
        image_mask=torch.stack([inputs[f"image_mask/{name}"] for name in CAMERAS], 1),
        tokens=inputs["tokenized_prompt"].long(),
        token_mask=inputs["tokenized_prompt_mask"],
        state=inputs["state"],
    )
    actions, noise, time = inputs["actions"], inputs["noise"], inputs["time"]
    with torch.no_grad():
        context = network.with_state(network.prefix(observation), observation.state)
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        found = {
            "v_t": network.velocity(context, noisy, time),
            "loss": network.loss(observation, actions, noise, time).mean(-1),
            "actions_10": network.sample(observation, inputs["sample_noise"], 10),
        }
    return {name: (value - wanted[name]).abs().max().item() for name, value in found.items()}


def of_alpha(alpha: str, family: Family) -> dict[str, Tensor]:
    lora = read("lora_f32", family)
    return {key.removeprefix(alpha): value for key, value in lora.items() if key.startswith(alpha)}


@pytest.fixture(scope="module")
def converted(family, tmp_path_factory) -> Path:
    """Both checkpoints, and what the command said of each."""
    folder = tmp_path_factory.mktemp("converted")
    for name, suffix in (("plain", ""), ("lora", "_lora")):
        source = GOLDEN[family] / f"golden_checkpoint{suffix}"
        (folder / f"{name}.txt").write_text(run(source, folder / name, **OF_BOTH[family]))
    return folder


@of_both
def test_openpi_checkpoints_do_what_they_did_end_to_end(family, converted):
    for name, wanted in (("plain", read("f32", family)), ("lora", of_alpha("checkpoint_alpha4/", family))):
        assert max(distances(converted / name, family, wanted).values()) < END_TO_END[family], name


@of_both
def test_openpi_checkpoints_but_for_the_time_embedding(family, converted, stored_time_embedding):
    for name, wanted in (("plain", read("f32", family)), ("lora", of_alpha("checkpoint_alpha4/", family))):
        assert max(distances(converted / name, family, wanted).values()) < ROUNDING, name


@of_both
def test_the_proof_counts_and_says_what_was_found(family, converted):
    counts = {PI0: "106 tensors, 216,608 parameters", PI05: "111 tensors, 236,480 parameters"}
    for name in ("plain", "lora"):
        text = (converted / f"{name}.txt").read_text()
        assert counts[family] in text
        assert "all equal" in text
        assert ("LoRA merged" in text) == (name == "lora")
        assert ("The state is in the prompt." in text) == (family is PI05)


@of_both
def test_alpha_of_lora_scales_attention_alone(family, lora_leaves, tmp_path, stored_time_embedding):
    """alpha 8 over rank 4: attention twice, the MLP once."""
    write_checkpoint(tmp_path / "jax", lora_leaves)
    run(tmp_path / "jax", tmp_path / "ours", statistics=False, lora_alpha=8.0, **OF_BOTH[family])
    assert max(distances(tmp_path / "ours", family, of_alpha("alpha8/", family)).values()) < ROUNDING


@pytest.mark.parametrize("family", [PI05], indirect=True, scope="module")
def test_adaptive_norms_are_scale_shift_and_gate_in_this_order(leaves, converted):
    dense = leaves["PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/kernel"][2]
    weight = Checkpoint(converted / "plain")["expert.layers.2.mlp_norm.dense.weight"]
    for number, of_openpi in enumerate(np.split(dense, 3, axis=-1)):
        ours = weight[number * 32 : (number + 1) * 32]
        assert torch.equal(ours, torch.from_numpy(of_openpi.T.copy()))


@pytest.mark.parametrize("family", [PI05], indirect=True, scope="module")
def test_frozen_adaptive_norms_stay_as_lora_left_them(converted):
    """In bfloat16, as openpi stores what is frozen; what trained is float32."""
    tensors = Checkpoint(converted / "lora")
    assert tensors["expert.norm.dense.weight"].dtype == torch.bfloat16
    assert tensors["time_mlp_in.weight"].dtype == torch.float32
    assert tensors["expert.layers.0.q_proj.weight"].dtype == torch.float32


def test_dtypes_stay_unless_asked(converted, tmp_path):
    run(LORA, tmp_path / "narrow", **FLAGS, dtype="bfloat16")
    as_is = Pi0Policy.from_pretrained(converted / "lora").model.state_dict()
    # Frozen by openpi in bfloat16; merged with float32 adapters; trained.
    assert as_is["token_embedding.weight"].dtype == torch.bfloat16
    assert as_is["vlm.layers.0.q_proj.weight"].dtype == torch.float32
    assert as_is["vision.layers.0.q_proj.weight"].dtype == torch.float32
    narrow = Pi0Policy.from_pretrained(tmp_path / "narrow").model.state_dict()
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(narrow[name], as_is[name].bfloat16()) for name in narrow)


CHUNKS = {
    "one piece": None,
    "by layer": lambda shape: (1, *shape[1:]),
    "by anything": lambda shape: tuple(-(-n // 2) for n in shape),
}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_large_leaves_are_unpacked_in_passing_to_the_same_tensors(leaves, chunk, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, leaves, chunk=chunk)
    monkeypatch.setattr(orbax, "_AT_ONCE", 1000)
    found, wanted = dict(OrbaxCheckpoint(tmp_path / "params", tmp_path)), from_openpi_jax(leaves)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]  # no temporary file is left


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """A folder with one for a vocabulary of 512."""
    vocabulary = {"<bos>": 0, "push": 1, "\n": 2, "<unk>": 3}
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(WordLevel(vocabulary, "<unk>")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return str(tmp_path / "tokenizer")


def test_pi05_normalizes_by_quantiles_as_openpi_does(tokenizer, tmp_path):
    run(GOLDEN[PI05] / "golden_checkpoint", tmp_path / "ours", **OF_BOTH[PI05] | {"tokenizer": tokenizer})
    config = PreTrainedConfig.from_pretrained(tmp_path / "ours")
    prepare, finish = make_pre_post_processors(config, pretrained_path=str(tmp_path / "ours"))
    golden = {name.removeprefix("pi05_droid/"): of for name, of in read("transforms", PI05).items()}
    joints, gripper = (golden[f"raw_observation.{name}_position"] for name in ("joint", "gripper"))
    cameras: Any = dict.fromkeys(config.image_features, torch.zeros(3, 56, 56))
    state = {"observation.state": torch.cat((joints, gripper))}
    found = prepare(cameras | state | {"action": golden["raw_actions"][None], "task": "push"})
    torch.testing.assert_close(
        found["observation.state"][0].double(), golden["state"][:8], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found["action"][0].double(), golden["actions"][:, :8], rtol=1e-5, atol=1e-5)
    actions = finish(golden["pred_actions"][None, :, :8])
    torch.testing.assert_close(actions[0].double(), golden["out_actions"], rtol=1e-5, atol=1e-5)


def test_processors_normalize_as_openpi_does_near_constant_dimensions_too(tokenizer, tmp_path):
    flags = {**FLAGS, "tokenizer": tokenizer, "cameras": {"base": "front"}}
    run(PLAIN, tmp_path / "ours", **flags)
    config = PreTrainedConfig.from_pretrained(tmp_path / "ours")
    prepare, finish = make_pre_post_processors(config, pretrained_path=str(tmp_path / "ours"))
    golden = read("transforms")
    batch: Any = {
        "observation.images.front": torch.zeros(3, 56, 56),
        "observation.state": golden["state"],
        "action": golden["actions"][None],
        "task": "push",
    }
    found = prepare(batch)
    for key, name in (("observation.state", "z_norm_state"), ("action", "z_norm_actions")):
        torch.testing.assert_close(found[key][0].double(), golden[name].double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(finish(found["action"])[0], golden["actions"], rtol=1e-5, atol=1e-5)


def test_masked_actions_are_relative_to_the_state(tokenizer, tmp_path):
    """As openpi's AbsoluteActions: what the network gives, in the robot's units, plus the state."""
    flags = {**FLAGS, "tokenizer": tokenizer, "cameras": {"base": "front"}}
    chunks, state = {}, torch.tensor([[0.3, -1.0, 0.5, 5.0, 0.01, 0.0, 4.0, -0.5]])
    for name, mask in (("absolute", []), ("relative", [2, -5, 1])):
        folder = tmp_path / name
        run(PLAIN, folder, **flags, delta_mask=mask)
        policy = load(folder)
        prepare, finish = make_pre_post_processors(policy.config, pretrained_path=str(folder))
        batch: Any = {"observation.images.front": torch.zeros(1, 3, 56, 56), "observation.state": state}
        noise = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
        chunks[name] = finish(policy.predict_action_chunk(prepare({**batch, "task": ["push"]}), noise=noise))
    wanted = chunks["absolute"] + state * torch.tensor([1, 1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(chunks["relative"], wanted, rtol=1e-4, atol=1e-4)


def copied(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder / "jax")
    return folder / "jax"


def refused(source: Path, message: str, **flags: Any) -> None:
    """The reason is said, and nothing of the target is left."""
    target = source.parent / "target"
    with pytest.raises((ValueError, OSError), match=message):
        run(source, target, **{**FLAGS, **flags})
    assert not [path for path in source.parent.iterdir() if path.name.startswith("target")]


def test_cut_off_file(tmp_path):
    source = copied(PLAIN, tmp_path)
    for file in (source / "params").rglob("d/*"):
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:1000])
    refused(source, "params is damaged or incomplete.*download it again")


def test_missing_file(tmp_path):
    source = copied(PLAIN, tmp_path)
    largest = max((source / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.parent.chmod(0o755)
    largest.unlink()
    refused(source, "params is damaged or incomplete.*download it again")


@pytest.mark.parametrize("missing", ["PaliGemma/llm/layers/attn/q_einsum/w", "action_out_proj/bias"])
def test_missing_leaf(leaves, missing, tmp_path):
    rest = {path: leaf for path, leaf in leaves.items() if path != missing}
    refused(write_checkpoint(tmp_path / "jax", rest), "incomplete|1 missing", statistics=False)


def test_leaves_of_both_models(leaves, tmp_path):
    mixed = {**leaves, "time_mlp_in/kernel": np.zeros((4, 4), np.float32)}
    refused(write_checkpoint(tmp_path / "jax", mixed), "is no leaf of openpi's plain π0.5", statistics=False)


def test_numbers_that_are_none(leaves, tmp_path):
    leaf = leaves["action_out_proj/kernel"].copy()
    leaf[3, 3] = np.nan
    source = write_checkpoint(tmp_path / "jax", {**leaves, "action_out_proj/kernel": leaf})
    refused(source, r"action_out_proj.weight.*NaN", statistics=False)


def test_statistics_of_several_robots_are_chosen_from(tmp_path):
    source = copied(PLAIN, tmp_path)
    (source / "assets").chmod(0o755)
    of = {"mean": [0.0] * 6, "std": [1.0] * 6}
    write_statistics(source, "droid", {"state": of, "actions": of})
    refused(source, r"several robots: --asset_id=... chooses one of \['droid', 'tiny'\]")
    refused(source, r"no assets/aloha/", asset_id="aloha")
    assert "State of 6" in run(source, tmp_path / "droid", **FLAGS, asset_id="droid")
    assert "Without statistics" in run(source, tmp_path / "none", **FLAGS, statistics=False)


def test_statistics_of_another_robot(tmp_path):
    refused(copied(PLAIN, tmp_path), r"statistics of \[8\] dimensions.*the robot has 14", state_dim=14)


def test_no_statistics_at_all(leaves, tmp_path):
    refused(write_checkpoint(tmp_path / "jax", leaves), "has no statistics.*--statistics=false")


def test_tokenizer_that_cannot_be_had_is_told_before_anything_is_written(tmp_path):
    refused(copied(PLAIN, tmp_path), "tokenizer 'google/.*--tokenizer=FOLDER", tokenizer=None)


def test_target_that_exists_is_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(FileExistsError, match="exists: give another TARGET"):
        run(PLAIN, tmp_path / "ours", **FLAGS)
    assert not list((tmp_path / "ours").iterdir())


def test_a_repository_on_the_hub(tmp_path, monkeypatch):
    """Its parameters are downloaded, and not the state of its training."""

    def download(_: str, *, allow_patterns: list[str]) -> str:
        there = [path.relative_to(PLAIN).as_posix() for path in PLAIN.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PLAIN / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(checkpoint_files, "snapshot_download", download)
    run(Path("me/openpi"), tmp_path / "target", statistics=False, **FLAGS)
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_without_tensorstore_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install 'lerobot_policy_pi0\[openpi\]'"):
        run(PLAIN, tmp_path / "ours", **FLAGS)


def test_config_says_where_the_weights_are_from(converted):
    assert json.loads((converted / "plain" / "config.json").read_text())["base_checkpoint"] == str(PLAIN)
