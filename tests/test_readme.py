"""The documentation is true: every shell command parses, code runs, links and names lead somewhere."""

import importlib.metadata
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.pi0 import PI0Config
from lerobot.utils.import_utils import register_third_party_plugins
from tiny_policy import tiny_config
from torch.distributed.run import get_args_parser

import lerobot_pi0.control.rollout
from lerobot_pi0 import Pi0Config, Pi0Policy, Pi05Config, cli
from lerobot_pi0.configuration_pi0 import RETIRED
from lerobot_pi0.lerobot_compat import parse_flags
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors
from lerobot_pi0.tools.doctor.checks import CHECKS

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]

# Whose flags each command of LeRobot takes.
LEROBOTS = {
    "lerobot-calibrate": "lerobot.scripts.lerobot_calibrate:CalibrateConfig",
    "lerobot-edit-dataset": "lerobot.scripts.lerobot_edit_dataset:EditDatasetConfig",
    "lerobot-eval": "lerobot.scripts.lerobot_eval:EvalPipelineConfig",
    "lerobot-record": "lerobot.scripts.lerobot_record:RecordConfig",
    "lerobot-train": "lerobot.scripts.lerobot_train:TrainPipelineConfig",
    "lerobot.async_inference.robot_client": "lerobot.async_inference.configs:RobotClientConfig",
}
# Of the environment, without flags that we know; gsutil is Google's.
OTHERS = ("pre-commit", "lerobot-find-port", "gsutil")
SUBSTITUTION = "$(which lerobot-train)"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shell_commands() -> Iterator[Any]:
    """Each command of the shell blocks, and of the comments in configs/, once."""
    pages = {page: "\n".join(blocks(text, "bash")) for page, text in PAGES.items()}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines = re.findall(r"^#   (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        pages[f"configs/{path.name}"] = "\n".join(lines)
    seen = set()
    for page, text in pages.items():
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace(SUBSTITUTION, shlex.quote(SUBSTITUTION)), comments=True)
            if words and tuple(words) not in seen:
                seen.add(tuple(words))
                yield pytest.param(words, id=f"{page}: {shlex.join(words)[:60]}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Where the commands' checkpoints would be: a config, and that of a training."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_config().save_pretrained(folder)
    flags = ["--policy.type=lerobot_pi0", "--policy.device=cpu", "--dataset.repo_id=me/data"]
    parse_lerobots("lerobot-train", flags).save_pretrained(folder)
    return folder


def parse_lerobots(program: str, flags: list[str]) -> Any:
    register_third_party_plugins()
    module, name = LEROBOTS[program].split(":")
    return parse_flags(program, flags, getattr(import_module(module), name))


def parse_ours(monkeypatch, name: str, flags: list[str]) -> None:
    """A subcommand up to the call of its function."""
    calls = []
    monkeypatch.setattr(cli, "check_folders", lambda *_: None)  # a command before this one makes them
    if name == "rollout":
        monkeypatch.setattr(lerobot_pi0.control.rollout, "rollout", lambda *given: calls.append(given))
    else:
        module, function = cli.SUBCOMMANDS[name].function.split(":")
        hints = get_type_hints(getattr(import_module(module), function))
        (config_class,) = (hint for key, hint in hints.items() if key != "return")

        def record(config: Any) -> None:
            calls.append(config)

        record.__annotations__ = {"config": config_class}
        monkeypatch.setattr(f"{module}.{function}", record)
    cli.run(name, flags)
    assert len(calls) == 1


def check_pip(words: list[str]) -> None:
    """Extras that exist, of this package or of LeRobot."""
    for word in words:
        name, extras = re.fullmatch(r"([.\w-]+)(?:\[([\w,-]+)\])?", word).groups()  # pyrefly: ignore[missing-attribute]
        ours = PYPROJECT["project"]["optional-dependencies"]
        known = {
            ".": list(ours),
            "lerobot": importlib.metadata.metadata("lerobot").get_all("Provides-Extra"),
            "cmake": [],
        }[name]
        assert {extra for extra in (extras or "").split(",") if extra} <= set(known or ())


def check_pytest(words: list[str]) -> None:
    markers = [line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(".py") or word.startswith("tests/"):
            assert (ROOT / word).exists(), word
        if word == "-m":
            assert following.removeprefix("not ") in markers, following


@pytest.mark.parametrize("words", list(shell_commands()))
def test_every_shell_command_parses(words, checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MUJOCO_GL", "egl")  # commands that set it for themselves
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    # Folders that a command before this one has made, and what a reader fills in.
    made = re.compile(r"outputs/[\w/]+(pretrained_model|_merged|_converted)")
    words = [made.sub(str(checkpoint), word) for word in words]
    words = [word.replace("=...", "=me/something") for word in words]
    program, *rest = words
    if program == "accelerate":
        cut = rest.index(SUBSTITUTION)
        launch = launch_command_parser().parse_args([*rest[1:cut], "lerobot-train"])
        assert launch.training_script == "lerobot-train"
        program, rest = "lerobot-train", rest[cut + 1 :]
    if program == "torchrun":
        cut = rest.index(SUBSTITUTION)
        launch = get_args_parser().parse_args([*rest[:cut], "lerobot-train"])
        assert launch.training_script == "lerobot-train"
        program, rest = "lerobot-train", rest[cut + 1 :]
        if "parallelism" not in {field.name for field in fields(TrainPipelineConfig)}:
            rest = [word for word in rest if not word.startswith("--parallelism.")]  # of later LeRobots
    if program == "python":
        assert rest[0] == "-m"
        assert importlib.util.find_spec(rest[1])
        program, rest = rest[1], rest[2:]
    if program in LEROBOTS:
        on_cpu = ["--policy.device=cpu"] if program == "lerobot-train" and "--resume=true" not in rest else []
        parse_lerobots(program, [*rest, *on_cpu])
    elif program == "lerobot-pi0":
        if rest != ["--help"]:
            parse_ours(monkeypatch, rest[0], rest[1:])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    elif program == "pip":
        assert rest[0] == "install"
        check_pip([word for word in rest[1:] if word != "-e"])
    elif program == "pytest":
        check_pytest(rest)
    elif program == "source":
        assert rest in ([".venv/bin/activate"], [".venv-libero/bin/activate"], [".venv-aloha/bin/activate"])
    elif program in (".ci/run", ".ci/setup.sh"):
        cases = re.findall(r"^([a-z| ]+)\)", (ROOT / program).read_text(encoding="utf-8"), re.MULTILINE)
        assert all(name in " ".join(cases).split() for name in rest)
    elif not program.startswith("benchmarks."):
        assert program in OTHERS, f"{program} is no command that the environment has"


def test_the_training_command_starts_from_published_weights():
    (command,) = [block for block in blocks(README, "bash") if block.startswith("lerobot-train \\")]
    words = shlex.split(command.replace("\\\n", " "))
    config = parse_lerobots(words[0], [*words[1:], "--policy.device=cpu"])
    assert isinstance(config.policy, Pi0Config)
    assert str(config.policy.pretrained_path) == "lerobot/pi0_base"


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = blocks(README, "python")
    features = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 128, 128)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config = tiny_config(chunk_size=16, n_action_steps=4, input_features=features)
    (folder,) = re.findall(r'^folder = "(.*)"$', code, flags=re.MULTILINE)
    policy = Pi0Policy(config)
    one = {"mean": [0.0] * 4, "std": [1.0] * 4}
    pre, post = make_lerobot_pi0_pre_post_processors(config, {"observation.state": one, "action": one})
    for saved in (policy, pre, post):
        saved.save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["chunk"].shape == (1, 16, 4)
    assert torch.isfinite(names["chunk"]).all()


def test_the_readme_is_short():
    assert len(README.split()) <= 1800


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    for command in set(re.findall(r"`(pytest [^`]*)`", PAGES[page])):
        words = shlex.split(command)
        names = [
            name
            for word in words
            if word.endswith(".py")
            for name in re.findall(
                r"^def (test_\w+)", (ROOT / word).read_text(encoding="utf-8"), re.MULTILINE
            )
        ]
        word = words[words.index("-k") + 1] if "-k" in words else ""
        assert not names or any(word in name for name in names), f"{command}: {names}"
        check_pytest(words)


@pytest.mark.parametrize("page", PAGES)
def test_every_policy_setting_that_a_page_names_exists(page):
    ours = {field.name for field in fields(Pi05Config)} - RETIRED
    known = ours | {field.name for field in fields(PI0Config)} | {"path", "type", "discover_packages_path"}
    assert set(re.findall(r"--policy\.(\w+)", PAGES[page])) - known == set()


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_into_the_repository_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), link


def test_files_and_functions_of_the_architecture_page_exist():
    mentions = re.findall(r"`([\w/]+(?:\.py|/))`(?: \(((?:`\w+`(?:, )?)+)\))?", ARCHITECTURE)
    assert len(mentions) > 30
    for path, functions in mentions:
        places = [ROOT / path, *(ROOT / "lerobot_pi0").rglob(path.rstrip("/"))]
        (file,) = [place for place in places if place.exists()]
        for name in re.findall(r"\w+", functions):
            defined = rf"\b(def|class|type) {name}\b|^{name}\b"
            text = file.read_text(encoding="utf-8")
            assert re.search(defined, text, flags=re.MULTILINE), f"{path}: {name}"


def test_every_check_of_the_doctor_that_a_page_names_exists():
    areas = {check.area for check in CHECKS}
    pattern = rf"`((?:{'|'.join(areas)})\.\w+_\w+)`"
    names = {name for page in PAGES.values() for name in re.findall(pattern, page)}
    assert names
    assert names - {check.name for check in CHECKS} == set()
