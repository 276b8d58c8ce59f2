"""`lerobot-pi0 demo`: from nothing to an evaluated policy with LeRobot's own commands, which it prints.

Whether a step is done is read off its result: the recording's settings, the checkpoint of the last training
step, the evaluation's `eval_info.json`. So a second start goes on where the first one ended.
"""

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lerobot_pi0.demo.command import Command, Job, run
from lerobot_pi0.demo.flags import DemoConfig, RecordConfig
from lerobot_pi0.demo.metaworld import OPPOSITES, parse_tasks, task_instructions
from lerobot_pi0.demo.record import SETTINGS_FILE, is_recorded
from lerobot_pi0.errors import OutputExistsError
from lerobot_pi0.inputs.shipped_configs import shipped_config

logger = logging.getLogger(__name__)

# lerobot-eval's default. Demonstrations begin at 100,000, so that the evaluated scenes are new.
EVALUATION_SEED = 1000
# How the types of the two policies are called.
MODELS = {"lerobot_pi0": "π0", "lerobot_pi05": "π0.5"}
QUICK_TASKS = "faucet-open-v3,faucet-close-v3"
# Waiting threads sleep: beside other work on the machine, spinning made steps up to ten times as long.
TRAINING_ENVIRONMENT = (("HF_HUB_OFFLINE", "1"), ("OMP_WAIT_POLICY", "PASSIVE"))
# The process that loads frames takes a core of its own, and small matrices gain little from many.
TRAINING_THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
QUICK_TRAINING = (
    "--steps=10",
    "--batch_size=4",
    "--log_freq=5",
    "--save_freq=5",
    "--policy.log_joints_every=5",
)
QUICK_EPISODE_LENGTH = 20
# Environments that share a pass of the policy.
EVALUATION_BATCH = 10

# The stages and what share of the time each takes: seconds on two cores of an AMD EPYC.
STAGES = {"record": 83, "train": 490, "evaluate": 82, "report": 17}
# The same for --quick, which mostly imports.
QUICK_STAGES = {"record": 25, "train": 25, "evaluate": 25, "report": 10}


class Demo:
    """The steps: what each of them runs, and how to tell that it is done."""

    def __init__(self, config: DemoConfig) -> None:
        self.quick = config.quick
        self.policy = config.policy
        name = "demo" if config.policy == "pi0" else f"demo_{config.policy}"
        self.root = config.output_dir or Path("outputs", f"{name}_quick" if config.quick else name)
        self.training = self.root / "training"
        self.recording = RecordConfig(
            root=self.root / "demonstrations",
            episodes_per_task=config.episodes_per_task or (2 if config.quick else 40),
        )
        if config.quick:
            self.recording.tasks = QUICK_TASKS
        self.tasks = parse_tasks(self.recording.tasks)
        self.pairs = [task for task in self.tasks if OPPOSITES.get(task) in self.tasks]
        self.eval_episodes = config.eval_episodes or (1 if config.quick else 40)
        self.episode_length = QUICK_EPISODE_LENGTH if config.quick else self.recording.episode_length
        self.train_config = config.train_config or shipped_config(name)
        self.takes_any_policy = config.train_config is not None
        self.train_extras = list(QUICK_TRAINING) if config.quick else []
        if config.wandb:
            self.train_extras += ["--wandb.enable=true", f"--wandb.mode={config.wandb_mode}"]

    def record(self) -> list[Job]:
        """The recording, unless it is there."""
        if is_recorded(self.recording):
            return []
        arguments = [
            f"--root={self.recording.root}",
            f"--tasks={self.recording.tasks}",
            f"--episodes_per_task={self.recording.episodes_per_task}",
        ]
        return [self._job("record", Command("lerobot-pi0 record", tuple(arguments)), "Recording")]

    def train(self) -> list[Job]:
        """The training, or what is missing of it since its last checkpoint."""
        data = (
            f"--dataset.repo_id={self.recording.repo_id}",
            f"--dataset.root={self.recording.root}",
            f"--output_dir={self.training}",
        )
        last = self.training / "checkpoints" / "last"
        if not last.exists():
            if self.training.exists() and not self._log("train").exists():
                raise OutputExistsError(
                    f"{self.training} is there, but not from this demo. Choose another --output_dir."
                )
            # An earlier start that did not come as far as a checkpoint; lerobot-train wants no such folder.
            shutil.rmtree(self.training, ignore_errors=True)
            dtype = [] if bfloat16_pays() else ["--policy.dtype=float32"]
            arguments = (f"--config_path={self.train_config}", *data, *dtype, *self.train_extras)
            return [self._training_job(arguments)]
        trained = self._train_settings()["policy"]["type"]
        if not self.takes_any_policy and trained != f"lerobot_{self.policy}":
            raise OutputExistsError(
                f"{self.training} holds a {trained}, not what --policy={self.policy} trains "
                f"(lerobot_{self.policy}). Choose another --output_dir."
            )
        saved_config = self.checkpoint / "train_config.json"
        for cause in (self.train_config, self.recording.root / SETTINGS_FILE):
            if cause.exists() and cause.stat().st_mtime > saved_config.stat().st_mtime:
                logger.warning(
                    "%s is newer than the training in %s, which is reused: to train anew, delete it or "
                    "choose another --output_dir",
                    cause,
                    self.training,
                )
        step = int(last.resolve().name)
        if step == self._train_settings()["steps"]:
            return []
        arguments = (f"--config_path={saved_config}", "--resume=true", *data, *self.train_extras)
        return [self._training_job(arguments, step)]

    def evaluate(self) -> list[Job]:
        """The missing evaluations: as instructed, and with the instructions of opposite tasks swapped.

        The latter takes longest, since its episodes end without success, and therefore shows its progress.
        """
        wanted: list[tuple[str, list[str], list[str]]] = [("evaluate", self.tasks, [])]
        if self.pairs:
            wanted.append(("evaluate_swapped", self.pairs, ["--env.swap_instructions=true"]))
        # A policy looks when it plans: pictures in between would be drawn for nobody.
        steps_per_picture = self._train_settings()["policy"]["n_action_steps"]
        jobs = []
        for name, tasks, extras in wanted:
            folder = self.root / name
            if self._is_evaluated(folder, tasks):
                continue
            arguments = (
                f"--policy.path={self.checkpoint}",
                "--env.type=metaworld_fast",
                f"--env.task={','.join(tasks)}",
                f"--env.episode_length={self.episode_length}",
                f"--env.steps_per_picture={steps_per_picture}",
                *extras,
                f"--eval.n_episodes={self.eval_episodes}",
                f"--eval.batch_size={min(self.eval_episodes, EVALUATION_BATCH)}",
                f"--seed={EVALUATION_SEED}",
                f"--output_dir={folder}",
            )
            # Two evaluations side by side: one thread each is as much as two cores have.
            environment = (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"))
            command = Command("lerobot-eval", arguments, environment)
            jobs.append(self._job(name, command, "Stepping through eval batches"))
        return jobs

    def open_loop_baselines(self) -> dict[str, float]:
        """Success of each task's average demonstration, replayed open-loop in the evaluated episodes."""
        from lerobot_pi0.demo.baseline import mean_demonstration, open_loop_success, recorded_actions

        seeds = range(EVALUATION_SEED, EVALUATION_SEED + self.eval_episodes)
        return {
            task: open_loop_success(
                task,
                mean_demonstration(recorded_actions(self.recording.root, task)),
                seeds,
                self.episode_length,
            )
            for task in self.tasks
        }

    def report(self) -> str:
        """Write the page with its pictures; return what the terminal shows."""
        from lerobot_pi0.demo import report
        from lerobot_pi0.demo.page import write_page

        evaluation = report.read_evaluation(self.root / "evaluate")
        swapped = report.read_evaluation(self.root / "evaluate_swapped") if self.pairs else {}
        table = report.success_table(evaluation, self.open_loop_baselines(), swapped)
        losses = report.training_losses(self._log("train"), self._train_settings()["log_freq"])
        if losses:
            report.plot_losses(losses, self.root / "loss.png")
        report.contact_sheet(evaluation, task_instructions(), self.root / "policy.gif")
        trained = self._train_settings()["policy"]["type"]
        page = write_page(
            self.root / "index.html",
            MODELS.get(trained, trained),
            table,
            "loss.png" if losses else None,
            self.next_commands(),
            self.quick,
        )
        lines = [str(table), ""]
        if self.quick:
            lines += ["A quick run: 10 training steps teach nothing. Leave out --quick for the real one.", ""]
        lines += [
            f"all of this on a page {page}",
            f"videos                {self.root / 'evaluate' / 'videos'}",
            f"checkpoint            {self.checkpoint}",
            "",
            "Next, for example:",
            "",
            *self.next_commands(),
        ]
        return "\n".join(lines)

    def next_commands(self) -> list[str]:
        """What to type after the demo: shell lines."""
        inputs = (
            f"--policy.path={self.checkpoint} --dataset.repo_id={self.recording.repo_id} "
            f"--dataset.root={self.recording.root}"
        )
        return [
            *(["source .venv/bin/activate"] if Path(".venv", "bin", "activate").exists() else []),
            f"lerobot-pi0 report {inputs} --output={self.root / 'open_loop'}",
            f"lerobot-pi0 language {inputs}",
            f"lerobot-pi0 attention {inputs} --dataset.episodes='[0]' --frame=20",
        ]

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, as --policy.path takes it."""
        return self.training / "checkpoints" / "last" / "pretrained_model"

    def _train_settings(self) -> dict[str, Any]:
        return json.loads((self.checkpoint / "train_config.json").read_text(encoding="utf-8"))

    def _is_evaluated(self, folder: Path, tasks: list[str]) -> bool:
        from lerobot_pi0.demo.report import read_evaluation

        info, weights = folder / "eval_info.json", self.checkpoint / "model.safetensors"
        if not info.exists() or info.stat().st_mtime < weights.stat().st_mtime:
            return False
        results = read_evaluation(folder)
        return list(results) == tasks and all(
            len(result.successes) == self.eval_episodes for result in results.values()
        )

    def _log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def _job(self, name: str, command: Command, bar: str, first_step: int = 0) -> Job:
        return Job(name, command, self._log(name), bar, first_step)

    def _training_job(self, arguments: tuple[str, ...], first_step: int = 0) -> Job:
        environment = (*TRAINING_ENVIRONMENT, ("OMP_NUM_THREADS", str(TRAINING_THREADS)))
        command = Command("lerobot-train", arguments, environment)
        return self._job("train", command, "Training", first_step)


def bfloat16_pays() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16: many have no instructions for it."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            _ = x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def main(config: DemoConfig) -> str:
    """`lerobot-pi0 demo`: runs the stages that are missing, and reports the results."""
    demo = Demo(config)
    expected = QUICK_STAGES if demo.quick else STAGES
    seconds: dict[str, float] = {}
    text = ""
    for number, stage in enumerate(expected, 1):
        left = minutes_left(expected, seconds, stage)
        logger.info("stage %d of %d, %s: about %s left in all", number, len(expected), stage, left)
        start = time.monotonic()
        if stage == "report":
            text = demo.report()
        elif jobs := getattr(demo, stage)():
            run(*jobs)
        else:
            logger.info("%s: already done, reused", stage)
            continue
        seconds[stage] = time.monotonic() - start
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"\n{text}\n\nwall time: {times}"


def minutes_left(expected: dict[str, int], seconds: dict[str, float], stage: str) -> str:
    """How long this stage and those after it take, if this machine is as fast as it was until now.

    Args:
        expected: seconds by stage, in order.
        seconds: those that stages have taken here; stages that were done before are missing.
        stage: the next one.
    """
    names = list(expected)
    rest = sum(expected[name] for name in names[names.index(stage) :])
    speed = sum(seconds.values()) / sum(expected[name] for name in seconds) if seconds else 1.0
    minutes = math.ceil(rest * speed / 60)
    return f"{minutes} minute{'s' if minutes > 1 else ''}"
