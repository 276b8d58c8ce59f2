"""The learning-rate schedule of openpi."""

import logging
import math
from dataclasses import dataclass

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

        return LambdaLR(optimizer, factor)
