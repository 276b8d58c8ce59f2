"""The environment of an evaluation: it opens, and runs at the data's rate, for long enough, in its words."""

import difflib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lerobot_pi0.processor_pi0 import clean_prompt
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

LOOKS = 3  # at the scene, in an episode of median length
# Environment, and what its datasets say → the rate that they were recorded at. openpi's conversion of LIBERO
# and those made by it say 10; the simulator ran at 20, and at another rate displacements are others.
RECORDED_AT = {("libero", 10): 20}
# Simulators that have an environment of their own in a clone of this repository, by --env.type.
SETUPS = {"libero": "libero", "libero_varied": "libero", "aloha": "aloha", "pusht": "pusht"}


def environment_opens(inputs: Inputs) -> Iterator[Finding]:
    """It can be made and reset."""
    assert inputs.env is not None
    if inputs.env_error:
        name = inputs.env.type
        setup = SETUPS.get(name)
        install = (
            f".ci/setup.sh {setup} makes an environment with it, .venv-{setup}"
            if setup
            else f"install the one that brings --env.type={name}, as for lerobot-eval"
        )
        yield error(
            f"the environment --env.type={name} does not open",
            inputs.env_error,
            f"if a package is missing: {install}",
        )
        return
    env = inputs.opened_env
    state = "no state" if env.state is None else f"{env.state.shape[1]} states"
    yield fine(
        f"{env.task}: {listed(env.cameras) or 'no camera'}, {state}, {len(env.low)} actions, "
        f"{len(env.instructions)} task{'s' if len(env.instructions) > 1 else ''}"
    )


def environment_has_the_datas_rate(inputs: Inputs) -> Iterator[Finding]:
    """An action lasts as long as in the data."""
    assert inputs.env is not None
    if inputs.reference is None:
        return
    assert inputs.reference.metadata is not None
    here, says = inputs.env.fps, inputs.reference.metadata.fps
    there = RECORDED_AT.get((inputs.env.type, says), says)
    if here == there:
        yield fine(
            f"{here} actions per second, as in the data" + (f", which says {says}" if says != here else "")
        )
        return
    takes = replace(inputs.env, fps=there).gym_kwargs != inputs.env.gym_kwargs
    yield error(
        f"the environment takes {here} actions per second, the data has {there}",
        f"a chunk of {inputs.config.chunk_size} covers {inputs.config.chunk_size / there:.2f} s of the data, "
        f"and {inputs.config.chunk_size / here:.2f} s here",
        f"--env.fps={there}"
        if takes
        else f"--env.type={inputs.env.type} has this rate (--env.fps only names it): train on data of {here} "
        "per second, or mend the fps in the dataset's meta/info.json if it was recorded at that",
    )


def episodes_are_long_enough(inputs: Inputs) -> Iterator[Finding]:
    """An episode lasts as long as a demonstration, and the policy looks at it more than once or twice."""
    assert inputs.env is not None
    config, longest, reference = inputs.config, inputs.opened_env.longest, inputs.reference
    length = int(np.median(reference.columns.lengths)) if reference else longest
    whose = "demonstrations have" if reference else "its episodes have"
    steps = getattr(inputs.env, "steps_per_picture", 1)
    healthy = True
    if reference and longest < np.quantile(reference.columns.lengths, 0.9):
        healthy = False
        most = int(reference.columns.lengths.max())
        yield error(
            f"episodes end after {longest} steps, before many demonstrations do",
            f"these have {length} frames (median), {most} at most",
            f"--env.episode_length={-(-most * 3 // 20) * 10}"
            if hasattr(inputs.env, "episode_length")
            else f"--env.type={inputs.env.type} fixes its length: success that comes later is not counted",
        )
    if config.n_action_steps * LOOKS > length:
        healthy = False
        better = max(1, length // (2 * LOOKS))
        yield warning(
            f"the policy plans every {config.n_action_steps} steps, and {whose} {length}",
            f"it sees {-(-length // config.n_action_steps)} pictures of an episode",
            f"--policy.n_action_steps={better}",
        )
    if config.n_action_steps % steps:
        healthy = False
        yield error(
            f"the environment takes a picture every {steps} steps, the policy plans every "
            f"{config.n_action_steps}",
            "it plans by old pictures",
            f"--env.steps_per_picture={config.n_action_steps}",
        )
    if healthy:
        yield fine(f"episodes of {longest} steps, {config.n_action_steps} from plan to plan")


def instructions_are_those_trained_on(inputs: Inputs) -> Iterator[Finding]:
    """The environment instructs in words that the policy was trained with."""
    assert inputs.env is not None
    if inputs.reference is None:
        return
    trained = {clean_prompt(text): text for text in inputs.reference.tasks.values()}
    given = inputs.opened_env.instructions
    new = [text for text in dict.fromkeys(given) if clean_prompt(text) not in trained]
    if not new:
        yield fine(f"instructions as in the data: {listed(map(repr, dict.fromkeys(given)), 2)}")
        return
    nearest = difflib.get_close_matches(clean_prompt(new[0]), trained, n=1, cutoff=0.0)
    yield (warning if any(map(clean_prompt, new)) else error)(
        f"the environment gives {len(new)} instructions that the policy was not trained on"
        if len(new) > 1
        else "the environment's instruction is none that the policy was trained on",
        f"the nearest of {len(trained)} in the data to {new[0]!r} is {trained[nearest[0]]!r}",
        "--env.task names the task; the words are the environment's: train with them "
        "(lerobot-edit-dataset --operation.type=modify_tasks)",
    )
