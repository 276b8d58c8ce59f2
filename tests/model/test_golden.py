"""The network against numbers that openpi's JAX code computed on the same weights (tests/golden/README.md).

Where a velocity is involved there are two comparisons: end to end, as loose as the float32 time embedding is,
and with openpi's stored embedding, which holds the rest of the network to float32 rounding.
"""

import pytest
import torch
from openpi_jax import from_openpi_jax
from torch import Tensor

from lerobot_pi0.model import flow, gemma

END_TO_END = 3e-4
ROUNDING = 2e-5  # absolute, of values of order 1 to 4 after some 40 matrix products

PRECISIONS = {"params_f32": torch.float32, "params_bf16": torch.bfloat16}


def distance(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape
    return (ours.detach().double() - golden.double()).abs().max().item()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def context(model, observation):
    return model.with_state(model.prefix(observation), observation.state)


def test_tokens_that_enter_the_stacks(golden, model, observation, training_pair, entering):
    prefix = entering(model.vlm.layers[0].attention_norm)
    suffix = entering(model.expert.layers[0].attention_norm)
    actions, noise, time = training_pair
    model.loss(observation, actions, noise, time)
    f32 = golden("f32.npz")
    assert distance(torch.cat(prefix, 1), f32["prefix_tokens"]) < ROUNDING
    assert distance(torch.cat(suffix, 1), f32["suffix_tokens"]) < 1e-4  # the time embedding is in it


def test_who_attends_to_whom(golden, model, observation, training_pair, monkeypatch):
    f32 = golden("f32.npz")
    real, rows = torch.cat((f32["prefix_mask"], f32["suffix_mask"]), 1), []
    attend = gemma.attend

    def recording(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        keys = torch.nn.functional.pad(key_mask, (0, real.shape[1] - key_mask.shape[1]))
        rows.append(keys[:, None].expand(-1, q.shape[2], -1))
        return attend(q, k, v, key_mask)

    monkeypatch.setattr(gemma, "attend", recording)
    model.vlm.layers = model.vlm.layers[:2]  # one of which attends: the last layer gives keys and values only
    model.expert.layers = model.expert.layers[:2]
    prefix = model.prefix(observation)
    state = model.with_state(prefix, observation.state)
    model.velocity(state, training_pair[0], training_pair[2])
    image_and_prompt, state_row, *actions = rows
    for action_rows in actions:
        attends = torch.cat((image_and_prompt, state_row, action_rows), 1)
        assert torch.equal(attends & real[:, :, None], f32["attn_mask"])
        assert torch.equal(attends[:, -11:], f32["sample_full_attn_mask"])
    assert len(actions) == 2


def test_masks_and_positions(golden, model, observation, training_pair, monkeypatch):
    positions, rotation = [], gemma.rotation

    def recording(at: Tensor, head_dim: int) -> gemma.Rotation:
        positions.append(at)
        return rotation(at, head_dim)

    monkeypatch.setattr(gemma, "rotation", recording)
    f32 = golden("f32.npz")
    prefix = model.prefix(observation)
    assert torch.equal(prefix.mask, f32["prefix_mask"])
    model.velocity(model.with_state(prefix, observation.state), training_pair[0], training_pair[2])
    assert torch.equal(torch.cat(positions, 1), f32["positions"].long())
    assert torch.equal(torch.cat(positions[1:], 1), f32["sample_suffix_positions"].long())


def test_prefix_cache_at_real_tokens(golden, model, observation):
    f32, prefix = golden("f32.npz"), model.prefix(observation)
    for which, name in enumerate(("cache_k", "cache_v")):
        ours = torch.stack([layer[which] for layer in prefix.layers]).transpose(2, 3)
        assert distance(ours[:, f32["prefix_mask"]], f32[name][:, f32["prefix_mask"]]) < 5e-5


def test_interpolation(golden, training_pair):
    x, velocity = flow.interpolate(*training_pair)
    assert distance(x, golden("f32.npz")["x_t"]) < 1e-6
    assert distance(velocity, golden("f32.npz")["u_t"]) == 0


@pytest.mark.parametrize("dim", [32, 1024])
def test_time_embedding(golden, dim):
    stored = golden("time_embedding.npz")
    assert distance(flow.embed_time(stored["time"], dim), stored[f"emb_{dim}"]) < 2e-4


def test_velocity_end_to_end(golden, model, observation, training_pair):
    f32 = golden("f32.npz")
    velocity = model.velocity(context(model, observation), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["v_t"]) < END_TO_END
    assert distance(velocity, f32["v_t_kv_cache"]) < END_TO_END


@pytest.mark.usefixtures("stored_time_embedding")
def test_velocity_and_last_hidden_state_with_the_stored_time_embedding(
    golden, model, observation, training_pair, leaving
):
    f32, out = golden("f32.npz"), leaving(model.expert.norm)
    velocity = model.velocity(context(model, observation), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["v_t"]) < ROUNDING
    assert distance(velocity, f32["v_t_kv_cache"]) < ROUNDING
    assert distance(out[-1], f32["suffix_out"][:, 1:]) < ROUNDING


def test_loss_end_to_end(golden, model, observation, training_pair):
    loss = model.loss(observation, *training_pair).mean(-1)
    assert distance(loss, golden("f32.npz")["loss"]) < END_TO_END


@pytest.mark.usefixtures("stored_time_embedding")
def test_loss_with_the_stored_time_embedding(golden, model, observation, training_pair):
    loss = model.loss(observation, *training_pair).mean(-1)
    assert distance(loss, golden("f32.npz")["loss"]) < ROUNDING
    assert distance(loss.mean(), golden("grads_f32.npz")["__mean_loss__"]) < ROUNDING


@pytest.mark.usefixtures("stored_time_embedding")
def test_gradients_of_all_leaves(golden, model, observation, training_pair):
    grads = golden("grads_f32.npz")
    expected = from_openpi_jax({path: grads[path].numpy() for path in golden("params.npz")})
    model.loss(observation, *training_pair).mean().backward()
    whole = sum(grad.square().sum().item() for grad in expected.values()) ** 0.5
    without = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            without.add(name)
            continue
        # Relative to the leaf. To the whole gradient for biases of SigLIP's keys: they cancel in the softmax,
        # and what is stored is rounding.
        difference = (parameter.grad - expected[name]).norm().item()
        assert difference < 1e-4 * expected[name].norm().item() + 1e-7 * whole, name
    assert without == {name for name, grad in expected.items() if not grad.any()}


@pytest.mark.parametrize("steps", [10, 4])
def test_sampled_actions_end_to_end(golden, model, observation, steps):
    ours = model.sample(observation, golden("inputs.npz")["sample_noise"], steps)
    assert distance(ours, golden("f32.npz")[f"actions_{steps}"]) < END_TO_END


@pytest.mark.usefixtures("stored_time_embedding")
@pytest.mark.parametrize("steps", [10, 4])
def test_sampled_actions_with_the_stored_time_embedding(golden, model, observation, steps):
    ours = model.sample(observation, golden("inputs.npz")["sample_noise"], steps)
    assert distance(ours, golden("f32.npz")[f"actions_{steps}"]) < ROUNDING


@pytest.mark.parametrize("steps", [10, 4])
def test_times_that_the_sampler_visits(golden, steps):
    visited = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        visited.append(time[0])
        return x

    flow.integrate(velocity, torch.ones(2, 3, 4), steps)
    assert torch.equal(torch.stack(visited), golden("f32.npz")[f"sample_times_{steps}"])


@pytest.fixture(params=["left out", "masked"])
def base_camera_alone(request, observe):
    """The wrists not in the observation, or there and masked: the golden values are those of the former."""
    if request.param == "left out":
        return observe("base_0_rgb")
    observation = observe()
    observation.image_mask[:, 1:] = False
    return observation


def test_base_camera_alone_end_to_end(golden, model, base_camera_alone, training_pair):
    expected = {
        key.removeprefix("base_only/"): value
        for key, value in golden("f32.npz").items()
        if key.startswith("base_only/")
    }
    x = golden("f32.npz")["x_t"]
    velocity = model.velocity(context(model, base_camera_alone), x, training_pair[2])
    assert distance(velocity, expected["v_t"]) < END_TO_END
    assert distance(model.loss(base_camera_alone, *training_pair).mean(-1), expected["loss"]) < END_TO_END
    for steps in (10, 4):
        ours = model.sample(base_camera_alone, golden("inputs.npz")["sample_noise"], steps)
        assert distance(ours, expected[f"actions_{steps}"]) < END_TO_END


@pytest.mark.usefixtures("stored_time_embedding")
def test_base_camera_alone_with_the_stored_time_embedding(golden, model, base_camera_alone, training_pair):
    f32 = golden("f32.npz")
    velocity = model.velocity(context(model, base_camera_alone), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["base_only/v_t"]) < ROUNDING
    assert distance(velocity, f32["base_only/v_t_kv_cache"]) < ROUNDING
    ours = model.sample(base_camera_alone, golden("inputs.npz")["sample_noise"], 10)
    assert distance(ours, f32["base_only/actions_10"]) < ROUNDING


def test_base_camera_alone_has_the_prefix_of_one_camera(golden, model, observe, entering):
    tokens = entering(model.vlm.layers[0].attention_norm)
    prefix = model.prefix(observe("base_0_rgb"))
    assert distance(tokens[0], golden("f32.npz")["base_only/prefix_tokens"]) < ROUNDING
    assert torch.equal(prefix.mask, golden("f32.npz")["base_only/prefix_mask"])


def test_stages_of_the_vision_tower(golden, model, observe, entering, leaving):
    f32, vision = golden("f32.npz"), model.vision
    stages = {"vit_with_posemb": entering(vision.layers[0]), "vit_encoded": leaving(vision.norm)}
    for i, layer in enumerate(vision.layers):
        stages[f"vit_block{i}_attn_out"] = leaving(layer.o_proj)
        stages[f"vit_block{i}_after_attn"] = entering(layer.mlp_norm)
        stages[f"vit_block{i}_mlp_out"] = leaving(layer.down_proj)
        stages[f"vit_block{i}_after_mlp"] = leaving(layer)
    tokens = vision(observe("base_0_rgb").images[:, 0], torch.float32)
    for name, (stage,) in stages.items():
        assert distance(stage, f32[name]) < ROUNDING, name
    assert distance(tokens, f32["vit_tokens"]) < ROUNDING
    stem = stages["vit_with_posemb"][0] - vision.position_embedding
    assert distance(stem, f32["vit_stem"].flatten(1, 2)) < ROUNDING


@pytest.fixture(params=PRECISIONS)
def bf16(request, golden, build):
    """A model that computes in bfloat16, openpi's results of the same, and their rms distance to float32."""
    results = golden("bf16.npz")
    calibration = golden("sanity.json")["bf16_calibration"][request.param]
    return (
        build(torch.bfloat16, PRECISIONS[request.param]),
        lambda name: results[f"{request.param}/{name}"],
        lambda name: calibration[name]["jit_vs_f32_rms"],
    )


def assert_as_close_as_bfloat16_is(ours: Tensor, in_float32: Tensor, openpis: Tensor, calibration: float):
    """As far from float32 as openpi is; from openpi no farther than independent roundings (√2 and room)."""
    assert 0.5 * calibration < rms(ours - in_float32) < 1.6 * calibration
    assert rms(ours - openpis) < 1.6 * calibration


def test_bfloat16_tokens_and_velocity(golden, bf16, observation, training_pair, entering):
    model, openpis, calibration = bf16
    f32 = golden("f32.npz")
    tokens = entering(model.vlm.layers[0].attention_norm)
    suffix = entering(model.expert.layers[0].attention_norm)
    velocity = model.velocity(context(model, observation), f32["x_t"], training_pair[2])
    assert {x.dtype for x in (*tokens, *suffix)} == {torch.bfloat16}
    assert velocity.dtype == torch.float32
    for name, ours in (("prefix_tokens", tokens[0]), ("v_t", velocity), ("v_t_kv_cache", velocity)):
        assert_as_close_as_bfloat16_is(ours, f32[name], openpis(name), calibration(name))


def test_bfloat16_loss_and_actions(golden, bf16, observation, training_pair):
    model, openpis, calibration = bf16
    f32, noise = golden("f32.npz"), golden("inputs.npz")["sample_noise"]
    results = {"loss": model.loss(observation, *training_pair).mean(-1)}
    results |= {f"actions_{steps}": model.sample(observation, noise, steps) for steps in (10, 4)}
    for name, ours in results.items():
        assert_as_close_as_bfloat16_is(ours, f32[name], openpis(name), calibration(name))
