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
from itertools import batched
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lerobot_pi0.demo.command import Command, Job, run
from lerobot_pi0.demo.flags import DemoConfig, RecordConfig
from lerobot_pi0.demo.progress import BATCHES, EvaluationProgress
from lerobot_pi0.demo.record import SETTINGS_FILE, is_recorded
from lerobot_pi0.demo.suites import EVALUATION_SEED, Evaluation, load_suite
from lerobot_pi0.errors import OutputExistsError
from lerobot_pi0.inputs.shipped_configs import shipped_config

logger = logging.getLogger(__name__)

# How the types of the two policies are called.
MODELS = {"lerobot_pi0": "π0", "lerobot_pi05": "π0.5"}
# Waiting threads sleep: beside other work on the machine, spinning made steps up to ten times as long.
TRAINING_ENVIRONMENT = (("HF_HUB_OFFLINE", "1"), ("OMP_WAIT_POLICY", "PASSIVE"))
# The process that loads frames takes a core of its own, and small matrices gain little from many.
TRAINING_THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
QUICK_STEPS = 10
QUICK_TRAINING = (
    f"--steps={QUICK_STEPS}",
    "--batch_size=4",
    "--log_freq=5",
    "--save_freq=5",
    "--policy.log_joints_every=5",
)
# Tokens of a prompt of π0.5: for instruction and words between, and for each number of the state.
PROMPT_TOKENS, TOKENS_PER_NUMBER = 40, 4


class Demo:
    """The steps: what each of them runs, and how to tell that it is done."""

    def __init__(self, config: DemoConfig) -> None:
        self.quick = config.quick
        self.policy = config.policy
        self.suite = suite = load_suite(config.suite)
        settings = "demo" if suite.name == "metaworld" else f"demo_{suite.name}"
        name = settings if config.policy == "pi0" else f"{settings}_{config.policy}"
        self.root = config.output_dir or Path("outputs", f"{name}_quick" if config.quick else name)
        self.training = self.root / "training"
        self.record_config = RecordConfig(
            root=self.root / "demonstrations",
            suite=suite.name,
            tasks=config.tasks or (suite.quick_tasks if config.quick else None),
            moved=config.moved,
            episodes_per_task=config.episodes_per_task or (2 if config.quick else None),
        )
        self.recording = self.record_config.recording()
        self.demonstrations = self.record_config.root
        self.tasks = suite.parse_tasks(self.recording.tasks)
        self.eval_episodes = config.eval_episodes or (1 if config.quick else suite.eval_episodes)
        self.episode_length = suite.quick_episode_length if config.quick else self.recording.episode_length
        self.train_config = config.train_config or shipped_config(settings)
        self.takes_any_policy = config.train_config is not None
        self.train_extras = list(QUICK_TRAINING) if config.quick else []
        if config.wandb:
            self.train_extras += ["--wandb.enable=true", f"--wandb.mode={config.wandb_mode}"]

    def record(self) -> list[Job]:
        """The recording, unless it is there."""
        if is_recorded(self.record_config, "--output_dir"):
            return []
        arguments = [
            f"--root={self.demonstrations}",
            f"--suite={self.suite.name}",
            f"--tasks={self.recording.tasks}",
            f"--episodes_per_task={self.recording.episodes_per_task}",
            *([f"--moved={self.recording.moved}"] if "moved" in self.suite.options else []),
        ]
        return [self._job("record", Command("lerobot-pi0 record", tuple(arguments)), "Recording")]

    def train(self) -> list[Job]:
        """The training, or what is missing of it since its last checkpoint."""
        data = (
            f"--dataset.repo_id={self.recording.repo_id}",
            f"--dataset.root={self.demonstrations}",
            f"--output_dir={self.training}",
        )
        last = self.training / "checkpoints" / "last"
        if not last.exists():
            if self.training.exists() and not self._log("train").exists():
                raise OutputExistsError(
                    f"{self.training} is there, but not from this demo. Choose another --output_dir."
                )
            if checkpoints := sorted(self.training.glob("checkpoints/*/pretrained_model")):
                raise OutputExistsError(
                    f"{self.training} holds checkpoints, and {last} leads to none of them. To go on from the "
                    f"newest: ln -sfn {checkpoints[-1].parent.name} {last}. To train anew, delete "
                    f"{self.training} or choose another --output_dir."
                )
            # An earlier start that did not come as far as a checkpoint; lerobot-train wants no such folder.
            shutil.rmtree(self.training, ignore_errors=True)
            dtype = [] if bfloat16_pays() else ["--policy.dtype=float32"]
            config = f"--config_path={self.train_config}"
            arguments = (config, *data, *dtype, *self._policy_flags(), *self.train_extras)
            return [self._training_job(arguments)]
        trained = self._train_settings()["policy"]["type"]
        if not self.takes_any_policy and trained != f"lerobot_{self.policy}":
            raise OutputExistsError(
                f"{self.training} holds a {trained}, not what --policy={self.policy} trains "
                f"(lerobot_{self.policy}). Choose another --output_dir."
            )
        steps = self._train_settings()["steps"]
        if not self.takes_any_policy and self.quick != (steps == QUICK_STEPS):
            kind = "not one" if self.quick else "that"
            raise OutputExistsError(
                f"{self.training} holds a training of {steps} steps, {kind} of --quick. "
                "Choose another --output_dir."
            )
        saved_config = self.checkpoint / "train_config.json"
        for cause in (self.train_config, self.demonstrations / SETTINGS_FILE):
            if cause.exists() and cause.stat().st_mtime > saved_config.stat().st_mtime:
                logger.warning(
                    "%s is newer than the training in %s, which is reused: to train anew, delete it or "
                    "choose another --output_dir",
                    cause,
                    self.training,
                )
        step = int(last.resolve().name)
        if step == steps:
            return []
        arguments = (f"--config_path={saved_config}", "--resume=true", *data, *self.train_extras)
        return [self._training_job(arguments, step)]

    def evaluate(self) -> list[Job]:
        """The suite's evaluations that are missing."""
        batch = min(self.eval_episodes, self.suite.eval_batch)
        jobs = []
        for evaluation in self.evaluations():
            folder = self.root / evaluation.name
            if self._is_evaluated(evaluation):
                continue
            arguments = (
                f"--policy.path={self.checkpoint}",
                *evaluation.flags,
                f"--eval.n_episodes={self.eval_episodes}",
                f"--eval.batch_size={batch}",
                f"--seed={EVALUATION_SEED}",
                f"--output_dir={folder}",
            )
            # Evaluations run side by side: one thread each is as much as two cores have.
            environment = (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"))
            command = Command("lerobot-eval", arguments, environment)
            progress = EvaluationProgress(evaluation.name, evaluation.tasks, self.eval_episodes, batch)
            name = evaluation.name
            jobs.append(Job(name, command, self._log(name), BATCHES, describe=progress))
        return jobs

    def evaluations(self) -> list[Evaluation]:
        """All that the suite evaluates the trained policy by."""
        n_action_steps = self._train_settings()["policy"]["n_action_steps"]
        return self.suite.evaluations(self.tasks, self.recording, self.episode_length, n_action_steps)

    def open_loop_baseline(self, evaluation: Evaluation) -> dict[str, float]:
        """Success of each task's average demonstration, replayed open-loop in the evaluated episodes."""
        from lerobot_pi0.demo.baseline import mean_demonstration

        rates = {}
        for task in tqdm(evaluation.tasks, desc="Open-loop baseline", unit="task", leave=False):
            actions = mean_demonstration(self.suite.baseline_runs(task, self.demonstrations))
            solved = self.suite.replay(evaluation, task, actions, self.eval_episodes, self.episode_length)
            rates[task] = sum(solved) / len(solved)
        return rates

    def open_loop_baselines(self) -> list[dict[str, float]]:
        """Those of all evaluations, empty where a task is not to be solved; `open_loop.json` keeps them."""
        evaluations = self.evaluations()
        path, settings = self.root / "open_loop.json", self.demonstrations / SETTINGS_FILE
        of = [[one.name, *one.flags, self.eval_episodes, self.episode_length] for one in evaluations]
        if path.exists() and path.stat().st_mtime > settings.stat().st_mtime:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == of:
                return kept["rates"]
        rates = [self.open_loop_baseline(one) if one.has_baseline else {} for one in evaluations]
        path.write_text(json.dumps({"of": of, "rates": rates}, indent=2) + "\n", encoding="utf-8")
        return rates

    def report(self) -> str:
        """Write the page with its pictures; return what the terminal shows."""
        from lerobot_pi0.demo import report
        from lerobot_pi0.demo.page import write_page

        evaluations = self.evaluations()
        results = [report.read_evaluation(self.root / one.name, self.suite.task_name) for one in evaluations]
        table = report.success_table(evaluations, results, self.open_loop_baselines())
        losses = report.training_losses(self._log("train"), self._train_settings()["log_freq"])
        if losses:
            report.plot_losses(losses, self.root / "loss.png")
        instructions = {task: self.suite.instruction(task) for task in self.tasks}
        report.contact_sheet(report.success_tiles(results[0], instructions), self.root / "policy.gif")
        failures = report.failure_tiles(results[0], instructions)
        for evaluation, by_task in zip(evaluations[1:], results[1:], strict=True):
            if evaluation.has_baseline:
                failures += report.failure_tiles(by_task, instructions, evaluation.column)
        if failures:
            report.contact_sheet(failures, self.root / "failures.gif")
        trained = self._train_settings()["policy"]["type"]
        page = write_page(
            self.root / "index.html",
            f"{MODELS.get(trained, trained)} in {self.suite.title}",
            table,
            self.suite.reading,
            "failures.gif" if failures else None,
            "loss.png" if losses else None,
            self.next_commands(),
            self.quick,
        )
        lines = [str(table), ""]
        if self.quick:
            lines += [
                f"A quick run: {QUICK_STEPS} training steps teach nothing. "
                "Leave out --quick for the real one.",
                "",
            ]
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
            f"--dataset.root={self.demonstrations}"
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

    def _is_evaluated(self, evaluation: Evaluation) -> bool:
        from lerobot_pi0.demo.report import read_evaluation

        folder = self.root / evaluation.name
        info, weights = folder / "eval_info.json", self.checkpoint / "model.safetensors"
        if not info.exists() or info.stat().st_mtime < weights.stat().st_mtime:
            return False
        results = read_evaluation(folder, self.suite.task_name)
        return list(results) == list(evaluation.tasks) and all(
            len(result.successes) == self.eval_episodes for result in results.values()
        )

    def _policy_flags(self) -> list[str]:
        """What makes the settings of a π0 those of a π0.5: the state stands in the prompt."""
        if self.takes_any_policy or self.policy == "pi0":
            return []
        (numbers,) = self.suite.features(self.recording)["observation.state"]["shape"]
        return [
            f"--policy.type=lerobot_{self.policy}",
            f"--policy.tokenizer_max_length={PROMPT_TOKENS + TOKENS_PER_NUMBER * numbers}",
        ]

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
    demo.suite.check_installed()
    expected = (demo.suite.quick_seconds if demo.quick else demo.suite.seconds)._asdict()
    seconds: dict[str, float] = {}
    text = ""
    for number, stage in enumerate(expected, 1):
        left = minutes_left(expected, seconds, stage)
        logger.info("stage %d of %d, %s: about %s left in all", number, len(expected), stage, left)
        start = time.monotonic()
        if stage == "report":
            text = demo.report()
        elif jobs := getattr(demo, stage)():
            for side_by_side in batched(jobs, os.cpu_count() or 1):
                run(*side_by_side)
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
