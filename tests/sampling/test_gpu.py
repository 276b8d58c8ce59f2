"""On a GPU that is not there: tensors without values (PyTorch's FakeTensor), which know their device.

An operation on tensors of two devices fails, and so does asking for a value, for which one waits for a GPU.
"""

from typing import Any

import pytest
import torch
from tiny_policy import CHUNK, MODELS, batch, first, tiny_policy
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lerobot_pi0 import modeling_pi0
from lerobot_pi0.data import action_space
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling import cuda_graph, policy_sampler
from lerobot_pi0.sampling.cuda_graph import Recorded
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    # There is nothing to record: what is given is copied, and a run's outputs are the graph's.
    monkeypatch.setattr(cuda_graph, "record", lambda function, _: Recorded(lambda: None, function()))
    with FakeTensorMode() as mode:
        yield mode


def on_gpu(mode: FakeTensorMode, model: str = "pi0", **settings: Any) -> tuple[Pi0Policy, dict[str, Any]]:
    """A policy, and a batch as its preprocessor gives it."""
    with torch.device(GPU):
        policy = tiny_policy(model, **settings)
    policy.config.device = "cuda"
    given = {
        key: mode.from_tensor(value).to(GPU) if isinstance(value, Tensor) else value
        for key, value in real_batch(model).items()
    }
    return policy, given


def real_batch(model: str) -> dict[str, Any]:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return batch(model=model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "pi05"},
        {"augmentation": True},
        {"freeze": "vlm", "num_flow_samples": 2},
        {"rtc_training_max_delay": 3},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_forward_pass_of_a_training_step_waits_for_nothing(gpu, dtype, settings):
    policy, given = on_gpu(gpu, dtype=dtype, **settings)
    loss, _ = policy.train()(given)
    assert loss.device == GPU


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunk_is_made_on_one_device_and_waited_for_when_it_is_there(gpu, dtype, model, monkeypatch):
    policy, given = on_gpu(gpu, model, dtype=dtype)
    with pytest.raises(DataDependentOutputException):  # are these numbers?
        policy.predict_action_chunk(first(given))
    monkeypatch.setattr(policy_sampler, "numbers_at", lambda _: [])
    monkeypatch.setattr(modeling_pi0, "check_observation", lambda *_: None)
    monkeypatch.setattr(action_space, "not_finite", lambda *_: None)
    assert policy.predict_action_chunk(first(given)).device == GPU
    assert policy.plan(policy.encode(first(given)), num_samples=3).device == GPU
    assert policy.select_action(first(given)).device == GPU


@pytest.mark.parametrize("model", MODELS)
def test_a_chunk_that_begins_with_committed_actions_is_made_on_one_device(gpu, model, monkeypatch):
    monkeypatch.setattr(policy_sampler, "numbers_at", lambda _: [])
    policy, given = on_gpu(gpu, model)
    start = torch.zeros(1, CHUNK, 8, device=GPU)
    begun = ActionPrefix(start, torch.arange(CHUNK, device=GPU) < 2)
    observation = policy.observation(first(given))
    assert policy.sampler.current().sample(observation, start, 10, begun).device == GPU


@pytest.fixture
def attentions(monkeypatch) -> list[tuple[bool, bool]]:
    """Of each attention whether gradients run and whether cuDNN's is among its backends."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return seen


def forward_alone(function: Any, x: Tensor, has_aux: bool) -> tuple[Any, ...]:
    """A backward pass would ask for the device."""
    with torch.enable_grad():
        actions, aux = function(x)
    return actions, lambda by: (by,), aux


def test_cudnn_attention_is_left_out_where_gradients_run_and_only_there(gpu, attentions, monkeypatch):
    """Its backward pass may give NaN (pytorch#196678)."""
    monkeypatch.setattr(policy_sampler, "numbers_at", lambda _: [])
    policy, given = on_gpu(gpu)
    policy.train()(given)
    assert set(attentions) == {(True, False)}
    attentions.clear()
    sampler, observation = policy.eval().sampler.current(), policy.observation(first(given))
    start = torch.zeros(1, CHUNK, 8, device=GPU)
    sampler.sample(observation, start, 2)
    assert set(attentions) == {(False, True)}
    attentions.clear()
    monkeypatch.setattr(torch.func, "vjp", forward_alone)
    sampler.sample(observation, start, 2, Guidance(start, torch.ones(CHUNK, 8, device=GPU), 5.0))
    assert set(attentions) == {(False, True), (True, False)}  # the prefix; the steps
    assert torch.backends.cuda.cudnn_sdp_enabled()
