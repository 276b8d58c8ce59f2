"""The command line: what `lerobot-pi0` says to people, and with which exit code."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from typing import get_type_hints

import pytest
from lerobot.utils.import_utils import require_package

from lerobot_pi0 import cli
from lerobot_pi0.demo import record
from lerobot_pi0.inputs import flags as shared_flags
from lerobot_pi0.simulated_robot import simulation


def call(monkeypatch, *arguments: str) -> int:
    """Run the console entry point; returns the exit code."""
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_lists_every_subcommand_with_a_line(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for name, command in cli.SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_flag_of_a_subcommand_is_explained(monkeypatch, capsys, name):
    assert call(monkeypatch, name, "--help") == 0
    text = capsys.readouterr().out
    module, attribute = cli.SUBCOMMANDS[name].flags.split(":")
    config_class = getattr(import_module(module), attribute)
    for flag in flags(config_class) if dataclasses.is_dataclass(config_class) else []:
        assert re.search(rf"^  --{re.escape(flag)} \S+\s+(?!\(default)\w", text, re.MULTILINE), flag


def flags(config_class) -> list[str]:
    names = []
    for field in dataclasses.fields(config_class):
        ours = getattr(field.type, "__module__", "") == shared_flags.__name__
        nested = flags(field.type) if ours else [""]
        names += [f"{field.name}.{name}".removesuffix(".") for name in nested]
    return names


HELP_OF_ALL = """
import json, sys, time
from lerobot_pi0 import cli
for name in cli.SUBCOMMANDS:
    sys.argv = ["lerobot-pi0", name, "--help"]
    cli.main()
print(json.dumps(sorted({"torch", "lerobot", "numpy", "transformers"} & set(sys.modules))))
"""


def test_help_imports_neither_lerobot_nor_torch():
    printed = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "[]"


WRONG = (
    ("report --rooot=x", "unrecognized arguments: --rooot=x"),
    ("report --policy.path=outputs/a/b/pretrained_model", "there is no folder outputs/a/b/pretrained_model"),
    ("language --policy.path=me/policy --dataset.root=nowhere", "there is no dataset in nowhere"),
    ("rollout --policy.path=outputs/a/b", "there is no folder outputs/a/b"),
    ("plan --dataset.repo_id=me/x --policy.chunk_size=8", "gpu_memory"),
    ("doctor --robot.type so101_follower --jsn", "unrecognized arguments: --jsn"),
)
ONE_BY_ONE = """
import json, sys
from lerobot_pi0 import cli
for line in json.loads(sys.argv[1]):
    sys.argv = ["lerobot-pi0", *line.split()]
    try:
        cli.main()
    except SystemExit:
        print("#", file=sys.stderr)
print(json.dumps(sorted({"torch", "lerobot", "numpy", "transformers"} & set(sys.modules))))
"""


def test_what_is_wrong_is_said_before_lerobot_and_torch_are_imported(tmp_path):
    lines = json.dumps([line for line, _ in WRONG])
    command = [sys.executable, "-c", ONE_BY_ONE, lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    said = done.stderr.split("#")
    assert len(said) == len(WRONG) + 1
    for (line, message), text in zip(WRONG, said, strict=False):
        assert message in text, line


@pytest.mark.parametrize(
    ("name", "positional"), [("convert", "SOURCE TARGET"), ("trace", "RUN"), ("plan", "GPU_MEMORY")]
)
def test_usage_shows_what_may_be_given_by_position(monkeypatch, capsys, name, positional):
    assert call(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: lerobot-pi0 {name} {positional} ")


@pytest.mark.parametrize("name", ["doctor", "plan"])
def test_flags_that_are_configs_of_lerobot_are_named(name):
    """What is parsed before LeRobot is imported leaves them out."""
    command = cli.SUBCOMMANDS[name]
    module, attribute = command.flags.split(":")
    own = getattr(import_module(module), attribute)
    module, attribute = command.function.split(":")
    config_class = get_type_hints(getattr(import_module(module), attribute))["config"]
    of_class = [field.name for field in dataclasses.fields(config_class)]
    assert [flag for flag in of_class if flag not in own.__dataclass_fields__] == list(own.of_lerobot)


def test_help_explains_each_flag_once(monkeypatch, capsys):
    assert call(monkeypatch, "doctor", "--help") == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    assert sorted(flags) == sorted(set(flags))
    assert "Flags" not in text
    assert "\n\n  The robot that the policy is to drive" in text


def test_help_of_a_command_before_one_of_lerobot_is_the_same_on_request(monkeypatch, capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        assert call(monkeypatch, "rollout", flag) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_flags_of_lerobot_are_shown_on_request(monkeypatch, capsys):
    assert call(monkeypatch, "plan", "--help") == 0
    own = capsys.readouterr().out
    assert call(monkeypatch, "plan", "--help-all") == 0
    everything = capsys.readouterr().out
    assert "--gpu_memory" in own
    assert "--policy.chunk_size" not in own
    assert "--policy.chunk_size" in everything


def test_versions_are_those_that_are_installed(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["lerobot_policy_pi0", "lerobot", "torch", "transformers"]
    assert lines[2] == f"torch {version('torch')}"


def test_what_is_required_may_be_given_by_its_position(monkeypatch, capsys, tmp_path):
    (tmp_path / "something").touch()
    assert call(monkeypatch, "record", str(tmp_path), "--seed=1") == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert call(monkeypatch, "record", str(tmp_path), "more") == 2
    assert "'more' is too many: it takes ROOT" in capsys.readouterr().err


def test_an_unknown_subcommand_suggests_the_nearest(monkeypatch, capsys):
    assert call(monkeypatch, "recrod") == 2
    assert "unknown subcommand 'recrod'. Did you mean record?" in capsys.readouterr().err


def test_a_command_of_lerobot_is_told_as_one(monkeypatch, capsys):
    assert call(monkeypatch, "train") == 2
    assert "That is a command of LeRobot's own: lerobot-train." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rooot=x",), "unrecognized arguments: --rooot=x"),
        (("--root=x", "--seed=many"), "Couldn't parse 'many' into an int"),
        (("--root=x", "--tasks=facet-open-v3"), "Unknown Meta-World task facet-open-v3"),
        ((), "root"),
    ],
)
def test_a_wrong_flag_is_a_message_and_exit_code_2(monkeypatch, capsys, flags, message):
    assert call(monkeypatch, "record", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_switch_needs_no_value(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(record, "record", lambda config: seen.append(config) or tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text('{"total_episodes": 0, "total_frames": 0}')
    for flags in (["--show_goal"], ["--show_goal=true"], ["--show_goal", "true"], ["--show_goal=false"], []):
        assert call(monkeypatch, "record", f"--root={tmp_path}", *flags, "--seed=1") == 0
    assert [config.show_goal for config in seen] == [True, True, True, False, False]


def test_an_error_of_ours_is_one_line_and_exit_code_1(monkeypatch, capsys, tmp_path):
    (tmp_path / "something").touch()
    assert call(monkeypatch, "record", f"--root={tmp_path}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lerobot-pi0 record: error: ")


def test_an_error_from_elsewhere_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "is_recorded", lambda _: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        call(monkeypatch, "record", f"--root={tmp_path}")


def test_a_missing_package_is_a_line_where_somebody_says_what_to_install(monkeypatch, capsys, tmp_path):
    def ours(_):
        monkeypatch.setattr(simulation, "find_spec", lambda name: None)
        simulation.make_model.__wrapped__()

    for missing, advice in (
        (ours, "pip install 'lerobot-policy-pi0[simulated-robot]'"),
        (lambda _: require_package("no_such_package", extra="peft"), "pip install 'lerobot[peft]'"),
    ):
        monkeypatch.setattr(record, "is_recorded", missing)
        assert call(monkeypatch, "record", f"--root={tmp_path}") == 1
        assert advice in capsys.readouterr().err
    monkeypatch.setattr(record, "is_recorded", lambda _: import_module("no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        call(monkeypatch, "record", f"--root={tmp_path}")


def test_ctrl_c_is_exit_code_130(monkeypatch, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "is_recorded", interrupted)
    assert call(monkeypatch, "record", f"--root={tmp_path}") == 130
