"""Settings: openpi's defaults, validation, round trips through JSON and the command line, the schedule."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import draccus
import pytest
import torch
import yaml
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from shipped_configs import CONFIGS, read_training_config
from tiny_policy import EXPERT, VISION, VLM, tiny_config

from lerobot_pi0 import Pi0Config, Pi05Config
from lerobot_pi0.configuration_pi0 import ReferenceState, assign_cameras
from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import parsing_failure
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig
from lerobot_pi0.tools.flags import LanguageConfig
from lerobot_pi0.training.schedule import CosineAfterWarmupConfig


def test_round_trip_through_json_keeps_everything(tmp_path):
    config = tiny_config(
        cameras={"base": "front"}, freeze="vision", action_feature_names=list("abcd"), base_checkpoint="x/y"
    )
    config.save_pretrained(tmp_path)
    again = PreTrainedConfig.from_pretrained(tmp_path)
    assert isinstance(again, Pi0Config)
    assert again == config
    assert (again.vision, again.vlm, again.expert) == (VISION, VLM, EXPERT)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == "lerobot_pi0"


def test_how_a_policy_is_run_is_not_saved(tmp_path):
    """By the config itself: LeRobot saves that of a LoRA run without the policy."""
    config = tiny_config(backend="int8", rtc_config=RTCConfig())
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path) == tiny_config()
    assert config.backend == "int8"


def test_defaults_of_pi05_are_kept_apart_from_those_of_pi0(tmp_path):
    config = tiny_config("pi05", normalization_mapping={"STATE": NormalizationMode.MEAN_STD})
    assert config.normalization_mapping["ACTION"] is NormalizationMode.QUANTILES
    config._save_pretrained(tmp_path)
    again = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--state_in_prompt=false"])
    changed: dict[str, Any] = {"state_in_prompt": False}
    assert again == replace(config, **changed)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == "lerobot_pi05"
    for other, mode in ((Pi0Config, "MEAN_STD"), (Pi05Config, "QUANTILES")):
        parsed = draccus.parse(other, args=["--device=cpu"])
        assert parsed.normalization_mapping["STATE"] is NormalizationMode[mode]
        assert type(parsed) is other


def test_pi05_takes_a_state_of_any_size_and_says_what_it_is():
    wide = {
        **(tiny_config().input_features or {}),
        "observation.state": PolicyFeature(FeatureType.STATE, (40,)),
    }
    tiny_config("pi05", input_features=wide).validate_features()
    with pytest.raises(UserError, match=r"π0.5 needs 'action'"):
        tiny_config("pi05", output_features={}).validate_features()


def test_override_of_a_saved_config_keeps_its_other_sizes(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    again: Any = PreTrainedConfig.from_pretrained(
        tmp_path, cli_overrides=["--vlm.width=64", "--n_action_steps=2"]
    )
    assert again.vlm == GemmaConfig(
        64, VLM.depth, VLM.mlp_dim, VLM.num_heads, VLM.num_kv_heads, VLM.head_dim, 1024
    )
    assert (again.expert, again.vision, again.n_action_steps) == (EXPERT, VISION, 2)


@pytest.mark.parametrize(
    ("argument", "part", "wanted"),
    [
        ("--vlm.width=64", "vlm", GemmaConfig(width=64)),
        ("--expert.width=64", "expert", ExpertConfig(width=64)),
        ("--vision.depth=2", "vision", SiglipConfig(depth=2)),
    ],
)
def test_override_of_one_size_keeps_the_published_others(argument, part, wanted):
    """draccus loses defaults when two fields share a dataclass and differ in their default."""
    config = draccus.parse(Pi0Config, args=[argument, "--device=cpu"])
    default = Pi0Config(device="cpu")
    assert {name: getattr(config, name) for name in ("vision", "vlm", "expert")} == {
        "vision": default.vision,
        "vlm": default.vlm,
        "expert": default.expert,
    } | {part: wanted}


@pytest.mark.parametrize("argument", ["--dtype=float16", "--freeze=expert", "--statistics=none"])
def test_choices_are_listed_when_none_of_them_is_given(argument, capsys):
    with pytest.raises(SystemExit):
        draccus.parse(Pi0Config, args=[argument, "--device=cpu"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_action_steps": 7},
            r"n_action_steps \(7\) must be between 1 and chunk_size \(6\).*--policy.chunk_size",
        ),
        ({"n_action_steps": 0}, r"n_action_steps \(0\)"),
        ({"num_inference_steps": 0}, r"--policy.num_inference_steps must be at least 1, got 0"),
        ({"num_flow_samples": 0}, r"--policy.num_flow_samples must be at least 1, got 0"),
        ({"num_flow_samples": None}, r"--policy.num_flow_samples must not be null"),
        ({"ema_decay": None}, r"--policy.ema_decay must not be null"),
        (
            {"normalization_mapping": {"state": NormalizationMode.IDENTITY}},
            r"--policy.normalization_mapping names \['state'\].*VISUAL, STATE, ACTION",
        ),
        ({"tokenizer_max_length": 2}, r"--policy.tokenizer_max_length must leave room.*got 2"),
    ],
)
def test_impossible_settings_name_their_flag(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes).validate_features()


@pytest.mark.parametrize(
    "flag",
    [
        "n_action_steps=99",
        "ema_decay=1",
        "rtc_training_max_delay=50",
        "scheduler_warmup_steps=30000",
        "scheduler_warmup_steps=-1",
        "scheduler_decay_steps=1000",
        "optimizer_lr=0",
        "scheduler_decay_lr=-1e-6",
        "tokenizer_max_length=2",
        "vision.image_size=30",
        "vision.num_heads=7",
        "vlm.num_kv_heads=3",
        "vlm.head_dim=15",
        "vlm.depth=0",
        "expert.width=33",
    ],
)
def test_impossible_settings_are_reported_by_name_and_not_as_a_class_that_was_not_made(flag, monkeypatch):
    """From the command line of lerobot-train, before it loads the dataset."""
    arguments = ["--policy.type=lerobot_pi0", "--policy.device=cpu", "--policy.push_to_hub=false"]
    arguments += ["--dataset.repo_id=me/mine", "--output_dir=outputs/none", f"--policy.{flag}"]
    monkeypatch.setattr("sys.argv", ["lerobot-train", *arguments])
    config: Any = cast(Callable[[], Any], read_training_config)()
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        config.validate()


def test_what_a_dataclass_objects_to_is_found_in_draccus_error():
    with pytest.raises(draccus.ParsingError) as raised:
        draccus.parse(LanguageConfig, args=["--num_samples=1"])
    assert "--num_samples must be at least 2, got 1" in str(parsing_failure(raised.value))


def test_other_errors_of_draccus_are_kept_as_they_are():
    with pytest.raises(draccus.ParsingError) as raised:
        draccus.parse(Pi0Config, args=["--chunk_size=many"])
    assert parsing_failure(raised.value) is raised.value


def test_vectors_beyond_the_padded_size_name_the_flag():
    config = tiny_config(output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))})
    with pytest.raises(
        ValueError, match=r"'action' has shape \(14,\).*at most 8.*--policy.max_action_dim=14"
    ):
        config.validate_features()


@pytest.mark.parametrize("missing", ["observation.state", "observation.images.front"])
def test_missing_feature_is_named(missing):
    features = dict(tiny_config().input_features or {})
    del features[missing]
    config = tiny_config(input_features=features)
    with pytest.raises(ValueError, match=r"needs '?(observation.state|at least one camera)"):
        config.validate_features()


def test_missing_action_is_named():
    with pytest.raises(ValueError, match=r"needs 'action'. The features are \['observation.images.front'"):
        tiny_config(output_features={}).validate_features()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (list("abcd"), list("abcd")),
        ({"motors": list("abcd")}, list("abcd")),
        ({"b": 1, "a": 0, "d": 3, "c": 2}, list("abcd")),
        ({"left": "a", "right": ["b", "c", "d"]}, list("abcd")),
        (["action"], None),
        (None, None),
    ],
)
def test_names_of_dimensions_are_kept_where_each_has_one(names, wanted):
    config = tiny_config()
    config.set_dataset_feature_metadata({"action": {"shape": (4,), "names": names}})
    assert config.action_feature_names == wanted
    assert config.state_feature_names is None


def test_presets_are_openpis():
    config = Pi0Config(device="cpu")
    optimizer, scheduler = config.get_optimizer_preset(), config.get_scheduler_preset()
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (2.5e-5, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip_norm) == (1e-10, 1.0)
    assert (scheduler.num_warmup_steps, scheduler.num_decay_steps) == (1_000, 30_000)
    assert scheduler.decay_factor * optimizer.lr == pytest.approx(2.5e-6)


def learning_rates(steps: int, **changes: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = CosineAfterWarmupConfig(**changes).build(optimizer, steps)
    rates: list[float] = []
    for _ in range(steps + 1):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_rises_to_its_peak_and_falls_to_its_end():
    rates = learning_rates(120, num_warmup_steps=10, num_decay_steps=100, decay_factor=0.1)
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)
    assert rates[100:] == pytest.approx([0.1] * 21)


def test_schedule_shrinks_to_a_shorter_run():
    rates = learning_rates(30)
    assert max(rates) == rates[1] == 1
    assert rates[30] == pytest.approx(0.1)


def test_schedule_without_warmup_starts_at_its_peak():
    assert learning_rates(10, num_warmup_steps=0, num_decay_steps=10)[0] == 1


def test_lerobot_reads_what_the_policy_needs():
    config = tiny_config()
    assert config.action_delta_indices == [0, 1, 2, 3, 4, 5]
    assert config.observation_delta_indices is None
    assert config.reward_delta_indices is None
    assert config.type == "lerobot_pi0"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_is_read_by_lerobots_parser(path, monkeypatch):
    arguments = [f"--config_path={path}", "--policy.device=cpu"]
    if "dataset:" not in path.read_text():
        arguments.append("--dataset.repo_id=me/mine")
    monkeypatch.setattr("sys.argv", ["lerobot-train", *arguments])
    config: Any = cast(Callable[[], Any], read_training_config)()
    assert isinstance(config.policy, Pi0Config)
    assert config.policy.push_to_hub is False
    assert config.dataset.repo_id


@pytest.mark.parametrize("name", ["aloha", "libero", "pi05_aloha", "pi05_droid", "pi05_libero"])
def test_cameras_of_the_benchmarks_find_their_slots(name):
    cameras = yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())["policy"]["cameras"]
    keys = [f"observation.images.{key}" for key in (*cameras.values(), "another")]
    assert list(assign_cameras(keys, cameras).values()) == keys[:-1]


def test_there_are_config_files():
    names = {path.stem for path in CONFIGS}
    assert {"aloha", "finetune_expert", "finetune_full", "libero"} <= names
    assert {f"pi05_{name}" for name in ("full", "lora", "libero", "droid", "aloha")} <= names


@pytest.mark.parametrize(
    ("file", "theirs", "differs"),
    [
        ("pi05_full", "pi05_aloha", set()),
        ("pi05_libero", "pi05_libero", {"decay_steps"}),  # constant from the warm-up on
        ("pi05_droid", "pi05_droid_finetune", set()),
        ("pi05_aloha", "pi05_aloha_pen_uncap", set()),
    ],
)
def test_config_files_of_pi05_are_openpis(file, theirs, differs, monkeypatch):
    golden = Path(__file__).parent.parent / "golden_pi05" / "golden_configs.json"
    wanted = json.loads(golden.read_text())[theirs]
    arguments = [
        f"--config_path={CONFIGS[0].parent / file}.yaml",
        "--policy.device=cpu",
        "--dataset.repo_id=x/y",
    ]
    monkeypatch.setattr("sys.argv", ["lerobot-train", *arguments])
    config: Any = cast(Callable[[], Any], read_training_config)()
    policy, schedule = config.policy, wanted["lr_schedule"]
    assert isinstance(policy, Pi05Config)
    assert (config.batch_size, config.steps) == (wanted["batch_size"], wanted["num_train_steps"])
    assert (policy.chunk_size, policy.ema_decay) == (wanted["action_horizon"], wanted["ema_decay"])
    assert policy.tokenizer_max_length == wanted["max_token_len"]
    assert policy.state_in_prompt == wanted["discrete_state_input"]
    relative = any(name == "DeltaActions" for name, _ in wanted["data_transforms_in"])
    assert policy.relative_actions == (relative and file != "pi05_full")
    assert {"STATE", "ACTION"} == {
        kind for kind, mode in policy.normalization_mapping.items() if mode is NormalizationMode.QUANTILES
    }
    found = {
        "warmup_steps": policy.scheduler_warmup_steps,
        "peak_lr": policy.optimizer_lr,
        "decay_steps": policy.scheduler_decay_steps,
        "decay_lr": policy.scheduler_decay_lr,
    }
    assert {name for name in found if found[name] != schedule[name]} == differs


def test_config_files_say_only_what_differs():
    """A value that repeats a default says nothing, and would keep an old default alive."""
    for path in CONFIGS:
        given = yaml.safe_load(path.read_text())["policy"]
        plain: Any = draccus.encode(PreTrainedConfig.get_choice_class(given["type"])(device="cpu"))
        repeated = [
            key for key, value in given.items() if key in plain and plain[key] == value and key != "device"
        ]
        assert repeated == [], path.name


def test_retired_names_of_saved_configs_and_flags_load_and_are_not_written(tmp_path):
    reference = {"actions": [0], "states": [1], "gain": [2.0], "offset": [0.5]}
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["type"] == "lerobot_pi0"
    assert not {"int8", "compile", "cache_prefix", "anchor"} & saved.keys()
    del saved["backend"], saved["reference_state"]
    old = {"int8": False, "compile": False, "cache_prefix": True, "anchor": reference}
    file.write_text(json.dumps(saved | old))
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--compile=true"])
    assert isinstance(config, Pi0Config)
    assert config.backend == "compile"
    assert config.reference_state == ReferenceState(**reference)
    assert replace(config, backend="auto").backend == "auto"


def image(*shape: int) -> PolicyFeature:
    return PolicyFeature(FeatureType.VISUAL, shape)


def with_cameras(features: dict[str, PolicyFeature], **changes: Any) -> Pi0Config:
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (5,))}
    named = {f"observation.images.{name}": feature for name, feature in features.items()}
    return tiny_config(input_features=named | state, **changes)


@pytest.mark.parametrize("shape", [(1, 48, 64), (4, 48, 64), (48, 64, 1)])
def test_a_camera_that_is_not_rgb_is_left_out_with_a_line(shape, caplog):
    config = with_cameras({"depth": image(*shape), "front": image(3, 48, 64)})
    config.validate_features()
    assert config.cameras == {"base": "observation.images.front"}
    assert "not RGB" in caplog.text
    assert "observation.images.depth" in caplog.text


def test_a_camera_that_is_not_rgb_is_refused_where_it_is_asked_for_or_the_only_one():
    cameras = {"depth": image(1, 48, 64), "front": image(3, 48, 64)}
    for config in (
        with_cameras(cameras, cameras={"base": "front", "left_wrist": "depth"}),
        with_cameras({"depth": image(1, 48, 64)}),
    ):
        with pytest.raises(UserError, match=r"RGB.*images.depth' has shape \(1, 48, 64\)"):
            config.validate_features()


def camera_features(*names: str) -> dict[str, Any]:
    of = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    return {f"observation.images.{name}": of for name in names}


def test_a_camera_that_the_checkpoint_does_not_have_is_logged_with_the_flag_that_adds_it(caplog):
    config = tiny_config()
    config.set_dataset_feature_metadata(camera_features("front", "wrist"))
    (message,) = caplog.messages
    assert "left out: ['observation.images.wrist']" in message
    flag = json.loads(message.partition("--policy.cameras=")[2].strip("'"))
    caplog.clear()
    again = tiny_config(cameras=flag)
    again.set_dataset_feature_metadata(camera_features("front", "wrist"))
    again.validate_features()
    assert list(again.cameras.values()) == ["observation.images.front", "observation.images.wrist"]
    assert again.image_features["observation.images.wrist"].shape == (3, 48, 64)
    assert not caplog.messages


@pytest.mark.parametrize("names", [["front"], ["top", "side"]])  # the second needs --rename_map
def test_nothing_is_logged_of_the_checkpoints_cameras_or_of_renamed_ones(names, caplog):
    config = tiny_config()
    config.set_dataset_feature_metadata(camera_features(*names))
    assert not caplog.messages
    assert list(config.image_features) == ["observation.images.front"]


def test_a_slot_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"\['bas'\].*base, left_wrist, right_wrist"):
        tiny_config(cameras={"bas": "front"}).set_dataset_feature_metadata({})
    tiny_config(cameras={"base": "a", "d": "observation.images.d"}).set_dataset_feature_metadata({})


def test_the_example_observation_fits_the_features():
    config = tiny_config()
    config.validate_features()
    example = config.example_observation(2, prompt_length=5)
    assert example["observation.images.front"].shape == (2, 3, 48, 64)
    assert example["observation.state"].shape == (2, 5)
    assert example[OBS_LANGUAGE_TOKENS].shape == example[OBS_LANGUAGE_ATTENTION_MASK].shape == (2, 5)
    assert all(torch.equal(x[0], x[1]) for x in example.values())
