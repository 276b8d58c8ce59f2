"""LeRobot's in-tree π0 in float32, on shared random weights at a tiny size."""

import pytest
import torch
from lerobot.policies.pi0 import PI0Config, modeling_pi0
from torch import nn

from lerobot_pi0.model import flow

STEPS = 10


@pytest.fixture
def in_tree(monkeypatch, sizes, randomise) -> nn.Module:
    """The network of the in-tree policy. What its code fixes (SigLIP, vocabulary) is made small."""
    vision, vlm, expert = sizes
    paligemma, gemma = (
        modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma,
        modeling_pi0.PiGemmaForCausalLM,
    )

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
        return modeling_pi0.GemmaConfig(
            width, vlm.depth, mlp_dim, vlm.num_heads, vlm.num_kv_heads, vlm.head_dim
        )

    monkeypatch.setattr(modeling_pi0, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
    monkeypatch.setattr(modeling_pi0, "PiGemmaForCausalLM", small_gemma)
    monkeypatch.setattr(modeling_pi0, "get_gemma_config", small_config)
    network = modeling_pi0.PI0Pytorch(
        PI0Config(
            chunk_size=10,
            n_action_steps=10,
            image_resolution=(vision.image_size, vision.image_size),
            dtype="float32",
            device="cpu",
        )
    )
    randomise(network)
    return network


def arguments(observation):
    images, masks = observation.images.unbind(1), observation.image_mask.unbind(1)
    return images, masks, observation.tokens, observation.token_mask, observation.state


@pytest.fixture
def same_time(monkeypatch) -> None:
    """One embedding and one sequence of times on both sides.

    In-tree embeds time in float64 and multiplies steps out; openpi works in float32, and ours with it. The
    fastest sinusoid turns that difference of one rounding into 1e-4.
    """
    monkeypatch.setattr(
        modeling_pi0,
        "create_sinusoidal_pos_embedding",
        lambda time, dimension, **_: flow.embed_time(time, dimension),
    )
    monkeypatch.setattr(flow, "step_times", lambda num_steps: [1 - i / num_steps for i in range(num_steps)])


def losses(in_tree, ours, observation, training_pair):
    return ours.loss(observation, *training_pair), in_tree(*arguments(observation), *training_pair)


def actions(in_tree, ours, observation, noise):
    theirs = in_tree.sample_actions(*arguments(observation), noise=noise, num_steps=STEPS)
    return ours.sample(observation, noise, STEPS), theirs


def test_loss_and_gradients(in_tree, ours_with, observation, training_pair, assert_same_gradients):
    ours = ours_with(in_tree.state_dict())
    loss, theirs = losses(in_tree, ours, observation, training_pair)
    assert abs(loss.mean().item() - theirs.mean().item()) < 1e-4
    theirs.mean().backward()
    loss.mean().backward()
    assert_same_gradients(ours, in_tree)


def test_sampled_actions(in_tree, ours_with, observation, training_pair):
    ours, theirs = actions(in_tree, ours_with(in_tree.state_dict()), observation, training_pair[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4)


@pytest.mark.usefixtures("same_time")
def test_every_element_of_the_loss_at_the_same_time(in_tree, ours_with, observation, training_pair):
    loss, theirs = losses(in_tree, ours_with(in_tree.state_dict()), observation, training_pair)
    torch.testing.assert_close(loss, theirs, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("same_time")
def test_sampled_actions_at_the_same_times(in_tree, ours_with, observation, training_pair):
    ours, theirs = actions(in_tree, ours_with(in_tree.state_dict()), observation, training_pair[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
