"""What fine-tuning, the EMA, relative actions and precision do to the demo's policy.

    python -m benchmarks.finetuning transfer    a third task from few episodes: full, expert, LoRA, scratch
    python -m benchmarks.finetuning actions     absolute and relative actions, with and without the EMA
    python -m benchmarks.finetuning precision   float32, bfloat16 over float32 weights, pure bfloat16

Each runs LeRobot's own commands in `outputs/finetuning` (precision: a plain loop), reuses what is there, and
prints a table of successes with 95 % intervals (Wilson, 1927). One seed.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from lerobot.datasets import LeRobotDataset
from lerobot.optim.optimizers import load_optimizer_state
from safetensors.torch import load_file, save_file

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.demo.command import Command, Job, run
from lerobot_pi0.demo.demo import TRAINING_ENVIRONMENT
from lerobot_pi0.demo.record import RecordConfig, record
from lerobot_pi0.demo.report import read_evaluation, wilson_interval
from lerobot_pi0.demo.suites import EVALUATION_SEED
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors

ROOT = Path("outputs", "finetuning")
DEMO = "configs/demo.yaml"
FOUR_TASKS = "faucet-open-v3,faucet-close-v3,door-unlock-v3,plate-slide-v3"
# One thread for each of two commands side by side.
ONE_THREAD = (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"))

OLD_TASKS, NEW_TASK, FEW = "faucet-open-v3,door-unlock-v3", "plate-slide-v3", 10
PRETRAINING_STEPS, TUNING_STEPS, ACTION_STEPS, PRECISION_STEPS = 2000, 500, 2000, 1000
EPISODES = 40


def transfer() -> str:
    """A policy of two tasks learns a third from few episodes, by each recipe; merged adapters as well."""
    old = demonstrations("two_tasks", OLD_TASKS)
    new = demonstrations("third_task", NEW_TASK, FEW)
    train(("pretrained", [f"--config_path={DEMO}", *of(old), f"--steps={PRETRAINING_STEPS}"]))
    base = [f"--policy.path={checkpoint('pretrained')}", *of(new), f"--steps={TUNING_STEPS}"]
    loader = ["--batch_size=32", "--num_workers=0", "--log_freq=50", "--save_freq=0", "--env_eval_freq=0"]
    train(
        ("full", [*base, *loader]),
        ("expert", [*base, *loader, "--policy.freeze=vlm"]),
        ("lora", [*base, *loader, "--peft.method_type=LORA"]),
        ("scratch", [f"--config_path={DEMO}", *of(new), f"--steps={TUNING_STEPS}"]),
    )
    merged = ROOT / "merged"
    if not merged.exists():
        arguments = (f"--adapter={checkpoint('lora')}", f"--output={merged}")
        run(Job("merge", Command("lerobot-pi0 merge", arguments), ROOT / "merge.log", "merge"))
    policies = {name: checkpoint(name) for name in ("pretrained", "full", "expert", "lora", "scratch")}
    evaluate(policies | {"merged": merged}, NEW_TASK)
    rows = ((name, *successes(name)[NEW_TASK]) for name in (*policies, "merged"))
    return "\n".join(f"| {name} | {percent(*counts)} |" for name, *counts in rows)


def actions() -> str:
    """Four tasks with positions for actions, absolute and relative, weights and EMA."""
    data = demonstrations("positions", FOUR_TASKS, position_actions=True)
    settings = [f"--config_path={DEMO}", *of(data), f"--steps={ACTION_STEPS}"]
    train(
        ("absolute", settings),
        ("relative", [*settings, "--policy.relative_actions=true"]),
    )
    policies = {}
    for name in ("absolute", "relative"):
        policies |= {name: checkpoint(name), f"{name}_without_ema": without_ema(name)}
    evaluate(policies, FOUR_TASKS, "--env.position_actions=true")
    lines = []
    for name in policies:
        of_tasks = successes(name)
        total = [sum(column) for column in zip(*of_tasks.values(), strict=True)]
        cells = (percent(*counts) for counts in (*of_tasks.values(), total))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([f"| | {FOUR_TASKS.replace(',', ' | ')} | all |", "|---|---|---|---|---|---|", *lines])


def precision() -> str:
    """Mean loss of the last steps of 1,000, the same data, noise and time in each run but the last."""
    data = demonstrations("two_tasks", OLD_TASKS)
    runs = {
        "float32": ("float32", False, 0),
        "float32, another seed": ("float32", False, 1),
        "bfloat16 over float32 weights": ("bfloat16", False, 0),
        "pure bfloat16": ("bfloat16", True, 0),
    }
    curves = {name: list(losses(data, *settings)) for name, settings in runs.items()}
    (ROOT / "precision.json").write_text(json.dumps(curves))
    quarter = PRECISION_STEPS // 4
    reference = torch.tensor(curves["float32"]).split(quarter)
    lines = ["| | mean loss by quarter | mean distance to float32, step by step |", "|---|---|---|"]
    for name, curve in curves.items():
        quarters = torch.tensor(curve).split(quarter)
        means = " ".join(f"{part.mean():.4f}" for part in quarters)
        distance = (quarters[-1] - reference[-1]).abs().mean()
        lines.append(f"| {name} | {means} | {distance:.4f} |")
    return "\n".join(lines)


def demonstrations(name: str, tasks: str, episodes: int = 40, position_actions: bool = False) -> Path:
    """Recorded with objects in Meta-World's own places."""
    return record(
        RecordConfig(
            ROOT / name,
            tasks=tasks,
            episodes_per_task=episodes,
            moved=0.0,
            position_actions=position_actions,
        )
    )


def losses(data: Path, dtype: str, pure: bool, seed: int) -> Iterator[float]:
    """Training losses of the demo's policy; `pure` lets AdamW step on bfloat16 weights."""
    config = Pi0Config.from_pretrained(checkpoint("pretrained"), cli_overrides=[f"--dtype={dtype}"])
    assert isinstance(config, Pi0Config)
    steps = [step / 80 for step in range(config.chunk_size)]
    dataset = LeRobotDataset("local/x", root=data, delta_timestamps={"action": steps})
    torch.manual_seed(seed)
    policy = Pi0Policy(config)
    policy.config.ema_decay = policy.trained.decay = 0.0
    if pure:
        policy.to(torch.bfloat16)
        groups: list = [{"params": list(filter(lambda p: p.requires_grad, policy.parameters()))}]
    else:
        groups = policy.get_optim_params()
    optimizer = config.get_optimizer_preset().build(groups)
    schedule = config.get_scheduler_preset().build(optimizer, PRECISION_STEPS)
    preprocess, _ = make_lerobot_pi0_pre_post_processors(config, dataset.meta.stats)
    generator = torch.Generator().manual_seed(seed)
    frames = torch.utils.data.DataLoader(
        dataset, batch_size=32, shuffle=True, generator=generator, drop_last=True
    )
    batches = [preprocess(batch) for _, batch in zip(range(100), frames, strict=False)]
    policy.train()
    for step in range(PRECISION_STEPS):
        loss, _ = policy(batches[step % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()


def of(data: Path) -> list[str]:
    return ["--dataset.repo_id=local/x", f"--dataset.root={data}"]


def checkpoint(name: str) -> Path:
    return ROOT / "runs" / name / "checkpoints" / "last" / "pretrained_model"


def train(*runs: tuple[str, list[str]]) -> None:
    """Training runs that are not there yet, two at a time."""
    missing = [(name, arguments) for name, arguments in runs if not checkpoint(name).exists()]
    environment = (*TRAINING_ENVIRONMENT, *(ONE_THREAD if len(missing) > 1 else ()))
    jobs = []
    for name, arguments in missing:
        folder = ROOT / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        given = (*arguments, "--policy.push_to_hub=false", f"--output_dir={folder}")
        command = Command("lerobot-train", given, environment)
        jobs.append(Job(name, command, ROOT / f"{name}.log", "Training"))
    for i in range(0, len(jobs), 2):
        run(*jobs[i : i + 2])


def without_ema(name: str) -> Path:
    """A copy of a checkpoint with the weights that the optimizer stepped on."""
    folder = ROOT / "runs" / f"{name}_without_ema"
    if not folder.exists():
        source = checkpoint(name)
        policy = Pi0Policy.from_pretrained(source)
        optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
        policy.config.get_scheduler_preset().build(optimizer, ACTION_STEPS)  # leaves its mark in the groups
        load_optimizer_state(optimizer, source.parent / "training_state")
        tensors = load_file(source / "model.safetensors")
        tensors |= {key: parameter.data for key, parameter in policy.trained.parameters.items()}
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def evaluate(policies: dict[str, Path], tasks: str, *extras: str) -> None:
    """Evaluations that are not there yet, two at a time, in the same scenes."""
    jobs = []
    for name, policy in policies.items():
        folder = ROOT / "evaluations" / name
        if (folder / "eval_info.json").exists():
            continue
        arguments = (
            f"--policy.path={policy}",
            "--env.type=metaworld_fast",
            f"--env.task={tasks}",
            *extras,
            f"--eval.n_episodes={EPISODES}",
            "--eval.batch_size=1",
            f"--seed={EVALUATION_SEED}",
            f"--output_dir={folder}",
        )
        command = Command("lerobot-eval", arguments, ONE_THREAD)
        jobs.append(Job(name, command, ROOT / f"evaluate_{name}.log", "Stepping through eval batches"))
    for i in range(0, len(jobs), 2):
        run(*jobs[i : i + 2])


def successes(name: str) -> dict[str, tuple[int, int]]:
    """By task: successful episodes, and how many there were."""
    results = read_evaluation(ROOT / "evaluations" / name)
    return {task: (sum(result.successes), len(result.successes)) for task, result in results.items()}


def percent(successful: int, of: int) -> str:
    """A share with its 95 % interval (Wilson)."""
    low, high = wilson_interval(successful, of)
    return f"{successful / of:.0%} ({low:.0%}–{high:.0%})"


if __name__ == "__main__":
    EXPERIMENTS = {"transfer": transfer, "actions": actions, "precision": precision}
    if sys.argv[1:] not in [[name] for name in EXPERIMENTS]:
        raise SystemExit(f"usage: python -m benchmarks.finetuning {'|'.join(EXPERIMENTS)}")
    print(EXPERIMENTS[sys.argv[1]]())
