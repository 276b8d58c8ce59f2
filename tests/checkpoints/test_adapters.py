"""LoRA: where adapters go, how they compute, whose weights they need, and making one checkpoint of both."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import PeftConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.rollout.context import _load_pretrained_policy
from lerobot_commands import checkpoint, dataset, in_tree_folder, run, train_command
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_policy import SIZES, VLM, batch, noise, statistics, tiny_config, tiny_policy

from lerobot_pi0 import cli
from lerobot_pi0.checkpoints import adapters
from lerobot_pi0.checkpoints.files import Checkpoint
from lerobot_pi0.conversion import merge
from lerobot_pi0.errors import CheckpointError, MissingFileError
from lerobot_pi0.inputs.policy import load_adapters, policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy

__all__ = ["dataset", "in_tree_folder"]  # fixtures

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")
HEADS_OF = {"pi0": HEADS, "pi05": ("action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj")}
EXPERT = {f"expert.layers.{i}.{name}" for i in range(VLM.depth) for name in LINEAR}
# Of the last layer's tokens nobody reads more than keys and values.
LANGUAGE = {
    f"vlm.layers.{i}.{name}" for i in range(VLM.depth) for name in LINEAR if i == 0 or name[0] in "kv"
}


of_both = pytest.mark.parametrize("model", HEADS_OF, indirect=True)


@pytest.fixture
def base(tmp_path, model) -> Path:
    folder = tmp_path / "base"
    tiny_policy(model).save_pretrained(folder)
    return folder


def wrap(base: Path, peft: dict[str, Any] | None = None, **changes: Any) -> Any:
    """As lerobot-train does: the policy from a checkpoint, then `--peft`."""
    model = json.loads((base / "config.json").read_text())["type"].removeprefix("lerobot_")
    config = tiny_config(model, ema_decay=0.0, **changes)  # what is saved is what the test makes of it
    config.pretrained_path = base
    given: Any = {"dataset_stats": statistics(), "dataset_meta": SimpleNamespace(stats=statistics())}
    policy = policy_class(config).from_pretrained(base, config=config, **given)
    torch.manual_seed(1)
    return policy.wrap_with_peft(peft_cli_overrides=asdict(PeftConfig(**peft or {})))


def move(wrapped: Any) -> None:
    """As if it had been trained: what trains is somewhere else."""
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def save(wrapped: Any, folder: Path) -> Path:
    """As lerobot-train does."""
    wrapped.save_pretrained(folder)
    wrapped.config.save_pretrained(folder)
    for pipeline in make_pre_post_processors(wrapped.config, dataset_stats=statistics()):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base, tmp_path) -> Path:
    wrapped = wrap(base)
    move(wrapped)
    return save(wrapped, tmp_path / "adapters")


def load(folder: Path) -> Any:
    """As lerobot-rollout does."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    return _load_pretrained_policy(config).eval()


def chunk(policy: Any) -> torch.Tensor:
    return policy.predict_action_chunk(batch_of(policy), noise=noise())


def batch_of(policy: Any) -> dict[str, Any]:
    return batch(model=policy.config.type.removeprefix("lerobot_"))


def lora_layers(wrapped: Any) -> Iterator[tuple[str, Any]]:
    for name, module in wrapped.get_base_model().model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


# Where adapters go.


@of_both
@pytest.mark.parametrize("freeze", ["nothing", "vision", "vlm"])
def test_default_targets_are_attention_and_mlp_of_the_stacks_that_train(base, model, freeze):
    """The adaptive norms of π0.5 have none and do not train, as in openpi."""
    wrapped = wrap(base, freeze=freeze)
    found = {name for name, _ in lora_layers(wrapped)}
    assert found == (EXPERT if freeze == "vlm" else EXPERT | LANGUAGE)
    modules = wrapped.get_base_model().model.named_modules()
    assert {name for name, module in modules if hasattr(module, "modules_to_save")} == {*HEADS_OF[model]}


@of_both
def test_the_vision_tower_trains_in_full_beside_the_projections_where_it_is_named(base, model, tmp_path):
    """As openpi's LoRA does (docs/finetuning.md)."""
    wrapped = wrap(base, {"full_training_modules": ["vision", *HEADS_OF[model]]})
    modules = dict(wrapped.get_base_model().model.named_modules())
    assert {name for name, of in modules.items() if hasattr(of, "modules_to_save")} == (
        {"vision", *HEADS_OF[model]}
    )
    assert all(of.requires_grad for of in modules["vision.modules_to_save"].parameters())
    move(wrapped)
    wanted = chunk(wrapped.eval())
    torch.testing.assert_close(chunk(load(save(wrapped, tmp_path / "adapters"))), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("peft", "vlm", "expert"),
    [
        ({}, (16, 16), (32, 32)),
        ({"r": 4}, (4, 4), (8, 8)),
        ({"r": 4, "lora_alpha": 6}, (4, 6), (8, 6)),
    ],
)
def test_ranks_are_openpis_and_alpha_is_the_rank_of_its_stack(base, peft, vlm, expert):
    for name, layer in lora_layers(wrap(base, peft)):
        wanted = expert if name.startswith("expert") else vlm
        assert (layer.r["default"], layer.lora_alpha["default"]) == wanted, name
        assert layer.scaling["default"] == wanted[1] / wanted[0]


def test_targets_that_are_given_have_one_rank_and_alpha_is_it(base):
    layers = dict(lora_layers(wrap(base, {"target_modules": ["down_proj", "state_proj"], "r": 4})))
    # The heads train in full already; the last layer's MLP has no influence.
    assert set(layers) == {
        "vlm.layers.0.down_proj",
        *(f"{stack}.layers.{i}.down_proj" for stack in ("expert", "vision") for i in range(2)),
    }
    assert {(layer.r["default"], layer.lora_alpha["default"]) for layer in layers.values()} == {(4, 4)}


@pytest.mark.parametrize(("freeze", "parts"), [("vision", {"vlm", "expert"}), ("vlm", {"expert"})])
def test_what_is_frozen_gets_no_adapters_whatever_the_targets(base, freeze, parts):
    wrapped = wrap(base, {"target_modules": ["q_proj"]}, freeze=freeze)
    assert {name.partition(".")[0] for name, _ in lora_layers(wrapped)} == parts


def test_what_trains_in_full_can_be_given(base):
    wrapped = wrap(base, {"full_training_modules": []})
    assert all("lora_" in name for name, p in wrapped.named_parameters() if p.requires_grad)


@of_both
@pytest.mark.parametrize("freeze", ["nothing", "vlm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_that_trains_gets_a_gradient_and_nothing_else_does(base, freeze, checkpointing):
    wrapped = wrap(base, freeze=freeze, gradient_checkpointing=checkpointing)
    move(wrapped)  # the first gradient of A would be zero, because B is
    wrapped.get_optim_params()
    wrapped.train()
    wrapped(batch_of(wrapped))[0].backward()
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_new_adapters_change_nothing(base):
    torch.testing.assert_close(chunk(wrap(base).eval()), chunk(Pi0Policy.from_pretrained(base)))


def test_one_line_says_what_trains(base, caplog):
    caplog.set_level("INFO", "lerobot_pi0")
    wrapped = wrap(base)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    (line,) = (record.message for record in caplog.records if record.message.startswith("LoRA:"))
    assert f"{trained / 1e6:.3g} of" in line
    assert "rank 16 in 9 layers of vlm, rank 32 in 14 layers of expert" in line
    assert "in full: state_proj, action_in_proj" in line


# How they compute.


def test_adapters_train_in_float32_and_compute_in_the_networks_dtype_over_a_base_in_it(base):
    wrapped = wrap(base, dtype="bfloat16")
    wrapped.get_optim_params()
    for name, parameter in wrapped.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    seen = set()
    for _, layer in lora_layers(wrapped):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.register_forward_hook(
                lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype})
            )
    wrapped.train()
    wrapped(batch())[0].backward()
    assert seen == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)


@of_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_adapters_act_as_those_that_were_trained(base, tmp_path, dtype):
    wrapped = wrap(base, dtype=dtype)
    wrapped.get_optim_params()
    move(wrapped)
    close = {"rtol": 0, "atol": 1e-5 if dtype == "float32" else 3e-2}
    torch.testing.assert_close(chunk(load(save(wrapped, tmp_path / "saved"))), chunk(wrapped.eval()), **close)


def test_what_trained_in_full_is_not_rounded_by_a_base_in_bfloat16(tmp_path):
    tiny_policy().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wrapped = wrap(tmp_path / "base", dtype="bfloat16")
    wrapped.get_optim_params()
    move(wrapped)
    wanted = {
        name: parameter.clone()
        for name, parameter in wrapped.named_parameters()
        if "modules_to_save" in name or "lora_" in name
    }
    loaded = dict(load(save(wrapped, tmp_path / "adapters")).named_parameters())
    for name, parameter in wanted.items():
        assert torch.equal(loaded[name], parameter), name


# Which weights they need.


def test_adapters_name_their_base_wherever_they_are_used_from(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    (base.parent / "last").symlink_to(base)  # moves with the run
    settings = wrap(Path("last")).peft_config["default"]
    assert settings.base_model_name_or_path == str(base.resolve())


def test_adapters_over_a_branch_of_the_hub_record_its_commit(base):
    commit = base.parent / "models--me--pi0" / "snapshots" / "0123abc"
    found = adapters.Base.of("me/pi0", "main", commit, Checkpoint(base))
    assert (found.name, found.revision) == ("me/pi0", "0123abc")


def test_fingerprint_is_that_of_the_weights_and_not_of_the_layout(base, published):
    assert Checkpoint(base).fingerprint() == Checkpoint(published).fingerprint()


@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor + 1e-3, torch.Tensor.bfloat16, torch.Tensor.t],
    ids=["value", "dtype", "shape"],
)
def test_fingerprint_of_other_weights_is_another(base, change):
    tensors, name = load_file(base / "model.safetensors"), "model.expert.layers.1.down_proj.weight"
    tensors[name].zero_()  # of which the first bytes are the same in every dtype and shape
    save_file(tensors, base / "model.safetensors")
    before = Checkpoint(base).fingerprint()
    save_file(tensors | {name: change(tensors[name]).contiguous()}, base / "model.safetensors")
    assert Checkpoint(base).fingerprint() != before


def test_adapters_over_weights_that_have_changed_are_refused(saved, base):
    tensors = {name: tensor * 1.01 for name, tensor in load_file(base / "model.safetensors").items()}
    was = Checkpoint(base).fingerprint()
    save_file(tensors, base / "model.safetensors")
    found = Checkpoint(base).fingerprint()
    with pytest.raises(
        CheckpointError,
        match=rf"adapters in '{re.escape(str(saved))}'.*other weights than '{re.escape(str(base))}' holds "
        rf"now \(fingerprint {was}, found {found}\).*revision in adapter_config.json.*train new adapters",
    ):
        load(saved)


def test_adapters_without_their_base_say_which_it_is_and_what_to_do(saved, base):
    base.rename(base.parent / "elsewhere")
    with pytest.raises(
        FileNotFoundError,
        match=rf"adapters in '{re.escape(str(saved))}' need.*trained over, '{re.escape(str(base))}'.*"
        r"base_model_name_or_path.*lerobot-pi0 merge --adapter=",
    ):
        load(saved)
    file = saved / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(base.parent / "elsewhere")}
    file.write_text(json.dumps(settings))
    chunk(load(saved))  # the second way out


@pytest.mark.parametrize("with_config", [False, True])
def test_adapters_where_a_whole_checkpoint_is_needed_are_refused_by_name(saved, base, with_config):
    with pytest.raises(
        CheckpointError,
        match=rf"holds adapters over the weights of '{re.escape(str(base))}'.*"
        rf"lerobot-pi0 merge --adapter={re.escape(str(saved))} --output=",
    ):
        Pi0Policy.from_pretrained(saved, config=tiny_config() if with_config else None)


def test_adapters_over_random_weights_are_refused():
    with pytest.raises(ValueError, match=r"random weights are of no use.*--policy\.path.*without --peft"):
        tiny_policy().wrap_with_peft(peft_cli_overrides=asdict(PeftConfig()))


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"method_type": "MISS"}, r"--peft\.method_type=MISS: this policy has LoRA adapters only"),
        ({"init_type": "pissa"}, r"--peft\.init_type=pissa would change the base's weights.*gaussian"),
    ],
)
def test_adapters_that_could_not_be_merged_are_refused(base, peft, message):
    with pytest.raises(ValueError, match=message):
        wrap(base, peft)


def test_a_config_of_dora_is_refused(base):
    policy = Pi0Policy.from_pretrained(base)
    with pytest.raises(ValueError, match="plain LoRA adapters only, not DoRA"):
        policy.wrap_with_peft(LoraConfig(target_modules=["q_proj"], use_dora=True))


def change_settings(**settings: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"config\.json holds list"),
        (change_settings(base_model_name_or_path=None), r"config\.json has no \['base_model_name_or_path'\]"),
        (change_settings(peft_type="NOBODYS"), r"config\.json is damaged or of another version of PEFT"),
        (change_settings(use_dora=True), r"config\.json: this policy has plain LoRA.*not DoRA"),
        (change_settings(lora_alpha=True), r"config\.json has no \['lora_alpha'\], or not as PEFT writes"),
        (change_settings(alpha_pattern=[]), r"config\.json has no \['alpha_pattern'\]"),
        (
            change_weights(lambda of: of.update({name: x.int() for name, x in of.items()})),
            r"model\.safetensors has base_model.* in I32, which is no float",
        ),
        (change_settings(r=5), r"model\.safetensors does not fit adapter_config\.json"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{"),
            r"model\.safetensors is dam",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"model\.safetensors is missing"),
        (
            change_weights(lambda of: of.pop("base_model.model.model.state_proj.weight")),
            r"model\.safetensors does not fit adapter_config\.json or its base .*state_proj\.weight",
        ),
        (change_weights(lambda tensors: tensors.popitem()), r"model\.safetensors does not hold.*1 tensors"),
        (
            change_weights(lambda tensors: tensors.update({"base_model.model.more": torch.zeros(1)})),
            r"model\.safetensors does not hold.*1 tensors.*base_model\.model\.more",
        ),
    ],
)
def test_damaged_adapters_are_refused_with_the_name_of_the_file(saved, damage, message):
    damage(saved)
    config: Any = PreTrainedConfig.from_pretrained(saved)
    with pytest.raises((CheckpointError, MissingFileError), match=rf"adapter_{message}"):
        load_adapters(str(saved), saved, config)


def test_adapters_over_a_published_layout_keep_their_own_processors(published, tmp_path):
    """LeRobot takes those from `pretrained_path`, which is empty after a policy was made of that layout."""
    wrapped = wrap(published)
    assert wrapped.config.pretrained_path is None
    move(wrapped)
    wrapped.get_optim_params()
    folder = save(wrapped, tmp_path / "saved")
    loaded = load(folder)
    assert loaded.config.pretrained_path == folder
    assert loaded.config.base_checkpoint == str(published)
    torch.testing.assert_close(chunk(loaded), chunk(wrapped.eval()), rtol=0, atol=1e-5)


@of_both
def test_adapters_over_a_base_of_the_other_model_are_refused(saved, base, model):
    """As when the base's repository was written over."""
    other = {"pi0": "pi05", "pi05": "pi0"}[model]
    tiny_policy(other).save_pretrained(base)
    with pytest.raises(CheckpointError, match=rf"Set --policy\.type=lerobot_{other}"):
        load(saved)


# Merging.


@of_both
@pytest.mark.parametrize("source", ["base", "published"])
def test_merged_policy_acts_as_base_and_adapters_do_and_needs_neither(request, tmp_path, model, source):
    folder = request.getfixturevalue(source)
    wrapped = wrap(folder)
    move(wrapped)
    saved = save(wrapped, tmp_path / "adapters")
    wanted, plain = chunk(load(saved)), chunk(tiny_policy(model))
    merge.merge(str(saved), tmp_path / "merged")
    folder.rename(tmp_path / "gone")
    saved.rename(tmp_path / "gone_too")
    merged = policy_class(wrapped.config).from_pretrained(tmp_path / "merged")
    assert not merged.config.use_peft
    assert merged.config.base_fingerprint is None
    torch.testing.assert_close(chunk(merged), wanted, rtol=0, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.1
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"policy_preprocessor.json", "policy_postprocessor.json"} < names
    assert not {name for name in names if name.startswith("adapter")}


@pytest.mark.parametrize(
    ("file", "computes", "folded"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_merged_weights_are_as_wide_as_the_bases_or_as_what_the_policy_computes_in(
    tmp_path, file, computes, folded
):
    tiny_policy().to(getattr(torch, file)).save_pretrained(tmp_path / "base")
    wrapped = wrap(tmp_path / "base", dtype=computes)
    wrapped.get_optim_params()
    move(wrapped)
    difference, _ = merge.merge(str(save(wrapped, tmp_path / "saved")), tmp_path / "merged")
    assert difference < (1e-5 if computes == "float32" else 5e-2)  # which rounds products instead of weights
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    untouched = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in tensors.items():
        module = name.removeprefix("model.").rpartition(".")[0]
        if module in HEADS:
            assert tensor.dtype == torch.float32, name
        elif module in EXPERT | LANGUAGE:
            assert tensor.dtype == getattr(torch, folded), name
        else:
            assert torch.equal(tensor, untouched[name]), name


def test_command_merges_and_prints_how_equal_the_actions_are(saved, tmp_path, monkeypatch, capsys):
    output = tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "merge", f"--adapter={saved}", f"--output={output}"])
    cli.main()
    found = re.search(r"differ from those of base and adapters by at most (\S+) ", capsys.readouterr().out)
    assert found
    assert float(found[1]) < 1e-5
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert f"{output} exists: give another --output" in capsys.readouterr().err


def test_merging_what_has_no_adapters_says_so(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapters.*--peft.*a plain checkpoint already"):
        merge.merge(str(base), tmp_path / "merged")


def test_adapters_go_on_training_with_the_tokenizer_that_they_have(published, tmp_path):
    folder = save(wrap(published), tmp_path / "adapters")
    config: Any = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path, config.tokenizer = folder, "google/paligemma-3b-pt-224"
    meta: Any = SimpleNamespace(stats=statistics())
    given: Any = {"config": config, "dataset_stats": statistics(), "dataset_meta": meta}
    policy = Pi0Policy.from_pretrained(published, **given)
    found, wanted = (of.model.get_parameter("state_proj.weight") for of in (policy, tiny_policy()))
    assert torch.equal(found, wanted)
    config.pretrained_path = None  # a policy that is new needs its own
    with pytest.raises(OSError, match="google/paligemma-3b-pt-224"):
        Pi0Policy.from_pretrained(published, **given)


def test_merging_adapters_of_another_policy_says_where_they_are_merged(saved, tmp_path):
    (saved / "config.json").write_text(json.dumps({"type": "pi0"}))
    with pytest.raises(CheckpointError, match=r"of type 'pi0'.*merge_and_unload.*lerobot-pi0 convert"):
        merge.merge(str(saved), tmp_path / "merged")


def test_merged_policy_that_would_act_otherwise_is_not_written(saved, tmp_path, monkeypatch):
    fold = merge.fold
    monkeypatch.setattr(merge, "fold", lambda *given: fold(*given) * 1.1)
    with pytest.raises(RuntimeError, match="actions differ from those of base and adapters"):
        merge.merge(str(saved), tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]


def test_what_the_sampler_leaves_out_like_merge_is_noticed(saved, tmp_path, monkeypatch):
    """The merged policy is compared with the network, in which adapters act by PEFT's own forward."""

    def without_adapters(network: Any, name: str, tensors: Any = None) -> torch.Tensor:
        return tiny_policy().model.state_dict()[name]

    monkeypatch.setattr(merge, "fold", without_adapters)
    monkeypatch.setattr("lerobot_pi0.sampling.swap.fold", without_adapters)
    with pytest.raises(RuntimeError, match="actions differ from those of base and adapters"):
        merge.merge(str(saved), tmp_path / "merged")


# LeRobot's own commands.


@pytest.fixture(scope="module")
def ran(dataset, in_tree_folder, tmp_path_factory) -> Path:
    """Adapters over in-tree weights, with the VLM frozen, resumed and evaluated; and over a checkpoint of
    ours, which is then merged, evaluated and trained on."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, *arguments: str) -> list[str]:
        return train_command(dataset, folder / name, *arguments)

    def evaluate(name: str) -> list[str]:
        return [
            "lerobot-eval",
            f"--policy.path={checkpoint(folder, name)}",
            "--policy.device=cpu",
            "--env.type=metaworld_fast",
            "--env.task=faucet-open-v3",
            "--env.episode_length=4",
            "--env.image_size=64",
            "--eval.n_episodes=1",
            "--eval.batch_size=1",
            f"--output_dir={folder / 'evaluation' / name}",
        ]

    lora, sizes = "--peft.method_type=LORA", ["--policy.type=lerobot_pi0", *SIZES, "--policy.tokenizer=small"]
    from_in_tree = [*sizes, f"--policy.pretrained_path={in_tree_folder}", "--policy.freeze=vlm"]
    first = [
        train("published", *from_in_tree, lora, "--steps=2", "--policy.optimizer_lr=1e-2"),
        [
            "lerobot-train",
            f"--config_path={checkpoint(folder, 'published', '000002')}/train_config.json",
            "--resume=true",
            f"--output_dir={folder / 'published'}",
            "--steps=4",
        ],
        evaluate("published"),
        train("new", *sizes, "--steps=1"),
        train("ours", f"--policy.path={checkpoint(folder, 'new')}", lora, "--peft.r=2", "--steps=1"),
    ]
    run(folder, first).succeed()
    merged = folder / "merged" / "checkpoints" / "last" / "pretrained_model"
    merged.parent.mkdir(parents=True)
    merge.merge(str(checkpoint(folder, "ours")), merged)
    then = [evaluate("merged"), train("on", f"--policy.path={merged}", "--steps=1")]
    (folder / "first.txt").write_text((folder / "log.txt").read_text())
    run(folder, then).succeed()
    return folder


@pytest.mark.slow
def test_adapters_over_in_tree_weights_are_trained_resumed_and_evaluated(ran, in_tree_folder):
    log = (ran / "first.txt").read_text()
    assert "rank 32 in 14 layers of expert; in full: state_proj" in log
    settings = json.loads((checkpoint(ran, "published") / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(in_tree_folder)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {"expert\\..*": 32}
    tensors = [
        load_file(checkpoint(ran, "published", step) / "adapter_model.safetensors")
        for step in ("000002", "000004")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, before in tensors[0].items():
        assert (not torch.equal(before, tensors[1][name])) or not before.any(), name
    policy = load(checkpoint(ran, "published"))
    assert policy.config.base_checkpoint == str(in_tree_folder)
    assert "lerobot_pi0_tokenizer" in (checkpoint(ran, "published") / "policy_preprocessor.json").read_text()
    assert (ran / "evaluation" / "published" / "eval_info.json").is_file()


@pytest.mark.slow
def test_merged_adapters_are_evaluated_and_trained_on_like_any_checkpoint(ran):
    assert (ran / "evaluation" / "merged" / "eval_info.json").is_file()
    weights = [load_file(checkpoint(ran, run) / "model.safetensors") for run in ("new", "merged", "on")]
    name = "model.expert.layers.0.q_proj.weight"
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert not torch.equal(weights[0][name], weights[1][name])
    assert (weights[1][name] - weights[2][name]).abs().max() < 1e-3
    assert not Pi0Policy.from_pretrained(checkpoint(ran, "on")).config.use_peft
