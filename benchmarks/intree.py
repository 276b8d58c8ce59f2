"""LeRobot's in-tree π0 or π0.5: built without its slow random initialization, and the tasks that measure it.

What it computes is its own code throughout. Only sizes that this code has written into it (the vision tower,
the vocabulary, the width to which images are projected) are changed where a row is not about the published.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from safetensors import safe_open
from torch import Tensor, nn

from lerobot_pi0.checkpoints.files import WEIGHTS_FILE

from .inputs import NUM_STEPS, batch, chunk_size, features, noise, read_through, sizes
from .worker import Measure, Measurement, Setup, time_pops, timed

# A policy of either model, whose code is alike.
type Policy = modeling_pi0.PI0Policy | modeling_pi05.PI05Policy

_HEADS = (
    "model.paligemma_with_expert.paligemma.lm_head.weight",
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",
)
_EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def build(
    setup: Setup, complete: bool = False, weights: Mapping[str, Tensor] | None = None, **settings: Any
) -> Policy:
    """The policy with the checkpoint's weights, or with given ones under openpi's names, each in the dtype
    that its own code gives it.

    Its two text heads, which nothing reads, stay unmaterialised unless it is to be `complete`.
    """
    policy = skeleton(setup, **settings)
    with ExitStack() as stack:
        if weights is None:
            file = stack.enter_context(safe_open(setup.checkpoint / WEIGHTS_FILE, framework="pt"))
            read = file.get_tensor
        else:
            read = weights.__getitem__
        for name, parameter in list(policy.named_parameters()):
            if name in _HEADS and not complete:
                # Untouched memory is not resident. A GPU's would be.
                size = parameter.shape if setup.device == "cpu" else (1, 1)
                values = torch.empty(size, dtype=parameter.dtype, device=setup.device)
            else:
                stored = read((_HEADS[0] if name == _EMBEDDING else name).removeprefix("model."))
                # A copy, as its own loading makes one: mapped pages of a file may be slower to compute with.
                values = stored.to(parameter.dtype, copy=True)
            owner, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(owner), leaf, nn.Parameter(values, parameter.requires_grad))
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(setup.device))
    return policy.eval()


@dataclass(frozen=True)
class Code:
    """LeRobot's module of a model, and the classes in it."""

    module: Any
    policy: type
    network: type
    config: type


PI0, PI05 = modeling_pi0, modeling_pi05
CODE: dict[str, Any] = {
    "pi0": Code(PI0, PI0.PI0Policy, PI0.PI0Pytorch, PI0.PI0Config),
    "pi05": Code(PI05, PI05.PI05Policy, PI05.PI05Pytorch, PI05.PI05Config),
}


def chunk(setup: Setup) -> Measure:
    """From a processed batch to actions."""
    policy, given, start = build(setup), batch(setup, policy_prompt_length(setup)), noise(setup)
    return lambda: timed(lambda: predict(policy, given, start))


def predict(policy: Policy, given: dict[str, Any], start: torch.Tensor) -> torch.Tensor:
    """A chunk from given noise, which its signature does not name, but hands on."""
    return cast(Any, policy).predict_action_chunk(given, noise=start)


def load(setup: Setup) -> Measure:
    """From the call of `from_pretrained` to the first chunk, complete, the file in the page cache."""
    read_through(setup.checkpoint)
    given, start = batch(setup, policy_prompt_length(setup)), noise(setup)

    def first_chunk() -> torch.Tensor:
        with built_in_sizes(setup):
            policy = CODE[setup.model].policy.from_pretrained(setup.checkpoint, config=config(setup))
        return predict(policy, given, start)

    # Of all that it holds, in the dtype that it has by default.
    weights = 4.0 * sum(parameter.numel() for parameter in skeleton(setup).parameters())

    def measure() -> Measurement:
        done = timed(first_chunk)
        return replace(done, figures=done.figures | {"float32_weight_bytes": weights})

    return measure


def queue_pop(setup: Setup) -> Measure:
    """Median tick of `select_action` that only takes the next action from the queue; needs no weights."""
    policy, given = skeleton(setup), batch(setup, policy_prompt_length(setup))
    return lambda: time_pops(policy, given, chunk_size(setup))


def config(setup: Setup, **settings: Any) -> Any:
    """Its config for the sizes, dtype and cameras of a row."""
    image_size = sizes(setup)[0].image_size
    return CODE[setup.model].config(
        paligemma_variant=setup.language_model,
        dtype=setup.dtype,
        device=setup.device,
        chunk_size=chunk_size(setup),
        n_action_steps=chunk_size(setup),
        num_inference_steps=NUM_STEPS,
        image_resolution=(image_size, image_size),
        **features(setup),
        **settings,
    )


def policy_prompt_length(setup: Setup) -> int:
    """To how many tokens its processor pads every prompt."""
    return config(setup).tokenizer_max_length


def skeleton(setup: Setup, **settings: Any) -> Policy:
    """The policy with its parameters on the meta device, in the dtypes of its own code, and real buffers."""
    with (
        built_in_sizes(setup),
        init_empty_weights(include_buffers=False),
        patch.object(CODE[setup.model].network, "to", lambda network, _: network),
    ):
        return CODE[setup.model].policy(config(setup, **settings))


@contextmanager
def built_in_sizes(setup: Setup) -> Iterator[None]:
    """Makes its constructors build other sizes than the published."""
    if setup.size == "full" and setup.language_model == "gemma_2b":
        yield
        return
    (vision, vlm, expert), module = sizes(setup), CODE[setup.model].module
    paligemma, gemma = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def make_paligemma(config: Any) -> nn.Module:
        text, tower = config.text_config, config.vision_config
        text.vocab_size = vlm.vocab_size
        tower.hidden_size, tower.intermediate_size = vision.width, vision.mlp_dim
        tower.num_hidden_layers, tower.num_attention_heads = vision.depth, vision.num_heads
        tower.projection_dim = vlm.width  # fixed at 2048 in its code, whatever the language model's width
        return paligemma(config)

    def make_gemma(config: Any) -> nn.Module:
        config.vocab_size = vlm.vocab_size
        return gemma(config)

    # It asks for the language model first, then for the expert; the variants may be the same.
    widths = iter([(vlm.width, vlm.mlp_dim), (expert.width, expert.mlp_dim)])

    def make_sizes(_: str) -> Any:
        width, mlp_dim = next(widths)
        return module.GemmaConfig(width, vlm.depth, mlp_dim, vlm.num_heads, vlm.num_kv_heads, vlm.head_dim)

    with (
        patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", make_paligemma),
        patch.object(module, "PiGemmaForCausalLM", make_gemma),
        patch.object(module, "get_gemma_config", make_sizes),
    ):
        yield
