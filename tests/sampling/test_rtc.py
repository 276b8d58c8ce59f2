"""Real-time chunking: a chunk that goes on from the one that is still being executed."""

import logging
import weakref
from typing import Any

import pytest
import torch
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from tiny_policy import ACTION, CHUNK, MODELS, batch, first, noise, tiny_config, tiny_policy

from lerobot_pi0.configuration_pi0 import ReferenceState
from lerobot_pi0.model.flow import integrate
from lerobot_pi0.sampling.rtc import (
    Guidance,
    guided,
    prefix_weights,
    read_remainder,
    warn_of_horizon,
)
from lerobot_pi0.training.loss import action_times, sample_delays

PADDED = 8


@pytest.fixture(params=MODELS)
def policy(request):
    return tiny_policy(request.param)


@pytest.fixture
def observation():
    return first(batch())


def remainder(steps: int = CHUNK, seed: int = 3) -> torch.Tensor:
    """As LeRobot hands it over."""
    return torch.randn(steps, ACTION, generator=torch.Generator().manual_seed(seed))


def with_rtc(policy, **settings: Any):
    given: dict[str, Any] = {"execution_horizon": CHUNK} | settings
    policy.config.rtc_config = RTCConfig(**given)
    policy.init_rtc_processor()
    return policy


# Guidance.


@pytest.mark.parametrize("schedule", RTCAttentionSchedule)
@pytest.mark.parametrize(("delay", "end"), [(0, 4), (2, 5), (3, 3), (4, 2), (0, 0), (CHUNK, CHUNK)])
def test_weights_are_lerobots(schedule, delay, end):
    theirs = RTCProcessor(RTCConfig(prefix_attention_schedule=schedule)).get_prefix_weights(delay, end, CHUNK)
    assert torch.allclose(prefix_weights(delay, end, CHUNK, schedule.value), theirs, atol=1e-6)


def test_guidance_is_the_papers_by_a_dense_jacobian(policy, observation):
    """Written down in the paper's time, with the Jacobian of the whole denoised chunk."""
    context = policy.encode(observation).buffer.read()
    target = torch.randn(1, CHUNK, PADDED, generator=torch.Generator().manual_seed(1))
    weights = prefix_weights(2, 5, CHUNK, "EXP")[:, None].expand(CHUNK, PADDED)
    x, bound = noise(1), 5.0
    for tau in (0.0, 0.1, 0.5, 0.9):
        time = torch.tensor([1 - tau])

        def denoised(x, tau=tau, time=time):
            return x + (1 - tau) * -policy.model.velocity(context, x, time)

        jacobian = torch.autograd.functional.jacobian(denoised, x).reshape(x.numel(), x.numel())
        error = ((target - denoised(x)) * weights).flatten()
        ratio = torch.tensor((1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2))
        scale = min(bound, (1 - tau) / (tau * ratio)) if tau else bound
        paper = -policy.model.velocity(context, x, time) + scale * (error @ jacobian).view_as(x)
        by = Guidance(target, weights, bound)
        ours = guided(lambda x, t: policy.model.velocity(context, x, t), by)(x, time)
        assert torch.allclose(-ours, paper, atol=2e-5)
        # LeRobot 0.6.1 takes the identity for the Jacobian, which is another direction.
        without = paper + scale * (error - error @ jacobian).view_as(x)
        assert not torch.allclose(-ours, without, atol=1e-3)


def test_guided_chunk_goes_on_where_the_last_one_is(policy, observation):
    free = policy.predict_action_chunk(observation, noise=noise(1))
    left = free[0] + 0.3 * remainder()
    with_rtc(policy)
    held = policy.predict_action_chunk(
        observation, noise=noise(1), inference_delay=3, prev_chunk_left_over=left
    )
    before, after = ((chunk[0, :3] - left[:3]).abs().mean() for chunk in (free, held))
    assert after < before / 3
    assert not torch.equal(held, free)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_chunk_is_guided_in_inference_mode_too(dtype, tolerance, observation):
    policy = with_rtc(tiny_policy(dtype=dtype))
    given = {"noise": noise(1), "inference_delay": 2, "prev_chunk_left_over": remainder()}
    chunk = policy.predict_action_chunk(observation, **given)
    with torch.inference_mode():
        again = policy.predict_action_chunk(observation, **given)
    assert torch.allclose(again, chunk, atol=tolerance)


def test_a_remainder_in_training_mode_is_refused(policy, observation):
    with pytest.raises(ValueError, match=r"policy\.eval\(\)"):
        with_rtc(policy).train().predict_action_chunk(observation, prev_chunk_left_over=remainder())


def test_a_remainder_guides_also_when_there_is_no_delay(policy, observation):
    free = policy.predict_action_chunk(observation, noise=noise(1))
    given = {"noise": noise(1), "inference_delay": 0, "prev_chunk_left_over": remainder()}
    assert not torch.equal(with_rtc(policy).predict_action_chunk(observation, **given), free)


def test_no_graph_outlives_a_step(policy, observation):
    context = policy.encode(observation).buffer.read()
    alive = []

    def velocity(x, time):
        assert all(reference() is None for reference in alive), "the graph of an earlier step is still there"
        v = policy.model.velocity(context, x, time)
        alive.append(weakref.ref(v))
        return v

    by = Guidance(torch.zeros(1, CHUNK, PADDED), torch.ones(CHUNK, PADDED), 5.0)
    with torch.no_grad():
        chunk = integrate(guided(velocity, by), noise(1), 4)
    assert not chunk.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_prefix_is_computed_once(policy, observation):
    calls = []
    policy.model.token_embedding.register_forward_hook(lambda *_: calls.append(1))
    with_rtc(policy).predict_action_chunk(observation, inference_delay=2, prev_chunk_left_over=remainder())
    assert len(calls) == 1


# What LeRobot hands over.


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_of_zeros_are_no_actions(policy, observation, rows):
    """An empty queue gives (0, size), which LeRobot fills up to the execution horizon with zeros."""
    with_rtc(policy)
    padded = torch.zeros(CHUNK, ACTION)
    padded[:rows] = remainder(rows)
    given = {"noise": noise(1), "inference_delay": 1}
    found = policy.predict_action_chunk(observation, prev_chunk_left_over=padded, **given)
    short = remainder(rows) if rows else None
    assert torch.equal(found, policy.predict_action_chunk(observation, prev_chunk_left_over=short, **given))
    if not rows:
        empty = torch.zeros(0, ACTION)
        assert torch.equal(
            found, policy.predict_action_chunk(observation, prev_chunk_left_over=empty, **given)
        )


def test_disabled_rtc_leaves_the_chunk_alone(policy, observation):
    free = policy.predict_action_chunk(observation, noise=noise(1))
    with_rtc(policy, enabled=False)
    given = {"inference_delay": 2, "prev_chunk_left_over": remainder()}
    assert torch.equal(policy.predict_action_chunk(observation, noise=noise(1), **given), free)


@pytest.mark.parametrize("left", [None, remainder()])
def test_a_delay_of_a_whole_chunk_is_refused(policy, observation, left):
    with pytest.raises(ValueError, match=rf"delay of {CHUNK} steps is a whole chunk of {CHUNK}.*latency"):
        policy.predict_action_chunk(observation, inference_delay=CHUNK, prev_chunk_left_over=left)


def test_a_horizon_longer_than_a_chunk_is_refused(policy):
    with pytest.raises(ValueError, match=r"execution_horizon=7 .* \(6 actions\)"):
        with_rtc(policy, execution_horizon=7)


@pytest.mark.parametrize("max_delay", [0, 5])
def test_a_horizon_shorter_than_the_delay_is_told_once(max_delay, observation, caplog):
    """LeRobot cuts what is left to the horizon, and fills it up to that."""
    warn_of_horizon.cache_clear()
    policy = with_rtc(tiny_policy(rtc_training_max_delay=max_delay), execution_horizon=3)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    policy.predict_action_chunk(observation, inference_delay=3, prev_chunk_left_over=remainder(3))
    assert caplog.messages == []
    for _ in range(2):
        policy.predict_action_chunk(observation, inference_delay=4, prev_chunk_left_over=remainder(3))
    (message,) = caplog.messages
    assert "4 actions" in message
    assert "held to 3 of them" in message
    assert "execution_horizon=6 or more" in message


def test_relative_remainders_are_taken_from_the_new_observation():
    """The remainder is absolute; what the network is held to is relative to the state at hand."""
    reference = ReferenceState([0, 2], [1, 0], [1.5, 0.5], [0.1, -0.2])
    at = torch.randn(1, ACTION)
    left = remainder()
    found = read_remainder(left, 2, noise(1), at)
    assert found is not None
    assert torch.allclose(found.actions[0, :, :ACTION], left - at)
    assert not found.actions[..., ACTION:].any()

    policy = with_rtc(tiny_policy(relative_actions=True, reference_state=reference))
    observation = first(batch())
    given = {"noise": noise(1), "inference_delay": CHUNK - 1}
    chunk = policy.predict_action_chunk(observation, prev_chunk_left_over=left, **given)
    free = policy.predict_action_chunk(observation, noise=noise(1))
    assert (chunk[0] - left).abs().mean() < (free[0] - left).abs().mean() / 2


# Warming up.


def test_the_first_chunk_of_a_run_is_not_the_first_that_is_computed(policy, monkeypatch):
    """LeRobot resets the policy before its thread starts; its delay is the longest inference so far."""
    seen = []
    monkeypatch.setattr(policy.sampler, "sample", lambda *given: seen.append(len(given) > 2))
    policy.reset()
    assert seen == []
    with_rtc(policy).reset()
    assert seen == [False, True]  # a first chunk, and one that goes on
    policy.reset()
    assert len(seen) == 2


def test_warming_up_draws_no_random_numbers(policy):
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with_rtc(policy).reset()
    assert torch.equal(torch.randn(3), expected)


def test_settings_of_a_run_are_not_saved(policy, tmp_path):
    with_rtc(policy).save_pretrained(tmp_path)
    assert type(policy).from_pretrained(tmp_path).config.rtc_config is None


# Training-time real-time chunking.


def test_committed_actions_are_given_and_the_rest_is_learnt():
    time, learnt = action_times(torch.tensor([0.5, 0.9]), torch.tensor([0, 2]), 4)
    assert time.tolist() == [[0.5] * 4, [0.0, 0.0, pytest.approx(0.9), pytest.approx(0.9)]]
    assert learnt.tolist() == [[True] * 4, [False, False, True, True]]


def test_delays_are_alike():
    delays = sample_delays(torch.linspace(0, 1, 4000), 3)
    assert delays.bincount().tolist() == pytest.approx([1000] * 4, abs=2)


def loss_gradient(policy, given) -> torch.Tensor:
    policy.zero_grad()
    loss, _ = policy.forward(given)
    loss.backward()
    return policy.model.action_out_proj.weight.grad.clone()


def test_committed_actions_are_no_part_of_the_loss(monkeypatch):
    """With a delay of all but the last step, other actions before it change the loss only as an input."""
    policy = tiny_policy(rtc_training_max_delay=CHUNK - 1, ema_decay=0.0, augmentation=False)
    policy.train()
    seen = {}
    model_loss = type(policy.model).loss

    def spy(model, observation, actions, noise, time, prefix=None):
        seen["time"] = time
        return model_loss(model, observation, actions, noise, time, prefix)

    monkeypatch.setattr(type(policy.model), "loss", spy)
    monkeypatch.setattr(
        "lerobot_pi0.training.loss.sample_delays", lambda u, _: torch.full_like(u, CHUNK - 1).long()
    )
    given = batch()
    losses = policy.forward(given, reduction="none")[0]
    assert (seen["time"][:, :-1] == 0).all()
    assert (seen["time"][:, -1] > 0).all()
    # The same sum by hand: only the last step's velocity counts.
    policy.trained.num_draws -= 1
    monkeypatch.setattr(
        type(policy.model),
        "loss",
        lambda *a, **k: spy(*a, **k) * torch.tensor([7.0] * (CHUNK - 1) + [1.0])[:, None],
    )
    assert torch.allclose(policy.forward(given, reduction="none")[0], losses)


def test_without_a_delay_training_is_as_it_was():
    given = batch()
    gradients = []
    for delay in (0, 3):
        policy = tiny_policy(rtc_training_max_delay=delay, augmentation=False)
        policy.train()
        policy.trained.num_draws = 2  # where the delays are 2 and 0
        gradients.append(loss_gradient(policy, given))
    assert not torch.allclose(gradients[0], gradients[1])
    policy.eval()
    plain = tiny_policy()
    assert torch.equal(policy.forward(given)[0], plain.forward(given)[0])  # a held-out loss is comparable


@pytest.mark.parametrize("model", MODELS)
def test_a_policy_trained_for_it_is_given_the_committed_actions(model, observation):
    """The same actions at no cost: no gradient, and the committed ones come back as they were."""
    policy = with_rtc(tiny_policy(model, rtc_training_max_delay=3))
    left = remainder()
    chunk = policy.predict_action_chunk(
        observation, noise=noise(1), inference_delay=2, prev_chunk_left_over=left
    )
    assert torch.equal(chunk[0, :2], left[:2])

    # By the network itself, with a time for each action.
    context = policy.encode(observation).buffer.read()
    known = torch.arange(CHUNK) < 2
    given = torch.zeros(1, CHUNK, PADDED)
    given[0, :, :ACTION] = left

    def velocity(x, time):
        x = torch.where(known[:, None], given, x)
        return policy.model.velocity(context, x, torch.where(known, 0.0, time[:, None]))

    expected = integrate(velocity, noise(1), policy.config.num_inference_steps)[..., :ACTION]
    assert torch.allclose(chunk[0, 2:], expected[0, 2:], atol=1e-5)


def test_beyond_its_training_it_goes_on_from_what_it_has_learnt_to_and_says_so(observation, caplog):
    """It does not fall back to guidance, which takes longer, whereupon the delay would stay as it is."""
    policy = with_rtc(tiny_policy(rtc_training_max_delay=2))
    chunks = [
        policy.predict_action_chunk(
            observation, noise=noise(1), inference_delay=delay, prev_chunk_left_over=remainder()
        )
        for delay in (2, 3, 3)
    ]
    assert torch.equal(chunks[0][:, 3:], chunks[1][:, 3:])
    (message,) = [message for message in caplog.messages if "has learnt to go on from 2" in message]
    assert "rtc_training_max_delay=3 or more" in message


def test_a_delay_without_anything_to_learn_is_refused():
    with pytest.raises(ValueError, match=r"rtc_training_max_delay \(6\) must be less than a chunk"):
        tiny_config(rtc_training_max_delay=CHUNK).validate_features()
