"""This package's π0 and π0.5: the tasks that measure them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.configs import PreTrainedConfig
from torch import Tensor

from lerobot_pi0 import Pi0Config, Pi0Policy
from lerobot_pi0.checkpoints.files import load_weights
from lerobot_pi0.checkpoints.layouts import from_published
from lerobot_pi0.configuration_pi0 import Dtype
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.errors import MissingFileError
from lerobot_pi0.inputs.policy import policy_class

from .inputs import NUM_STEPS, batch, chunk_size, features, noise, read_through, sizes
from .worker import Measure, Measurement, Setup, time_pops, timed

DEMO_FRAMES = 32


def build(setup: Setup, weights: Mapping[str, Tensor] | None = None, **settings: Any) -> Pi0Policy:
    """The policy with the checkpoint's weights, or with given ones under openpi's names, of which it takes
    over those that have its dtype; `settings` go to its config."""
    given = config(setup, **settings)
    if weights is None:
        return policy_class(given).from_pretrained(setup.checkpoint, config=given)
    policy = skeleton(setup, **settings)
    tensors = from_published(weights)
    load_weights(policy.model, tensors, dict.fromkeys(tensors, policy.model.dtype), setup.device)
    return policy


def skeleton(setup: Setup, **settings: Any) -> Pi0Policy:
    """The policy with its parameters on the meta device."""
    with torch.device("meta"):
        return policy_class(given := config(setup, **settings))(given).eval()


def chunk(setup: Setup) -> Measure:
    """From a processed batch to actions."""
    policy, given, start = build(setup), batch(setup), noise(setup)
    return lambda: timed(lambda: policy.predict_action_chunk(given, noise=start))


def replan(setup: Setup) -> Measure:
    """Another chunk from an observation that was encoded before, and whether it is that of a full run."""
    policy, given, start = build(setup), batch(setup), noise(setup)
    whole, context = policy.predict_action_chunk(given, noise=start), policy.encode(given)

    def measure() -> Measurement:
        done = timed(lambda: policy.plan(context, noise=start))
        assert done.actions is not None
        return replace(done, figures=done.figures | {"identical": float(torch.equal(done.actions, whole[0]))})

    return measure


def load(setup: Setup) -> Measure:
    """From the call of `from_pretrained` to the first chunk, the file in the page cache."""
    read_through(setup.checkpoint)
    given, start = batch(setup), noise(setup)
    return lambda: timed(lambda: build(setup).predict_action_chunk(given, noise=start))


def queue_pop(setup: Setup) -> Measure:
    """Median tick of `select_action` that only takes the next action from the queue; needs no weights."""
    policy, given = skeleton(setup), batch(setup)
    return lambda: time_pops(policy, given, chunk_size(setup))


def int8_on_demo(setup: Setup) -> Measure:
    """Cosines of int8 (and bfloat16) actions with float32's: the demo's policy on frames of its training.

    `setup.demo` is the folder of `lerobot-pi0 demo`.
    """
    from lerobot.datasets import LeRobotDataset  # both are slow to import, and no other task needs them
    from lerobot.policies import make_pre_post_processors

    checkpoint = setup.demo / "training" / "checkpoints" / "last" / "pretrained_model"
    if not checkpoint.is_dir():
        raise MissingFileError(
            f"there is no {checkpoint}: run `lerobot-pi0 demo` first, or give --demo=FOLDER"
        )
    exact = _demo_policy(checkpoint, "float32")
    if exact.config.type != f"lerobot_{setup.model}":
        raise MissingFileError(f"{checkpoint} is a {exact.config.type}: give --demo=FOLDER of {setup.model}")
    others = {
        "": _demo_policy(checkpoint, "float32", int8=True),
        "bfloat16_": _demo_policy(checkpoint, "bfloat16"),  # what a frame that is hard to round does to this
    }
    preprocess, _ = make_pre_post_processors(exact.config, pretrained_path=str(checkpoint))
    training = json.loads((checkpoint / "train_config.json").read_text())["dataset"]
    frames = LeRobotDataset(training["repo_id"], root=setup.demo / "demonstrations")
    shape = (1, exact.config.chunk_size, exact.config.max_action_dim)

    def measure() -> Measurement:
        cosines: dict[str, list[float]] = {name: [] for name in others}
        for number in range(DEMO_FRAMES):
            frame = preprocess(frames[number * len(frames) // DEMO_FRAMES])  # pyrefly: ignore[bad-argument-type]
            start = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            expected = exact.predict_action_chunk(frame, noise=start).flatten()
            for name, policy in others.items():
                actions = policy.predict_action_chunk(frame, noise=start).flatten()
                cosines[name].append(F.cosine_similarity(expected, actions, dim=0).item())
        figures = {f"{name}cosine_min": min(values) for name, values in cosines.items()}
        return Measurement(
            figures | {f"{name}cosine_mean": sum(values) / len(values) for name, values in cosines.items()}
        )

    return measure


def config(setup: Setup, **settings: Any) -> Pi0Config:
    """The config for the sizes, dtype and cameras of a row. A camera that is absent has no slot."""
    vision, vlm, expert = sizes(setup)
    settings: dict[str, Any] = {
        "backend": "int8" if setup.int8 else "auto",
        "num_inference_steps": NUM_STEPS,
    } | settings
    return {"pi0": Pi0Config, "pi05": Pi05Config}[setup.model](
        vision=vision,
        vlm=vlm,
        expert=expert,
        tokenizer="small",  # the batches are tokenized already
        dtype=setup.dtype,
        device=setup.device,
        chunk_size=chunk_size(setup),
        n_action_steps=chunk_size(setup),
        **features(replace(setup, absent_cameras=0)),
        **settings,
    )


def _demo_policy(checkpoint: Path, dtype: Dtype, int8: bool = False) -> Pi0Policy:
    config = PreTrainedConfig.from_pretrained(checkpoint)
    assert isinstance(config, Pi0Config)
    config.device, config.dtype = "cpu", dtype
    config.backend = "int8" if int8 else "auto"
    return policy_class(config).from_pretrained(checkpoint, config=config)
