"""`lerobot-pi0 <subcommand> [--flag=value ...]`: the tools beside the policy, with LeRobot's flag style.

A subcommand is a function from a dataclass to the text to print, or to text and exit code: the fields are its
flags, the comments above them their help; a field without a default may also be given by its position. A
function of a list of strings gets its arguments as they are: it stands before a command of LeRobot. A module
is imported when it is called.
"""

import difflib
import itertools
import logging
import re
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import NoReturn, get_type_hints

from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import silence_torchcodec_notice

PROGRAM = "lerobot-pi0"

# Beside the package in a checkout, within it in a wheel.
BENCHMARKS = "lerobot_pi0.benchmarks" if Path(__file__).with_name("benchmarks").is_dir() else "benchmarks"

# Name: (module:function, what it does).
SUBCOMMANDS = {
    "attention": ("lerobot_pi0.tools.attention:main", "where the actions look: at which patches and words"),
    "bench": (f"{BENCHMARKS}.bench:main", "measure this π0 beside LeRobot's in-tree one, on this machine"),
    "convert": ("lerobot_pi0.conversion.convert:main", "openpi's, LeRobot's and transformers' π0 ↔ this one"),
    "demo": ("lerobot_pi0.demo.demo:main", "record, train and evaluate a small π0 in Meta-World"),
    "doctor": ("lerobot_pi0.tools.doctor.command:main", "what is wrong with a policy, its data, its robot"),
    "language": ("lerobot_pi0.tools.language:main", "does a policy follow its instruction? Swap it and see"),
    "latency": ("lerobot_pi0.control.latency:main", "how long a chunk takes, and how to drive with that"),
    "merge": (
        "lerobot_pi0.conversion.merge:main",
        "one plain checkpoint of LoRA adapters and their base",
    ),
    "plan": ("lerobot_pi0.tools.plan:main", "which fine-tuning fits a GPU, how long it takes, which command"),
    "record": ("lerobot_pi0.demo.record:main", "record scripted Meta-World experts as a LeRobotDataset"),
    "report": (
        "lerobot_pi0.tools.report.command:main",
        "compare a policy with recorded actions and naive guesses: a page",
    ),
    "rollout": (
        "lerobot_pi0.control.rollout:main",
        "lerobot-rollout with checks before it moves, and a trace",
    ),
    "serve": ("lerobot_pi0.serving.serve:main", "serve a policy to robots by LeRobot's async inference"),
    "trace": ("lerobot_pi0.control.trace_report:main", "stalls, jumps and delays of a run, from its trace"),
}

# Commands of LeRobot that people look for here.
LEROBOTS = ("train", "eval", "replay", "teleoperate", "calibrate")


def main() -> None:
    """Console entry point. Exit code 2 for a wrong command line, 1 for an error, 130 for Ctrl-C."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
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
    silence_torchcodec_notice()
    try:
        run(name, flags)
    except KeyboardInterrupt:
        fail(f"\n{PROGRAM} {name}: interrupted.", 130)
    except UserError as error:
        fail(f"{PROGRAM} {name}: error: {error}", 1)


def run(name: str, flags: list[str]) -> None:
    """Parse the flags of a subcommand and call it."""
    import draccus

    module, function_name = SUBCOMMANDS[name][0].split(":")
    function = getattr(import_module(module), function_name)
    (config_class,) = (hint for key, hint in get_type_hints(function).items() if key != "return")
    if config_class == list[str]:
        if (text := function(flags)) is not None:
            print(text)
        return
    required = [
        field.name for field in fields(config_class) if field.default is field.default_factory is MISSING
    ]
    positional = list(itertools.takewhile(lambda flag: not flag.startswith("-"), flags))
    if len(positional) > len(required):
        known = f"takes {' '.join(map(str.upper, required))}" if required else "takes flags alone"
        fail(f"{PROGRAM} {name}: error: {positional[len(required)]!r} is too many: it {known}", 2)
    given = [f"--{field}={value}" for field, value in zip(required, positional, strict=False)]
    flags = [*given, *flags[len(positional) :]]
    flags = [re.sub(r"^--[^=]+", lambda name: f"--{name[0][2:].replace('-', '_')}", flag) for flag in flags]
    # LeRobot's flags take a value, also those that are true or false; "--quick" is short for "--quick=true".
    switches = {f"--{field.name}" for field in fields(config_class) if field.type is bool}
    flags = [
        f"{flag}=true" if flag in switches and following.startswith("--") else flag
        for flag, following in zip(flags, [*flags[1:], "--"], strict=False)
    ]
    try:
        config = draccus.parse(config_class, args=flags, prog=f"{PROGRAM} {name}", preferred_help="above")
    except draccus.ParsingError as error:
        # If it was the dataclass that objected, draccus only says that it could not be made.
        reason = error.__cause__ if type(error) is draccus.ParsingError else error
        fail(f"{PROGRAM} {name}: error: {reason} (`{PROGRAM} {name} --help`)", 2)
    text = function(config)
    text, code = text if isinstance(text, tuple) else (text, 0)
    if text is not None:
        print(text)
    if code:
        raise SystemExit(code)


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} <subcommand> [--flag=value ...]",
            "",
            *lines,
            "",
            f"`{PROGRAM} <subcommand> --help` explains the flags. Training, evaluation and robots are",
            "LeRobot's own commands, with --policy.type=lerobot_pi0: lerobot-train, lerobot-eval, ...",
        ]
    )


def fail(message: str, code: int) -> NoReturn:
    """Leave with a line on standard error."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
