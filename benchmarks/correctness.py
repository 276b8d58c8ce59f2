"""Whether a device computes what a CPU does: golden values, a shallow network, and LeRobot's own π0."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from lerobot_pi0.configuration_pi0 import Dtype
from lerobot_pi0.model import Network, Observation
from lerobot_pi0.tools.made_up_weights import MadeUpWeights

from . import inputs, intree, ours
from .context import Context, Row
from .worker import Setup

GOLDEN_TESTS = Path(__file__).parents[1] / "tests" / "model"


def correctness(context: Context) -> None:
    """Nothing is timed here."""
    context.row("golden values", lambda: golden_values(context))
    reference = Reference(context)
    for name, dtype, tf32 in (
        ("float32", "float32", False),
        ("TF32", "float32", True),
        ("bf16", "bfloat16", False),
    ):
        context.row(f"{name} vs CPU", partial(reference.compare, dtype, tf32))
    context.row("vs in-tree, tiny", lambda: beside_in_tree(context))
    for backend in context.backends:
        if backend != "eager":
            context.row(f"{backend} vs eager", partial(against_eager, context, backend))
    backend = "compile" if "compile" in context.backends else "auto"
    context.row(f"threads, {backend}", partial(threads, context, backend))


def golden_values(context: Context) -> Row:
    """The tests of openpi's golden values, which are not part of a wheel."""
    if not GOLDEN_TESTS.is_dir():
        return {"skipped": "there are no tests here: run this in a checkout"}
    if not context.clock.on_gpu:
        return {"skipped": "on a CPU they are part of the tests"}
    command = [sys.executable, "-m", "pytest", str(GOLDEN_TESTS), f"--device={context.setup.device}", "-q"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(context.left(), 1), cwd=GOLDEN_TESTS.parents[1],
        check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", " ".join(lines[-1:]))
    }
    row: Row = {"passed": counts.get("passed", 0), "failed": done.returncode and max(len(failed), 1)}
    return row | ({"which": "; ".join(failed[:20]) or done.stderr[-200:]} if done.returncode else {})


class Reference:
    """Actions and gradients of a shallow network of full width in float32 on a CPU, made when asked for."""

    def __init__(self, context: Context):
        self.context = context
        self._made: tuple[Tensor, dict[str, Tensor]] | None = None
        vision, vlm, expert = inputs.sizes(context.setup)
        # Deeper adds nothing, and no operation depends on the vocabulary.
        depths: dict[str, Any] = {"depth": min(2, vlm.depth), "vocab_size": min(1024, vlm.vocab_size)}
        self.sizes = replace(vision, depth=min(2, vision.depth)), replace(vlm, **depths), expert

    def compare(self, dtype: Dtype, tf32: bool) -> Row:
        """Cosines of actions and of each parameter's gradient."""
        if self._made is None:
            self._made = self.run("cpu", "float32")
        actions, grads = self._made
        with tf32_is(tf32):
            own, own_grads = self.run(self.context.setup.device, dtype)
        cosines = {
            name: cosine(grads[name], grad) for name, grad in own_grads.items() if relevant(grads, name)
        }
        worst = min(cosines, key=lambda name: cosines[name])
        return {
            "actions": cosine(actions, own),
            "worst_gradient": cosines[worst],
            "of": worst,
            "gradients_finite": all(bool(grad.isfinite().all()) for grad in own_grads.values()),
        }

    def run(self, device: str, dtype: Dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.network(device, dtype)
        setup = replace(self.context.setup, device="cpu", dtype=dtype)
        of = ours.skeleton(setup)
        given = of.observation(inputs.batch(setup))
        placed: dict[str, Any] = {
            name: None if x is None else x.to(device) for name, x in vars(given).items()
        }
        placed["tokens"] = placed["tokens"] % self.sizes[1].vocab_size
        observation = Observation(**placed)
        noise, actions = (x.to(device) for x in (inputs.noise(setup), inputs.actions(setup)))
        sampled = model.sample(observation, noise, inputs.NUM_STEPS)
        model.loss(observation, actions, noise, noise.new_full((1,), 0.5)).mean().backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return sampled.cpu(), grads

    def network(self, device: str, dtype: str) -> Network:
        """The same float32 weights everywhere."""
        with torch.device("meta"):
            model = inputs.network(self.context.setup.model, *self.sizes)
        model.dtype = getattr(torch, dtype)
        MadeUpWeights().fill(model, torch.float32)
        return model.to(device).train()


def relevant(grads: dict[str, Tensor], name: str) -> bool:
    """Not the biases of SigLIP's keys, which cancel in the softmax: both sides are rounding."""
    return not name.endswith("k_proj.bias") and bool(grads[name].any())


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double().to(a.device), dim=0).item()


@contextmanager
def tf32_is(on: bool) -> Iterator[None]:
    """Whether float32 products, and convolutions, may be rounded to TF32."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def beside_in_tree(context: Context) -> Row:
    """Both sides' actions from the same weights and noise."""
    setup = replace(context.setup, size="tiny", dtype="float32")
    with tf32_is(False):
        own = ours.build(setup, inputs.weights(setup))
        theirs = intree.build(setup, weights=inputs.weights(setup))
        start = inputs.noise(setup)
        ours_actions = own.predict_action_chunk(inputs.batch(setup), noise=start)
        given = inputs.batch(setup, intree.policy_prompt_length(setup))
        apart = (ours_actions - intree.predict(theirs, given, start)).abs().max().item()
    return {"largest_difference": apart}


def against_eager(context: Context, backend: str) -> Row:
    """A backend's actions, and those of the eager one."""
    given, start = inputs.batch(context.setup), inputs.noise(context.setup)
    chunks = [
        context.policy(backend=name).predict_action_chunk(given, noise=start) for name in ("eager", backend)
    ]
    return {
        "identical": torch.equal(*chunks),
        "cosine": cosine(*chunks),
        "largest_difference": (chunks[0] - chunks[1]).abs().max().item(),
    }


def threads(context: Context, backend: str) -> Row:
    """Prompts of one length from two threads: no further compilation, and each the actions of its own."""
    policy, start = context.policy(backend=backend), inputs.noise(context.setup)
    batches = [other_prompt(context.setup, number) for number in range(3)]
    policy.predict_action_chunk(batches[0], noise=start)
    alone = [policy.predict_action_chunk(given, noise=start) for given in batches]
    before, results = counters["stats"]["unique_graphs"], {}

    def work(thread: int) -> None:
        results[thread] = [policy.predict_action_chunk(given, noise=start) for given in batches]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    same = len(results) == 2 and all(
        torch.equal(a, b) for chunks in results.values() for a, b in zip(chunks, alone, strict=True)
    )
    return {"identical": same, "compilations": counters["stats"]["unique_graphs"] - before}


def other_prompt(setup: Setup, number: int) -> dict[str, Any]:
    given = inputs.batch(setup)
    tokens = given["observation.language.tokens"]
    _, vlm, _ = inputs.sizes(setup)
    return given | {"observation.language.tokens": (tokens + number) % vlm.vocab_size}
