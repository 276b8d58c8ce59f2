"""Chunks as CUDA graphs, recorded and replayed on a CPU (`recorded_calls`), against the eager ones."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from recorded_calls import record_calls
from tiny_policy import ACTION, CHUNK, MODELS, batch, noise, tiny_policy
from torch import Tensor

from lerobot_pi0.errors import UserError
from lerobot_pi0.model import Observation
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling.cuda_graph import Graphs, leaves, side_stream
from lerobot_pi0.sampling.policy_sampler import PolicySampler
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance, action_prefix, guidance, read_remainder
from lerobot_pi0.sampling.sampler import Sampler

STEPS = 3


@pytest.fixture
def recordings(monkeypatch):
    return record_calls(monkeypatch)


@pytest.fixture(params=MODELS)
def policy(request) -> Pi0Policy:
    return tiny_policy(request.param)


def samplers(policy: Pi0Policy, compiled: bool = False) -> tuple[Sampler, Sampler]:
    """With graphs, and without."""
    return Sampler(policy.model, "fused", None, compiled, Graphs()), Sampler(policy.model, "fused")


def others(observation: Observation, number: int) -> Observation:
    """Another observation of the same shapes."""
    return replace(
        observation,
        images=observation.images.flip(-1) * (1 - 0.1 * number),
        tokens=(observation.tokens + number) % 1024,
        state=observation.state + number,
    )


def continuations(number: int) -> list[ActionPrefix | Guidance | None]:
    """What a chunk may go on from: nothing, committed actions, and what it is guided to."""
    remainder = read_remainder(noise()[:, : 3 + number, :ACTION] + number, 1 + number, noise(), None)
    assert remainder is not None
    return [None, action_prefix(remainder, 5), guidance(remainder, "EXP", CHUNK - number, 5.0)]


@pytest.mark.parametrize("masked", [False, True])
def test_replayed_chunks_are_the_eager_ones_bit_for_bit_whatever_they_are_given(policy, recordings, masked):
    graphed, eager = samplers(policy)
    observation = policy.observation(batch())
    if masked:
        observation = observation.padded(observation.tokens.shape[1] + 2)
    for number in range(3):
        given, start = others(observation, number), noise() * (1 + number)
        for by in continuations(number):
            wanted = eager.sample(given, start, STEPS, by)
            assert torch.equal(graphed.sample(given, start, STEPS, by), wanted)
        contexts = [sampler.context(given, CHUNK) for sampler in (graphed, eager)]
        for seed in (1, 2):
            chunks = [
                sampler.actions(context, start * seed, STEPS)
                for sampler, context in zip((graphed, eager), contexts, strict=True)
            ]
            assert torch.equal(*chunks)
    # A chunk, one with committed actions, a guided one; a context, and a chunk from it.
    assert len(recordings) == 5


def test_each_shape_and_each_number_of_steps_has_one_graph(policy, recordings):
    graphed, eager = samplers(policy)
    observation = policy.observation(batch())
    one = replace(observation, **{name: value[:1] for name, value in tensors_of(observation)})
    longer = observation.padded(observation.tokens.shape[1] + 8)
    calls = [(observation, noise(), 2), (observation, noise(), 4), (one, noise(1), 2), (longer, noise(), 2)]
    for _ in range(2):
        for call in calls:
            assert torch.equal(graphed.sample(*call), eager.sample(*call))
    assert len(recordings) == len(calls)
    context = graphed.context(observation, CHUNK)
    for samples in (1, 3, 1, 3):
        graphed.actions(context.repeat(samples), noise().repeat(samples, 1, 1), 2)
    assert len(recordings) == len(calls) + 3


def tensors_of(observation: Observation) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(observation).items() if value is not None]


def test_no_result_changes_with_the_next_one(policy, recordings):
    graphed, _ = samplers(policy)
    observation = policy.observation(batch())
    results: list[Any] = []
    for number in range(2):
        given = others(observation, number)
        results.append((graphed.sample(given, noise(), STEPS), graphed.context(given, CHUNK)))
    kept = [[leaf for leaf in leaves(result) if isinstance(leaf, Tensor)] for result in results]
    copies = [[tensor.clone() for tensor in of] for of in kept]
    graphed.sample(others(observation, 5), noise() * 3, STEPS)
    graphed.context(others(observation, 5), CHUNK)
    # A context has room that nothing has been written to yet, where NaN may stand.
    torch.testing.assert_close(kept, copies, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(copies[0][0], copies[1][0])


def test_any_thread_replays_and_threads_do_not_mix(policy, recordings):
    graphed, eager = samplers(policy)
    observation = policy.observation(batch())
    given = [(others(observation, number), noise() * number) for number in range(1, 9)]
    wanted = [eager.sample(of, start, STEPS) for of, start in given]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda pair: graphed.sample(pair[0], pair[1], STEPS), given))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(recordings) == 1


def test_a_graph_is_replayed_for_tensors_of_inference_mode_too(policy, recordings):
    graphed, eager = samplers(policy)
    wanted = eager.sample(policy.observation(batch()), noise(), STEPS)
    with torch.inference_mode():
        for _ in range(2):
            observation = policy.observation({key: _inference(value) for key, value in batch().items()})
            assert torch.equal(graphed.sample(observation, noise(), STEPS), wanted)
    assert torch.equal(graphed.sample(policy.observation(batch()), noise(), STEPS), wanted)
    assert len(recordings) == 1


def _inference(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


# In the policy.


@pytest.fixture
def on_cuda(monkeypatch, recordings):
    """Policies take their device for CUDA as far as graphs go."""
    monkeypatch.setattr(PolicySampler, "records", True)
    monkeypatch.setattr(PolicySampler, "linear_backend", "fused")
    return recordings


def test_a_policy_plans_from_a_graph_and_gives_what_its_whole_chunk_is(on_cuda):
    policy = tiny_policy()
    for seed in range(3):
        given = batch(seed=seed)
        chunk = policy.predict_action_chunk(given, noise=noise())
        context = policy.encode(given)
        assert torch.equal(policy.plan(context, noise=noise()), chunk)
    assert len(on_cuda) == 3


@pytest.mark.parametrize("change", ["ema", "in place", "assign"])
def test_after_the_weights_have_changed_graphs_are_recorded_anew(on_cuda, change):
    policy = tiny_policy()
    before = policy.predict_action_chunk(batch(), noise=noise())
    if change == "ema":
        optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2)
        policy.train()(batch())[0].backward()
        optimizer.step()
        policy.update()  # moves the EMA in place, which eval mode shows
        policy.eval()
    elif change == "in place":
        with torch.no_grad():
            policy.model.expert.layers[0].get_parameter("down_proj.weight").mul_(1.5)
    else:
        other = {name: tensor * 1.1 for name, tensor in policy.state_dict().items()}
        policy.load_state_dict(other, assign=True)
    after = policy.predict_action_chunk(batch(), noise=noise())
    assert not torch.allclose(after, before, atol=1e-4)
    wanted = policy.model.sample(policy.observation(batch()), noise(), 10)[..., :ACTION]
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=0)


def test_the_warm_up_records_what_real_time_chunking_needs_for_prompts_of_all_lengths(on_cuda):
    policy = tiny_policy()
    policy.config.rtc_config = RTCConfig(execution_horizon=CHUNK)
    policy.init_rtc_processor()
    policy.reset()
    warm = len(on_cuda)
    assert warm == 2
    left: dict[str, Any] = {"inference_delay": 2, "prev_chunk_left_over": torch.ones(CHUNK, ACTION)}
    for length in (8, 16, 24):
        given = policy.config.example_observation(prompt_length=length)
        policy.predict_action_chunk(given)
        policy.predict_action_chunk(given, **left)
    assert len(on_cuda) == warm


def test_the_random_numbers_of_a_chunk_are_drawn_outside_of_the_graph(on_cuda):
    policy = tiny_policy()
    chunks = [policy.predict_action_chunk(batch()) for _ in range(2)]
    assert not torch.equal(*chunks)


def test_eager_is_without_graphs(recordings, monkeypatch):
    monkeypatch.setattr(PolicySampler, "device", torch.device("cuda"))
    policy = tiny_policy(backend="eager")
    assert not policy.sampler.records
    policy.config.backend = "auto"
    assert policy.sampler.records


# The calls of torch.cuda, in order.


class FakeCuda:
    """The few that are made, and what they are made with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("side waits"))

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("main waits"))

    def graph_pool_handle(self) -> str:
        return "pool"

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def stream(self, stream: Any) -> Any:
        return self._within("side stream")

    def graph(self, graph: Any, **settings: Any) -> Any:
        assert settings["pool"] == "pool"
        assert settings["capture_error_mode"] == "thread_local"
        return self._within("graph")

    def _within(self, name: str) -> Any:
        calls = self.calls

        class Within:
            def __enter__(self) -> None:
                calls.append(f"{name} begins")

            def __exit__(self, *_: Any) -> None:
                calls.append(f"{name} ends")

        return Within()


@pytest.fixture
def fake_cuda(monkeypatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "graph_pool_handle", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    side_stream.cache_clear()
    yield fake
    side_stream.cache_clear()


def test_a_function_is_warmed_up_on_a_side_stream_recorded_once_and_replayed(fake_cuda):
    graphs, out = Graphs(), torch.zeros(2)

    def function(x: Tensor) -> Tensor:
        fake_cuda.calls.append("run")
        return out.copy_(x)

    for value in (1.0, 2.0):
        graphs("key", function, torch.full((2,), value))
    assert fake_cuda.calls == [
        "side waits",
        "side stream begins",
        *("run",) * (fake_cuda.calls.count("run") - 1),
        "side stream ends",
        "main waits",
        "graph begins",
        "run",
        "graph ends",
        "replay",
        "replay",
    ]
    assert fake_cuda.calls.count("run") >= 2


def test_a_device_that_records_no_graph_is_named_with_what_helps(fake_cuda):
    def function(x: Tensor) -> Tensor:
        if "graph begins" in fake_cuda.calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(UserError, match=r"not permitted when.*--policy.backend=eager"):
        Graphs()("key", function, torch.zeros(2))


def test_an_error_of_the_function_itself_stays_what_it_is(fake_cuda):
    def function(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        Graphs()("key", function, torch.zeros(2))
