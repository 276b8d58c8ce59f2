"""Prompts: instructions of the dataset reach the policy untruncated and distinguishable."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from lerobot.processor import PolicyProcessorPipeline

from lerobot_pi0.data.frames import read_parquet
from lerobot_pi0.processor_pi0 import Pi0TokenizerStep, clean_prompt
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

RARE = 0.02  # of the frames, where tasks are few
FEW_TASKS = 20
MODIFY = "lerobot-edit-dataset --operation.type=modify_tasks"
_quoted = partial(map, repr)


def prompts_say_something(inputs: Inputs) -> Iterator[Finding]:
    """No instruction is empty, none is written in two ways, none is missing from the data."""
    tasks, frames = inputs.tasks, inputs.columns.task
    counts = np.bincount(frames, minlength=max(tasks, default=0) + 1)
    if strangers := sorted({*np.unique(frames).tolist()} - tasks.keys()):
        yield error(
            f"frames name tasks that the dataset does not have: {listed(strangers)}",
            f"{int(np.isin(frames, strangers).sum())} frames; the tasks are {sorted(tasks)}",
            f"give their episodes an instruction: {MODIFY}",
        )
    empty = [index for index, text in tasks.items() if not clean_prompt(text)]
    if empty:
        share = sum(counts[index] for index in empty) / len(frames)
        yield error(
            f"{share:.0%} of the frames have an empty instruction",
            f"task {listed(empty)} of meta/tasks.parquet is {tasks[empty[0]]!r}",
            f"say what is done there: {MODIFY}; lerobot-record takes --dataset.single_task",
        )
    spellings = defaultdict(list)
    for text in tasks.values():
        spellings[" ".join(clean_prompt(text).lower().split()).rstrip(".")].append(text)
    for same in spellings.values():
        if len(same) > 1 and len({clean_prompt(text) for text in same}) == 1:
            yield note(
                f"one instruction is written in {len(same)} ways, which the policy reads alike",
                f"{listed(_quoted(same))}: '_' and line breaks become spaces",
            )
        elif len(same) > 1:
            yield warning(
                f"one instruction is written in {len(same)} ways",
                listed(_quoted(same)),
                f"write it in one way: {MODIFY}. At run time it has to be the same again",
            )
    if 1 < len(tasks) <= FEW_TASKS:
        rare = [index for index in tasks if counts[index] < RARE * len(frames)]
        if rare:
            yield note(
                f"{listed(_quoted(tasks[index] for index in rare))}: less than {RARE:.0%} of the frames",
                f"{', '.join(str(counts[index]) for index in rare)} of {len(frames):,} frames",
            )
        shares = ", ".join(f"{counts[index] / len(frames):.0%}" for index in tasks)
        yield fine(f"{len(tasks)} instructions, in {shares} of the frames")
    else:
        yield fine(
            f"{len(tasks)} instruction{'s' if len(tasks) > 1 else ''}: {listed(_quoted(tasks.values()), 2)}"
        )


def prompts_are_whole(inputs: Inputs) -> Iterator[Finding]:
    """No instruction is cut by the tokenizer's length, and none becomes another one by that."""
    step, tasks = _tokenizer(inputs), inputs.tasks
    if step is None:
        return
    limit = step.max_length
    step.max_length = 10_000
    # With a state in the prompt: the one of the longest numbers.
    dims = inputs.config.robot_state_feature.shape[0] if inputs.config.robot_state_feature else 0
    states = [torch.full((dims,), value) for value in (-2.0, 0.0, 2.0)]
    rows = {
        text: max((step.encode(text, state) for state in states), key=len)
        for text in tasks.values()
        if clean_prompt(text)
    }
    cut = {text: len(row) for text, row in rows.items() if len(row) > limit}
    whole = {tuple(row) for row in rows.values()}  # two spellings may be one instruction
    collided = Counter(row[:limit] for row in whole)
    alike = [text for text, row in rows.items() if collided[tuple(row[:limit])] > 1]
    longest = max(map(len, rows.values()), default=0)
    if alike:
        yield error(
            f"{len(alike)} instructions are the same to the policy, because they are cut",
            f"{listed(_quoted(alike), 2)}: up to {longest} tokens, cut to {limit}",
            f"train with --policy.tokenizer_max_length={-(-longest // 8) * 8}, or shorten the "
            f"instructions: {MODIFY}",
        )
    elif cut:
        lost = " and lose the end of the state" if getattr(step, "state_in_prompt", False) else ""
        yield warning(
            f"{len(cut)} of {len(tasks)} prompts are cut to {limit} tokens{lost}",
            f"the longest has {longest}: {max(cut, key=lambda text: cut[text])!r}",
            f"train with --policy.tokenizer_max_length={-(-longest // 8) * 8}, or shorten them: {MODIFY}",
        )
    else:
        yield fine(f"the longest prompt has {longest} of {limit} tokens")


def prompts_are_those_trained_on(inputs: Inputs) -> Iterator[Finding]:
    """The policy has seen each instruction, where the dataset that it was trained on is still there."""
    assert inputs.metadata is not None
    if inputs.trained_dataset is None:
        return
    name, root = inputs.trained_dataset
    known = root / "meta" / "tasks.parquet"
    if inputs.is_trained_dataset:
        yield fine(f"'{name}' is what the policy was trained on")
        return
    elsewhere = f"the policy was trained on '{name}', this is '{inputs.metadata.repo_id}'"
    if not known.is_file():
        if name != inputs.metadata.repo_id:
            yield note(elsewhere)
        return
    seen = {clean_prompt(str(text)) for text in read_parquet(known, ["task"])["task"].to_pylist()}
    new = [text for text in inputs.tasks.values() if clean_prompt(text) not in seen]
    if new:
        yield warning(
            f"the policy never saw {len(new)} of the instructions: {listed(_quoted(new), 2)}",
            f"{elsewhere}, whose instructions are {listed(_quoted(sorted(seen)), 3)}",
            "instruct it in the words that it was trained with, or train on this dataset",
        )


def _tokenizer(inputs: Inputs) -> Pi0TokenizerStep | None:
    """The checkpoint's own, or a new policy's if it is on this disk."""
    if not inputs.checkpoint:
        config = inputs.config
        file = try_to_load_from_cache(config.tokenizer, "tokenizer.json")
        if not isinstance(file, str):
            return None
        return Pi0TokenizerStep(file, config.tokenizer_max_length, config.vlm.vocab_size)
    pipeline = PolicyProcessorPipeline.from_pretrained(
        inputs.folder, config_filename="policy_preprocessor.json"
    )
    return next(step for step in pipeline.steps if isinstance(step, Pi0TokenizerStep))
