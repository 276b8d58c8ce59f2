"""Both networks against numbers that openpi's JAX code computed on the same weights (tests/golden/README.md,
tests/golden_pi05/README.md).

Where a velocity is involved there are two comparisons: end to end, as loose as the float32 time embedding is,
and with openpi's stored embedding, which holds the rest of the network to float32 rounding.
"""

import dataclasses

import numpy as np
import pytest
import torch
from openpi_jax import from_openpi_jax
from torch import Tensor

from lerobot_pi0.model import flow, gemma

# In π0.5 the time is in every norm: one rounding of it moves the velocity by 5.5e-4 (π0: 1.9e-4).
END_TO_END = {"pi0": 3e-4, "pi05": 1e-3}
ROUNDING = {"pi0": 2e-5, "pi05": 3e-5}  # absolute, of values of order 1 to 4 after some 40 matrix products
PI0_ALONE = pytest.mark.parametrize("which", ["pi0"], indirect=True)
PI05_ALONE = pytest.mark.parametrize("which", ["pi05"], indirect=True)

GRADIENT = "grad_alpha4/"  # of the golden LoRA, whose alpha is its rank
PRECISIONS = {"params_f32": torch.float32, "params_bf16": torch.bfloat16}


@pytest.fixture(params=["pi0", "pi05"])
def which(request) -> str:
    return request.param


@pytest.fixture
def end_to_end(which) -> float:
    return END_TO_END[which]


@pytest.fixture
def rounding(which) -> float:
    return ROUNDING[which]


def distance(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape
    return (ours.detach().double() - golden.double()).abs().max().item()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def context(model, observation):
    return model.with_state(model.prefix(observation), observation.state)


def test_tokens_that_enter_the_stacks(golden, model, rounding, observation, training_pair, entering):
    prefix = entering(model.vlm.layers[0].attention_norm)
    suffix = entering(model.expert.layers[0].attention_norm)
    actions, noise, time = training_pair
    model.loss(observation, actions, noise, time)
    f32 = golden("f32.npz")
    assert distance(torch.cat(prefix, 1), f32["prefix_tokens"]) < rounding
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
    *before, one, two = rows  # images and prompt, π0's state; actions in two layers
    for action_rows in (one, two):
        assert action_rows.shape[1] == 10
        attends = torch.cat((*before, action_rows), 1)
        assert torch.equal(attends & real[:, :, None], f32["attn_mask"])
        assert torch.equal(attends[:, -f32["suffix_mask"].shape[1] :], f32["sample_full_attn_mask"])


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


@PI0_ALONE
@pytest.mark.parametrize("dim", [32, 1024])
def test_time_embedding(golden, dim):
    stored = golden("time_embedding.npz")
    assert distance(flow.embed_time(stored["time"], dim), stored[f"emb_{dim}"]) < 2e-4


def test_velocity_end_to_end(golden, model, end_to_end, observation, training_pair):
    f32 = golden("f32.npz")
    velocity = model.velocity(context(model, observation), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["v_t"]) < end_to_end
    assert distance(velocity, f32["v_t_kv_cache"]) < end_to_end


@pytest.mark.usefixtures("stored_time_embedding")
def test_velocity_and_last_hidden_state_with_the_stored_time_embedding(
    golden, model, rounding, observation, training_pair, leaving
):
    f32, out = golden("f32.npz"), leaving(model.expert.norm)
    velocity = model.velocity(context(model, observation), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["v_t"]) < rounding
    assert distance(velocity, f32["v_t_kv_cache"]) < rounding
    assert distance(out[-1], f32["suffix_out"][:, -10:]) < rounding


def test_loss_end_to_end(golden, model, end_to_end, observation, training_pair):
    loss = model.loss(observation, *training_pair).mean(-1)
    assert distance(loss, golden("f32.npz")["loss"]) < end_to_end


@pytest.mark.usefixtures("stored_time_embedding")
def test_loss_with_the_stored_time_embedding(golden, model, rounding, observation, training_pair):
    loss = model.loss(observation, *training_pair).mean(-1)
    assert distance(loss, golden("f32.npz")["loss"]) < rounding
    assert distance(loss.mean(), golden("grads_f32.npz")["__mean_loss__"]) < rounding


@pytest.mark.usefixtures("stored_time_embedding")
def test_gradients_of_all_leaves(golden, model, observation, training_pair):
    grads = golden("grads_f32.npz")
    expected = from_openpi_jax({path: grads[path].cpu().numpy() for path in golden("params.npz")})
    model.loss(observation, *training_pair).mean().backward()
    whole = sum(grad.square().sum().item() for grad in expected.values()) ** 0.5
    without = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            without.add(name)
            continue
        # Relative to the leaf. To the whole gradient for biases of SigLIP's keys: they cancel in the softmax,
        # and what is stored is rounding.
        difference = (parameter.grad.cpu() - expected[name]).norm().item()
        assert difference < 1e-4 * expected[name].norm().item() + 1e-7 * whole, name
    assert without == {name for name, grad in expected.items() if not grad.any()}


@pytest.mark.usefixtures("stored_time_embedding")
def test_gradients_of_lora(golden, model, observation, training_pair):
    """openpi's factors, a pair for each head, get theirs by the chain rule from the merged weights."""
    stored = golden("lora_f32.npz")
    expected = {name.removeprefix(GRADIENT): x for name, x in stored.items() if name.startswith(GRADIENT)}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in golden("params.npz").items()}
    lora = {name.removeprefix("param/"): x for name, x in stored.items() if name.startswith("param/")}
    lora = {name: factor.clone().requires_grad_() for name, factor in lora.items()}
    merged = dict(leaves)
    for name, a in lora.items():
        if name.endswith("lora_a"):
            stem, b = name.removesuffix("lora_a"), lora[name.removesuffix("a") + "b"]
            if "attn_vec_einsum" in name:  # openpi adds the heads up between the factors
                b = b.sum(1, keepdim=True)
            path = f"{stem}w" if stem.endswith("/") else stem.removesuffix("_")
            merged[path] = leaves[path] + a @ b
    numbers = torch.cat([leaf.flatten() for leaf in merged.values()])
    ends = np.cumsum([leaf.numel() for leaf in merged.values()])
    parts = zip(merged.items(), np.split(np.arange(len(numbers)), ends[:-1]), strict=True)
    places = from_openpi_jax({path: part.reshape(leaf.shape) for (path, leaf), part in parts})
    weights = {name: numbers[place] for name, place in places.items()}
    model.load_state_dict(weights)

    model.loss(observation, *training_pair).mean().backward()
    found = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    torch.autograd.backward([weights[name] for name in found], [*found.values()])
    assert lora.keys() <= expected.keys()
    whole = sum(grad.square().sum().item() for grad in expected.values()) ** 0.5
    for name, grad in expected.items():
        ours = (leaves | lora)[name].grad
        assert (ours - grad).norm().item() < 1e-4 * grad.norm().item() + 1e-7 * whole, name


@pytest.mark.parametrize("steps", [10, 4])
def test_sampled_actions_end_to_end(golden, model, end_to_end, observation, steps):
    ours = model.sample(observation, golden("inputs.npz")["sample_noise"], steps)
    assert distance(ours, golden("f32.npz")[f"actions_{steps}"]) < end_to_end


@pytest.mark.usefixtures("stored_time_embedding")
@pytest.mark.parametrize("steps", [10, 4])
def test_sampled_actions_with_the_stored_time_embedding(golden, model, rounding, observation, steps):
    ours = model.sample(observation, golden("inputs.npz")["sample_noise"], steps)
    assert distance(ours, golden("f32.npz")[f"actions_{steps}"]) < rounding


@pytest.mark.parametrize("steps", [10, 4])
def test_times_that_the_sampler_visits(golden, steps):
    visited = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        visited.append(time[0])
        return x

    flow.integrate(velocity, torch.ones(2, 3, 4), steps)
    assert torch.equal(torch.stack(visited), golden("f32.npz")[f"sample_times_{steps}"])


# What π0.5 alone has.


@PI05_ALONE
def test_condition_of_the_norms(golden, model, training_pair):
    f32 = golden("f32.npz")
    assert distance(model.prepare(training_pair[2])[:, 0], f32["adarms_cond"]) < 2e-4
    for steps in (10, 4):
        condition = model.prepare(f32[f"sample_times_{steps}"])
        assert distance(condition[:, 0], f32[f"adarms_cond_steps_{steps}"]) < 2e-4


@PI05_ALONE
@pytest.mark.usefixtures("stored_time_embedding")
def test_residual_stream_behind_each_layer(golden, model, observation, training_pair, leaving):
    streams = [leaving(layer) for layer in model.expert.layers]
    model.loss(observation, *training_pair)
    for ours, expected in zip(streams, golden("f32.npz")["suffix_after_layer"], strict=True):
        assert distance(ours[0], expected) < 6e-5


@PI05_ALONE
def test_adaptive_norm_alone(golden, model):
    f32, norm = golden("f32.npz"), model.expert.layers[0].attention_norm
    out, gate = norm(f32["suffix_tokens"], f32["adarms_cond"][:, None])
    assert distance(out, f32["adarms/out_f32"]) < 5e-6
    assert distance(gate, f32["adarms/gate_f32"]) < 5e-6


@PI05_ALONE
def test_adaptive_norm_modulates_in_float32(golden, model):
    """openpi computes the modulation in bfloat16: a float32 one is within its rounding."""
    f32, norm = golden("f32.npz"), model.expert.layers[0].attention_norm
    out, gate = norm(f32["suffix_tokens"].bfloat16(), f32["adarms_cond"][:, None])
    assert (out.dtype, gate.dtype) == (torch.bfloat16, torch.bfloat16)
    for form in ("bf16", "bf16_strict"):
        assert distance(out, f32[f"adarms/out_{form}"]) < 0.035
        assert distance(gate, f32[f"adarms/gate_{form}"]) < 0.02
    assert torch.equal(gate.float(), f32["adarms/gate_f32"].bfloat16().float())


@PI05_ALONE
def test_state_of_the_observation_changes_nothing_bit_for_bit(golden, model, observation, training_pair):
    other = dataclasses.replace(observation, state=observation.state + 1)
    losses = [model.loss(given, *training_pair) for given in (observation, other)]
    assert torch.equal(*losses)
    noise = golden("inputs.npz")["sample_noise"]
    assert torch.equal(model.sample(observation, noise, 4), model.sample(other, noise, 4))


@pytest.fixture(params=["left out", "masked"])
def base_camera_alone(request, observe):
    """The wrists not in the observation, or there and masked: the golden values are those of the former."""
    if request.param == "left out":
        return observe("base_0_rgb")
    observation = observe()
    observation.image_mask[:, 1:] = False
    return observation


def test_base_camera_alone_end_to_end(golden, model, end_to_end, base_camera_alone, training_pair):
    expected = {
        key.removeprefix("base_only/"): value
        for key, value in golden("f32.npz").items()
        if key.startswith("base_only/")
    }
    x = golden("f32.npz")["x_t"]
    velocity = model.velocity(context(model, base_camera_alone), x, training_pair[2])
    assert distance(velocity, expected["v_t"]) < end_to_end
    assert distance(model.loss(base_camera_alone, *training_pair).mean(-1), expected["loss"]) < end_to_end
    for steps in (10, 4):
        ours = model.sample(base_camera_alone, golden("inputs.npz")["sample_noise"], steps)
        assert distance(ours, expected[f"actions_{steps}"]) < end_to_end


@pytest.mark.usefixtures("stored_time_embedding")
def test_base_camera_alone_with_the_stored_time_embedding(
    golden, model, rounding, base_camera_alone, training_pair
):
    f32 = golden("f32.npz")
    velocity = model.velocity(context(model, base_camera_alone), f32["x_t"], training_pair[2])
    assert distance(velocity, f32["base_only/v_t"]) < rounding
    assert distance(velocity, f32["base_only/v_t_kv_cache"]) < rounding
    ours = model.sample(base_camera_alone, golden("inputs.npz")["sample_noise"], 10)
    assert distance(ours, f32["base_only/actions_10"]) < rounding


def test_base_camera_alone_has_the_prefix_of_one_camera(golden, model, rounding, observe, entering):
    tokens = entering(model.vlm.layers[0].attention_norm)
    prefix = model.prefix(observe("base_0_rgb"))
    assert distance(tokens[0], golden("f32.npz")["base_only/prefix_tokens"]) < rounding
    assert torch.equal(prefix.mask, golden("f32.npz")["base_only/prefix_mask"])


@PI0_ALONE
def test_stages_of_the_vision_tower(golden, model, rounding, observe, entering, leaving):
    f32, vision = golden("f32.npz"), model.vision
    stages = {"vit_with_posemb": entering(vision.layers[0]), "vit_encoded": leaving(vision.norm)}
    for i, layer in enumerate(vision.layers):
        stages[f"vit_block{i}_attn_out"] = leaving(layer.o_proj)
        stages[f"vit_block{i}_after_attn"] = entering(layer.mlp_norm)
        stages[f"vit_block{i}_mlp_out"] = leaving(layer.down_proj)
        stages[f"vit_block{i}_after_mlp"] = leaving(layer)
    tokens = vision(observe("base_0_rgb").images[:, 0], torch.float32)
    for name, (stage,) in stages.items():
        assert distance(stage, f32[name]) < rounding, name
    assert distance(tokens, f32["vit_tokens"]) < rounding
    stem = stages["vit_with_posemb"][0] - vision.position_embedding
    assert distance(stem, f32["vit_stem"].flatten(1, 2)) < rounding


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
