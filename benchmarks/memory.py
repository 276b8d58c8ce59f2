"""Real training steps beside what `lerobot-pi0 plan` says they take: `python -m benchmarks.memory expert`.

A process of its own writes a bfloat16 checkpoint of seeded values, loads it as LeRobot's training does, takes
three steps with a batch of one on a CPU, and compares the largest resident memory of its life with the plan.

It starts itself anew with a bound above which the C library gives freed blocks back to the system: without it
its heap keeps holes that belong to no tensor.
"""

import dataclasses
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import draccus
import torch
from lerobot.configs.default import PeftConfig
from lerobot.utils.constants import ACTION

from lerobot_pi0 import Pi0Config, Pi0Policy
from lerobot_pi0.tools.memory import estimate_memory
from lerobot_pi0.tools.plan import GIGABYTE, HEAP, PROCESS, on_cpu

from . import inputs, ours
from .worker import Setup, Size

Recipe = Literal["expert", "lora"]
STEPS = 3


@dataclass
class MemoryConfig:
    """Flags, after the recipe."""

    # What trains.
    recipe: Recipe
    size: Size = "full"
    # Where the checkpoint is written, 6.5 GB at full size; without it, to a folder that is deleted again.
    checkpoint: Path | None = None
    cameras: int = 2
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Result:
    """Bytes."""

    planned: float
    peak: int  # of the process since it started
    before: int  # when all was imported and nothing loaded

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.peak / self.planned


def main(config: MemoryConfig) -> Result:
    """Take the steps, and print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        return take_steps(config, config.checkpoint or Path(folder))


def take_steps(config: MemoryConfig, checkpoint: Path) -> Result:
    """The peak of `STEPS` steps of forward, backward, clipping, optimizer and EMA."""
    setup = Setup(size=config.size, checkpoint=checkpoint, demo=checkpoint, threads=1, cameras=config.cameras)
    inputs.write_checkpoint(setup)
    peft = PeftConfig() if config.recipe == "lora" else None
    settings: dict[str, Any] = {
        "freeze": "nothing" if peft else "vlm",
        "gradient_checkpointing": config.gradient_checkpointing,
        # The batch is one of 8 multiples of tokens, as the processor makes it.
        "tokenizer_max_length": inputs.batch(setup)["observation.language.tokens"].shape[1],
        "pretrained_path": checkpoint,
    }
    of = ours.config(setup, **settings)
    of.validate_features()
    planned = estimate_memory(of, peft, "cpu")
    before = resident()
    policy, optimizer = load(of, checkpoint, peft)
    given = inputs.batch(setup) | {ACTION: inputs.actions(setup), "index": torch.zeros(1, dtype=torch.long)}
    for number in range(STEPS):
        start = time.perf_counter()
        policy.train()
        loss, _ = policy.forward(given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), of.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        policy.update()
        print(f"step {number}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s")
    result = Result(on_cpu(planned, 1), resident(), before)
    parts = {
        "weights": planned.weights,
        "AdamW": planned.optimizer,
        "EMA": planned.ema,
        "step": planned.step(1),
        "heap": HEAP * planned.step(1),
        "process": PROCESS,
    }
    print("planned", ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items()), "GB")
    print(f"before loading {before / GIGABYTE:.2f} GB")
    print(
        f"{config.recipe}: planned {result.planned / GIGABYTE:.2f} GB, "
        f"measured {result.peak / GIGABYTE:.2f} GB, {result.ratio:.3f} of it"
    )
    return result


def load(
    config: Pi0Config, checkpoint: Path, peft: PeftConfig | None
) -> tuple[Pi0Policy, torch.optim.Optimizer]:
    """Policy and optimizer, in the order of LeRobot's training: load, wrap, optimizer."""
    policy = Pi0Policy.from_pretrained(checkpoint, config=config)
    if peft is not None:
        policy.wrap_with_peft(peft_cli_overrides=dataclasses.asdict(peft))
    optimizer: Any = config.get_optimizer_preset().build(policy.get_optim_params())
    return policy, optimizer


def resident() -> int:
    """The largest resident memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # read when a process starts
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]], environment)
    recipe, *flags = sys.argv[1:] or ["--help"]
    main(draccus.parse(MemoryConfig, args=[recipe if recipe == "--help" else f"--recipe={recipe}", *flags]))
