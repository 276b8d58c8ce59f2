"""The section on training: whole steps by recipe and batch, their parts, their memory beside the plan."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lerobot.configs.default import PeftConfig
from lerobot.utils.constants import ACTION

from lerobot_pi0.errors import CommandError
from lerobot_pi0.tools.memory import estimate_memory
from lerobot_pi0.tools.plan import CONTEXT, FRAGMENTATION
from lerobot_pi0.tools.step_time import TrainingRun, free_bytes

from . import inputs, intree, ours
from .context import Context, Row
from .worker import Setup


@dataclass(frozen=True)
class Case:
    """What trains, and with which batch."""

    batch_size: int
    cameras: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    peft: PeftConfig | None = None


_EXPERT = {"freeze": "vlm"}
_CHECKPOINTING = {"gradient_checkpointing": True}
CASES = {
    "full, 2 cameras, batch 8": Case(8),
    "full, 2 cameras, batch 32": Case(32),
    "full, compiled, 2 cameras, batch 32": Case(32, settings={"backend": "compile"}),
    "full, 3 cameras, batch 16": Case(16, 3),
    "full, checkpointing, 2 cameras, batch 32": Case(32, 2, _CHECKPOINTING),
    "expert only, 2 cameras, batch 32": Case(32, 2, _EXPERT),
    "expert only, 3 cameras, batch 32": Case(32, 3, _EXPERT),
    "LoRA, 2 cameras, batch 8": Case(8, peft=PeftConfig()),
}
IN_TREE = {
    "in-tree full, 2 cameras, batch 8": (Case(8), {}),
    "in-tree expert only, 2 cameras, batch 8": (Case(8), {"train_expert_only": True}),
}


def training(context: Context) -> None:
    """Steps of LeRobot's loop without its loader. At other sizes than the full one with batches of 2."""
    for name, case in CASES.items():
        if case.settings.get("backend") == "compile" and not context.clock.on_gpu:
            context.rows[name] = {"skipped": "takes minutes on a CPU"}
            continue
        context.row(name, partial(own_step, context, at_size(context, case)))
    for name, (case, settings) in IN_TREE.items():
        context.row(name, partial(in_tree_step, context, at_size(context, case), settings))


def at_size(context: Context, case: Case) -> Case:
    return case if context.is_full else replace(case, batch_size=2)


def own_step(context: Context, case: Case) -> Row:
    """Seconds of each part, samples per second, and the peak beside what `plan` expects."""
    setup = replace(context.setup, cameras=case.cameras)
    length = inputs.batch(setup)["observation.language.tokens"].shape[1]
    path = None if case.peft is None else "lerobot/pi0_base"  # adapters are over a checkpoint
    config = ours.config(setup, tokenizer_max_length=length, pretrained_path=path, **case.settings)
    config.validate_features()
    plan = estimate_memory(config, case.peft)
    needs = plan.held + (1 + FRAGMENTATION) * plan.step(case.batch_size) + CONTEXT
    if context.is_full and needs > free_bytes(setup.device):
        raise CommandError(f"needs {needs / 1e9:.1f} GB, {free_bytes(setup.device) / 1e9:.1f} GB are free")
    run = TrainingRun(config, case.peft, setup.device)
    finite = run.gradients_are_finite(run.batch(case.batch_size))
    context.clock.forget_peak()
    times = run.times(case.batch_size, steps=5, seconds=4)
    row: Row = {f"{name}_ms": 1e3 * seconds for name, seconds in times.parts.items()}
    row |= {
        "step_ms": 1e3 * times.seconds,
        "samples_per_s": case.batch_size / times.seconds,
        "tflop_per_s": plan.flops * case.batch_size / times.seconds / 1e12,
        "gradients_finite": finite,
        "plan_gb": plan.peak(case.batch_size) / 1e9,
    }
    peak = context.clock.peak_gigabytes()
    if peak is not None:
        reserved = torch.cuda.max_memory_reserved(context.clock.device) / 1e9
        row |= {"peak_gb": peak, "reserved_gb": reserved, "plan_with_allowances_gb": needs / 1e9}
        row["peak_over_plan"] = peak / row["plan_gb"]
    return row


def in_tree_step(context: Context, case: Case, settings: dict[str, Any]) -> Row:
    """The same of LeRobot's own policy, with torch's fused AdamW."""
    setup: Setup = replace(context.setup, cameras=case.cameras, batch_size=case.batch_size)
    # Its weights and its moments in bfloat16, save what its own code keeps in float32.
    policy: Any = intree.build(setup, weights=inputs.weights(setup), **settings).train()
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2.5e-5, fused=True)
    given = inputs.batch(setup, intree.policy_prompt_length(setup)) | {ACTION: inputs.actions(setup)}
    context.clock.forget_peak()

    def step() -> None:
        policy.forward(given)[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    row = context.clock.times(step, calls=5, seconds=4)
    return {
        "step_ms": row["p50_ms"],
        "samples_per_s": 1e3 * case.batch_size / row["p50_ms"],
        "peak_gb": context.clock.peak_gigabytes(),
    }
