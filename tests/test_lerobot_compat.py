"""The internals of LeRobot, PEFT and torch that `lerobot_compat` relies on, by name and signature."""

import inspect
import logging
import sys
import textwrap
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from test_packaging import PYPROJECT

from lerobot_pi0 import lerobot_compat
from lerobot_pi0.errors import UserError

# module:name → its parameters; None where it is no function.
NAMES: dict[str, str | None] = {
    "lerobot.configs.parser:wrap": "config_path",
    "lerobot.configs.parser:get_path_arg": "field_name, args",
    "lerobot.configs.parser:parse_arg": "arg_name, args",
    "lerobot.configs.parser:get_cli_overrides": "field_name, args",
    "lerobot.policies.factory:make_pre_post_processors": (
        "policy_cfg, pretrained_path, pretrained_revision, kwargs"
    ),
    "lerobot.policies.rtc:ActionQueue.get": "self",
    "lerobot.policies.rtc:ActionQueue.merge": (
        "self, original_actions, processed_actions, real_delay, action_index_before_inference"
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
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.get_observation": "self",
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.send_action": "self, action",
    "lerobot.rollout.robot_wrapper:ThreadSafeRobot.inner": None,
    "lerobot.policies:PreTrainedPolicy._get_default_peft_targets": "self",
    "lerobot.policies:PreTrainedPolicy._build_peft_config": "self, cli_overrides",
    "lerobot.policies:PreTrainedPolicy._validate_peft_config": "self, peft_config",
    "lerobot.policies:PreTrainedPolicy._save_pretrained": "self, save_directory, state_dict",
    "lerobot.policies:PreTrainedPolicy.wrap_with_peft": "self, peft_config, peft_cli_overrides",
    "lerobot.utils.import_utils:get_safe_default_video_backend": "",
    "torch._inductor.cudagraph_trees:local": None,
}

# Where a private attribute or a behaviour stands in a function of LeRobot: module:name → text of its source.
SOURCES = {
    "lerobot.rollout.inference.rtc:RTCInferenceEngine._rtc_loop": (
        "with self._obs_lock:",
        'obs = self._obs_holder.get("obs")',
        "prev_actions = queue.get_left_over()",
        "queue.merge(original, processed, new_delay, idx_before)",
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
        'processor_kwargs["dataset_stats"] = dataset.meta.stats',
        "processor_pretrained_path = active_cfg.pretrained_path",
    ),
    "lerobot.utils.import_utils:get_safe_default_video_backend": ("logging.getLogger(__name__)",),
    "draccus.parsers.decoding:decode_dataclass": (
        "except (TypeError, ValueError) as e:",
        "raise ParsingError(f\"Couldn't instantiate class",
    ),
    "lerobot.configs.parser:get_cli_overrides": ("args = sys.argv[1:]",),
}


def named(name: str) -> Any:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_relied_on_is_there_with_its_parameters(name):
    found = named(name)
    if NAMES[name] is not None:
        assert ", ".join(inspect.signature(found).parameters) == NAMES[name]


@pytest.mark.parametrize("name", SOURCES)
def test_an_attribute_or_behaviour_that_is_relied_on_is_there(name):
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(named(name))))
    assert [text for text in SOURCES[name] if text not in source] == []


def test_the_installed_lerobot_is_tested_and_within_the_declared_bound():
    requirements = map(Requirement, PYPROJECT["project"]["dependencies"])
    (bound,) = (requirement.specifier for requirement in requirements if requirement.name == "lerobot")
    assert version("lerobot") in lerobot_compat.TESTED
    assert all(bound.contains(tested) for tested in lerobot_compat.TESTED)
    newest = Version(max(lerobot_compat.TESTED, key=Version))
    assert not bound.contains(f"{newest.major}.{newest.minor}.{newest.micro + 1}")


@pytest.mark.parametrize(("installed", "warnings"), [(lerobot_compat.TESTED[-1], 0), ("0.7.0", 1)])
def test_an_untested_lerobot_is_warned_about_once(monkeypatch, caplog, installed, warnings):
    monkeypatch.setattr(lerobot_compat, "version", lambda _: installed)
    lerobot_compat.check_version.cache_clear()
    with caplog.at_level(logging.WARNING):
        lerobot_compat.check_version()
        lerobot_compat.check_version()
    lerobot_compat.check_version.cache_clear()
    assert len(caplog.messages) == warnings
    assert all("LeRobot 0.7.0 is installed" in message for message in caplog.messages)


def test_an_internal_that_is_gone_is_named_with_the_version(monkeypatch):
    monkeypatch.setattr(lerobot_compat, "version", lambda _: "0.7.0")
    queue: Any = SimpleNamespace(get=None, merge=None, clear=None)
    with pytest.raises(UserError, match=r"version 0\.7\.0 does not have .*get_left_over"):
        lerobot_compat.replace_queue_methods(queue, get=len, merge=len, clear=len, get_left_over=len)
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
