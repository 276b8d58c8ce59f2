"""Policies of ours in other layouts, and back: nothing is lost, and LeRobot's own runs what it gets."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.processor import PolicyProcessorPipeline
from safetensors.torch import load_file, save_file
from small_policies import make_small, run, save
from tiny_policy import ACTION, CHUNK, STATE

from lerobot_pi0 import Pi0Config
from lerobot_pi0.checkpoints.files import Checkpoint
from lerobot_pi0.checkpoints.golden_actions import write_golden_actions
from lerobot_pi0.checkpoints.layouts import FAMILIES, PI0, PI05, Family, to_openpi
from lerobot_pi0.checkpoints.published import TRAININGS
from lerobot_pi0.conversion import convert, targets
from lerobot_pi0.conversion.merge import merge
from lerobot_pi0.data.normalization import NormalizationStatistics
from lerobot_pi0.data.relative_actions import make_reference_state
from lerobot_pi0.data.statistics import read_statistics
from lerobot_pi0.errors import CheckpointError, OutputExistsError, UserError
from lerobot_pi0.model import SiglipConfig
from lerobot_pi0.modeling_pi0 import Pi0Policy

BACK: dict[str, Any] = {"tokenizer": "small", "vision_heads": 2}  # what LeRobot's and openpi's do not say
# And what openpi's do not say of π0.5.
UNSAID: dict[Family, dict[str, Any]] = {
    PI0: {},
    PI05: {"state_in_prompt": True, "delta_mask": []},
}
# What LeRobot's own policy knows of ours, and what openpi's files say.
BY_IN_TREE = (
    "chunk_size",
    "n_action_steps",
    "num_inference_steps",
    "max_state_dim",
    "max_action_dim",
    "tokenizer_max_length",
    "normalization_mapping",
    "dtype",
    "cameras",
    "vision",
    "vlm",
    "expert",
    "action_feature_names",
    "relative_actions",
    "absolute_joints",
    "reference_state",
    "input_features",
    "output_features",
)
BY_OPENPI = ("chunk_size", "max_state_dim", "max_action_dim", "vision", "vlm", "expert", "dtype")


@pytest.fixture(scope="module", autouse=True)
def small_sizes() -> Iterator[None]:
    """Those that LeRobot and openpi have names for are small ones here."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        yield


@pytest.fixture(scope="module")
def family(request) -> Family:
    """π0, or what `of_both` says."""
    return getattr(request, "param", PI0)


of_both = pytest.mark.parametrize("family", FAMILIES, ids=lambda of: of.name, indirect=True, scope="module")


@pytest.fixture(scope="module")
def ours(tmp_path_factory, family, small_sizes) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "ours", family)


@pytest.fixture(scope="module")
def in_tree(ours) -> Path:
    run(ours, ours.parent / "in_tree", to="lerobot", compare=False)
    return ours.parent / "in_tree"


@pytest.fixture(scope="module")
def openpi(ours) -> Path:
    run(ours, ours.parent / "openpi", to="openpi-pytorch", asset_id="my_robot")
    return ours.parent / "openpi"


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def settings(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    config = PreTrainedConfig.from_pretrained(folder)
    return {name: getattr(config, name) for name in names}


def assert_same_weights(found: Path, wanted: Path) -> None:
    ours, theirs = dict(Checkpoint(found)), dict(Checkpoint(wanted))
    assert ours.keys() == theirs.keys()
    assert [
        name
        for name in ours
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ] == []


def assert_same_statistics(found: Path, wanted: Path, names: tuple[str, ...]) -> None:
    ours, theirs = read_statistics(found), read_statistics(wanted)
    for key in ("observation.state", "action"):
        for name in names:
            assert ours[key][name].tolist() == theirs[key][name].tolist(), (key, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@of_both
def test_to_lerobots_own_policy_and_back(family, dtype, tmp_path):
    ours = save(tmp_path / "ours", family, dtype=dtype, num_inference_steps=4, solver="ab2")
    text = run(ours, tmp_path / "in_tree", to="lerobot")
    assert f"LeRobot's own {family.name} integrates by Euler" in text
    assert f"Run as LeRobot's own {family.name} and as ours: actions differ by" in text
    text = run(tmp_path / "in_tree", tmp_path / "back", **BACK)
    assert f"Run as LeRobot's own {family.name} and as ours: actions differ by" in text
    assert ("LeRobot up to 0.4.4" in text) == (family is PI05)
    assert_same_weights(tmp_path / "back", ours)
    assert_same_statistics(tmp_path / "back", ours, ("mean", "std", "min", "max", "q01", "q99"))
    assert settings(tmp_path / "back", BY_IN_TREE) == settings(ours, BY_IN_TREE)


@of_both
def test_to_openpi_and_back(family, tmp_path):
    ours = save(tmp_path / "ours", family, dtype="bfloat16")
    run(ours, tmp_path / "openpi", to="openpi-pytorch", asset_id="my_robot")
    assert (tmp_path / "openpi" / "assets" / "my_robot" / "norm_stats.json").is_file()
    cameras = {"base": "front", "left_wrist": "wrist"}
    run(tmp_path / "openpi", tmp_path / "back", **BACK, **UNSAID[family], cameras=cameras)
    assert_same_weights(tmp_path / "back", ours)
    assert_same_statistics(tmp_path / "back", ours, ("mean", "std", "q01", "q99"))
    assert settings(tmp_path / "back", BY_OPENPI) == settings(ours, BY_OPENPI)


@of_both
def test_running_a_converted_policy_keeps_no_weights_in_memory(in_tree, tmp_path, monkeypatch):
    """A weight that was used is mapped from its file anew, and so takes none until it is read again."""
    kept = []

    def write(folder: Path, config: Pi0Config, predict: Any, device: torch.device) -> None:
        policy = predict.__self__
        before = {name: weight.data_ptr() for name, weight in policy.model.named_parameters()}
        write_golden_actions(folder, config, predict, device)
        for name, weight in policy.model.named_parameters():
            assert torch.equal(weight, Checkpoint(folder)[name])
            if weight.data_ptr() == before[name] and weight.requires_grad:  # all others are used
                kept.append(name)

    monkeypatch.setattr(convert, "write_golden_actions", write)
    run(in_tree, tmp_path / "back", **BACK)
    assert [name for name in kept if not name.startswith("vision.patch_embedding.")] == []


@of_both
def test_lerobots_own_policy_loads_and_normalizes_the_same(family, ours, in_tree, tmp_path, capsys):
    """By its own loader and its own processors; the actions are compared by the conversion itself."""
    copy(ours, tmp_path / "ours")
    copy(in_tree, tmp_path / "in_tree")
    policy: Any = get_policy_class(family.in_tree).from_pretrained(tmp_path / "in_tree")
    printed = capsys.readouterr().out
    assert "All keys loaded successfully!" in printed  # else it would have random weights
    assert "Could not load" not in printed
    pipeline = json.loads((tmp_path / "in_tree" / "policy_preprocessor.json").read_text())
    by_name = {step["registry_name"]: step["config"] for step in pipeline["steps"]}
    assert by_name["tokenizer_processor"]["tokenizer_name"] == "small"
    state = torch.arange(1, STATE + 1).float()
    found = {}
    for name in ("ours", "in_tree"):
        folder = tmp_path / name
        saved = json.loads((folder / "policy_preprocessor.json").read_text())
        # Both tokenizers out of the way: "small" is none that transformers has.
        saved["steps"] = [step for step in saved["steps"] if "tokenizer" not in step["registry_name"]]
        (folder / "policy_preprocessor.json").write_text(json.dumps(saved))
        prepare: Any = PolicyProcessorPipeline.from_pretrained(
            folder, config_filename="policy_preprocessor.json"
        )
        found[name] = prepare({"observation.state": state, "task": "push"})["observation.state"]
    assert torch.equal(found["ours"], found["in_tree"])
    assert [*policy.config.image_features] == ["observation.images.front", "observation.images.wrist"]


def make_relative(folder: Path, absolute_joints: list[str], **names: Any) -> Path:
    config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(config, Pi0Config)
    config.relative_actions, config.absolute_joints = True, absolute_joints
    config.state_feature_names = names.get("state", config.state_feature_names)
    config.reference_state = make_reference_state(
        config, cast(NormalizationStatistics, read_statistics(folder))
    )
    config.save_pretrained(folder)
    return folder


@of_both
def test_relative_actions_go_both_ways(family, ours, tmp_path):
    relative = make_relative(copy(ours, tmp_path / "ours"), ["gripper"])
    run(relative, tmp_path / "in_tree", to="lerobot", compare=False)
    saved = json.loads((tmp_path / "in_tree" / "policy_preprocessor.json").read_text())
    (step,) = [step for step in saved["steps"] if step["registry_name"] == "relative_actions_processor"]
    assert step["config"]["enabled"] is True
    assert step["config"]["exclude_joints"] == ["gripper"]
    run(tmp_path / "in_tree", tmp_path / "back", **BACK, compare=False)
    assert settings(tmp_path / "back", BY_IN_TREE) == settings(relative, BY_IN_TREE)
    text = run(relative, tmp_path / "openpi", to="openpi-pytorch")
    assert "the mask (True, True, True, False)" in text


def test_joints_in_another_order_than_the_states_cannot_be_said_elsewhere(ours, tmp_path):
    names = ["force", "a", "b", "elbow", "wrist"]
    relative = make_relative(copy(ours, tmp_path / "ours"), ["gripper", "shoulder"], state=names)
    with pytest.raises(ValueError, match=r"actions \[1, 2\] are relative to \[3, 4\] of the state"):
        run(relative, tmp_path / "in_tree", to="lerobot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_policy_of_old_lerobot_with_statistics_among_its_weights(ours, in_tree, tmp_path):
    copy(in_tree, tmp_path / "old")
    tensors = {}
    for name, tensor in load_file(tmp_path / "old" / "model.safetensors").items():
        name = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
        name = name.replace("paligemma.lm_head.", "paligemma.language_model.lm_head.")
        tensors[name.replace("paligemma.model.", "paligemma.")] = tensor
    for key, size in (("inputs.buffer_observation_state", STATE), ("targets.buffer_action", ACTION)):
        tensors[f"normalize_{key}.mean"] = torch.arange(size).float()
        tensors[f"normalize_{key}.std"] = torch.zeros(size)
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    for file in (tmp_path / "old").glob("policy_p*"):
        file.unlink()
    saved = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("paligemma_variant", "dtype", "num_inference_steps", "use_relative_actions"):
        del saved[name]
    saved |= {"num_steps": 7, "resize_imgs_with_padding": [28, 28], "proj_width": 32}
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    text = run(tmp_path / "old", tmp_path / "back", **BACK)
    assert "up to 0.3" in text
    assert_same_weights(tmp_path / "back", ours)
    assert read_statistics(tmp_path / "back")["action"]["std"].tolist() == pytest.approx([1e-8] * ACTION)
    assert Pi0Policy.from_pretrained(tmp_path / "back").config.num_inference_steps == 7


@pytest.mark.parametrize("equal", [True, False])
def test_a_text_head_that_is_not_the_embedding_is_warned_about(ours, in_tree, tmp_path, caplog, equal):
    copy(in_tree, tmp_path / "both")
    file = tmp_path / "both" / "model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if name.endswith("paligemma.lm_head.weight"))
    table = head.replace("lm_head", "model.language_model.embed_tokens")
    tensors[table] = tensors[head].clone()
    tensors[head] += not equal
    save_file(tensors, file)
    run(tmp_path / "both", tmp_path / "back", **BACK)
    assert ("the text head of" in caplog.text) == (not equal)
    assert_same_weights(tmp_path / "back", ours)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def be_smolvla(folder: Path) -> None:
    save_file({"model.vlm_with_expert.lm_expert.norm.weight": torch.zeros(1)}, folder / "model.safetensors")


def be_another_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"type": "act"}))


def lose_statistics(folder: Path) -> None:
    for file in folder.glob("policy_preprocessor*"):
        file.unlink()


def unnormalizer(folder: Path) -> Path:
    (file,) = folder.glob("policy_postprocessor_step_*_unnormalizer_processor.safetensors")
    return file


def unnormalize_otherwise(folder: Path) -> None:
    file = unnormalizer(folder)
    save_file(load_file(file) | {"action.std": 2 * load_file(file)["action.std"]}, file)


def lose_the_postprocessor(folder: Path) -> None:
    (folder / "policy_postprocessor.json").unlink()


def unnormalize_by_another_mode(folder: Path) -> None:
    file = folder / "policy_postprocessor.json"
    file.write_text(file.read_text().replace('"MEAN_STD"', '"MIN_MAX"'))


def have_another_robots_statistics(folder: Path) -> None:
    (file,) = folder.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    save_file({name: torch.ones(9) for name in load_file(file)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "damaged or cut off.*download it again"),
        (lose_a_shard, "names the shard .* which is missing"),
        (be_smolvla, "this is a SmolVLA checkpoint"),
        (be_another_type, "a policy of type 'act', not π0"),
        (lose_statistics, "has no statistics.*--statistics=false"),
        (lambda folder: unnormalizer(folder).write_bytes(b""), "unnormalizer_processor.* damaged or cut off"),
        (unnormalize_otherwise, r"not unnormalized as they were normalized: action.std is"),
        (unnormalize_by_another_mode, "norm_map is MEAN_STD in the normalizer, MIN_MAX in the unnormalizer"),
        (lose_the_postprocessor, "policy_postprocessor.json has no statistics of the action"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds list, expected"),
        (lambda folder: (folder / "policy_preprocessor.json").write_text("{}"), "has no list of 'steps'"),
        (have_another_robots_statistics, r"statistics of \[9\] dimensions.*the robot has 5"),
    ],
)
def test_damaged_source_says_why_and_leaves_nothing(damage, message, in_tree, tmp_path):
    source = copy(in_tree, tmp_path / "source")
    damage(source)
    with pytest.raises((CheckpointError, ValueError), match=message):
        run(source, tmp_path / "some" / "folders" / "target", **BACK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_that_was_there_before_is_neither_used_nor_deleted(ours, tmp_path):
    precious = tmp_path / "target.unfinished" / "precious"
    precious.parent.mkdir()
    precious.write_text("data")
    with pytest.raises(OutputExistsError, match=r"target.unfinished exists.*move or delete it"):
        run(ours, tmp_path / "target")
    with pytest.raises(OutputExistsError, match=r"target.unfinished exists.*choose another --output"):
        merge(str(ours), tmp_path / "target")
    assert precious.read_text() == "data"


@pytest.mark.parametrize("asset_id", ["../../x", "a/../../../x", "/tmp/x"])
def test_statistics_are_written_inside_the_target(asset_id, ours, tmp_path):
    with pytest.raises(UserError, match=r"--asset_id=.* leads out of TARGET/assets"):
        run(ours, tmp_path / "some" / "target", to="openpi-pytorch", asset_id=asset_id)
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_source_is_not_copied(ours, tmp_path):
    source = copy(ours, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "policy_preprocessor_step_9.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_links_within_a_snapshot_of_the_hub_are_followed(ours, tmp_path):
    copy(ours, tmp_path / "blobs")
    source = tmp_path / "snapshots" / "abc"
    source.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (source / file.name).symlink_to(file)
    run(source, tmp_path / "target")
    assert not any(file.is_symlink() for file in (tmp_path / "target").iterdir())


def test_flags_about_what_a_policy_says_itself_are_refused(ours, tmp_path):
    with pytest.raises(ValueError, match="--chunk_size says what openpi's checkpoints do not"):
        run(ours, tmp_path / "target", to="lerobot", chunk_size=10)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"tokenizer": "other"}, "leave --tokenizer out"),
        ({"statistics": False}, "leave --statistics=false out"),
        ({"asset_id": "arm"}, "--asset_id=arm is a folder of openpi's"),
        ({"lora_alpha": 8.0}, "--lora_alpha says what openpi's checkpoints do not"),
    ],
)
def test_flags_without_an_effect_are_refused(flags, named, ours, tmp_path):
    with pytest.raises(ValueError, match=named):
        run(ours, tmp_path / "target", **flags)


def test_another_tokenizer_goes_into_another_layout(ours, tmp_path):
    run(ours, tmp_path / "in_tree", to="lerobot", tokenizer="me/another", compare=False)
    assert "me/another" in (tmp_path / "in_tree" / "policy_preprocessor.json").read_text()


def test_a_config_of_another_version_is_an_error_with_its_place(ours, tmp_path):
    source = copy(ours, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"not_known_yet": 1}))
    with pytest.raises(
        CheckpointError, match=r"config.json is damaged or of another version .*not_known_yet"
    ):
        run(source, tmp_path / "target", to="lerobot")


def test_other_sizes_than_published_ones_cannot_be_said_elsewhere(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "VISION", SiglipConfig())
    for layout in ("lerobot", "openpi-pytorch"):
        with pytest.raises(ValueError, match="this policy is another size: only this package runs it"):
            run(ours, tmp_path / layout, to=layout)


@of_both
def test_a_normalization_that_openpi_does_not_have_cannot_be_said_to_it(family, tmp_path):
    mode = NormalizationMode.QUANTILES if family is PI0 else NormalizationMode.MEAN_STD
    ours = save(tmp_path / "ours", family, normalization_mapping=dict.fromkeys(("STATE", "ACTION"), mode))
    with pytest.raises(UserError, match=f"openpi's {family.name} normalizes .* this policy by {mode.value}"):
        run(ours, tmp_path / "openpi", to="openpi-pytorch")


@of_both
def test_names_on_disk_are_openpis(ours, openpi):
    # The expert's text head is in every file of openpi's, and its strict loading asks for it.
    head = "paligemma_with_expert.gemma_expert.lm_head.weight"
    assert load_file(openpi / "model.safetensors").keys() == {*to_openpi(dict(Checkpoint(ours))), head}


@pytest.fixture(scope="module")
def published(in_tree) -> Path:
    """As lerobot/pi05_base and lerobot/pi0_libero_base: openpi's weights and LeRobot's defaults, without a
    prefix and statistics."""
    folder = copy(in_tree, in_tree.parent / "published")
    file = folder / "model.safetensors"
    save_file({name.removeprefix("model."): of for name, of in load_file(file).items()}, file)
    for file in folder.glob("policy_p*_step_*_normalizer_processor.safetensors"):
        file.unlink()
    for file in folder.glob("policy_p*.json"):
        pipeline = json.loads(file.read_text())
        for step in pipeline["steps"]:
            if "normalizer" in step["registry_name"]:
                step.pop("state_file", None)
        file.write_text(json.dumps(pipeline))
    return folder


of_pi05 = pytest.mark.parametrize("family", [PI05], ids=["π0.5"], indirect=True, scope="module")
ASKED = {"chunk_size": 7, "state_in_prompt": False, "delta_mask": []}


@of_pi05
@pytest.mark.parametrize("left_out", ASKED)
@pytest.mark.parametrize("layout", ["openpi", "published"])
def test_what_no_file_of_a_pi05_says_is_asked_for(family, request, tmp_path, layout, left_out):
    source = request.getfixturevalue(layout)
    given = {name: value for name, value in ASKED.items() if name != left_out}
    if layout == "openpi" and left_out == "chunk_size":
        run(source, tmp_path / "ours", **BACK, **given)  # its config.json says it
        assert settings(tmp_path / "ours", ("chunk_size",)) == {"chunk_size": CHUNK}
        return
    with pytest.raises(UserError, match=rf"does not say how it was trained.*: give --{left_out} \(") as error:
        run(source, tmp_path / "ours", **BACK, **given)
    assert all(name in str(error.value) for name in TRAININGS)
    assert not (tmp_path / "ours").exists()


@of_pi05
def test_a_published_pi05_has_the_settings_and_statistics_that_are_given(openpi, published, ours, tmp_path):
    (norm_stats,) = openpi.glob("assets/*/norm_stats.json")
    run(published, tmp_path / "ours", **BACK, **ASKED, norm_stats=norm_stats)
    config: Any = PreTrainedConfig.from_pretrained(tmp_path / "ours")
    assert (config.chunk_size, config.n_action_steps, config.state_in_prompt) == (7, 7, False)
    assert config.cameras == {"base": "observation.images.front", "left_wrist": "observation.images.wrist"}
    assert_same_weights(tmp_path / "ours", ours)
    assert_same_statistics(tmp_path / "ours", ours, ("q01", "q99"))


def test_a_published_pi0_has_the_statistics_and_relative_actions_that_are_given(
    openpi, published, ours, tmp_path
):
    with pytest.raises(UserError, match=r"has no statistics.*--norm_stats=FILE.*--statistics=false"):
        run(published, tmp_path / "none", **BACK)
    (norm_stats,) = openpi.glob("assets/*/norm_stats.json")
    run(published, tmp_path / "ours", **BACK, norm_stats=norm_stats, delta_mask=[3, -1], chunk_size=7)
    config: Any = PreTrainedConfig.from_pretrained(tmp_path / "ours")
    assert (config.chunk_size, config.reference_state.actions) == (7, [0, 1, 2])
    assert config.cameras == {"base": "observation.images.front", "left_wrist": "observation.images.wrist"}
    assert_same_weights(tmp_path / "ours", ours)
    assert_same_statistics(tmp_path / "ours", ours, ("mean", "std"))


@pytest.mark.parametrize(("name", "horizon"), [("pi0_droid", 10), ("pi0_libero", 50)])
def test_the_horizon_of_a_published_pi0_is_known_by_its_name(openpi, tmp_path, name, horizon):
    file = copy(openpi, tmp_path / name) / "config.json"
    saved = json.loads(file.read_text())
    del saved["action_horizon"]  # JAX checkpoints have none
    file.write_text(json.dumps(saved))
    assert f"chunks of {horizon} actions" in run(tmp_path / name, tmp_path / "ours", **BACK)


@of_pi05
def test_a_published_pi05_to_be_fine_tuned_needs_neither_mask_nor_statistics(published, tmp_path):
    flags = {"chunk_size": 7, "state_in_prompt": True, "statistics": False}
    assert "Without statistics" in run(published, tmp_path / "ours", **BACK, **flags)
    with pytest.raises(UserError, match=r"has no statistics.*--norm_stats=FILE.*--statistics=false"):
        run(published, tmp_path / "other", **BACK, **ASKED)


@of_pi05
@pytest.mark.parametrize("name", ["pi05_libero_base", "models--lerobot--pi05_libero/snapshots/abc"])
def test_the_error_says_how_a_known_checkpoint_was_trained(published, tmp_path, name):
    copy(published, tmp_path / name)
    known = r"pi05_libero\w* was trained with --chunk_size=10 --state_in_prompt=false --delta_mask='\[\]'"
    with pytest.raises(UserError, match=known):
        run(tmp_path / name, tmp_path / "ours", **BACK)


@of_pi05
def test_lerobots_own_cannot_leave_the_state_out_of_the_prompt(published, openpi, tmp_path):
    (norm_stats,) = openpi.glob("assets/*/norm_stats.json")
    with pytest.raises(UserError, match="always writes the state into the prompt"):
        run(published, tmp_path / "in_tree", **BACK, **ASKED, norm_stats=norm_stats, to="lerobot")


def test_the_state_in_the_prompt_is_no_setting_of_pi0(openpi, tmp_path):
    with pytest.raises(UserError, match="--state_in_prompt is about π0"):
        run(openpi, tmp_path / "ours", **BACK, state_in_prompt=True)


@of_both
def test_openpis_aloha_checkpoints_adapt_their_joints(family, tmp_path):
    """By their names, which say the relative actions of π0 as well; or by the flag."""
    ours = save(tmp_path / "ours", family)
    source = tmp_path / ("pi05_aloha" if family is PI05 else "pi0_aloha_towel")
    run(ours, source, to="openpi-pytorch")
    of = {"mean": [0.0] * 16, "std": [1.0] * 16, "q01": [-1.0] * 16, "q99": [1.0] * 16}
    (norm_stats,) = source.glob("assets/*/norm_stats.json")
    norm_stats.write_text(json.dumps({"norm_stats": {"state": of, "actions": of}}))
    unsaid = UNSAID[family] | ({"delta_mask": [6, -1, 6, -1]} if family is PI05 else {})
    text = run(source, tmp_path / "aloha", **BACK, **unsaid)
    assert "The joints are ALOHA's, adapted to openpi's" in text
    config: Any = PreTrainedConfig.from_pretrained(tmp_path / "aloha")
    assert config.adapt_to_pi
    assert config.robot_state_feature.shape == config.action_feature.shape == (14,)
    assert config.reference_state.actions == [*range(6), *range(7, 13)]
    assert run(tmp_path / "aloha", tmp_path / "back", to="openpi-pytorch").count("adapt_to_pi=True") == 1
    with pytest.raises(UserError, match="no step that adapts ALOHA's joints"):
        run(tmp_path / "aloha", tmp_path / "in_tree", to="lerobot")
    other = copy(source, tmp_path / "other")
    flags = BACK | unsaid | {"state_dim": 14, "action_dim": 14}
    assert "Convert it with --adapt_to_pi=true" in run(other, tmp_path / "plain", **flags)
    assert settings(tmp_path / "plain", ("adapt_to_pi",)) == {"adapt_to_pi": False}
    sim = copy(source, tmp_path / ("pi0_aloha_sim" if family is PI0 else "sim"))
    run(sim, tmp_path / "ours_sim", **BACK | UNSAID[family] | {"adapt_to_pi": True})
    assert settings(tmp_path / "ours_sim", ("adapt_to_pi", "relative_actions")) == {
        "adapt_to_pi": True,
        "relative_actions": False,
    }


@of_pi05
def test_weights_of_one_model_with_a_config_of_the_other(in_tree, tmp_path):
    source = copy(in_tree, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"type": "pi0"}))
    with pytest.raises(CheckpointError, match="a policy of type 'pi0', not π0"):
        run(source, tmp_path / "ours", **BACK)


@of_pi05
def test_an_epsilon_that_float32_does_not_have_leaves_a_range(in_tree, tmp_path):
    """LeRobot's epsilon is 1e-8, and next to 1 float32 has steps of 1e-7."""
    source = copy(in_tree, tmp_path / "source")
    for file in source.glob("policy_p*_step_*_*normalizer_processor.safetensors"):
        save_file(load_file(file) | {f"action.{end}": torch.ones(ACTION) for end in ("q01", "q99")}, file)
    run(source, tmp_path / "ours", **BACK)
    of = read_statistics(tmp_path / "ours")["action"]
    assert (of["q99"] > of["q01"]).all()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"norm_stats": []}',
        '{"norm_stats": {"state": {"mean": [0]}}}',
        '{"norm_stats": {"state": 3, "actions": {}}}',
        '{"norm_stats": {"state": {"mean": ["x"]}, "actions": {}}}',
        '{"norm_stats": {"state": {"mean": [[0], [0, 1]]}, "actions": {}}}',
    ],
)
def test_damaged_statistics_of_openpi_are_named(openpi, tmp_path, text):
    (tmp_path / "norm_stats.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"norm_stats.json (has no statistics|holds list)"):
        run(openpi, tmp_path / "ours", **BACK, norm_stats=tmp_path / "norm_stats.json")


@pytest.mark.parametrize("horizon", ["x", 0, -1, 1.5, [], True])
def test_a_horizon_that_is_none_is_named(openpi, tmp_path, horizon):
    source = copy(openpi, tmp_path / "source")
    saved = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(saved | {"action_horizon": horizon}))
    with pytest.raises(CheckpointError, match=r"config.json has action_horizon="):
        run(source, tmp_path / "ours", **BACK)
