"""Training steps on this machine, timed: of a policy with made-up weights, on a made-up batch.

A step is that of LeRobot's training loop (forward, backward, clipping, optimizer, EMA), without its loader.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from lerobot.configs.default import PeftConfig
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.tools.made_up_weights import MadeUpWeights
from lerobot_pi0.tools.memory import on_meta_device
from lerobot_pi0.training.randomness import normal_of


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each part of a training step, medians of several steps."""

    batch_size: int
    parts: dict[str, float]
    steps: int = 1

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Rate:
    """How long a step of `batch_size` takes, and what that was found from."""

    batch_size: int
    seconds: float
    measured: tuple[StepTimes, ...] = field(default=())

    @property
    def is_extended(self) -> bool:
        """Whether the batch itself was too large to measure, and smaller ones were continued in a line."""
        return self.batch_size not in [times.batch_size for times in self.measured]


class TrainingRun:
    """A policy that takes training steps."""

    def __init__(self, config: Pi0Config, peft: PeftConfig | None = None, device: str = "cpu"):
        self.config = replace(config, device=device)
        self.device = torch.device(device)
        self.policy = on_meta_device(self.config, peft)
        MadeUpWeights(device).fill(self.policy, self.policy.model.dtype)
        self.optimizer = self.config.get_optimizer_preset().build(self.policy.get_optim_params())

    def batch(self, batch_size: int) -> dict[str, Tensor]:
        """As LeRobot's loop gives it to the policy: images float32, prompts as long as they may be."""
        length = self.config.tokenizer_max_length
        example = self.config.example_observation(batch_size, prompt_length=length)
        assert self.config.action_feature is not None
        shape = batch_size, self.config.chunk_size, self.config.action_feature.shape[0]
        batch = {key: x.float() / 255 if x.dtype == torch.uint8 else x for key, x in example.items()}
        actions = normal_of("actions", shape[0] * shape[1] * shape[2]).view(shape)
        return {key: x.to(self.device) for key, x in (batch | {ACTION: actions}).items()}

    def step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step; the seconds of its parts."""
        marks = [self._now()]
        self.policy.train()
        loss, _ = self.policy.forward(batch)
        loss.backward()
        marks.append(self._now())
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optimizer_grad_clip_norm)
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        self.policy.update()
        marks.append(self._now())
        names = ("forward_backward", "clip", "optimizer", "ema")
        return {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}

    def gradients_are_finite(self, batch: dict[str, Tensor]) -> bool:
        """Whether the loss of a batch and all its gradients are finite; no step is taken."""
        self.policy.train()
        loss, _ = self.policy.forward(batch)
        loss.backward()
        values = [loss.detach(), *(p.grad for p in self.policy.parameters() if p.grad is not None)]
        finite = all(bool(value.isfinite().all()) for value in values)
        self.optimizer.zero_grad()
        return finite

    def times(self, batch_size: int, steps: int = 5, seconds: float = float("inf")) -> StepTimes:
        """Medians of so many steps, fewer if they take longer than `seconds`, after one to warm up."""
        batch, begin = self.batch(batch_size), time.perf_counter()
        self.step(batch)
        taken = [self.step(batch)]
        while len(taken) < steps and time.perf_counter() - begin < seconds:
            taken.append(self.step(batch))
        parts = {name: statistics.median(step[name] for step in taken) for name in taken[0]}
        return StepTimes(batch_size, parts, len(taken))

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def measure_rate(run: TrainingRun, batch_size: int, fits: Callable[[int], bool], seconds: float = 45) -> Rate:
    """Seconds of a step with this batch size, found in about `seconds`.

    Where the batch is too large for the time or the memory (`fits`), batches of one and of a few are measured
    and continued in a line.
    """
    begin = time.perf_counter()
    one = run.times(1, steps=2, seconds=0)
    left = seconds - (time.perf_counter() - begin)

    def can(size: int) -> bool:
        # At worst a sample costs what a batch of one does; one step warms up.
        return fits(size) and 2 * size * one.seconds <= left

    if batch_size == 1:
        return Rate(1, one.seconds, (one,))
    if can(batch_size):
        times = run.times(batch_size, steps=10, seconds=left)
        return Rate(batch_size, times.seconds, (times,))
    sizes = [size for size in (16, 8, 4, 3, 2) if size < batch_size and can(size)]
    if not sizes:
        return Rate(batch_size, batch_size * one.seconds, (one,))
    more = run.times(sizes[0], steps=3, seconds=left)
    per_sample = max(more.seconds - one.seconds, 0) / (sizes[0] - 1)
    return Rate(batch_size, one.seconds + (batch_size - 1) * per_sample, (one, more))


def this_device() -> str:
    """The accelerator that torch runs on here, else the CPU."""
    return (
        str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    )


def name_of(device: str) -> str:
    """What a device is called in a message."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores" if device == "cpu" else device


def free_bytes(device: str) -> float:
    """Memory that a process can have there now; infinite where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    if device != "cpu" or not file.exists():
        return float("inf")
    lines = (line.split() for line in file.read_text().splitlines())
    return next(1024.0 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
