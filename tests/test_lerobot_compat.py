"""The internals of LeRobot, PEFT and torch that `lerobot_compat` relies on, by name and signature."""

import gc
import inspect
import json
import logging
import os
import re
import sys
import textwrap
import threading
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import lerobot.utils.constants
import pytest
from draccus.utils import ParsingError
from huggingface_hub.errors import RepositoryNotFoundError
from packaging.requirements import Requirement
from packaging.version import Version
from test_packaging import PYPROJECT
from tiny_policy import tiny_policy

from lerobot_pi0 import lerobot_compat
from lerobot_pi0.errors import CheckpointError, UserError

# module:name → its parameters, of some version; None where it is no function.
NAMES: dict[str, str | tuple[str, ...] | None] = {
    "lerobot.configs.parser:wrap": "config_path",
    "lerobot.configs.parser:get_path_arg": "field_name, args",
    "lerobot.configs.parser:parse_arg": "arg_name, args",
    "lerobot.configs.parser:get_cli_overrides": "field_name, args",
    "lerobot.policies.factory:make_pre_post_processors": (
        "policy_cfg, pretrained_path, pretrained_revision, kwargs"
    ),
    "lerobot.policies.rtc:ActionQueue.get": "self",
    "lerobot.policies.rtc:ActionQueue.merge": (
        "self, original_actions, processed_actions, real_delay, action_index_before_inference",
        "self, original_actions, processed_actions, real_delay, action_index_before_inference, task",
    ),
    "lerobot.policies.rtc:ActionQueue.clear": "self",
    "lerobot.policies.rtc:ActionQueue.get_left_over": "self",
    "lerobot.policies.rtc:ActionQueue.get_action_index": "self",
    "lerobot.rollout:build_rollout_context": (
        "cfg, shutdown_event, teleop_action_processor, robot_action_processor, robot_observation_processor"
    ),
    "lerobot.rollout.inference:InferenceEngine.get_action": "self, obs_frame",
    "lerobot.rollout.inference:InferenceEngine.notify_observation": "self, obs",
    "lerobot.rollout.inference:InferenceEngine.pause": "self",
    "lerobot.rollout.inference:InferenceEngine.reset": "self",
    "lerobot.rollout.inference:InferenceEngine.resume": "self",
    "lerobot.rollout.inference:InferenceEngine.start": "self",
    "lerobot.rollout.inference:InferenceEngine.stop": "self",
    "lerobot.rollout.inference:InferenceEngine.ready": None,
    "lerobot.rollout.inference:InferenceEngine.failed": None,
    "lerobot.rollout.inference:RTCInferenceEngine.action_queue": None,
    "lerobot.rollout.inference:RTCInferenceEngine._rtc_loop": "self",
    "lerobot.rollout.inference.sync:prepare_observation_for_inference": (
        "observation, device, task, robot_type"
    ),
    "lerobot.rollout.inference.rtc:prepare_observation_for_inference": (
        "observation, device, task, robot_type"
    ),
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.get_observation": "self",
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.send_action": "self, action",
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.inner": None,
    "lerobot.policies:PreTrainedPolicy._get_default_peft_targets": "self",
    "lerobot.policies:PreTrainedPolicy._build_peft_config": "self, cli_overrides",
    "lerobot.policies:PreTrainedPolicy._validate_peft_config": "self, peft_config",
    "lerobot.policies:PreTrainedPolicy._save_pretrained": (
        "self, save_directory, state_dict",
        "self, save_directory",
    ),
    "lerobot.policies:PreTrainedPolicy.wrap_with_peft": "self, peft_config, peft_cli_overrides",
    "lerobot.utils.import_utils:get_safe_default_video_backend": "",
}

# Those that LeRobot has since 0.6.1.
NEWER: dict[str, str | None] = {
    "lerobot.common.train_utils:generate_model_card": "model_cfg, cfg, dataset_meta",
    "lerobot.policies:PreTrainedPolicy.drop_queued_actions": "self",
    "lerobot.policies.rtc:ActionQueue.get_with_task": "self",
    "lerobot.processor:TokenizerProcessorStep.save_artifacts": "self, save_directory",
    "lerobot.rollout:InteractiveSession": "strategy, ctx, input_stream",
    "lerobot.rollout:LinkedEvent": "parent",
    "lerobot.rollout:RolloutController.failed": None,
    "lerobot.rollout:RolloutController.failure_traceback": None,
    "lerobot.rollout.context:_align_state_feature_order": "observation_features_hw, policy_action_names",
}

# Where a private attribute or a behaviour stands in a function of LeRobot: module:name → texts of its source,
# or what one is in some version.
SOURCES: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "lerobot.rollout.inference.rtc:RTCInferenceEngine._rtc_loop": (
        "with self._obs_lock:",
        'obs = self._obs_holder.get("obs")',
        "prev_actions = queue.get_left_over()",
        "queue.merge(original, processed, new_delay, idx_before",
        'logger.error("Fatal error in RTC thread: %s", e)',
    ),
    "lerobot.rollout.inference.rtc:RTCInferenceEngine.start": (
        "self._action_queue = ActionQueue(self._rtc_config)",
        "self._obs_holder = {",
    ),
    "lerobot.rollout.inference.rtc:RTCInferenceEngine.notify_observation": ('self._obs_holder["obs"] = obs',),
    "lerobot.rollout.context:build_rollout_context": (
        "policy_config.compile_model = cfg.use_torch_compile",
        'k.endswith((".pos", ".vel"))',
        "robot_wrapper = ThreadSafeRobot(robot)",
    ),
    "lerobot.scripts.lerobot_train:train": (
        "dataset, eval_dataset = make_train_eval_datasets(cfg)",
        "ds_meta=dataset.meta",
        (
            'processor_kwargs["dataset_stats"] = dataset.meta.stats',
            "processor_dataset_stats = rename_stats(dataset.meta.stats, cfg.rename_map)",
        ),
        "processor_pretrained_path = active_cfg.pretrained_path",
    ),
    # The policy's word for what --policy.use_peft=true does without adapters.
    "lerobot.policies.factory:make_policy": ("elif cfg.pretrained_path and cfg.use_peft:",),
    # `lerobot-pi0 demo --wandb`.
    "lerobot.configs.train:TrainPipelineConfig": ("wandb: WandBConfig",),
    "lerobot.utils.import_utils:get_safe_default_video_backend": ("logging.getLogger(__name__)",),
    "draccus.parsers.decoding:decode_dataclass": (
        "except (TypeError, ValueError) as e:",
        "raise ParsingError(f\"Couldn't instantiate class",
    ),
    "lerobot.configs.parser:get_cli_overrides": ("args = sys.argv[1:]",),
    # After 0.6.1 a timer says it.
    "lerobot.rollout.strategies.base:BaseStrategy.run": (
        ('f"Record loop is running slower', "timer.tick(new_cycle="),
    ),
    "lerobot.datasets.dataset_metadata:LeRobotDatasetMetadata.__init__": (
        "self.root = HF_LEROBOT_HOME / repo_id",
    ),
}


if find_spec("lerobot.utils.cycle_timer"):
    SOURCES["lerobot.utils.cycle_timer:CycleTimer"] = ('f"Control loop is running slower',)


def named(name: str) -> Any:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


def is_release() -> bool:
    return lerobot_compat.installed_commit() is None and version("lerobot") in lerobot_compat.TESTED


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_relied_on_is_there_with_its_parameters(name):
    found, wanted = named(name), NAMES[name]
    if wanted is not None:
        given = ", ".join(inspect.signature(found).parameters)
        assert given in (wanted if isinstance(wanted, tuple) else (wanted,))


@pytest.mark.skipif(is_release(), reason="of later versions")
@pytest.mark.parametrize("name", NEWER)
def test_a_newer_name_that_is_relied_on_is_there_with_its_parameters(name):
    found = named(name)
    if NEWER[name] is not None:
        assert ", ".join(inspect.signature(found).parameters) == NEWER[name]


@pytest.mark.parametrize("name", SOURCES)
def test_an_attribute_or_behaviour_that_is_relied_on_is_there(name):
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(named(name))))
    wanted = [(text,) if isinstance(text, str) else text for text in SOURCES[name]]
    assert [texts for texts in wanted if not any(text in source for text in texts)] == []


def test_the_installed_lerobot_is_tested_and_releases_are_within_the_declared_bound():
    requirements = map(Requirement, PYPROJECT["project"]["dependencies"])
    (bound,) = (requirement.specifier for requirement in requirements if requirement.name == "lerobot")
    assert is_release() or lerobot_compat.installed_commit() in lerobot_compat.SNAPSHOTS
    assert all(bound.contains(tested) for tested in lerobot_compat.TESTED)
    newest = Version(max(lerobot_compat.TESTED, key=Version))
    assert not bound.contains(f"{newest.major}.{newest.minor}.{newest.micro + 1}")


SNAPSHOT = next(iter(lerobot_compat.SNAPSHOTS))


@pytest.mark.parametrize(
    ("installed", "commit", "said"),
    [
        (lerobot_compat.TESTED[-1], None, []),
        ("0.7.0", None, ["LeRobot 0.7.0 is installed"]),
        ("0.7.0", SNAPSHOT, []),
        (lerobot_compat.TESTED[-1], "c0ffee", ["LeRobot 0.6.1 (commit c0ffee) is installed"]),
    ],
)
def test_an_untested_lerobot_is_warned_about_once(monkeypatch, caplog, installed, commit, said):
    monkeypatch.setattr(lerobot_compat, "version", lambda _: installed)
    monkeypatch.setattr(lerobot_compat, "installed_commit", lambda: commit)
    lerobot_compat.check_version.cache_clear()
    with caplog.at_level(logging.WARNING):
        lerobot_compat.check_version()
        lerobot_compat.check_version()
    lerobot_compat.check_version.cache_clear()
    assert len(caplog.messages) == len(said)
    assert all(text in message for text, message in zip(said, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("origin", "commit"),
    [
        (None, None),
        ({"url": "https://host/lerobot.git", "vcs_info": {"vcs": "git", "commit_id": "cafe"}}, "cafe"),
        ({"url": "file:///wheels/lerobot-0.6.1-py3-none-any.whl", "archive_info": {}}, None),
        ({"url": "file:///nowhere", "dir_info": {}}, "unknown"),
    ],
)
def test_an_installation_from_lerobots_repository_is_told_from_a_release(monkeypatch, origin, commit):
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(lerobot_compat, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    assert lerobot_compat.installed_commit() == commit


def test_the_first_line_of_a_run_says_the_versions_once(monkeypatch, caplog):
    lerobot_compat.log_versions.cache_clear()
    with caplog.at_level(logging.INFO, logger="lerobot_pi0"):
        lerobot_compat.log_versions()
        lerobot_compat.log_versions()
    names = ["lerobot_policy_pi0", "lerobot", "torch", "transformers"]
    (line,) = [message for message in caplog.messages if message.startswith(names[0])]
    assert [part.split()[0] for part in line.split(", ")] == names


def test_lerobot_asks_the_policy_for_its_card(monkeypatch):
    """After 0.6.1 a function makes the card."""
    from lerobot.common import train_utils

    monkeypatch.setattr(train_utils, "generate_model_card", lambda *_: "LeRobot's", raising=False)
    config, other = SimpleNamespace(type="a", license="mit", tags=None), SimpleNamespace()
    run = SimpleNamespace(dataset=SimpleNamespace(repo_id="me/data"))

    class Policy:
        def __init__(self) -> None:
            self.config = config

        def generate_model_card(self, dataset: str, *_: Any, **given: Any) -> Any:
            return dataset, given["cfg"]

    policy = Policy()
    for _ in range(2):  # as by two runs in one process
        lerobot_compat.make_card_by(policy)
    make: Any = train_utils.generate_model_card  # pyrefly: ignore[missing-attribute]
    assert make(config, cfg=run, dataset_meta=None) == ("me/data", run)
    assert make(other, cfg=run, dataset_meta=None) == "LeRobot's"
    del policy
    gc.collect()
    assert make(config, cfg=run, dataset_meta=None) == "LeRobot's"


def test_an_internal_that_is_gone_is_named_with_the_version(monkeypatch):
    monkeypatch.setattr(lerobot_compat, "version", lambda _: "0.7.0")
    queue: Any = SimpleNamespace(get=None, merge=None, clear=None)
    with pytest.raises(UserError, match=r"version 0\.7\.0 does not have .*get_left_over"):
        lerobot_compat.replace_queue_methods(queue, get=id, merge=id, clear=id, get_left_over=id)
    engine: Any = SimpleNamespace()
    with pytest.raises(UserError, match="_obs_lock"):
        lerobot_compat.forget_observation(engine, lambda: None)


def test_flags_are_parsed_as_by_lerobot_and_argv_is_restored():
    from lerobot.configs.eval import EvalPipelineConfig

    before = list(sys.argv)
    flags = ["--env.type=pusht", "--eval.n_episodes=3", "--eval.batch_size=1"]
    config = lerobot_compat.parse_flags("command", flags, EvalPipelineConfig)
    assert (config.env.type, config.eval.n_episodes) == ("pusht", 3)
    assert sys.argv == before
    named = lerobot_compat.policy_path(["--policy.path=here", "--policy.pretrained_revision=x"])
    assert named == ("here", "x")


TYPE, DATA = "--policy.type=lerobot_pi0", "--dataset.repo_id=me/data"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lerobot-train", TYPE, "--policy.chunksize=16"], "--policy.chunksize .* --policy.chunk_size\\?"),
        (["bin/lerobot-eval", "--policy.vsion.width=3", TYPE], "--policy.vsion .* --policy.vision\\?"),
        (["lerobot_train.py", TYPE, "--policy.qqq", "1"], "--policy.qqq is no setting of lerobot_pi0.$"),
        (["lerobot-train", DATA, "--dataset.root={}"], "holds no dataset .*--dataset.root=.*/mine"),
        (["lerobot-train", DATA, "--dataset.root={}/no"], "/no does not exist, and 'me/data' .*OFFLINE"),
        (["lerobot-train", DATA, "--dataset.root={}/empty"], "/empty is empty, and 'me/data' cannot be"),
        (["lerobot-train", "--dataset.repo_id=local/x", "--dataset.root={}/no"], "local/ are .* here"),
        (["lerobot-train", DATA], "'me/data' is not in .*--dataset.root=FOLDER"),
        (["lerobot-train", "--resume=true", "--config_path={}/run.yaml"], "/gone does not exist"),
        (
            ["lerobot-train", "--config_path=configs/smal.yaml"],
            "=configs/smal.yaml does not exist",
        ),
        (
            ["lerobot-eval", "--policy.path={}/last/model"],
            "there is no folder .*/last/model, and",
        ),
    ],
)
def test_what_lerobot_would_refuse_is_refused_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_LEROBOT_HOME", "HF_LEROBOT_HUB_CACHE"):
        monkeypatch.setattr(lerobot.utils.constants, name, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.yaml").write_text("dataset: {repo_id: me/data, root: /gone}")
    (tmp_path / "mine" / "meta").mkdir(parents=True)
    (tmp_path / "mine" / "meta" / "info.json").touch()
    with pytest.raises(SystemExit) as stop:
        lerobot_compat.check_command_line([argument.format(tmp_path) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pytest", TYPE, "--policy.chunksize=16"],
        ["lerobot-train", "--policy.type=act", "--policy.chunksize=16"],
        ["lerobot-train", "--policy.path=x", "--policy.chunksize=16"],  # of another policy, perhaps
        [
            "lerobot-train",
            TYPE,
            "--policy.chunk_size=16",
            "--policy.vision.width=32",
            "--policy.cameras={{}}",
        ],
        ["lerobot-train", DATA, "--dataset.root={}/mine"],
        ["lerobot-train", DATA, "--dataset.root={}/not_there"],  # is downloaded to
        ["lerobot-train", DATA],
        ["lerobot-train", "--dataset.repo_id=local/x", "--job.target=a10g-small"],
        ["lerobot-record", DATA, "--dataset.root={}"],
    ],
)
def test_what_lerobot_may_take_passes(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)  # the hub has it
    (tmp_path / "mine" / "meta").mkdir(parents=True)
    (tmp_path / "mine" / "meta" / "info.json").touch()
    lerobot_compat.check_command_line([argument.format(tmp_path) for argument in arguments])


def not_found() -> Exception:
    return RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "x:")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (not_found(), "the hub has no such dataset"),
        (httpx.ConnectError("no route"), "the hub cannot be reached (no route)"),
    ],
)
def test_a_dataset_that_cannot_be_downloaded_is_refused(error, said, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(SystemExit):
        lerobot_compat.check_command_line(["lerobot-train", DATA, f"--dataset.root={tmp_path}/no"])
    assert said in capsys.readouterr().err


def test_a_command_of_lerobot_ends_with_the_message_of_what_the_user_caused(monkeypatch, capsys):
    elsewhere = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: elsewhere.append(error[1]))
    lerobot_compat.print_user_errors(["bin/lerobot-train", TYPE])
    while_parsing = ParsingError("Couldn't instantiate class")
    while_parsing.__cause__ = UserError("too few")
    fault = ValueError("a fault")
    for error in (CheckpointError("damaged"), while_parsing, fault):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "lerobot-train: error: damaged\nlerobot-train: error: too few\n"
    assert elsewhere == [fault]
    hook = sys.excepthook
    lerobot_compat.print_user_errors(["my_program.py"])
    assert sys.excepthook is hook


def test_torchcodec_that_cannot_be_loaded_is_one_line_once(caplog):
    lerobot_compat.shorten_torchcodec_notice()
    log = logging.getLogger("lerobot.utils.import_utils")
    notice: Any = log.filters[-1]
    fresh = type(notice)()
    log.removeFilter(notice)
    log.addFilter(fresh)
    try:
        for _ in range(2):
            log.warning("Could not load libtorchcodec.\nTraceback\n'torchcodec' is installed")
        log.warning("another matter")
    finally:
        log.removeFilter(fresh)
        log.addFilter(notice)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("videos are decoded with PyAV: torchcodec cannot be loaded")
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize("given", [None, "3"])
def test_the_video_encoder_logs_errors_alone_unless_it_is_set_otherwise(monkeypatch, given):
    monkeypatch.delenv("SVT_LOG", raising=False)
    if given is not None:
        monkeypatch.setenv("SVT_LOG", given)
    lerobot_compat.quiet_video_encoder()
    assert os.environ["SVT_LOG"] == (given or "1")


@pytest.mark.parametrize(
    ("logger", "notice"),
    [
        ("lerobot.rollout.strategies.base", "Record loop is running slower"),
        ("lerobot.utils.cycle_timer", "Control loop is running slower"),
    ],
)
def test_lerobots_notices_of_slow_rounds_are_hidden(logger, notice):
    handler = logging.Handler()
    seen = []
    handler.emit = lambda record: seen.append(record.getMessage())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        lerobot_compat.hide_slow_loop_notices()
        log = logging.getLogger(logger)
        log.warning("%s (3.0 Hz) than the target FPS (30 Hz)", notice)
        log.warning("Could not return to initial position")
    finally:
        root.removeHandler(handler)
    assert seen == ["Could not return to initial position"]


def threads(name: str = "second OpenMP team") -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_idle_threads_sleep_where_a_cpu_trains(monkeypatch):
    import torch

    held = threads()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    lerobot_compat.let_idle_threads_sleep.cache_clear()
    tiny_policy().get_optim_params()
    tiny_policy().get_optim_params()
    assert threads() == held + 1
    lerobot_compat.let_idle_threads_sleep.cache_clear()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    tiny_policy().get_optim_params()
    assert threads() == held + 1


def test_pictures_reach_the_policy_as_the_cameras_give_them():
    import numpy as np
    import torch
    from lerobot.rollout.inference import rtc, sync

    def frame() -> dict[str, Any]:
        picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        depth = np.ones((4, 6, 3), dtype=np.float32)
        return {
            "observation.images.front": picture,
            "observation.images.scaled": depth,
            "observation.state": np.arange(3.0, dtype=np.float32),
        }

    wanted = sync.prepare_observation_for_inference(frame(), torch.device("cpu"), "push", "so101")
    with lerobot_compat.pictures_as_they_are():
        for engine in (sync, rtc):
            given = frame()
            found = engine.prepare_observation_for_inference(given, torch.device("cpu"), "push", "so101")
            given["observation.images.front"][:] = 0  # the camera's next one
            front = found.pop("observation.images.front")
            assert front.dtype == torch.uint8
            assert torch.equal(front.float() / 255, wanted["observation.images.front"])
            assert found.keys() == wanted.keys() - {"observation.images.front"}
            assert torch.equal(found["observation.images.scaled"], wanted["observation.images.scaled"])
            assert found["task"] == "push"
    assert sync.prepare_observation_for_inference is rtc.prepare_observation_for_inference
    assert sync.prepare_observation_for_inference.__module__ == "lerobot.policies.utils"
