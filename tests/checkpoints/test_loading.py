"""From files to a policy: a failure says what is wrong and what to do; what loads is what was saved."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import PreTrainedPolicy
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from tiny_dataset import make_checkpoint
from tiny_policy import STATE, batch, noise, raw_batch, statistics, tiny_config, tiny_policy
from torch import Tensor

from lerobot_pi0.checkpoints import files, loading
from lerobot_pi0.checkpoints.layouts import to_openpi
from lerobot_pi0.data.statistics import read_statistics
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling.linear import Packed

FILES = ["config.json", "golden_actions.safetensors", "model.safetensors"]
TRAINING: dict[str, Any] = {"dataset_meta": SimpleNamespace(), "dataset_stats": statistics()}


def test_statistics_of_several_robots_are_not_chosen_from(tmp_path):
    for robot in ("droid", "trossen"):
        (tmp_path / "assets" / robot).mkdir(parents=True)
        (tmp_path / "assets" / robot / "norm_stats.json").write_text('{"norm_stats": {}}')
    with pytest.raises(CheckpointError, match=r"droid, trossen.*--policy\.statistics=dataset"):
        read_statistics(str(tmp_path))


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "saved"
    tiny_policy().save_pretrained(folder)
    return folder


def load(folder: Path | str, **keywords: Any) -> Pi0Policy:
    return Pi0Policy.from_pretrained(folder, config=tiny_config(), **keywords)


def test_wrong_path_is_no_repository_name_either():
    with pytest.raises(FileNotFoundError, match=r"no folder a/b/c, and it is no name of a repository"):
        load("a/b/c")


def test_path_that_could_be_a_repository_says_both():
    with pytest.raises(
        FileNotFoundError, match=r"outputs/train.*no such folder.*local cache.*HF_HUB_OFFLINE"
    ):
        load("outputs/train")


def test_file_instead_of_a_folder(saved):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is a file: give the folder"):
        load(saved / "model.safetensors")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors.*pretrained_model"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 6, 1_000, -1])
def test_cut_off_file(saved, size):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut off.*download it again"):
        load(saved)


def test_missing_shard(saved):
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, saved / "model-00001-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"names the shard model-00002-of-00002.safetensors, which is missing"
    ):
        load(saved)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_damaged_index(saved, text):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json (is damaged|holds list).*download it again"):
        load(saved)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"null", b"\xff", b'{"type": "lerobot_pi0", "chunk_size": "x"}']
)
def test_damaged_config(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config.json (is damaged|holds).*download it again"):
        Pi0Policy.from_pretrained(saved)


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_counted_and_named(saved):
    change_tensors(saved, lambda tensors: [tensors.pop(f"model.state_proj.{k}") for k in ("weight", "bias")])
    with pytest.raises(CheckpointError, match=r"2 missing: state_proj.bias, state_proj.weight\."):
        load(saved)


def test_unexpected_tensors_are_counted_and_named(saved):
    change_tensors(saved, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"1 unexpected: stray\."):
        load(saved)


def test_other_sizes_than_the_configs_name_both(saved):
    with pytest.raises(
        CheckpointError, match=r"of another shape: .*action_in_proj.weight is \(32, 8\).*\(32, 16\)"
    ):
        Pi0Policy.from_pretrained(saved, config=tiny_config(max_action_dim=16))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("π0-FAST", "model.paligemma_with_expert.paligemma.model.language_model.norm.weight"),
        ("SmolVLA", "model.vlm_with_expert.lm_expert.norm.weight"),
    ],
)
def test_checkpoint_of_another_family_is_named(tmp_path, family, name):
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{family}.*not π0"):
        load(tmp_path)


MODELS = {"pi0": ("π0", "action_time_mlp_in.weight"), "pi05": (r"π0\.5", "time_mlp_in.weight")}


@pytest.mark.parametrize("train", [{}, TRAINING], ids=["", "train"])
@pytest.mark.parametrize("saved_as", ["{}", "lerobot_{}", None])
@pytest.mark.parametrize(("model", "other"), [("pi0", "pi05"), ("pi05", "pi0")])
def test_checkpoint_of_the_other_model_names_its_policy_type(tmp_path, model, other, saved_as, train):
    name, tensor = MODELS[other]
    save_file({tensor: torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"type": saved_as.format(other)} if saved_as else {"action_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"is a checkpoint of {name}, .*Set --policy\.type=lerobot_{other}, "
    own = tiny_config(model)
    for given in (own, None):
        with pytest.raises(CheckpointError, match=message):
            policy_class(own).from_pretrained(tmp_path, config=given, **train)


def test_the_other_model_is_refused_before_its_weights_are_fetched(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi05"}))
    with pytest.raises(CheckpointError, match=r"Set --policy\.type=lerobot_pi05"):
        load(tmp_path, **TRAINING)


@pytest.mark.parametrize(
    ("folder", "known"), [("mine", "trained. Assumed"), ("pi05_libero", "(pi05_libero with --chunk_size=10 ")]
)
def test_what_is_assumed_of_pi05_weights_is_logged(tmp_path, caplog, folder, known):
    policy = tiny_policy("pi05")
    (tmp_path / folder).mkdir()
    save_file(to_openpi(policy.model.state_dict()), tmp_path / folder / "model.safetensors")
    with caplog.at_level("INFO", "lerobot_pi0"):
        policy_class(policy.config).from_pretrained(tmp_path / folder, config=policy.config)
    (line,) = [line for line in caplog.messages if "Assumed" in line]
    assert "Assumed: chunks of 6 actions (--policy.chunk_size), state_in_prompt=true, relative" in line
    assert known in line
    assert policy.config.base_checkpoint is not None


def test_policy_of_another_type_says_how_to_take_its_weights(published):
    with pytest.raises(CheckpointError) as error:
        Pi0Policy.from_pretrained(published)
    assert "a policy of type 'pi0'" in str(error.value)
    assert f"--policy.type=lerobot_pi0 --policy.pretrained_path={published}" in str(error.value)


@pytest.mark.parametrize("config", [None, {"action_dim": 32}])
def test_checkpoint_that_is_not_lerobots_says_how_to_take_its_weights(published, config):
    (published / "config.json").unlink()
    if config is not None:
        (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is no LeRobot policy.*--policy.type=lerobot_pi0"):
        Pi0Policy.from_pretrained(published)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/me/pi0"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError("403", response=response(403)),
            r"gated: accept its licence at huggingface.co/me/pi0.*hf auth",
        ),
        (
            RepositoryNotFoundError("404", response=response(404)),
            r"no such folder and no such repository.*hf auth",
        ),
        (RevisionNotFoundError("404", response=response(404)), r"no revision 'v9'"),
        (
            LocalEntryNotFoundError("offline"),
            r"not in the local cache, and the hub cannot be reached.*HF_HUB_OFFLINE",
        ),
        (
            HfHubHTTPError("500 Server Error\nmore", response=response(500)),
            r"cannot be downloaded: 500 Server Error$",
        ),
        (HFValidationError("bad name"), r"no folder me/pi0, and it is no name of a repository"),
    ],
)
def test_hub_errors_say_why_and_what_to_do(monkeypatch, error, message):
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=message):
        load("me/pi0", revision="v9")


def test_download_arguments_reach_the_download(monkeypatch, saved, tmp_path):
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **keywords: Any) -> str:
        calls.append((name, keywords))
        return str(saved)

    monkeypatch.setattr(files, "snapshot_download", download)
    given = {
        "revision": "v1",
        "token": "hf_x",
        "cache_dir": tmp_path / "cache",
        "local_files_only": True,
        "force_download": True,
    }
    load("me/pi0", **given)
    ((name, keywords),) = calls
    assert name == "me/pi0"
    assert given.items() <= keywords.items()
    there = [
        *(
            "config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "train_config.json",
        ),
        *("policy_preprocessor_step_4_normalizer_processor.safetensors", "assets/trossen/norm_stats.json"),
        "checkpoints/000100/training_state/optimizer_state.safetensors",
        "checkpoints/000100/pretrained_model/train_config.json",
        "checkpoints/000100/pretrained_model/model.safetensors",
    ]
    wanted = filter_repo_objects(there, allow_patterns=keywords["allow_patterns"])
    assert list(wanted) == there[:-3], "training states and older checkpoints stay on the hub"


def test_config_comes_from_the_downloaded_folder_too(monkeypatch, saved):
    """Not from a second download that knows no revision."""
    monkeypatch.setattr(files, "snapshot_download", lambda *_, **__: str(saved))
    assert Pi0Policy.from_pretrained("me/pi0", revision="v1").config.vlm.width == 48


def test_saved_file_holds_each_parameter_once_and_no_text_heads(saved):
    tensors = load_file(saved / "model.safetensors")
    network = tiny_policy().model
    assert {name.removeprefix("model.") for name in tensors} == set(network.state_dict())
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in network.parameters())
    assert sorted(file.name for file in saved.iterdir()) == FILES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_policy_acts_bit_for_bit_the_same(tmp_path, dtype):
    policy = tiny_policy(dtype=dtype)
    preprocess, postprocess = make_pre_post_processors(policy.config, dataset_stats=statistics())
    policy.save_pretrained(tmp_path / "first")
    preprocess.save_pretrained(tmp_path / "first")
    postprocess.save_pretrained(tmp_path / "first")
    deployed = Pi0Policy.from_pretrained(tmp_path / "first")
    deployed.save_pretrained(tmp_path / "second")
    again = Pi0Policy.from_pretrained(tmp_path / "second")
    preprocess_2, postprocess_2 = make_pre_post_processors(
        again.config, pretrained_path=str(tmp_path / "first")
    )

    actions = postprocess(deployed.predict_action_chunk(preprocess(raw_batch()), noise=noise()))
    assert torch.equal(
        postprocess_2(again.predict_action_chunk(preprocess_2(raw_batch()), noise=noise())), actions
    )
    if dtype == "float32":
        assert torch.equal(
            postprocess(policy.predict_action_chunk(preprocess(raw_batch()), noise=noise())), actions
        )


@pytest.mark.skipif(
    "state_dict" not in inspect.signature(PreTrainedPolicy.save_pretrained).parameters,
    reason="after 0.6.1 LeRobot has the policy gather them",
)
def test_gathered_weights_are_saved_in_place_of_the_policys_own(tmp_path):
    """Sharded training hands over the weights of all its processes."""
    policy = tiny_policy()
    gathered = {name: tensor + 1 for name, tensor in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state_dict=gathered)
    found = Pi0Policy.from_pretrained(tmp_path).state_dict()
    assert [name for name in gathered if not torch.equal(found[name], gathered[name])] == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_weights_are_mapped_from_the_file_not_copied(saved):
    policy = Pi0Policy.from_pretrained(saved)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(saved / "model.safetensors"))
    ]
    for name, parameter in policy.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name


def test_saving_over_the_folder_that_the_weights_are_mapped_from_keeps_them(saved, monkeypatch):
    file = saved / "model.safetensors"
    policy = Pi0Policy.from_pretrained(saved)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    written: list[Path] = []
    monkeypatch.setattr(
        loading,
        "save_file",
        lambda *given, **more: (written.append(given[1]), save_file(*given, **more)),
    )
    policy.save_pretrained(saved)
    assert file not in written  # safetensors before 0.8 writes in place
    for source in (policy.state_dict(), Pi0Policy.from_pretrained(saved).state_dict()):
        assert [name for name in before if not torch.equal(source[name], before[name])] == []
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_training_mapped_weights_leaves_the_file_alone(saved):
    contents = (saved / "model.safetensors").read_bytes()
    policy = load(saved, **TRAINING).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=0.1)
    policy(batch())[0].backward()
    optimizer.step()
    assert (saved / "model.safetensors").read_bytes() == contents


def test_published_weights_give_the_actions_of_the_policy_they_came_from(published):
    found = load(published).predict_action_chunk(batch(), noise=noise())
    assert torch.equal(found, tiny_policy().predict_action_chunk(batch(), noise=noise()))


def test_published_weights_leave_the_processors_to_us(published):
    """LeRobot loads processors from `pretrained_path` if it is set: they would be another policy's."""
    config = tiny_config()
    config.pretrained_path = published
    Pi0Policy.from_pretrained(published, config=config)
    assert config.pretrained_path is None
    assert config.base_checkpoint == str(published)


def test_our_own_checkpoint_keeps_its_path_and_its_processors(saved):
    config = tiny_config()
    config.pretrained_path = saved
    Pi0Policy.from_pretrained(saved, config=config)
    assert config.pretrained_path == saved
    assert config.base_checkpoint is None


@pytest.mark.parametrize("source", ["saved", "published"])
def test_trained_parameters_are_float32_and_frozen_ones_are_not(request, source):
    folder = request.getfixturevalue(source)
    config = tiny_config(dtype="bfloat16", freeze="vlm")
    policy = Pi0Policy.from_pretrained(folder, config=config, **TRAINING)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert policy.get_parameter("model.expert.layers.0.q_proj.weight").requires_grad
    assert not policy.get_parameter("model.vlm.layers.0.q_proj.weight").requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_deployed_on_a_cpu_leaves_its_parameters_in_the_file_and_samples_in_the_configs_dtype(
    saved, dtype
):
    policy = Pi0Policy.from_pretrained(saved, config=tiny_config(dtype=dtype))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {keys.dtype for keys, _ in policy.encode(batch()).buffer.layers} == {getattr(torch, dtype)}
    assert not policy.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_deployed_elsewhere_is_all_in_the_configs_dtype(saved, dtype, monkeypatch):
    monkeypatch.setattr(Packed, "runs", staticmethod(lambda dtype: False))
    policy = Pi0Policy.from_pretrained(saved, config=tiny_config(dtype=dtype))
    assert {parameter.dtype for parameter in policy.parameters()} == {getattr(torch, dtype)}


def test_adamw_steps_on_float32_under_bfloat16_compute(saved):
    policy = Pi0Policy.from_pretrained(saved, config=tiny_config(dtype="bfloat16"), **TRAINING).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-6)
    before = policy.get_parameter("model.action_out_proj.weight").clone()
    policy(batch())[0].backward()
    optimizer.step()
    moments = [state["exp_avg"].dtype for state in optimizer.state.values()]
    assert moments
    assert set(moments) == {torch.float32}
    # Far below the spacing of bfloat16, so a bfloat16 parameter would not have moved.
    change = (policy.get_parameter("model.action_out_proj.weight") - before).abs().max().item()
    assert 0 < change < 2e-6


# Statistics of checkpoints of other layouts.


def write_lerobot_statistics(folder: Path, stats: dict[str, dict[str, Tensor]]) -> None:
    """As LeRobot saves the processors of its own π0, the gated tokenizer by name among them."""
    steps = [
        {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "google/paligemma-3b-pt-224"}},
        {"registry_name": "normalizer_processor", "config": {}, "state_file": "stats.safetensors"},
    ]
    (folder / "policy_preprocessor.json").write_text(
        json.dumps({"name": "policy_preprocessor", "steps": steps})
    )
    flat = {f"{key}.{name}": value.clone() for key, of in stats.items() for name, value in of.items()}
    save_file(flat, folder / "stats.safetensors")


def test_statistics_of_lerobots_processor_files(tmp_path):
    write_lerobot_statistics(tmp_path, statistics())
    found = read_statistics(str(tmp_path))
    assert found["action"]["std"].tolist() == statistics()["action"]["std"].tolist()
    assert found["observation.state"]["mean"].tolist() == statistics()["observation.state"]["mean"].tolist()


def test_statistics_of_openpi(tmp_path):
    (tmp_path / "assets" / "trossen").mkdir(parents=True)
    text = json.dumps(
        {"norm_stats": {"state": {"mean": [1.0], "std": [2.0]}, "actions": {"q01": [3.0], "q99": [4.0]}}}
    )
    (tmp_path / "assets" / "trossen" / "norm_stats.json").write_text(text)
    found = read_statistics(str(tmp_path))
    assert found["observation.state"]["std"].tolist() == [2.0]
    assert found["action"]["q01"].tolist() == [3.0]


def test_statistics_of_old_lerobots_buffers(tmp_path):
    names = {
        "normalize_inputs.buffer_observation_state.mean": 1.0,
        "normalize_targets.buffer_action.std": 2.0,
        "model.state_proj.bias": 3.0,
    }
    save_file({name: torch.tensor([value]) for name, value in names.items()}, tmp_path / "model.safetensors")
    found = read_statistics(str(tmp_path))
    assert {key: sorted(of) for key, of in found.items()} == {
        "observation.state": ["mean"],
        "action": ["std"],
    }


def test_checkpoint_without_statistics_says_to_take_the_datasets(published):
    with pytest.raises(CheckpointError, match=r"no normalization statistics.*--policy.statistics=dataset"):
        read_statistics(str(published))


@pytest.mark.parametrize(
    ("chosen", "mean"), [("dataset", statistics()["action"]["mean"]), ("checkpoint", torch.full((4,), 5.0))]
)
def test_statistics_are_the_datasets_or_on_request_the_checkpoints(published, chosen, mean):
    write_lerobot_statistics(
        published,
        {
            "action": {"mean": torch.full((4,), 5.0), "std": torch.ones(4)},
            "observation.state": {"mean": torch.zeros(5), "std": torch.ones(5)},
        },
    )
    config = tiny_config(statistics=chosen)
    config.pretrained_path = published
    Pi0Policy.from_pretrained(published, config=config, **TRAINING)
    _, postprocess = make_pre_post_processors(
        config, pretrained_path=config.pretrained_path, dataset_stats=statistics()
    )
    torch.testing.assert_close(postprocess(torch.zeros(1, 4))[0], mean)


def test_statistics_of_another_robots_size_are_refused(published):
    stats = {"mean": torch.zeros(14), "std": torch.ones(14)}
    write_lerobot_statistics(published, {"action": stats, "observation.state": stats})
    config = tiny_config(statistics="checkpoint")
    with pytest.raises(
        ValueError, match=r"14 dimensions for 'observation.state', the robot has 5.*statistics=dataset"
    ):
        Pi0Policy.from_pretrained(published, config=config, **TRAINING)


def test_deleted_base_checkpoint_does_not_matter_to_what_was_saved(published, tmp_path):
    policy = load(published)
    policy.save_pretrained(tmp_path / "saved")
    shutil.rmtree(published)
    assert Pi0Policy.from_pretrained(tmp_path / "saved").config.base_checkpoint == str(published)


FULL_SIZE_CHECKPOINT = """
import json, struct, sys
from pathlib import Path
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot_pi0 import Pi0Config, Pi0Policy

folder = Path(sys.argv[1])
config = Pi0Config(
    device="cpu",
    input_features={
        "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
        "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
    },
    output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
)
config.save_pretrained(folder)
with torch.device("meta"):
    shapes = {name: tuple(tensor.shape) for name, tensor in Pi0Policy(config).state_dict().items()}
header, offset = {}, 0
for name, shape in shapes.items():
    size = 2 * torch.Size(shape).numel()
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
    offset += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
values = (torch.randn(1 << 20) / 100).to(torch.bfloat16).view(torch.int16).numpy()
with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for shape in shapes.values():
        left = torch.Size(shape).numel()
        while left:
            file.write(values[:left].tobytes())
            left -= min(left, len(values))
print(offset)
"""

FULL_SIZE_LOAD = """
import json, resource, sys, time
import torch
from lerobot_pi0 import Pi0Policy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

start, before = time.perf_counter(), peak()
policy = Pi0Policy.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
parameters = list(policy.parameters())
total = sum(float(p.detach().flatten()[::1024].float().abs().sum()) for p in parameters)  # touches every page
assert total > 0
print(json.dumps({
    "load_seconds": round(seconds, 2),
    "touched_seconds": round(time.perf_counter() - start, 2),
    "rss_before": before,
    "rss_peak": peak(),
    "parameters": sum(p.numel() for p in parameters),
    "dtypes": sorted({str(p.dtype) for p in parameters}),
}))
"""


@pytest.mark.full_size
def test_full_size_checkpoint_loads_within_about_its_own_size(tmp_path):
    def run(program: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip().splitlines()[-1]

    size = int(run(FULL_SIZE_CHECKPOINT))
    measured = json.loads(run(FULL_SIZE_LOAD))
    print(measured | {"file": size, "peak / file": round(measured["rss_peak"] / size, 3)})
    assert measured["parameters"] == 3_238_048_528
    assert measured["dtypes"] == ["torch.bfloat16"]
    assert measured["rss_peak"] < 1.3 * size


@pytest.mark.parametrize("name", ["vision.num_heads", "expert.mlp_dim", "vlm", "dtype", "chunk_size"])
def test_a_config_without_a_size_is_refused_and_no_default_taken_for_it(saved, name):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    part, _, size = name.rpartition(".")
    (config[part] if part else config).pop(size)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json is damaged: it has no \['{name}"):
        load(saved)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("size", "keeps"), [(STATE, True), (STATE + 2, False)])
def test_weights_for_another_robot_get_new_processors(tmp_path, model, size, keeps):
    """LeRobot loads those of `pretrained_path`, which take a state of the size that they were saved with."""
    folder = make_checkpoint(tmp_path / "saved", model)
    config = tiny_config(model, pretrained_path=folder)
    assert config.input_features is not None
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (size,))
    policy_class(config).from_pretrained(folder, config=config)
    assert (config.pretrained_path is not None) == keeps
