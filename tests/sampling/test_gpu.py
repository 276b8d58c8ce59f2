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
from lerobot_pi0.sampling import policy_sampler
from lerobot_pi0.sampling.rtc import ActionPrefix

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu():
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
