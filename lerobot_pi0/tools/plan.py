"""`lerobot-pi0 plan`: which fine-tuning fits a GPU, how long it takes, and the command that starts it.

Reads a dataset's metadata and no frame. Memory comes from `estimate_memory`; this module holds the
choices, each with its source: the recipes, the allowances, the number of samples for a dataset.
"""

import json
import math
import shlex
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from typing import Any, cast

import draccus
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDatasetMetadata

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import fit_to, read_dataset
from lerobot_pi0.inputs.shipped_configs import shipped_config
from lerobot_pi0.tables import format_table
from lerobot_pi0.tools.flags import Model, PlanFlags, Recipe
from lerobot_pi0.tools.memory import MemoryEstimate, estimate_memory
from lerobot_pi0.tools.step_time import TrainingRun, free_bytes, measure_rate, name_of, this_device

GIGABYTE = 10**9  # cards sold as 24 GB have from 23.6e9 (with error correction) to 25.8e9 bytes

# What a step takes beyond its tensors. On a GPU the CUDA context, kernels and the workspaces of cuBLAS, 0.5
# to 1 GB; and a tenth of what comes and goes in a step, for blocks that torch's allocator cannot fill.
# Neither was measured here, for want of a GPU. On a CPU the interpreter with torch and LeRobot, and a
# quarter of a step for holes of the C library's heap and buffers of oneDNN, if MALLOC_MMAP_THRESHOLD_=1048576
# is set (see benchmarks/memory.py); without it the holes were as large as the step itself.
CONTEXT = 1.0 * GIGABYTE
FRAGMENTATION = 0.1
PROCESS = 0.8 * GIGABYTE
HEAP = 0.25

# openpi fine-tunes π0 on 30,000 batches of 32; LeRobot's guides say 5 to 10 epochs, and 3,000 batches of 32
# in their example for π0. So: ten epochs, within these two.
BATCH_SIZE = 32
EPOCHS = 10
FEWEST_SAMPLES, MOST_SAMPLES = 3_000 * BATCH_SIZE, 30_000 * BATCH_SIZE
# LeRobot's guide wants batches of 16 or more for π0; its training loop does not accumulate gradients.
GOOD_BATCH_SIZE = 16
NUM_CHECKPOINTS = 6

# Memory in GB and peak of dense bfloat16 products in TFLOP/s, by the vendor's data sheets.
GPUS = {
    "RTX 4090": (24, 165),
    "RTX 5090": (32, 209),
    "L40S": (48, 362),
    "A100": (80, 312),
    "H100": (80, 989),
}
# Of that peak. LeRobot's hardware guide reports 12.6 samples per second and H100 for its π0.5 with
# checkpointing, some 19 TFLOP each: 24 %.
UTILISATION = 0.25


class GivenSettings(Pi05Config):
    """Settings of either model, π0.5 having all of π0's. They know which ones were given: a recipe may have
    another value than the default.
    """

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.given = given.keys() - {"device"}


@dataclass
class PlanConfig(PlanFlags):
    """Flags of `lerobot-pi0 plan`."""

    # Settings of the policy that differ from the recipes', for example --policy.cameras='{"base": "front"}'.
    policy: GivenSettings = field(default_factory=lambda: GivenSettings(device="cpu"))

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {of.name for of in fields(Pi0Config)}
        if self.model == "pi0" and (others := sorted(self.policy.given - known)):
            raise UserError(f"--policy.{others[0]} is a setting of π0.5: leave it out, or give --model=pi05")


@dataclass(frozen=True)
class Row:
    """A recipe with or without gradient checkpointing: a file of `configs/`, and what it takes."""

    recipe: Recipe
    checkpointing: bool
    arguments: tuple[str, ...]  # for lerobot-train, without batch size and steps
    train: TrainPipelineConfig
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        """As the table calls it."""
        name = {"full": "full", "lora": "LoRA", "expert": "expert only"}[self.recipe]
        return f"{name}, checkpointing" if self.checkpointing else name

    def needs(self, batch_size: int) -> float:
        """Bytes on a GPU, allowances included."""
        return self.memory.held + (1 + FRAGMENTATION) * self.memory.step(batch_size) + CONTEXT

    def largest_batch(self, memory: float) -> int:
        """The largest batch that fits into so many bytes; 0 if none does."""
        fixed, per_sample = self.memory.growth.T
        free = (memory - CONTEXT - self.memory.held) / (1 + FRAGMENTATION)
        if (fixed + per_sample).max() > free:
            return 0
        grows = per_sample > 0
        return int(((free - fixed[grows]) // per_sample[grows]).min())


@dataclass(frozen=True)
class Schedule:
    """How long to train on a dataset with a batch size."""

    batch_size: int
    steps: int
    epochs: float

    @classmethod
    def of(cls, num_frames: int, batch_size: int) -> "Schedule":
        """Ten epochs, but no fewer samples than LeRobot's example has and no more than openpi takes."""
        samples = min(max(EPOCHS * num_frames, FEWEST_SAMPLES), MOST_SAMPLES)
        steps = _up_to_hundreds(samples / batch_size)
        return cls(batch_size, steps, steps * batch_size / num_frames)

    def arguments(self, config: Pi0Config) -> list[str]:
        """Flags for lerobot-train. To a shorter run the policy shrinks its schedule; here it grows."""
        flags = [
            f"--batch_size={self.batch_size}",
            f"--steps={self.steps}",
            f"--save_freq={_up_to_hundreds(self.steps / NUM_CHECKPOINTS)}",
        ]
        if self.steps > config.scheduler_decay_steps:
            warmup = round(config.scheduler_warmup_steps * self.steps / config.scheduler_decay_steps)
            flags += [
                f"--policy.scheduler_warmup_steps={warmup}",
                f"--policy.scheduler_decay_steps={self.steps}",
            ]
        return flags


def main(config: PlanConfig) -> str:
    """The plan as text. Raises UserError for a dataset that cannot be opened or used."""
    dataset = read_dataset(config.dataset)
    memory = config.gpu_memory * GIGABYTE
    rows = make_rows(config, dataset)
    parts = [_about(dataset, rows[0].train), _table(rows, config.gpu_memory)]
    if find_spec("peft") is None:
        parts.append("LoRA is left out: it needs PEFT, `pip install 'lerobot[peft]'`.")
    row = choose([row for row in rows if config.recipe in (None, row.recipe)], memory)
    if row is None:
        return "\n\n".join([*parts, _nothing_fits(rows, config)])
    schedule = Schedule.of(dataset.total_frames, min(row.largest_batch(memory), BATCH_SIZE))
    here = duration_here(row, schedule) if config.measure else None
    parts.append(_advice(row, dataset, schedule, here))
    return "\n\n".join(parts)


def make_rows(config: PlanConfig, dataset: LeRobotDatasetMetadata) -> list[Row]:
    """All recipes on a dataset. Without PEFT there is none for LoRA."""
    given = _flags(config.policy)
    for name in ("freeze", "gradient_checkpointing"):
        if any(flag.startswith(f"--policy.{name}=") for flag in given):
            raise UserError(f"--policy.{name} is what the recipes differ in: leave it out, see --recipe")
    source = [f"--dataset.{key}={value}" for key, value in vars(config.dataset).items() if value is not None]
    cameras, rows = {}, []
    for recipe, checkpointing in (
        (recipe, checkpointing) for recipe in ("full", "lora", "expert") for checkpointing in (False, True)
    ):
        if recipe == "lora" and find_spec("peft") is None:
            continue
        arguments = [*_recipe(config.model, recipe, checkpointing), *source, *given]
        train = _read(arguments)
        if cast(Pi0Config, train.policy).gradient_checkpointing != checkpointing:
            arguments.append(f"--policy.gradient_checkpointing={str(checkpointing).lower()}")
            train = _read(arguments)
        policy = cast(Pi0Config, train.policy)
        policy.cameras = policy.cameras or cameras  # or each recipe would log the assignment
        fit_to(policy, dataset)
        cameras = policy.cameras
        rows.append(Row(recipe, checkpointing, tuple(arguments), train, estimate_memory(policy, train.peft)))
    return rows


def _recipe(model: Model, recipe: Recipe, checkpointing: bool) -> list[str]:
    """The arguments of a recipe: its file in configs/, and what it has in another way."""
    if model == "pi0":
        file = "finetune_lora_24gb" if recipe == "lora" and checkpointing else f"finetune_{recipe}"
        return [f"--config_path={shipped_config(file)}"]
    file = shipped_config("pi05_lora" if recipe == "lora" else "pi05_full")
    return [f"--config_path={file}", *(["--policy.freeze=vlm"] if recipe == "expert" else [])]


def on_cpu(needs: MemoryEstimate, batch_size: int) -> float:
    """Bytes of a process that trains on a CPU, allowances included, by an estimate for a CPU."""
    return needs.held + (1 + HEAP) * needs.step(batch_size) + PROCESS


def choose(rows: list[Row], memory: float) -> Row | None:
    """The row to recommend: the first recipe that fits with a good batch size, else the one with the largest.

    Checkpointing where it makes room for a larger batch, up to openpi's 32. None if nothing fits.
    """
    fitting = [(min(row.largest_batch(memory), BATCH_SIZE), row) for row in rows]
    fitting = [(batch_size, row) for batch_size, row in fitting if batch_size]
    of_good_size = [row.recipe for batch_size, row in fitting if batch_size >= GOOD_BATCH_SIZE]
    candidates = [(b, row) for b, row in fitting if not of_good_size or row.recipe == of_good_size[0]]
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def duration_here(row: Row, schedule: Schedule) -> str:
    """How long the run takes on this machine, measured with made-up weights and frames, or why it cannot."""
    policy, device = cast(Pi0Config, row.train.policy), this_device()
    on_this = estimate_memory(policy, row.train.peft, "cpu") if device == "cpu" else row.memory

    def needs(batch_size: int) -> float:
        return on_cpu(on_this, batch_size) if device == "cpu" else row.needs(batch_size)

    free = free_bytes(device)
    if needs(1) > free:
        return (
            f"not measured: a batch of 1 needs {_gigabytes(needs(1))} GB, and {name_of(device)} has "
            f"{_gigabytes(free)} GB free"
        )
    run = TrainingRun(policy, row.train.peft, device)
    rate = measure_rate(run, schedule.batch_size, lambda size: needs(size) < free)
    sizes = " and ".join(str(times.batch_size) for times in rate.measured)
    how = f"continued from batches of {sizes}" if rate.is_extended else "measured"
    return (
        f"{_duration(schedule.steps * rate.seconds)} on {name_of(device)}: {rate.seconds:.3g} s per step of "
        f"{schedule.batch_size}, {how}, if loading frames keeps up"
    )


def _about(dataset: LeRobotDatasetMetadata, train: TrainPipelineConfig) -> str:
    policy = cast(Pi0Config, train.policy)
    minutes = dataset.total_frames / dataset.fps / 60
    slots = ", ".join(f"{slot} ← {key}" for slot, key in policy.cameras.items())
    left_out = sorted(set(policy.image_features) - set(policy.cameras.values()))
    lines = {
        "dataset": f"{dataset.repo_id}: {dataset.total_episodes:,} episodes, {dataset.total_frames:,} frames "
        f"at {dataset.fps} per second ({minutes:.0f} minutes)",
        "cameras": slots + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        "policy": f"from {policy.pretrained_path}; prompts of up to {policy.tokenizer_max_length} tokens, "
        f"chunks of {policy.chunk_size} actions",
    }
    return _labelled(lines)


def _table(rows: list[Row], gpu_memory: float) -> str:
    batch_sizes = (1, 4, 8, 16, 32)
    head = ["recipe", "trains", "weights", "AdamW", "EMA", "gradients"]
    lines = [[*head, *(f"batch {b}" for b in batch_sizes), "largest"]]
    for row in rows:
        of = row.memory
        parts = [_gigabytes(n) for n in (of.weights, of.optimizer, of.ema, of.gradients)]
        fits = [f"{_gigabytes(row.needs(b))}{' ' if _fits(row, b, gpu_memory) else '*'}" for b in batch_sizes]
        largest = row.largest_batch(gpu_memory * GIGABYTE) or "-"
        lines.append([row.name, f"{of.trained / 1e6:,.1f} M", *parts, *fits, str(largest)])
    return "\n".join(
        [
            "GPU memory in GB (10⁹ bytes), computed from the model's operations; * does not fit "
            f"{gpu_memory:g} GB.",
            f"A batch's column is the whole, with {CONTEXT / GIGABYTE:g} GB for CUDA, and for the allocator "
            f"{FRAGMENTATION:.0%} of what comes and goes in a step.",
            "",
            format_table(lines),
        ]
    )


def _advice(row: Row, dataset: LeRobotDatasetMetadata, plan: Schedule, here: str | None) -> str:
    policy, needs = cast(Pi0Config, row.train.policy), row.memory
    takes = row.needs(plan.batch_size)
    warmup = round(policy.scheduler_warmup_steps * plan.steps / policy.scheduler_decay_steps)
    without_gpu = on_cpu(estimate_memory(policy, row.train.peft, "cpu"), 1)
    times = [
        f"{name} {_duration(plan.steps * plan.batch_size * needs.flops / (UTILISATION * tflops * 1e12))}"
        for name, (gigabytes, tflops) in GPUS.items()
        if gigabytes * GIGABYTE >= takes
    ]
    lines = {
        "recommended": f"{row.name}, batches of {plan.batch_size}: {_gigabytes(takes)} GB "
        f"(batches of 1 on a CPU: {_gigabytes(without_gpu)} GB)",
        "steps": f"{plan.steps:,}, or {plan.epochs:.1f} epochs. The rule: {EPOCHS} epochs, but at least "
        f"{FEWEST_SAMPLES:,} samples (LeRobot's example) and at most {MOST_SAMPLES:,} (openpi)",
        "learning rate": f"{warmup:,} steps up to {policy.optimizer_lr:g}, then a cosine down to "
        f"{policy.scheduler_decay_lr:g} at the end: openpi's schedule over the whole run",
        "time": f"{', '.join(times) or 'no GPU in our list is large enough'}",
        "": f"an estimate: {needs.flops / 1e12:.2g} TFLOP per sample at {UTILISATION:.0%} of the data "
        "sheet's peak, if loading frames keeps up",
        **({"time here": here} if here else {}),
        "disk": f"{_gigabytes(needs.checkpoint)} GB per checkpoint, {NUM_CHECKPOINTS} of them",
    }
    name = f"{row.recipe}_{dataset.repo_id.rpartition('/')[2]}"
    words = ["lerobot-train", *row.arguments, *plan.arguments(policy), f"--output_dir=outputs/{name}"]
    return "\n\n".join([_labelled(lines), " \\\n    ".join(map(shlex.quote, words))])


def _nothing_fits(rows: list[Row], config: PlanConfig) -> str:
    considered = [row for row in rows if config.recipe in (None, row.recipe)]
    least = min(considered, key=lambda row: row.needs(1))
    return (
        f"{'Nothing' if config.recipe is None else 'This'} fits {config.gpu_memory:g} GB: the least is "
        f"{_gigabytes(least.needs(1))} GB ({least.name}, batches of 1). "
        "Ways out: fewer cameras (--policy.cameras), another --recipe, a larger GPU, or several with FSDP "
        "(docs/finetuning.md)."
    )


def _read(arguments: list[str]) -> TrainPipelineConfig:
    """What lerobot-train makes of a command line."""
    (first, *rest) = arguments
    return draccus.parse(
        TrainPipelineConfig,
        config_path=first.removeprefix("--config_path="),
        args=[*rest, "--policy.device=cpu"],
    )


def _flags(policy: GivenSettings) -> list[str]:
    """The settings that were given, as flags; of sizes, those that are not the published ones."""
    settings = {name: vars(policy)[name] for name in vars(policy) if name in policy.given}
    for part in [name for name, value in settings.items() if is_dataclass(value)]:
        published = vars(getattr(Pi0Config(device="cpu"), part))
        sizes = vars(settings.pop(part))
        settings |= {f"{part}.{name}": size for name, size in sizes.items() if size != published[name]}
    encoded: dict[str, Any] = {name: draccus.encode(value) for name, value in settings.items()}
    return [
        f"--policy.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in encoded.items()
    ]


def _fits(row: Row, batch_size: int, gpu_memory: float) -> bool:
    return row.needs(batch_size) <= gpu_memory * GIGABYTE


def _up_to_hundreds(number: float) -> int:
    return math.ceil(number / 100) * 100


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GIGABYTE:.1f}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 3 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


def _labelled(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())
