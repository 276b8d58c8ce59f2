"""The learning-rate schedule of openpi."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lerobot.optim import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


@LRSchedulerConfig.register_subclass("lerobot_pi0_cosine")
@dataclass
class CosineAfterWarmupConfig(LRSchedulerConfig):
    """openpi's schedule (optax.warmup_cosine_decay_schedule).

    Linear from peak/(warmup+1), then a cosine that starts where warm-up ends. A run shorter than
    `num_decay_steps` gets the whole schedule, warm-up and decay shrunk alike.
    """

    # The base also allows None.
    num_warmup_steps: int = 1_000  # pyrefly: ignore[bad-override-mutable-attribute]
    num_decay_steps: int = 30_000  # warm-up included
    decay_factor: float = 0.1  # last learning rate over peak

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        warmup, decay = self.num_warmup_steps, self.num_decay_steps
        if num_training_steps < decay:
            warmup, decay = round(warmup * num_training_steps / decay), num_training_steps
            logger.info(
                "learning rate: %d steps of warm-up and decay at %d, shrunk to the run", warmup, decay
            )

        def factor(step: int) -> float:
            if step < warmup:
                start = 1 / (warmup + 1)
                return start + (1 - start) * step / warmup
            progress = min(step - warmup, decay - warmup) / max(decay - warmup, 1)
            return self.decay_factor + (1 - self.decay_factor) * (1 + math.cos(math.pi * progress)) / 2

        return RunSchedule(optimizer, factor, num_training_steps)


class RunSchedule(LambdaLR):
    """A schedule that knows how long its run is, and warns when a finished one is resumed."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], num_training_steps: int):
        self.num_training_steps = num_training_steps
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "num_training_steps"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.last_epoch >= self.num_training_steps:
            logger.warning(
                "this run has made its %d steps, and nothing is left to train: to go on, --steps=%d or more",
                self.num_training_steps,
                2 * self.num_training_steps,
            )
