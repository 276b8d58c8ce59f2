"""transformers' own π0, SigLIP and Gemma in float32, on shared random weights at a tiny size."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaModel,
    PI0Config,
    PI0ForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lerobot_pi0.model import Pi0
from lerobot_pi0.model.gemma import Decoder
from lerobot_pi0.model.siglip import Siglip

STEPS = 10


def vision_config(vision) -> dict:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_use_head": False,
    }


def gemma_config(width, mlp_dim, vlm) -> dict:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": vlm.depth,
        "num_attention_heads": vlm.num_heads,
        "num_key_value_heads": vlm.num_kv_heads,
        "head_dim": vlm.head_dim,
        "vocab_size": vlm.vocab_size,
    }


@pytest.fixture
def native(sizes, randomise) -> PI0ForConditionalGeneration:
    vision, vlm, expert = sizes
    settings: dict[str, Any] = {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": gemma_config(vlm.width, vlm.mlp_dim, vlm),
            "vision_config": vision_config(vision) | {"projection_dim": vlm.width},
            "projection_dim": vlm.width,
            "image_token_id": vlm.vocab_size,
        },
        "dit_config": gemma_config(expert.width, expert.mlp_dim, vlm),
        "chunk_size": 10,
        "loss_reduction": "none",
    }
    config = PI0Config(**settings)
    model = PI0ForConditionalGeneration(config).eval()
    randomise(model)
    return model


def arguments(observation, vlm, vision) -> dict:
    """The batch as transformers takes it: image tokens are ids of the prompt, an absent camera has none."""
    rows = []
    for present, tokens, mask in zip(
        observation.image_mask, observation.tokens, observation.token_mask, strict=True
    ):
        images = torch.full((int(present.sum()) * vision.num_tokens,), vlm.vocab_size)
        rows.append(torch.cat((images, tokens[mask])))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "state": observation.state,
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "pixel_values": observation.images,
        "pixel_attention_mask": observation.image_mask,
    }


def test_pi0_loss_and_gradients(native, ours_with, sizes, observation, training_pair, assert_same_gradients):
    vision, vlm, _ = sizes
    actions, noise, time = training_pair
    ours = ours_with(native.state_dict())
    theirs = native(**arguments(observation, vlm, vision), actions=actions, noise=noise, timestep=time).loss
    loss = ours.loss(observation, actions, noise, time)
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-4)
    theirs.mean().backward()
    loss.mean().backward()
    assert_same_gradients(ours, native)


def test_pi0_sampled_actions(native, ours_with, sizes, observation, training_pair):
    vision, vlm, _ = sizes
    _, noise, _ = training_pair
    ours = ours_with(native.state_dict()).sample(observation, noise, STEPS)
    theirs = native.sample_actions(**arguments(observation, vlm, vision), noise=noise, num_steps=STEPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def copy_weights(ours: nn.Module, theirs: nn.Module, renamed: dict[str, str]) -> None:
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    ours.load_state_dict(tensors)


def test_siglip(sizes, randomise, observation):
    vision, vlm, _ = sizes
    theirs = SiglipVisionModel(SiglipVisionConfig(**vision_config(vision)))
    randomise(theirs)
    ours = Siglip(vision, vlm.width)
    ours.add_module("projector", nn.Identity())
    renamed = {
        "vision_model.": "",
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "position_embedding",
        "encoder.": "",
        "layer_norm1": "attention_norm",
        "layer_norm2": "mlp_norm",
        "self_attn.out_proj": "o_proj",
        "self_attn.": "",
        "mlp.fc1": "up_proj",
        "mlp.fc2": "down_proj",
        "post_layernorm": "norm",
    }
    copy_weights(ours, theirs, renamed)
    images = observation.images.flatten(0, 1)
    torch.testing.assert_close(
        ours(images, torch.float32), theirs(images).last_hidden_state, rtol=0, atol=2e-5
    )


def test_gemma_stack_extended_and_read_is_one_pass_with_a_block_mask(sizes, randomise):
    _, vlm, _ = sizes
    theirs = GemmaModel(GemmaConfig(**gemma_config(vlm.width, vlm.mlp_dim, vlm)))
    theirs.add_module("embed_tokens", nn.Identity())
    randomise(theirs)
    ours = Decoder(vlm.width, vlm.mlp_dim, vlm)
    renamed = {
        "self_attn.": "",
        "mlp.": "",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    copy_weights(ours, theirs, renamed)
    x = torch.randn(2, 9, vlm.width, generator=torch.Generator().manual_seed(3))
    real = torch.tensor([[True] * 5, [True, True, False, True, False]])
    prefix = ours.prefill(x[:, :5], real)
    out = ours.attend(x[:, 5:], prefix)

    mask = torch.cat((real, torch.ones(2, 4, dtype=torch.bool)), 1)
    block = torch.tensor([0] * 5 + [1] * 4)
    attends = (block[None] <= block[:, None]) & mask[:, None]
    additive = torch.where(attends, 0.0, torch.finfo(torch.float32).min)[:, None]
    expected = theirs(inputs_embeds=x, attention_mask=additive, position_ids=mask.cumsum(1) - 1)
    torch.testing.assert_close(out, expected.last_hidden_state[:, 5:], rtol=0, atol=2e-5)


def test_bfloat16_actions_point_where_our_float32_ones_do(
    sizes, randomise, ours_with, observation, training_pair
):
    vision, vlm, expert = sizes
    float32 = Pi0(vision, vlm, expert, 32, 32, torch.float32)
    randomise(float32)
    bfloat16 = ours_with(float32.state_dict(), torch.bfloat16)
    _, noise, _ = training_pair
    ours, exact = (model.sample(observation, noise, STEPS) for model in (bfloat16, float32))
    cosine = nn.functional.cosine_similarity(ours.flatten(1), exact.flatten(1))
    assert cosine.min() >= 0.999
    assert not torch.equal(ours, exact)
