"""`lerobot-pi0 <subcommand> [--flag=value ...]`: the tools beside the policy, with LeRobot's flag style.

A subcommand is a function from a dataclass to the text to print, or to text and exit code: the fields are its
flags, the comments above them their help; a field without a default may also be given by its position. A
function of a list of strings gets its arguments as they are: it stands before a command of LeRobot. Help
imports the flags alone, and neither LeRobot nor torch, unless LeRobot's own flags are asked for (--help-all).
"""

import contextlib
import difflib
import io
import itertools
import logging
import os
import re
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.flags import check_dataset_root
from lerobot_pi0.lerobot_compat import (
    check_checkpoint_name,
    check_version,
    parsing_failure,
    shorten_torchcodec_notice,
    versions,
)

PROGRAM = "lerobot-pi0"

# Beside the package in a checkout, within it in a wheel.
BENCHMARKS = "lerobot_pi0.benchmarks" if Path(__file__).with_name("benchmarks").is_dir() else "benchmarks"


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand is, so that it is imported when it runs."""

    function: str  # module:function
    flags: str  # module:name of its dataclass, or of its help as a text; imports neither LeRobot nor torch
    summary: str


def _tool(name: str, flags: str, summary: str) -> Subcommand:
    return Subcommand(f"lerobot_pi0.tools.{name}:main", f"lerobot_pi0.tools.flags:{flags}", summary)


def _in(folder: str, name: str, flags: str, summary: str) -> Subcommand:
    return Subcommand(f"lerobot_pi0.{folder}.{name}:main", f"lerobot_pi0.{folder}.flags:{flags}", summary)


SUBCOMMANDS = {
    "attention": _tool("attention", "AttentionConfig", "where the actions look: at which patches and words"),
    "bench": Subcommand(
        f"{BENCHMARKS}.bench:main",
        f"{BENCHMARKS}.flags:BenchConfig",
        "measure this π0 beside LeRobot's in-tree one, on this machine",
    ),
    "convert": _in(
        "conversion", "convert", "ConvertConfig", "openpi's, LeRobot's and transformers' π0 ↔ this one"
    ),
    "demo": _in("demo", "demo", "DemoConfig", "record, train and evaluate a small π0 or π0.5 in a simulator"),
    "doctor": _tool("doctor.command", "DoctorFlags", "what is wrong with a policy, data, robot or simulator"),
    "language": _tool("language", "LanguageConfig", "does a policy follow its instruction? Swap it and see"),
    "latency": _in(
        "control", "latency", "LatencyConfig", "how long a chunk takes, and which flags of rollout suit that"
    ),
    "merge": _in(
        "conversion", "merge", "MergeConfig", "one plain checkpoint of LoRA adapters and their base"
    ),
    "plan": _tool("plan", "PlanFlags", "which fine-tuning fits a GPU, how long it takes, which command"),
    "record": _in("demo", "record", "RecordConfig", "record scripted experts as a LeRobotDataset"),
    "report": _tool(
        "report.command",
        "ReportConfig",
        "compare actions with recorded ones and open-loop baselines: a page",
    ),
    "rollout": _in(
        "control", "rollout", "ROLLOUT_HELP", "lerobot-rollout with checks before it moves, and a trace"
    ),
    "serve": _in("serving", "serve", "ServeConfig", "serve a policy to robots by LeRobot's async inference"),
    "trace": _in(
        "control", "trace_report", "TraceReportConfig", "stalls, jumps and delays of a run, from its trace"
    ),
}

# Commands of LeRobot that people look for here.
LEROBOTS = ("train", "eval", "replay", "teleoperate", "calibrate")


def main() -> None:
    """Console entry point. Exit code 2 for a wrong command line, 1 for an error, 130 for Ctrl-C."""
    # Before torch is imported: beside another process its idle threads would take the time of the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print("\n".join(versions()))
        check_version()
        return
    name, *flags = arguments
    if name not in SUBCOMMANDS:
        similar = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        if name in LEROBOTS:
            hint = f" That is a command of LeRobot's own: lerobot-{name}."
        fail(f"{PROGRAM}: unknown subcommand {name!r}.{hint} `{PROGRAM} --help` lists them.", 2)
    ours = logging.getLogger("lerobot_pi0")
    ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO)
    ours.propagate = False  # some library may have set up the root logger already
    shorten_torchcodec_notice()
    try:
        run(name, flags)
    except KeyboardInterrupt:
        fail(f"\n{PROGRAM} {name}: interrupted.", 130)
    except UserError as error:
        fail(f"{PROGRAM} {name}: error: {error}", 1)
    except ImportError as error:
        if "pip install" not in str(error):  # as LeRobot's `require_package` and ours say it
            raise
        fail(f"{PROGRAM} {name}: error: {error}", 1)


def run(name: str, flags: list[str]) -> None:
    """Parse the flags of a subcommand and call it.

    What is wrong is said before LeRobot and torch are imported, as far as it can be known without them.
    """
    command = SUBCOMMANDS[name]
    own = _imported(command.flags)
    before_lerobots = isinstance(own, str)  # the help of a command that stands before one of LeRobot
    if {"-h", "--help"} & set(flags) or (before_lerobots and "--help-all" in flags):
        print_help(name, own)
        return
    if before_lerobots:
        check_folders(flags, "--policy.path")
        if (text := _imported(command.function)(flags)) is not None:
            print(text)
        return
    if "--help-all" not in flags:
        check_folders(flags, "--policy.path", "--dataset.root")
        if not any(flag.startswith("--config_path") for flag in flags):
            parse(name, own, _without_lerobots(own, flags))
    function = _imported(command.function)
    (config_class,) = (hint for key, hint in get_type_hints(function).items() if key != "return")
    if "--help-all" in flags:
        print_help(name, config_class)
        return
    text = function(parse(name, config_class, flags))
    text, code = text if isinstance(text, tuple) else (text, 0)
    if text is not None:
        print(text)
    if code:
        raise SystemExit(code)


def check_folders(flags: list[str], *names: str) -> None:
    """Raises MissingFileError for a folder that one of these flags names and that is not there."""
    checks = {"--policy.path": check_checkpoint_name, "--dataset.root": check_dataset_root}
    for flag in flags:
        name, _, value = flag.partition("=")
        if name in names and value:
            checks[name](value)


def _without_lerobots(own: type, flags: list[str]) -> list[str]:
    """The flags without those of the groups that are configs of LeRobot, and their values."""
    kept, is_theirs = [], False
    for flag in flags:
        if flag.startswith("--"):
            is_theirs = re.split(r"[.=]", flag[2:])[0] in getattr(own, "of_lerobot", ())
        if not is_theirs:
            kept.append(flag)
    return kept


def parse[T](name: str, config_class: type[T], flags: list[str]) -> T:
    """The config of a subcommand. Ends with exit code 2 and a message for flags that it does not take."""
    import draccus

    required = required_flags(config_class)
    positional = list(itertools.takewhile(lambda flag: not flag.startswith("-"), flags))
    if len(positional) > len(required):
        known = f"takes {' '.join(map(str.upper, required))}" if required else "takes flags alone"
        fail(f"{PROGRAM} {name}: error: {positional[len(required)]!r} is too many: it {known}", 2)
    given = [f"--{field}={value}" for field, value in zip(required, positional, strict=False)]
    flags = [*given, *flags[len(positional) :]]
    flags = [re.sub(r"^--[^=]+", lambda name: f"--{name[0][2:].replace('-', '_')}", flag) for flag in flags]
    # LeRobot's flags take a value, also those that are true or false; "--quick" is short for "--quick=true".
    of: Any = config_class
    switches = {f"--{field.name}" for field in fields(of) if field.type is bool}
    flags = [
        f"{flag}=true" if flag in switches and following.startswith("--") else flag
        for flag, following in zip(flags, [*flags[1:], "--"], strict=False)
    ]
    try:
        return draccus.parse(config_class, args=flags, prog=f"{PROGRAM} {name}", preferred_help="above")
    except draccus.ParsingError as error:
        fail(f"{PROGRAM} {name}: error: {parsing_failure(error)} (`{PROGRAM} {name} --help`)", 2)


def required_flags(config_class: type) -> list[str]:
    """Names of the fields without a default, in their order, but for groups of flags."""
    given: Any = config_class
    required = [field for field in fields(given) if field.default is field.default_factory is MISSING]
    return [field.name for field in required if not is_dataclass(field.type)]


def print_help(name: str, flags: Any) -> None:
    """Print the help of a subcommand: of its dataclass, or the text that it has."""
    import draccus

    if isinstance(flags, str):
        print(flags)
        return
    positional = [field.upper() for field in required_flags(flags)]
    usage = " ".join([PROGRAM, name, *positional])
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        draccus.parse(flags, args=["--help"], prog=usage, preferred_help="above")
    print(_readable(printed.getvalue()), end="")


def _readable(text: str) -> str:
    """draccus's help without the flag of each group, which it explains twice, and with the docstring of our
    class in place of its name.
    """
    of_groups = r"--\S+ str\s+Config file for .*\n(?: {8}.*\n)*"
    names = {found.split()[0] for found in re.findall(rf"^  ({of_groups})", text, re.MULTILINE)}
    text = re.sub(rf"^  {of_groups}", "", text, flags=re.MULTILINE)
    text = re.sub(rf"\s+\[(?:{'|'.join(names) or '-'}) str\]", "", text)
    text = re.sub(r"^\w+ \['([\w.]+)'\]:$", r"--\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^\w+:\n(?=  [A-Z])", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ +\n\n?", "\n", text, flags=re.MULTILINE)
    return re.sub(r"^ {6}(?=\S)", "  ", text, flags=re.MULTILINE)


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in SUBCOMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} <subcommand> [--flag=value ...]",
            "",
            *lines,
            "",
            f"`{PROGRAM} <subcommand> --help` explains the flags, `--help-all` also those of LeRobot;",
            f"`{PROGRAM} --version` says what is installed. Training, evaluation and robots are LeRobot's",
            "own commands, with --policy.type=lerobot_pi0: lerobot-train, lerobot-eval, ...",
        ]
    )


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def fail(message: str, code: int) -> NoReturn:
    """Leave with a line on standard error."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
