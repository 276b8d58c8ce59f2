"""LeRobot's in-tree π0 and π0.5 in float32, on shared random weights at a tiny size."""

from typing import Any

import pytest
import torch
from lerobot.policies.pi0 import PI0Config, modeling_pi0
from lerobot.policies.pi05 import PI05Config, modeling_pi05
from torch import nn

from lerobot_pi0.model import flow

STEPS = 10
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "pi0": (modeling_pi0, modeling_pi0.PI0Pytorch, PI0Config),
    "pi05": (modeling_pi05, modeling_pi05.PI05Pytorch, PI05Config),
}


@pytest.fixture(params=MODELS)
def which(request) -> str:
    return request.param


@pytest.fixture
def in_tree(which, monkeypatch, sizes, randomise) -> nn.Module:
    """The network of the in-tree policy. What its code fixes (SigLIP, vocabulary) is made small."""
    vision, vlm, expert = sizes
    module, network_class, config_class = MODELS[which]
    paligemma, gemma = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_paligemma(config):
        text, tower = config.text_config, config.vision_config
        text.vocab_size = vlm.vocab_size
        tower.hidden_size, tower.intermediate_size = vision.width, vision.mlp_dim
        tower.num_hidden_layers, tower.num_attention_heads = vision.depth, vision.num_heads
        tower.projection_dim = vlm.width
        return paligemma(config)

    def small_gemma(config):
        config.vocab_size = vlm.vocab_size
        return gemma(config)

    def small_config(variant):
        width, mlp_dim = {
            "gemma_2b": (vlm.width, vlm.mlp_dim),
            "gemma_300m": (expert.width, expert.mlp_dim),
        }[variant]
        return module.GemmaConfig(width, vlm.depth, mlp_dim, vlm.num_heads, vlm.num_kv_heads, vlm.head_dim)

    monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
    monkeypatch.setattr(module, "PiGemmaForCausalLM", small_gemma)
    monkeypatch.setattr(module, "get_gemma_config", small_config)
    network = network_class(
        config_class(
            chunk_size=10,
            n_action_steps=10,
            image_resolution=(vision.image_size, vision.image_size),
            dtype="float32",
            device="cpu",
        )
    )
    randomise(network)
    return network


def arguments(in_tree, observation):
    images, masks = observation.images.unbind(1), observation.image_mask.unbind(1)
    state = (observation.state,) if hasattr(in_tree, "state_proj") else ()
    return images, masks, observation.tokens, observation.token_mask, *state


@pytest.fixture
def same_time(which, monkeypatch) -> None:
    """One embedding and one sequence of times on both sides.

    In-tree embeds time in float64 and multiplies steps out; openpi works in float32, and ours with it. The
    fastest sinusoid turns that difference of one rounding into 1e-4.
    """
    monkeypatch.setattr(
        MODELS[which][0],
        "create_sinusoidal_pos_embedding",
        lambda time, dimension, **_: flow.embed_time(time, dimension),
    )
    monkeypatch.setattr(flow, "step_times", lambda num_steps: [1 - i / num_steps for i in range(num_steps)])


def losses(in_tree, ours, observation, training_pair):
    return ours.loss(observation, *training_pair), in_tree(*arguments(in_tree, observation), *training_pair)


def actions(in_tree, ours, observation, noise):
    theirs = in_tree.sample_actions(*arguments(in_tree, observation), noise=noise, num_steps=STEPS)
    return ours.sample(observation, noise, STEPS), theirs


def test_loss_and_gradients(in_tree, ours_with, observation, training_pair, assert_same_gradients):
    ours = ours_with(in_tree.state_dict())
    loss, theirs = losses(in_tree, ours, observation, training_pair)
    assert abs(loss.mean().item() - theirs.mean().item()) < 1e-4
    theirs.mean().backward()
    loss.mean().backward()
    assert_same_gradients(ours, in_tree)


def test_sampled_actions(which, in_tree, ours_with, observation, training_pair):
    ours, theirs = actions(in_tree, ours_with(in_tree.state_dict()), observation, training_pair[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol={"pi0": 3e-4, "pi05": 1e-3}[which])


@pytest.mark.usefixtures("same_time")
def test_every_element_of_the_loss_at_the_same_time(in_tree, ours_with, observation, training_pair):
    loss, theirs = losses(in_tree, ours_with(in_tree.state_dict()), observation, training_pair)
    torch.testing.assert_close(loss, theirs, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("same_time")
def test_sampled_actions_at_the_same_times(in_tree, ours_with, observation, training_pair):
    ours, theirs = actions(in_tree, ours_with(in_tree.state_dict()), observation, training_pair[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
