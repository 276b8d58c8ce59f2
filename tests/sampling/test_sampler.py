"""The sampler against the network's own `sample`: each saving leaves the actions where they are."""

import gc
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from forked import Program, script
from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from peft import LoraConfig, get_peft_model
from tiny_policy import (
    ACTION,
    CHUNK,
    MODELS,
    batch,
    first,
    noise,
    raw_batch,
    statistics,
    tiny_config,
    tiny_network,
    tiny_policy,
)
from torch import Tensor

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.errors import UserError
from lerobot_pi0.model import Network, Observation, gemma
from lerobot_pi0.model.flow import Solver, integrate
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors
from lerobot_pi0.sampling import buffer
from lerobot_pi0.sampling.cuda_graph import leaves
from lerobot_pi0.sampling.linear import BackendName, Fp8, Int8, Packed
from lerobot_pi0.sampling.policy_sampler import PolicySampler
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance, guided
from lerobot_pi0.sampling.sampler import Sampler

STEPS = 10
EXACT: tuple[BackendName, ...] = ("fused", "packed")


@pytest.fixture(params=MODELS)
def which(request) -> str:
    return request.param


@pytest.fixture
def model(which) -> Network:
    return tiny_network(which)


@pytest.fixture
def observation() -> Observation:
    """Two samples and three cameras, one of them nobody's and one only the first sample's; padded prompts."""
    generator = torch.Generator().manual_seed(0)
    return Observation(
        images=torch.rand(2, 3, 3, 32, 32, generator=generator) * 2 - 1,
        image_mask=torch.tensor([[True, False, True], [True, False, False]]),
        tokens=torch.randint(0, 1024, (2, 16), generator=generator),
        token_mask=torch.arange(16) < torch.tensor([[9], [4]]),
        state=torch.randn(2, 8, generator=generator),
    )


def of_first(observation: Observation) -> Observation:
    return Observation(**{name: value[:1] for name, value in vars(observation).items()})


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize(("num_steps", "solver"), [(1, "euler"), (10, "euler"), (5, "ab2")])
def test_sampler_gives_the_networks_actions(model, observation, form, num_steps, solver):
    wanted = model.sample(observation, noise(), num_steps, solver)
    close(Sampler(model, form).sample(observation, noise(), num_steps, solver=solver), wanted)
    alone = Sampler(model, form).sample(of_first(observation), noise()[:1], num_steps, solver=solver)
    close(alone, wanted[:1])


def test_trimming_drops_what_nobody_has_and_keeps_the_actions(model, observation):
    trimmed = observation.trimmed()
    assert trimmed.images.shape[1] == 2
    assert trimmed.tokens.shape[1] == 9
    close(model.sample(trimmed, noise(), STEPS), model.sample(observation, noise(), STEPS))
    nothing_to_drop = trimmed.trimmed()
    assert nothing_to_drop.images is trimmed.images


def test_absent_camera_and_padding_are_neither_encoded_nor_kept(model, observation):
    encoded = []
    model.vision.patch_embedding.register_forward_pre_hook(lambda *_: encoded.append(1))
    original = model.vision.embed
    model.vision.embed = lambda images, dtype: encoded.append(len(images)) or original(images, dtype)
    buffer = Sampler(model, "packed").context(of_first(observation), CHUNK).buffer
    assert encoded == [2]
    assert buffer.layers[0][0].shape[2] == 2 * 16 + 9 + 1 + CHUNK
    assert buffer.mask is None  # so that no mask is applied


@pytest.mark.parametrize("form", EXACT)
def test_bfloat16_stays_as_close_to_float32_as_the_networks_own(model, observation, form):
    wanted = model.sample(observation, noise(), STEPS)
    model.bfloat16().dtype = torch.bfloat16
    own = (model.sample(observation, noise(), STEPS) - wanted).square().mean()
    assert (Sampler(model, form).sample(observation, noise(), STEPS) - wanted).square().mean() < 1.5**2 * own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_default_dtype_changes_no_action(dtype):
    """While it is another, and after: what is computed of the times of the steps is kept."""
    policy, given = tiny_policy(), batch()
    remainder = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(CHUNK, ACTION)}
    calls: list[dict[str, Any]] = [{}, remainder]
    wanted = [tiny_policy().predict_action_chunk(given, noise=noise(), **rest) for rest in calls]
    start = noise()
    torch.set_default_dtype(dtype)
    try:
        found = [policy.predict_action_chunk(given, noise=start, **rest) for rest in calls]
        assert policy.select_action(given).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    found += [policy.predict_action_chunk(given, noise=start, **rest) for rest in calls]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 2, strict=True))


def test_int8_points_where_float32_does(model, observation):
    wanted = model.sample(observation, noise(), STEPS).flatten(1)
    actions = Sampler(model, "int8").sample(observation, noise(), STEPS).flatten(1)
    assert torch.cosine_similarity(actions, wanted).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantized_to_their_largest_element(dtype):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x *= torch.logspace(-4, 4, 64)[:, None]
    x[3] = 0
    integers, scale = Int8.quantize(x)
    assert integers.dtype == torch.uint8
    error = ((integers.float() - Int8.ZERO) * scale - x.float()).abs()
    assert (error <= 0.51 * scale.float() + 2**-8 * x.float().abs()).all()
    assert (integers[3] == Int8.ZERO).all()


def test_int8_product_is_that_of_the_rounded_factors():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 64, generator=generator), torch.randn(48, 64, generator=generator)
    bias = torch.randn(48, generator=generator)
    integers, scale = Int8.quantize(x)
    weight_scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / weight_scale).round() * weight_scale
    torch.testing.assert_close(Int8([weight], [bias])(x), (integers.float() - 128) * scale @ rounded.T + bias)


def test_rows_are_rounded_to_8_bit_floats_by_their_largest_element():
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    x *= torch.logspace(-4, 4, 64)[:, None]
    x[3] = 0
    eights, scale = Fp8.quantize(x)
    assert eights.dtype == torch.float8_e4m3fn
    assert eights.float().abs().amax(1)[:3].tolist() == [Fp8.LARGEST] * 3
    error = (eights.float() * scale - x.float()).abs()
    # Three bits behind the first one; below 2⁻⁶ of the format, steps of 2⁻⁹.
    assert (error <= 2**-4 * x.float().abs() + 2**-10 * scale).all()
    assert not eights[3].float().any()


@pytest.fixture
def emulated_fp8(monkeypatch) -> list[torch.Size]:
    """The GPU's product as it is defined, on a CPU; a list of the shapes of its weights."""
    shapes: list[torch.Size] = []

    def scaled_mm(a: Tensor, b: Tensor, by_a: Tensor, _: Any, by_b: Tensor, __: Any, bias: Any) -> Tensor:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert (by_a.shape, by_b.shape) == ((len(a), 1), (1, b.shape[1]))
        assert b.stride(0) == 1  # column by column, as the GPU takes it
        assert not a.shape[1] % 16
        assert not b.shape[1] % 16
        shapes.append(b.shape)
        product = (a.float() * by_a) @ (b.float() * by_b)
        return (product if bias is None else product + bias.float()).bfloat16()

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    return shapes


def test_fp8_points_where_float32_does_and_leaves_the_action_expert_alone(model, observation, emulated_fp8):
    wanted = model.sample(observation, noise(), STEPS).flatten(1)
    model.bfloat16().dtype = torch.bfloat16
    actions = Sampler(model, "fp8").sample(observation, noise(), STEPS).flatten(1)
    assert torch.cosine_similarity(actions, wanted).min() > 0.99
    # Two layers of the vision tower and its projector, one layer of the language model, and of its last one
    # keys.
    assert len(emulated_fp8) == 2 * 4 + 1 + 4 + 1


# What one observation costs once.


@pytest.mark.parametrize("form", ["fused", "packed", "int8"])
def test_chunks_from_one_context_are_bit_for_bit_those_of_full_runs(model, observation, form):
    sampler = Sampler(model, form)
    context = sampler.context(observation, CHUNK)
    for seed in (1, 2, 1):
        start = torch.randn(2, CHUNK, 8, generator=torch.Generator().manual_seed(seed))
        replanned = sampler.actions(context, start, STEPS)
        assert torch.equal(replanned, sampler.sample(observation, start, STEPS))


def test_samples_of_an_observation_share_its_prefix_and_stand_in_a_row(model, observation):
    sampler = Sampler(model, "packed")
    three = sampler.context(observation, CHUNK).repeat(3)
    starts = torch.randn(6, CHUNK, 8, generator=torch.Generator().manual_seed(0))
    together = sampler.actions(three, starts, STEPS)
    for i in range(3):
        close(together[i::3], sampler.sample(observation, starts[i::3], STEPS))


def test_denoising_steps_write_behind_the_prefix_and_nowhere_else(model, observation):
    sampler = Sampler(model, "packed")
    context = sampler.context(observation, CHUNK)
    before = [tensor.clone() for layer in context.buffer.layers for tensor in layer]
    sampler.actions(context, noise(), STEPS)
    after = [tensor for layer in context.buffer.layers for tensor in layer]
    filled = context.buffer.filled
    for was, is_now in zip(before, after, strict=True):
        assert torch.equal(is_now[:, :, :filled], was[:, :, :filled])
        assert not torch.equal(is_now[:, :, filled:], was[:, :, filled:])


def test_images_prompt_state_and_time_are_embedded_once_per_chunk(model, observation, monkeypatch):
    calls = dict.fromkeys(("prompt", "state", "rotation", "time"), 0)

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return counted

    embedding, network = model.token_embedding, type(model)
    monkeypatch.setattr(embedding, "forward", counting("prompt", embedding.forward))
    monkeypatch.setattr(network, "with_state", counting("state", network.with_state))
    monkeypatch.setattr(network, "prepare", counting("time", network.prepare))
    monkeypatch.setattr(buffer, "rotation", counting("rotation", buffer.rotation))
    monkeypatch.setattr(gemma, "rotation", counting("rotation", gemma.rotation))
    sampler = Sampler(model, "packed")
    sampler.sample(observation, noise(), STEPS)
    assert calls == {"prompt": 1, "state": 1, "rotation": 1, "time": 1}
    sampler.sample(observation, noise(), STEPS)
    assert calls == {"prompt": 2, "state": 2, "rotation": 2, "time": 1}


class Recorded(Mapping[str, Tensor]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_weights_are_read_from_where_one_says_and_the_unused_ones_and_the_embedding_are_not(
    which, observation
):
    tensors = Recorded(tiny_network(which).state_dict())
    other = tiny_network(which)
    for name, parameter in other.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data.zero_()
    close(
        Sampler(other, "packed", tensors).sample(observation, noise(), STEPS),
        tiny_network(which).sample(observation, noise(), STEPS),
    )
    assert "token_embedding.weight" not in tensors.read
    assert "vlm.layers.0.down_proj.weight" in tensors.read
    last = {name for name in tensors.read if name.startswith("vlm.layers.1.")}
    assert last == {"vlm.layers.1.k_proj.weight", "vlm.layers.1.v_proj.weight"}


def test_fused_weights_are_the_networks_own(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler = Sampler(model, "fused")
    fused = sampler.network.expert.layers[0].get_parameter("q_proj.weight")
    assert fused.shape == (6 * 16, 32)  # four heads of queries, one of keys, one of values
    storage = fused.untyped_storage().data_ptr()
    for part in "qkv":
        weight = model.get_parameter(f"expert.layers.0.{part}_proj.weight")
        assert weight.untyped_storage().data_ptr() == storage
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# With both solvers, each over one of the backends.
SOLVED: tuple[tuple[BackendName, Solver], ...] = (("fused", "euler"), ("packed", "ab2"))


def by_the_network(model: Network, observation: Observation, velocity: Any, solver: Solver) -> Tensor:
    """A chunk along velocity(model's own velocity at the observation)(x, time)."""
    context = model.with_state(model.prefix(observation), observation.state)
    along = velocity(lambda x, time: model.velocity(context, x, time))
    return integrate(along, noise(), STEPS, solver=solver)


@pytest.mark.parametrize(("form", "solver"), SOLVED)
def test_guided_chunk_is_along_the_networks_own_velocity_guided(model, observation, form, solver):
    weights = torch.linspace(1, 0, CHUNK)[:, None].expand(-1, 8)
    by = Guidance(-noise(), weights, 5.0)
    wanted = by_the_network(model, observation, lambda velocity: guided(velocity, by), solver)
    sampler = Sampler(model, form)
    found = sampler.sample(observation, noise(), STEPS, by, solver)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - sampler.sample(observation, noise(), STEPS)).abs().max() > 0.1


@pytest.mark.parametrize(("form", "solver"), SOLVED)
def test_committed_actions_are_at_time_0_in_every_step(model, observation, form, solver):
    committed = ActionPrefix(-noise(), torch.arange(CHUNK) < 2)

    def begun(velocity: Any) -> Any:
        def at_zero(x: Tensor, time: Tensor) -> Tensor:
            return velocity(committed.put(x), torch.where(committed.mask, 0.0, time[:, None]))

        return at_zero

    wanted = committed.put(by_the_network(model, observation, begun, solver))
    close(Sampler(model, form).sample(observation, noise(), STEPS, committed, solver), wanted)


def test_a_policy_samples_by_the_solver_of_its_config(which):
    """Chunks, plans, guided and trained real-time chunking."""
    given, left = (
        batch(model=which),
        {"inference_delay": 1, "prev_chunk_left_over": torch.ones(CHUNK, ACTION)},
    )

    def chunks(solver: Solver) -> list[Tensor]:
        found = []
        for max_delay in (0, 2):
            policy = tiny_policy(
                which, num_inference_steps=4, solver=solver, rtc_training_max_delay=max_delay
            )
            policy.config.rtc_config = RTCConfig(execution_horizon=3)
            found += [policy.predict_action_chunk(given, noise=noise(), **rest) for rest in ({}, left)]
            found.append(policy.plan(policy.encode(given), noise=noise()))
        close(found[0], policy.model.sample(policy.observation(given), noise(), 4, solver)[..., :ACTION])
        assert torch.equal(found[2], found[0])
        return found

    assert not any(torch.equal(a, b) for a, b in zip(chunks("euler"), chunks("ab2"), strict=True))


@pytest.mark.parametrize("form", ["fused", "packed", "int8"])
def test_adaptive_norms_are_read_once_for_each_number_of_steps(observation, form):
    model, by = tiny_network("pi05"), Guidance(-noise(), torch.ones(CHUNK, 8), 5.0)
    sampler, committed = Sampler(model, form), ActionPrefix(-noise(), torch.arange(CHUNK) < 2)

    def chunks(num_steps: int) -> list[Tensor]:
        context = sampler.context(observation, CHUNK)
        return [
            sampler.sample(observation, noise(), num_steps),
            sampler.sample(observation, noise(), num_steps, committed),
            sampler.actions(context, noise(), num_steps),
            sampler.sample(observation, noise(), num_steps, by),
        ]

    before = chunks(STEPS)
    for name, parameter in model.named_parameters():
        if ".dense." in name:
            parameter.data.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(chunks(STEPS), before, strict=True))
    assert all(chunk.isnan().any() for chunk in chunks(STEPS // 2))


# Static: one graph for all prompts and states of a length.


STATIC = """
from dataclasses import replace
import torch
from torch._dynamo.backends.common import aot_autograd
from tiny_policy import batch, noise, tiny_policy
from lerobot_pi0.sampling.sampler import Sampler
from lerobot_pi0.sampling.rtc import action_prefix, guidance, read_remainder

graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph.forward

compile = torch.compile
backend = aot_autograd(fw_compiler=keep)
torch.compile = lambda function, fullgraph: compile(function, fullgraph=fullgraph, backend=backend)
policy = tiny_policy(MODEL)
sampler = Sampler(policy.model, "fused", compiled=True)
observation = policy.observation(batch(model=MODEL)).padded(8)
length = observation.tokens.shape[1]
for valid in (1, length // 2, length):
    given = replace(
        observation,
        tokens=(observation.tokens + valid) % 1024,
        token_mask=torch.arange(length).expand(2, -1) < valid,
        state=observation.state * valid,
    )
    actions = sampler.sample(given, noise() * valid, 3)
    torch.testing.assert_close(actions, policy.model.sample(given, noise() * valid, 3), atol=1e-5, rtol=1e-5)
for delay in (1, 3, 5):
    given = action_prefix(read_remainder(noise()[:, :, :4], delay, noise(), None), 5)
    actions = sampler.sample(observation, noise(), 3, given)
    eager = Sampler(policy.model, "fused").sample(observation, noise(), 3, given)
    torch.testing.assert_close(actions, eager, atol=1e-5, rtol=1e-5)
for valid, delay in ((2, 1), (length, 3), (5, 5)):
    given = replace(observation, token_mask=torch.arange(length).expand(2, -1) < valid)
    by = guidance(read_remainder(noise()[:, : delay + 1, :4], delay, noise(), None), "LINEAR", 6, 10.0)
    eager = Sampler(policy.model, "fused")
    chunks = (made.sample(given, noise(), 3, by) for made in (sampler, eager))
    torch.testing.assert_close(*chunks, atol=1e-4, rtol=1e-4)
context = sampler.context(observation, 6)
for steps in (2, 5):
    replanned = sampler.actions(context, noise(), steps)
    assert torch.equal(replanned, sampler.sample(observation, noise(), steps))
# One for all prompts and states of a padded length, one for all steps, of any number of them, one for all
# steps behind committed actions, and one for all steps of guidance.
assert len(graphs) == 4, len(graphs)
nodes = [node for graph in graphs for node in graph.graph.nodes]
operations = [str(node.target) for node in nodes if node.op == "call_function"]
assert len(operations) > 300, len(operations)
waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "device_put", "lift_fresh_copy")
assert not [name for name in operations if any(f".{wait}." in f".{name}." for wait in waits)], operations
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", MODELS)
def test_sampling_is_one_graph_for_all_prompts_of_a_length_and_it_never_waits_for_the_host(which, tmp_path):
    # In a process of its own: in this one every function of the network is wrapped in a check of its shapes.
    Program(tmp_path / "log.txt", script, f"MODEL = {which!r}\n{STATIC}").succeed()


# In the policy.


def test_prompts_of_all_lengths_have_one_graph_which_the_warm_up_compiles(monkeypatch):
    shapes = set()

    def keep_shapes(function, **_):
        def graph(sampler, given, *rest):
            mask = given.token_mask if isinstance(given, Observation) else given.mask
            assert mask is not None
            shapes.add((function.__name__, mask.shape))
            return function(sampler, given, *rest)

        return graph

    monkeypatch.setattr(torch, "compile", keep_shapes)
    compiled, eager = tiny_policy(backend="compile"), tiny_policy()
    for policy in (compiled, eager):
        policy.config.rtc_config = RTCConfig(execution_horizon=CHUNK)
        policy.init_rtc_processor()
    compiled.reset()
    warm = set(shapes)
    assert {name for name, _ in warm} == {"_context", "_velocity", "_guided_velocity"}
    preprocess, _ = make_lerobot_pi0_pre_post_processors(tiny_config(), statistics())
    left: dict[str, Any] = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(CHUNK, ACTION)}
    for task in ("push", "open the door, and then close all the drawers one after the other"):
        given = preprocess(raw_batch(1) | {"task": [task]})
        for rest in (dict[str, Any](), left):
            chunks = (
                policy.predict_action_chunk(given, noise=noise(1), **rest) for policy in (compiled, eager)
            )
            torch.testing.assert_close(*chunks, atol=1e-4, rtol=1e-4)
    assert shapes == warm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_encodes_once_and_plans_as_often_as_one_likes(dtype):
    policy = tiny_policy(dtype=dtype)
    context = policy.encode(batch())
    chunk = policy.predict_action_chunk(batch(), noise=noise())
    assert torch.equal(policy.plan(context, noise=noise()), chunk)
    assert torch.equal(policy.plan(context, noise=noise()), chunk)
    samples = policy.plan(context, num_samples=3)
    assert samples.shape == (6, CHUNK, 4)
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "assign", "module"])
def test_chunk_after_the_weights_have_changed_is_that_of_the_new_ones(change):
    policy = tiny_policy()
    before = policy.predict_action_chunk(batch(), noise=noise())
    if change == "optimizer":
        optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2)
        policy(batch())[0].backward()
        optimizer.step()
    elif change == "module":
        policy.model.expert.layers[0].o_proj = type(policy.model.action_in_proj)(64, 32, bias=False)
    else:
        other = {name: tensor * 1.1 for name, tensor in policy.state_dict().items()}
        policy.load_state_dict(other, assign=change == "assign")
    after = policy.predict_action_chunk(batch(), noise=noise())
    assert not torch.allclose(after, before)
    given = policy.observation(batch())
    close(after, policy.model.sample(given, noise(), STEPS)[..., :4])


def test_the_network_is_walked_for_its_parameters_once(monkeypatch):
    policy = tiny_policy()
    wanted = policy.predict_action_chunk(batch(), noise=noise())
    for method in ("parameters", "modules", "named_parameters", "named_modules"):
        monkeypatch.setattr(policy.model, method, lambda *_, **__: pytest.fail("walked again"))
    assert torch.equal(policy.predict_action_chunk(batch(), noise=noise()), wanted)


@pytest.mark.parametrize("form", ["fused", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(form, dtype, monkeypatch):
    """As LeRobot evaluates during training: a tensor of that mode cannot be trained."""
    policy = tiny_policy(dtype=dtype)
    monkeypatch.setattr(PolicySampler, "linear_backend", form)
    with torch.inference_mode():
        policy.eval().select_action(batch())
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2)
    policy.train()(batch())[0].backward()
    optimizer.step()
    assert not any(parameter.is_inference() for parameter in policy.parameters())


def test_threads_that_ask_at_once_share_a_sampler(monkeypatch):
    """lerobot-eval with --env.max_parallel_tasks: another sampler would be another copy of the weights."""
    policy, made, asked = tiny_policy(), [], Barrier(4)

    class Slow(Sampler):
        def __init__(self, *args: Any):
            made.append(self)
            time.sleep(0.1)  # the others ask meanwhile
            super().__init__(*args)

    monkeypatch.setattr("lerobot_pi0.sampling.policy_sampler.Sampler", Slow)
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda _: (asked.wait(), policy.sampler.current())[1], range(4)))
    assert got == made * 4


def test_the_backend_is_for_the_device_that_the_network_is_on():
    """`policy.to(device)` leaves the config's device as it was: LeRobot's --device is applied so."""
    policy = tiny_policy(dtype="bfloat16")
    wanted = policy.sampler.linear_backend
    policy.config.device = "cuda"
    assert policy.sampler.linear_backend == wanted


@pytest.mark.parametrize("compiled", [False, True])
def test_training_gives_back_what_sampling_kept(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    policy = tiny_policy(backend="compile" if compiled else "auto")
    policy.predict_action_chunk(batch())
    policy.eval()
    sampler = weakref.ref(policy.sampler.current())
    gc.disable()  # a GPU that runs out of memory does not collect Python's garbage either
    try:
        policy.train()
        assert sampler() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("form", ["fused", "packed"])
def test_a_graph_is_the_same_in_inference_mode(form, model, observation, monkeypatch):
    """It would be compiled anew for a tensor of that mode: LeRobot measures without, and controls with it."""
    seen = []

    def graph_of(function, **_):
        def graph(*given):
            seen.extend(leaves(given))
            return function(*given)

        return graph

    monkeypatch.setattr(torch, "compile", graph_of)
    sampler = Sampler(model, form, compiled=True)
    with torch.inference_mode():
        given = Observation(**{name: value.clone() for name, value in vars(observation).items()})
        for by in (
            ActionPrefix(noise(), torch.arange(CHUNK) < 2),
            Guidance(noise(), torch.ones(CHUNK, 8), 5.0),
        ):
            sampler.sample(given, noise(), STEPS, by)
    tensors = [value for value in seen if isinstance(value, Tensor)]
    assert len(tensors) > 20
    assert not any(tensor.is_inference() for tensor in tensors)


def test_compiling_the_policy_around_its_sampler_changes_nothing():
    """As LeRobot's --use_torch_compile does; what can be one graph is compiled by the sampler itself."""
    policy, graphs = tiny_policy(), []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(policy.predict_action_chunk, backend=keep)
    assert torch.equal(compiled(batch(), noise=noise()), policy.predict_action_chunk(batch(), noise=noise()))
    assert not graphs


def test_a_prompt_longer_than_the_config_says_is_not_cut_by_compiling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    policy = tiny_policy(tokenizer_max_length=4)
    wanted = policy.predict_action_chunk(batch(), noise=noise())
    policy.config.backend = "compile"
    policy.sampler.release()
    close(policy.predict_action_chunk(batch(), noise=noise()), wanted)


def test_adapters_are_part_of_the_weights():
    policy = tiny_policy()
    plain = policy.predict_action_chunk(batch(), noise=noise())
    settings = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["action_out_proj"])
    wrapped = get_peft_model(policy, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    wrapped.eval()
    chunk = policy.predict_action_chunk(batch(), noise=noise())
    assert not torch.allclose(chunk, plain, atol=1e-3)
    close(chunk, policy.model.sample(policy.observation(batch()), noise(), STEPS)[..., :4])


def test_the_backend_is_no_part_of_a_checkpoint(tmp_path):
    policy = tiny_policy(backend="int8")
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.predict_action_chunk(batch())
    policy.save_pretrained(tmp_path)
    again = Pi0Policy.from_pretrained(tmp_path)
    assert again.config.backend == "auto"
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("flag", ["--backend=int8", "--int8=true"])
def test_int8_is_one_flag_when_a_policy_is_loaded(tmp_path, flag):
    tiny_policy().save_pretrained(tmp_path)
    exact = Pi0Policy.from_pretrained(tmp_path).predict_action_chunk(batch(), noise=noise())
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=[flag])
    rounded = Pi0Policy.from_pretrained(tmp_path, config=config).predict_action_chunk(batch(), noise=noise())
    assert not torch.allclose(rounded, exact, atol=1e-4)
    assert torch.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > 0.999


def test_int8_is_refused_away_from_cpus():
    policy = tiny_policy(backend="int8").to("meta")  # counts for the device that the config names
    assert policy.sampler.linear_backend == "int8"
    policy.config.device = "cuda"
    with pytest.raises(UserError, match="backend=int8 is for CPUs, and this policy runs on 'cuda'"):
        _ = policy.sampler.linear_backend


def test_fp8_is_refused_where_the_device_has_none(monkeypatch):
    policy = tiny_policy(backend="fp8", dtype="bfloat16")
    with pytest.raises(UserError, match=r"backend=fp8 is for NVIDIA GPUs of .* 8\.9 .*bfloat16 on 'cpu'"):
        policy.predict_action_chunk(batch())
    gpu = torch.device("cuda")
    for capability, runs in (((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=capability: of)
        assert Fp8.runs(gpu, torch.bfloat16) == runs
    assert not Fp8.runs(gpu, torch.float32)


def test_processor_without_the_packed_product_samples_all_the_same(monkeypatch):
    wanted = tiny_policy().predict_action_chunk(first(batch()), noise=noise(1))
    monkeypatch.setattr(Packed, "runs", staticmethod(lambda dtype: False))
    close(tiny_policy().predict_action_chunk(first(batch()), noise=noise(1)), wanted)
