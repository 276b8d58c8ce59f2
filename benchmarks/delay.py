"""Does a policy still solve its tasks when each chunk arrives late? In simulated steps, not in wall time.

    python -m benchmarks.delay

Records the demo's tasks with positions of the hand for actions, as arms have, trains the demo's policy on it
with chunks of 50 relative actions, and a copy of that for real-time chunking, in `outputs/delay`; what is
there is reused. Then each of the ways of `chunking` solves the same episodes of Meta-World, 80 steps per
second, with chunks that arrive `delay` steps after their observation. Prints successes with 95 % intervals
(Wilson, 1927), and what a delay changes in the same episodes, with the interval of its mean.
"""

import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from benchmarks.chunking import predictor
from benchmarks.finetuning import FOUR_TASKS, percent
from lerobot_pi0.demo.command import Command, Job, run
from lerobot_pi0.demo.demo import TRAINING_ENVIRONMENT
from lerobot_pi0.demo.metaworld_env import MetaworldFastEnv
from lerobot_pi0.demo.metaworld_tasks import FPS, task_instructions
from lerobot_pi0.demo.record import RecordConfig, record
from lerobot_pi0.inputs.policy import LoadedPolicy, PolicyFlags, load_policy

ROOT = Path("outputs", "delay")
CHUNK, LONGEST_DELAY, STEPS, TUNING_STEPS = 50, 24, 3400, 1000
# The expert goes on after success: the policy executes actions that far ahead, so they must be learnt there.
TASKS = FOUR_TASKS.split(",")
RECORDING = RecordConfig(
    ROOT / "demonstrations",
    tasks=FOUR_TASKS,
    episodes_per_task=80,
    moved=0.0,
    position_actions=True,
    after_success=LONGEST_DELAY,
)
SEEDS = range(2000, 2050)  # of each task; the demo's evaluation and recording have others
EPISODE_LENGTH = 200
DELAYS = (0, 8, 24)  # steps: 0, 0.1 and 0.3 s
# A chunk is replaced when so much of it was executed, or as soon as the next one can be there.
EXECUTED = 8
# Which policy, and how it goes from chunk to chunk.
WAYS = (("plain", "naive"), ("plain", "in-tree"), ("plain", "rtc"), ("trained", "rtc"))


def main() -> str:
    """Train what is missing, evaluate what is missing, print the table."""
    train()
    wanted = [
        (policy, way, delay, task)
        for policy, way in WAYS
        for delay in DELAYS
        for task in TASKS
        if not result_file(policy, way, delay, task).exists()
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in pool.map(evaluate, *zip(*wanted, strict=True)) if wanted else ():
            print(done, file=sys.stderr)
    return table()


def train() -> None:
    """The demo's policy with longer chunks, which then learns real-time chunking."""
    data = record(RECORDING)
    plain = ROOT / "plain" / "checkpoints" / "last"
    settings = {
        "plain": ("--config_path=configs/demo.yaml", "--policy.relative_actions=true", *steps(STEPS)),
        "trained": (
            f"--policy.path={plain / 'pretrained_model'}",
            f"--policy.rtc_training_max_delay={LONGEST_DELAY}",
            "--policy.push_to_hub=false",
            "--policy.optimizer_lr=4e-4",
            "--dataset.repo_id=local/metaworld_demo",
            *("--batch_size=32", "--num_workers=0", "--log_freq=50", "--save_freq=0", "--env_eval_freq=0"),
            *steps(TUNING_STEPS),
        ),
    }
    for name, arguments in settings.items():
        if (ROOT / name / "checkpoints" / "last").exists():
            continue
        where = (f"--dataset.root={data}", f"--output_dir={ROOT / name}", f"--policy.chunk_size={CHUNK}")
        command = Command("lerobot-train", (*arguments, *where), TRAINING_ENVIRONMENT)
        run(Job(name, command, ROOT / f"{name}.log", "Training"))


def steps(number: int) -> tuple[str, str]:
    return f"--steps={number}", f"--policy.scheduler_decay_steps={number}"


def result_file(policy: str, way: str, delay: int, task: str) -> Path:
    return ROOT / "results" / f"{policy}_{way}_{delay}_{task}.json"


def evaluate(policy: str, way: str, delay: int, task: str) -> str:
    """Solve a task's episodes, and write down which ones were solved."""
    torch.set_num_threads(1)
    folder = ROOT / policy / "checkpoints" / "last" / "pretrained_model"
    loaded = load_policy(PolicyFlags(path=str(folder)))
    predict = predictor(loaded.policy, way, RTCConfig(execution_horizon=CHUNK))
    env = MetaworldFastEnv(task, task_instructions()[task], position_actions=True)
    solved = [episode(env, loaded, predict, delay, seed) for seed in SEEDS]
    env.close()
    file = result_file(policy, way, delay, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(solved))
    return f"{file.stem}: {sum(solved)} of {len(solved)}"


def episode(env: MetaworldFastEnv, loaded: LoadedPolicy, predict: Any, delay: int, seed: int) -> bool:
    """Whether an episode is solved when each chunk arrives `delay` steps after its observation."""
    torch.manual_seed(seed)
    env.reset(seed=seed)
    chunk, at, arriving, waited = predict(observation(env, loaded), 0, None), 0, None, 0
    left = chunk[0]
    actions = loaded.postprocess(chunk)[0].numpy()
    for _ in range(EPISODE_LENGTH):
        if arriving is None and at >= max(EXECUTED, delay):
            left = left[at:]
            arriving, waited = predict(observation(env, loaded), delay, left), 0
        if arriving is not None and waited == delay:
            left, at = arriving[0], delay
            actions, arriving = loaded.postprocess(arriving)[0].numpy(), None
        _, success = env.act(actions[at])
        at, waited = at + 1, (waited + 1 if arriving is not None else 0)
        if success:
            return True
    return False


def observation(env: MetaworldFastEnv, loaded: LoadedPolicy) -> dict[str, Any]:
    """What the policy sees now."""
    seen = env.observe()
    return loaded.preprocess(
        {
            "observation.image": torch.from_numpy(seen["pixels"]).permute(2, 0, 1).float() / 255,
            "observation.state": torch.from_numpy(seen["agent_pos"]),
            "task": env.task_description,
        }
    )


def table() -> str:
    lines = [
        "| policy | chunks | delay | " + " | ".join(task.removesuffix("-v3") for task in TASKS) + " | all | "
        "against no delay |",
        "|" + "---|" * (len(TASKS) + 5),
    ]
    for policy, way in WAYS:
        undelayed: np.ndarray | None = None
        for delay in DELAYS:
            results = [json.loads(result_file(policy, way, delay, task).read_text()) for task in TASKS]
            solved = np.concatenate(results).astype(float)
            undelayed = solved if undelayed is None else undelayed
            change = solved - undelayed
            half = 1.96 * change.std(ddof=1) / math.sqrt(len(change))
            cells = [f"{sum(result) / len(result):.0%}" for result in results]
            rate = percent(int(solved.sum()), len(solved))
            lines.append(
                f"| {policy} | {way} | {delay / FPS:g} s | {' | '.join(cells)} | {rate} | "
                f"{100 * change.mean():+.1f} ± {100 * half:.1f} points |"
            )
    lines.append(f"\n{len(SEEDS) * len(TASKS)} episodes each, the same ones everywhere.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main())
