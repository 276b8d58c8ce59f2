"""What the architecture is, said without the code that implements it: sizes, order, masks, dependencies."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from forked import Program, script
from jaxtyping import TypeCheckError
from torch import Tensor

from lerobot_pi0.model import (
    ExpertConfig,
    GemmaConfig,
    Network,
    Observation,
    Pi0,
    Pi05,
    SiglipConfig,
    flow,
    gemma,
    layers,
)
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.model.siglip import Siglip

MINUS_INFINITY = -2.3819763e38  # what openpi puts where a token may not look

# openpi's sizes, written out: SigLIP So400m/14, Gemma 2B, Gemma 300M. "#" is a layer; torch's [out, in].
VISION_LAYER = {
    "attention_norm.weight": (1152,),
    "attention_norm.bias": (1152,),
    "q_proj.weight": (1152, 1152),
    "q_proj.bias": (1152,),
    "k_proj.weight": (1152, 1152),
    "k_proj.bias": (1152,),
    "v_proj.weight": (1152, 1152),
    "v_proj.bias": (1152,),
    "o_proj.weight": (1152, 1152),
    "o_proj.bias": (1152,),
    "mlp_norm.weight": (1152,),
    "mlp_norm.bias": (1152,),
    "up_proj.weight": (4304, 1152),
    "up_proj.bias": (4304,),
    "down_proj.weight": (1152, 4304),
    "down_proj.bias": (1152,),
}
VLM_LAYER = {
    "attention_norm.weight": (2048,),
    "q_proj.weight": (2048, 2048),  # 8 heads of 256
    "k_proj.weight": (256, 2048),  # 1 head
    "v_proj.weight": (256, 2048),
    "o_proj.weight": (2048, 2048),
    "mlp_norm.weight": (2048,),
    "gate_proj.weight": (16384, 2048),
    "up_proj.weight": (16384, 2048),
    "down_proj.weight": (2048, 16384),
}
EXPERT_LAYER = {
    "attention_norm.weight": (1024,),
    "q_proj.weight": (2048, 1024),
    "k_proj.weight": (256, 1024),
    "v_proj.weight": (256, 1024),
    "o_proj.weight": (1024, 2048),
    "mlp_norm.weight": (1024,),
    "gate_proj.weight": (4096, 1024),
    "up_proj.weight": (4096, 1024),
    "down_proj.weight": (1024, 4096),
}
PUBLISHED = {
    "vision.patch_embedding.weight": (1152, 3, 14, 14),
    "vision.patch_embedding.bias": (1152,),
    "vision.position_embedding": (256, 1152),
    **{f"vision.layers.{i}.{name}": shape for i in range(27) for name, shape in VISION_LAYER.items()},
    "vision.norm.weight": (1152,),
    "vision.norm.bias": (1152,),
    "vision.projector.weight": (2048, 1152),
    "vision.projector.bias": (2048,),
    "token_embedding.weight": (257152, 2048),
    **{f"vlm.layers.{i}.{name}": shape for i in range(18) for name, shape in VLM_LAYER.items()},
    "vlm.norm.weight": (2048,),
    **{f"expert.layers.{i}.{name}": shape for i in range(18) for name, shape in EXPERT_LAYER.items()},
    "expert.norm.weight": (1024,),
    "state_proj.weight": (1024, 32),
    "state_proj.bias": (1024,),
    "action_in_proj.weight": (1024, 32),
    "action_in_proj.bias": (1024,),
    "action_time_mlp_in.weight": (1024, 2048),
    "action_time_mlp_in.bias": (1024,),
    "action_time_mlp_out.weight": (1024, 1024),
    "action_time_mlp_out.bias": (1024,),
    "action_out_proj.weight": (32, 1024),
    "action_out_proj.bias": (32,),
}


@pytest.fixture(params=["pi0", "pi05"])
def which(request) -> str:
    return request.param


PI0_ALONE = pytest.mark.parametrize("which", ["pi0"], indirect=True)


@pytest.fixture(scope="module")
def published() -> Pi0:
    with torch.device("meta"):
        return Pi0(SiglipConfig(), GemmaConfig(), ExpertConfig(), 32, 32, torch.bfloat16)


def context(model: Network, observation: Observation) -> Cache:
    return model.with_state(model.prefix(observation), observation.state)


def gradients(model: Network) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_published_sizes_are_the_defaults_name_for_name(published):
    assert {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()} == PUBLISHED
    assert not list(published.buffers())


def test_published_model_has_openpis_number_of_parameters(published):
    assert sum(parameter.numel() for parameter in published.parameters()) == 3_238_048_528


def test_published_pi05_differs_in_the_experts_norms_and_what_is_around_it():
    with torch.device("meta"):
        model = Pi05(SiglipConfig(), GemmaConfig(), ExpertConfig(), 32, torch.bfloat16)
    norms = [
        "norm",
        *(f"layers.{i}.{name}" for i in range(18) for name in ("attention_norm", "mlp_norm")),
    ]
    dense = {
        f"expert.{norm}.dense.{name}": shape
        for norm in norms
        for name, shape in (("weight", (3072, 1024)), ("bias", (3072,)))
    }
    times = {f"time_mlp_{end}.weight": (1024, 1024) for end in ("in", "out")}
    times |= {f"time_mlp_{end}.bias": (1024,) for end in ("in", "out")}
    gone = {f"expert.{norm}.weight" for norm in norms}
    gone |= {name for name in PUBLISHED if name.startswith(("state_proj", "action_time_mlp"))}
    wanted = {name: shape for name, shape in PUBLISHED.items() if name not in gone} | dense | times
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == wanted
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_353_433_872


def test_adaptive_norms_start_at_zero_and_the_expert_as_the_identity(training_pair):
    actions, _, time = training_pair
    model = Pi05(
        SiglipConfig(28, 14, 16, 1, 16, 2), GemmaConfig(16, 2, 16, 2, 1, 8, 32), ExpertConfig(16, 16), 32,
        torch.float32,
    )  # fmt: skip
    keys = torch.randn(3, 1, 4, 8)
    velocity = model.velocity(Cache([(keys, keys)] * 2, torch.ones(3, 4).bool()), actions, time)
    tokens = model.action_in_proj(actions)
    normed = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(velocity, model.action_out_proj(normed))


def test_only_the_language_model_has_an_embedding_table_and_nobody_a_text_head(published):
    vocabulary = [name for name, parameter in published.named_parameters() if 257152 in parameter.shape]
    assert vocabulary == ["token_embedding.weight"]


def test_two_cameras_give_611_tokens_in_the_order_images_prompt_state_actions(published, entering):
    observation = Observation(
        images=torch.empty(1, 2, 3, 224, 224, device="meta"),
        image_mask=torch.empty(1, 2, dtype=torch.bool, device="meta"),
        tokens=torch.empty(1, 48, dtype=torch.long, device="meta"),
        token_mask=torch.empty(1, 48, dtype=torch.bool, device="meta"),
        state=torch.empty(1, 32, device="meta"),
    )
    prefix = entering(published.vlm.layers[0].attention_norm)
    suffix = entering(published.expert.layers[0].attention_norm)
    actions, time = torch.empty(1, 50, 32, device="meta"), torch.empty(1, device="meta")
    velocity = published.velocity(context(published, observation), actions, time)
    assert [tokens.shape for tokens in prefix] == [(1, 256 + 256 + 48, 2048)]
    assert [tokens.shape for tokens in suffix] == [(1, 1, 1024), (1, 50, 1024)]
    assert velocity.shape == (1, 50, 32)


@PI0_ALONE
def test_prefix_is_the_images_in_camera_order_and_then_the_prompt(model, observation, entering):
    tokens = entering(model.vlm.layers[0].attention_norm)
    model.prefix(observation)
    for camera in range(3):
        features = model.vision(observation.images[:, camera], torch.float32)
        torch.testing.assert_close(tokens[0][:, 16 * camera : 16 * (camera + 1)], features)
    prompt = F.embedding(observation.tokens, model.token_embedding.weight) * 64**0.5
    torch.testing.assert_close(tokens[0][:, 48:], prompt)


@PI0_ALONE
def test_image_features_are_not_scaled_and_the_prompt_is(model, observation, entering):
    tokens = entering(model.vlm.layers[0].attention_norm)
    with torch.no_grad():
        model.vision.projector.weight.zero_()
        model.vision.projector.bias.fill_(1)
        model.token_embedding.weight.fill_(1)
    model.prefix(observation)
    assert (tokens[0][:, :48] == 1).all()
    assert (tokens[0][:, 48:] == 8).all()  # √64


@PI0_ALONE
def test_action_and_time_are_joined_on_the_feature_axis_action_first(
    published, model, training_pair, entering
):
    assert (published.action_time_mlp_in.in_features, published.action_time_mlp_in.out_features) == (
        2048,
        1024,
    )
    assert (published.action_time_mlp_out.in_features, published.action_time_mlp_out.out_features) == (
        1024,
        1024,
    )
    actions, _, time = training_pair
    joined, hidden = entering(model.action_time_mlp_in), entering(model.action_time_mlp_out)
    tokens = entering(model.expert.layers[0].attention_norm)
    cache = Cache([(torch.zeros(3, 1, 1, 16), torch.zeros(3, 1, 1, 16))] * 3, torch.ones(3, 1).bool())
    model.velocity(cache, actions, time)
    action = F.linear(actions, model.action_in_proj.weight, model.action_in_proj.bias)
    embedding = flow.embed_time(time, 32)[:, None].expand(-1, 10, -1)
    torch.testing.assert_close(joined[0], torch.cat((action, embedding), 2))
    inside = F.linear(joined[0], model.action_time_mlp_in.weight, model.action_time_mlp_in.bias)
    torch.testing.assert_close(hidden[0], inside * torch.sigmoid(inside))
    outside = F.linear(hidden[0], model.action_time_mlp_out.weight, model.action_time_mlp_out.bias)
    torch.testing.assert_close(tokens[0], outside)  # nothing after the second layer


# The joint pass, as openpi trains: both stacks side by side, one attention over the whole sequence.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def rope(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] / 10_000 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@dataclasses.dataclass
class Joint:
    keys: list[Tensor]
    values: list[Tensor]
    prefix: Tensor
    suffix: Tensor
    velocity: Tensor


def joint_pass(model: Pi0, observation: Observation, noisy: Tensor, time: Tensor) -> Joint:
    weights = dict(model.named_parameters())

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    images = [model.vision(image, torch.float32) for image in observation.images.unbind(1)]
    prompt = weights["token_embedding.weight"][observation.tokens] * 64**0.5
    embedding = flow.embed_time(time, 32)[:, None].expand(-1, noisy.shape[1], -1)
    fused = dense("action_time_mlp_in", torch.cat((dense("action_in_proj", noisy), embedding), -1))
    actions = dense("action_time_mlp_out", fused * torch.sigmoid(fused))
    state = dense("state_proj", observation.state)[:, None]
    streams = {"vlm": torch.cat((*images, prompt), 1), "expert": torch.cat((state, actions), 1)}

    length = streams["vlm"].shape[1]
    prefix = observation.mask(images[0].shape[1])
    assert prefix is not None
    real = torch.cat((prefix, torch.ones(actions.shape[0], 11).bool()), 1)
    block = torch.tensor([0] * length + [1] + [2] * actions.shape[1])
    attends = (block[None, :] <= block[:, None]) & real[:, None, :] & real[:, :, None]
    positions = real.cumsum(1) - 1

    keys, values = [], []
    for i in range(3):
        normed = {
            name: rms_norm(x, weights[f"{name}.layers.{i}.attention_norm.weight"])
            for name, x in streams.items()
        }

        def project(which: str, normed: dict[str, Tensor] = normed, i: int = i) -> Tensor:
            parts = [dense(f"{name}.layers.{i}.{which}", x) for name, x in normed.items()]
            return torch.cat(parts, 1).unflatten(-1, (-1, 16))

        q, k, v = rope(project("q_proj"), positions), rope(project("k_proj"), positions), project("v_proj")
        logits = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * 16**-0.5
        weight = (logits.float() + torch.where(attends, 0.0, MINUS_INFINITY)[:, None]).softmax(-1)
        attended = torch.einsum("bhqk,bkd->bqhd", weight, v[:, :, 0]).flatten(2)
        keys.append(k)
        values.append(v)
        for name, part in zip(("vlm", "expert"), attended.split((length, 11), 1), strict=True):
            x = streams[name] + dense(f"{name}.layers.{i}.o_proj", part)
            h = rms_norm(x, weights[f"{name}.layers.{i}.mlp_norm.weight"])
            gate = F.gelu(dense(f"{name}.layers.{i}.gate_proj", h), approximate="tanh")
            gated = gate * dense(f"{name}.layers.{i}.up_proj", h)
            streams[name] = x + dense(f"{name}.layers.{i}.down_proj", gated)
    prefix = rms_norm(streams["vlm"], weights["vlm.norm.weight"])
    suffix = rms_norm(streams["expert"], weights["expert.norm.weight"])
    return Joint(keys, values, prefix, suffix, dense("action_out_proj", suffix[:, 1:]))


@pytest.fixture
def joint(model, observation, training_pair) -> Joint:
    x, _ = flow.interpolate(*training_pair)
    return joint_pass(model, observation, x, training_pair[2])


@PI0_ALONE
def test_the_joint_pass_written_here_is_openpis(golden, joint):
    f32 = golden("f32.npz")
    real = f32["prefix_mask"]
    torch.testing.assert_close(joint.prefix[real].detach(), f32["prefix_out"][real], rtol=0, atol=5e-5)
    torch.testing.assert_close(joint.suffix.detach(), f32["suffix_out"], rtol=0, atol=3e-4)
    torch.testing.assert_close(joint.velocity.detach(), f32["v_t"], rtol=0, atol=3e-4)


@PI0_ALONE
def test_three_passes_equal_one_joint_masked_pass(model, observation, training_pair, joint):
    cache = context(model, observation)
    for (keys, values), joint_keys, joint_values in zip(cache.layers, joint.keys, joint.values, strict=True):
        for ours, theirs in (
            (keys, joint_keys),
            (values, joint_values),
        ):  # of the prefix, and of the state last
            assert cache.mask is not None
            theirs = theirs[:, : cache.mask.shape[1]].transpose(1, 2)
            real = cache.mask[:, None].expand(ours.shape[:3])
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=2e-5)
    x, _ = flow.interpolate(*training_pair)
    torch.testing.assert_close(model.velocity(cache, x, training_pair[2]), joint.velocity, rtol=0, atol=2e-5)


@PI0_ALONE
def test_three_passes_have_the_gradients_of_one_joint_masked_pass(model, observation, training_pair, joint):
    _, target = flow.interpolate(*training_pair)
    (joint.velocity - target).square().mean().backward()
    theirs = gradients(model)
    model.zero_grad()
    model.loss(observation, *training_pair).mean().backward()
    ours = gradients(model)
    assert not any(theirs[name].any() for name in theirs.keys() - ours.keys())
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() < 2e-5 * theirs[name].norm() + 1e-6, name


# Padding and absent cameras.


def everything(model: Network, observation: Observation, training_pair) -> Iterator[Tensor]:
    """Loss, gradients and actions: all that a change could show in."""
    model.zero_grad()
    loss = model.loss(observation, *training_pair)
    loss.mean().backward()
    yield loss.detach()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    yield model.sample(observation, training_pair[1], 4)


def test_pixels_of_absent_cameras_and_ids_of_padding_change_nothing_bit_for_bit(
    model, observation, training_pair
):
    before = list(everything(model, observation, training_pair))
    images = torch.where(observation.image_mask[:, :, None, None, None], observation.images, 0.7)
    tokens = torch.where(observation.token_mask, observation.tokens, 7)
    assert not torch.equal(images, observation.images)
    assert not torch.equal(tokens, observation.tokens)
    changed = dataclasses.replace(observation, images=images, tokens=tokens)
    after = list(everything(model, changed, training_pair))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@PI0_ALONE
def test_pixels_and_ids_that_are_there_do_change_the_result(model, observation, training_pair):
    before = model.sample(observation, training_pair[1], 4)
    for changed in (
        dataclasses.replace(observation, images=-observation.images),
        dataclasses.replace(observation, tokens=(observation.tokens + 1) % 512),
        dataclasses.replace(observation, state=observation.state + 0.1),
    ):
        assert (model.sample(changed, training_pair[1], 4) - before).abs().amax((1, 2)).min() > 1e-2


def test_longer_padding_and_a_camera_left_out_change_nothing_but_rounding(model, observe, training_pair):
    both = observe("base_0_rgb", "left_wrist_0_rgb")
    both.image_mask[:, 1] = False
    padded = dataclasses.replace(
        both, tokens=F.pad(both.tokens, (0, 5), value=3), token_mask=F.pad(both.token_mask, (0, 5))
    )
    shorter = list(everything(model, observe("base_0_rgb"), training_pair))
    longer = list(everything(model, padded, training_pair))
    for alone, masked in zip(shorter, longer, strict=True):
        assert (alone - masked).norm() < 3e-6 * alone.norm() + 1e-6


@PI0_ALONE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_without_any_real_key_gives_no_nan_forward_or_backward(build, observation, training_pair, dtype):
    model = build(dtype)
    observation.image_mask[0] = False
    observation.token_mask[0] = False
    for result in everything(model, observation, training_pair):
        assert result.isfinite().all()


# What depends on what.


def test_velocity_leaves_the_context_as_it_was(which, model, observation, training_pair):
    cache = context(model, observation)
    before = [tensor.clone() for layer in cache.layers for tensor in layer]
    model.velocity(cache, training_pair[0], training_pair[2])
    after = [tensor for layer in cache.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.layers[0][0].shape[2] == {"pi0": 60 + 1, "pi05": 68}[which]


@PI0_ALONE
def test_state_does_not_change_what_the_prefix_says(model, observation):
    prefix = model.prefix(observation)
    with_state = model.with_state(prefix, observation.state)
    for before, after in zip(prefix.layers, with_state.layers, strict=True):
        assert all(torch.equal(a, b[:, :, :60]) for a, b in zip(before, after, strict=True))


@PI0_ALONE
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_rotary_angles_are_float32_when_the_model_computes_in_bfloat16(
    build, observation, monkeypatch, parameter_dtype
):
    model, rotations, rotation = build(torch.bfloat16, parameter_dtype), [], gemma.rotation

    def recording(positions: Tensor, head_dim: int) -> gemma.Rotation:
        rotations.append((positions, *rotation(positions, head_dim)))
        return rotations[-1][1:]

    monkeypatch.setattr(gemma, "rotation", recording)
    context(model, observation)
    assert len(rotations) == 2
    for positions, cos, sin in rotations:
        angle = positions.double()[:, None, :, None] / 10_000 ** (torch.arange(8).double() / 8)
        assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
        wanted_cos, wanted_sin = angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)
        torch.testing.assert_close(cos.double(), wanted_cos, rtol=0, atol=1e-5)
        torch.testing.assert_close(sin.double(), wanted_sin, rtol=0, atol=1e-5)


UNUSED = ("q_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj")


def test_dead_parts_of_the_last_vlm_layer_are_neither_computed_nor_trained(
    model, observation, training_pair, entering
):
    last = model.vlm.layers[-1]
    dead = {f"vlm.layers.2.{name}.weight": last.get_submodule(name) for name in UNUSED}
    dead["vlm.norm.weight"] = model.vlm.norm
    calls = [entering(module) for module in dead.values()]
    alive = entering(last.k_proj)
    model.loss(observation, *training_pair).mean().backward()
    model.sample(observation, training_pair[1], 2)
    assert len(alive) == 2
    assert not any(calls)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(dead)
    assert dict(model.named_parameters()).keys() - gradients(model).keys() == set(dead)


def test_prefix_without_a_graph_leaves_the_experts_gradients_bit_identical(model, observation, training_pair):
    model.loss(observation, *training_pair).mean().backward()
    everything_trained = gradients(model)
    model.zero_grad()
    with torch.no_grad():
        prefix = model.prefix(observation)
    model.loss(observation, *training_pair, prefix).mean().backward()
    vlm = {name for name in everything_trained if name.startswith(("vision.", "token_embedding.", "vlm."))}
    assert gradients(model).keys() == everything_trained.keys() - vlm
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, everything_trained[name]), name


def test_loss_is_the_error_of_the_velocity_that_sampling_follows(model, observation, training_pair):
    actions, noise, time = training_pair
    x, wanted = flow.interpolate(actions, noise, time)
    error = (model.velocity(context(model, observation), x, time) - wanted).square()
    torch.testing.assert_close(model.loss(observation, *training_pair), error, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_product_with_a_float32_weight_keeps_no_copy_of_it_and_has_the_gradients_of_one(bias):
    layer = layers.Linear(24, 40, bias=bias)
    x = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        y = layer(x)
    assert not [tensor.shape for tensor in kept if tensor.shape == (40, 24) and tensor is not layer.weight]
    wanted = F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16() if bias else None)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    grad = torch.randn_like(y)
    inputs = (x, *layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_several_draws_per_observation_are_the_losses_of_each(model, observation, training_pair, entering):
    actions, noise, time = training_pair
    draws = [(noise, time), (noise.flip(0), time.flip(0)), (-noise, time / 2)]
    separate = torch.stack([model.loss(observation, actions, *draw) for draw in draws], 1).flatten(0, 1)
    images = entering(model.vision.layers[0])
    noises, times = (torch.stack(part, 1).flatten(0, 1) for part in zip(*draws, strict=True))
    together = model.loss(observation, actions, noises, times)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-4)
    assert len(images) == 1  # one pass of the language model for all of them


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients_bit_for_bit(
    model, observation, training_pair, entering, frozen
):
    calls = {
        name: entering(model.get_submodule(name).layers[0].k_proj) for name in ("vision", "vlm", "expert")
    }

    def run(checkpointing: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
        for stack in (model.vision, model.vlm, model.expert):
            for layer in stack.layers:
                layer.gradient_checkpointing = checkpointing
        model.train().zero_grad()
        for inputs in calls.values():
            inputs.clear()
        with torch.set_grad_enabled(not frozen):
            prefix = model.prefix(observation)
        model.loss(observation, *training_pair, prefix).mean().backward()
        return gradients(model), {name: len(inputs) for name, inputs in calls.items()}

    (plain, once), (recomputed, twice) = run(False), run(True)
    prefix = 1 if frozen else 2
    assert once == {"vision": 1, "vlm": 1, "expert": 1}
    assert twice == {"vision": prefix, "vlm": prefix, "expert": 2}
    assert recomputed.keys() == plain.keys()
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, plain[name]), name


def test_a_time_for_each_action_equals_one_for_all_when_constant(model, observation, training_pair):
    actions, _, time = training_pair
    cache = context(model, observation)
    per_sample = model.velocity(cache, actions, time)
    per_action = model.velocity(cache, actions, time[:, None].expand(-1, 10))
    torch.testing.assert_close(per_action, per_sample, rtol=1e-5, atol=5e-5)
    first_is_clean = time[:, None].repeat(1, 10)
    first_is_clean[:, 0] = 0
    assert not torch.allclose(model.velocity(cache, actions, first_is_clean), per_sample, atol=1e-3)


def test_sampling_time_follows_its_distribution():
    time = flow.sample_time(torch.rand(20_000, generator=torch.Generator().manual_seed(0), device="cpu"))
    assert time.min() > 0.001
    assert time.max() <= 1
    # Beta(1.5, 1) has mean 0.6 and variance 12/175.
    assert abs(time.mean().item() - (0.6 * 0.999 + 0.001)) < 0.01
    assert abs(time.var().item() - 12 / 175) < 0.005


def test_two_steps_of_euler_by_hand():
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), device="cpu")
    half = noise - (noise * 1.0) / 2
    assert torch.equal(
        flow.integrate(lambda x, time: x * time[:, None, None], noise, 2), half - half * 0.5 / 2
    )


def test_two_steps_of_adams_bashforth_by_hand():
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    first = noise * 1.0  # the velocity x · time at time 1
    half = noise - first / 2  # Euler
    wanted = half - (1.5 * (half * 0.5) - 0.5 * first) / 2
    found = flow.integrate(lambda x, time: x * time[:, None, None], noise, 2, solver="ab2")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("solver", "ratio"), [("euler", 2), ("ab2", 4)])
def test_twice_the_steps_divide_the_error_as_the_solvers_order_says(solver, ratio):
    """Along x · time from 1 at time 1: e^-½ at time 0."""

    def error(num_steps: int) -> float:
        x = flow.integrate(
            lambda x, time: x * time[:, None, None], torch.ones(1, 1, 1), num_steps, None, solver
        )
        return abs(x.item() - math.exp(-0.5))

    assert error(16) / error(32) == pytest.approx(ratio, rel=0.1)
    assert error(32) < 0.02


@pytest.mark.parametrize("width", [8, 18])
def test_before_training_near_patches_have_like_positions_and_no_two_the_same(width):
    tower = Siglip(SiglipConfig(image_size=12, patch_size=2, width=width, depth=1, mlp_dim=4, num_heads=2), 4)
    places = tower.position_embedding.detach().unflatten(0, (6, 6))
    assert places.shape == (6, 6, width)
    for along in (places[2], places[:, 3]):
        distances = (along - along[:1]).norm(dim=-1)
        assert (distances[1:4] > distances[:3] + 0.1).all()
    assert (torch.cdist(places.flatten(0, 1), places.flatten(0, 1)) + torch.eye(36)).min() > 0.1


def test_letterbox_leaves_a_fitting_image_alone():
    image = torch.rand(1, 3, 8, 8)
    assert letterbox(image, 8) is image


COMPILED = """
import torch
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Observation, Pi0, SiglipConfig
torch.manual_seed(0)
vlm = GemmaConfig(16, 2, 16, 2, 1, 8, 32)
model = Pi0(SiglipConfig(28, 14, 16, 2, 16, 2), vlm, ExpertConfig(16, 16), 8, 8, torch.float32)
observation = Observation(
    images=torch.randn(2, 2, 3, 28, 28),
    image_mask=torch.tensor([[True, True], [True, False]]),
    tokens=torch.ones(2, 4, dtype=torch.long),
    token_mask=torch.tensor([[True] * 4, [True] * 2 + [False] * 2]),
    state=torch.randn(2, 8),
)
noise = torch.randn(2, 3, 8)
compiled = torch.compile(model.sample, fullgraph=True, backend="eager")
assert torch.equal(compiled(observation, noise, 3), model.sample(observation, noise, 3))
"""


@pytest.mark.slow
def test_sampling_compiles_to_one_graph(tmp_path):
    # In a process of its own: in this one every function is wrapped in a check of its shapes.
    Program(tmp_path / "log.txt", script, COMPILED).succeed()


@PI0_ALONE
def test_shapes_in_signatures_are_checked_in_tests(model, observation):
    rotation = gemma.rotation(torch.zeros(2, 5, dtype=torch.long), 8)
    with pytest.raises(TypeCheckError):  # aliases are looked into: five positions do not turn four tokens
        gemma.rotate(torch.zeros(2, 1, 4, 8), rotation)
    with pytest.raises(TypeCheckError):
        layers.attend(torch.zeros(2, 4, 3, 8), torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, 6, 8))
    with pytest.raises(TypeCheckError):  # fields of dataclasses as well
        dataclasses.replace(observation, token_mask=observation.token_mask[:, 1:])
    with pytest.raises(TypeCheckError):
        model.sample(observation, torch.zeros(30, 32), 1)
