"""LeRobot's contract: loss, queue, chunk, freezing, cameras, and messages for what does not fit."""

import logging
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from tiny_policy import ACTION, CHUNK, FRONT, MODELS, STATE, batch, first, noise, tiny_config, tiny_policy

from lerobot_pi0.configuration_pi0 import Pi0Config, assign_cameras
from lerobot_pi0.modeling_pi0 import Pi0Policy

VLM = ("model.vision.", "model.token_embedding.", "model.vlm.")
# No output depends on these; see the network.
UNUSED = ("q_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj")


def is_unused(name: str) -> bool:
    return name == "model.vlm.norm.weight" or (
        name.startswith("model.vlm.layers.1.") and name.split(".")[4] in UNUSED
    )


@pytest.fixture(params=MODELS)
def policy(request) -> Pi0Policy:
    return tiny_policy(request.param)


def count_calls(monkeypatch: pytest.MonkeyPatch, policy: Pi0Policy) -> dict[str, int]:
    """Passes over images and prompt, evaluations of the velocity, looks at a batch."""
    calls = dict.fromkeys(("prefix", "velocity", "observation"), 0)
    for owner, method, name in (
        (policy.model, "embed_prefix", "prefix"),
        (policy, "observation", "observation"),
    ):

        def counted(*args: Any, _original=getattr(owner, method), _name=name) -> Any:  # noqa: B008
            calls[_name] += 1
            return _original(*args)

        monkeypatch.setattr(owner, method, counted)

    def count_velocity(*_: Any) -> None:
        calls["velocity"] += 1

    policy.model.expert.norm.register_forward_hook(count_velocity)
    return calls


# The loss.


def test_loss_of_each_sample_averages_to_the_loss(policy):
    loss, logged = policy(batch(3))
    each, _ = policy(batch(3), reduction="none")
    assert loss.shape == ()
    assert each.shape == (3,)
    assert torch.equal(each.mean(), loss)
    assert all(isinstance(value, int | float) for value in logged.values())


def test_steps_beyond_the_episode_are_left_out_of_the_loss(policy):
    given = batch()
    given["action_is_pad"][0, 3:] = True
    loss, _ = policy(given)
    given["action"][0, 3:] = 1e6
    # What stands there is seen by the other steps as noise is, so only their own error leaves the loss.
    policy.config.mask_padded_actions = False
    assert policy(given)[0] > 1e6 > loss


def test_masked_loss_is_the_mean_over_the_valid_steps(policy, monkeypatch):
    errors = torch.arange(2 * CHUNK * 8).float().view(2, CHUNK, 8)
    monkeypatch.setattr(policy.model, "loss", lambda *_, **__: errors)
    given = batch()
    given["action_is_pad"][0, 4:] = True
    given["action_is_pad"][1, 1:] = True
    each, _ = policy(given, reduction="none")
    torch.testing.assert_close(each, torch.stack([errors[0, :4].mean(), errors[1, 0].mean()]))


def test_openpis_loss_is_the_mean_over_everything(monkeypatch):
    policy = tiny_policy(mask_padded_actions=False)
    errors = torch.arange(2 * CHUNK * 8).float().view(2, CHUNK, 8)
    monkeypatch.setattr(policy.model, "loss", lambda *_, **__: errors)
    given = batch()
    given["action_is_pad"][:, 2:] = True
    torch.testing.assert_close(policy(given)[0], errors.mean())


def test_sample_without_a_valid_step_gives_no_nan(policy):
    given = batch()
    given["action_is_pad"][0] = True
    each, _ = policy(given, reduction="none")
    assert each[0] == 0
    assert each[1] > 0


def test_held_out_loss_is_the_same_every_time_and_keyed_by_index(policy):
    torch.manual_seed(1)
    first, _ = policy(batch())
    torch.manual_seed(2)
    again, _ = policy(batch())
    other, _ = policy(batch() | {"index": torch.tensor([1_000, 1_001])})
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_held_out_loss_leaves_the_global_generator_alone(policy):
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    policy(batch())
    assert torch.equal(torch.rand(1), wanted)


def test_training_loss_draws_anew_every_time(policy):
    policy.train()
    assert not torch.equal(policy(batch())[0], policy(batch())[0])


def test_several_flow_samples_share_one_prefix(monkeypatch):
    policy = tiny_policy(num_flow_samples=3).train()
    calls = count_calls(monkeypatch, policy)
    each, _ = policy(batch(2), reduction="none")
    assert each.shape == (2,)
    assert calls["prefix"] == calls["velocity"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_nothing(dtype):
    """LeRobot wraps training in autocast when the config's dtype is bfloat16."""
    policy = tiny_policy(dtype=dtype)
    wanted, _ = policy(batch())
    wanted_actions = policy.predict_action_chunk(batch(), noise=noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy(batch())[0], wanted)
        assert torch.equal(policy.predict_action_chunk(batch(), noise=noise()), wanted_actions)


@pytest.mark.parametrize("model", MODELS)
def test_a_few_steps_bring_the_loss_down(model):
    policy = tiny_policy(model, ema_decay=0.8)  # for so few steps
    before, _ = policy(batch())
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        policy(batch())[0].backward()
        optimizer.step()
        policy.update()
    assert policy.eval()(batch())[0] < 0.7 * before


# Actions.


def test_chunk_has_the_robots_actions(policy):
    assert policy.predict_action_chunk(batch(2)).shape == (2, CHUNK, ACTION)
    assert policy.predict_action_chunk(batch(1)).shape == (1, CHUNK, ACTION)


def test_chunk_is_repeatable_with_its_noise_and_keeps_no_graph(policy):
    chunk = policy.predict_action_chunk(batch(), noise=noise())
    assert torch.equal(policy.predict_action_chunk(batch(), noise=noise()), chunk)
    assert not torch.equal(policy.predict_action_chunk(batch()), chunk)
    assert not chunk.requires_grad


def test_select_action_hands_out_the_chunk_and_then_predicts_the_next(policy):
    chunk = policy.predict_action_chunk(batch(), noise=noise())
    found = [policy.select_action(batch(), noise=noise()) for _ in range(3)]
    assert torch.equal(torch.stack(found, 1), chunk[:, :3])
    other = policy.select_action(batch(seed=1), noise=noise())
    assert torch.equal(other, policy.predict_action_chunk(batch(seed=1), noise=noise())[:, 0])


def test_select_action_on_a_full_queue_does_no_work_beyond_the_pop(policy, monkeypatch):
    calls = count_calls(monkeypatch, policy)
    policy.select_action(batch())
    assert calls == {"prefix": 1, "velocity": 10, "observation": 1}
    for _ in range(2):
        policy.select_action({})  # not even a look at the batch
    assert calls == {"prefix": 1, "velocity": 10, "observation": 1}
    policy.select_action(batch())
    assert calls == {"prefix": 2, "velocity": 20, "observation": 2}


def test_a_new_instruction_is_acted_on_at_once(policy):
    policy.select_action(batch(), noise=noise())
    policy.drop_queued_actions()
    found = policy.select_action(batch(seed=1), noise=noise())
    assert torch.equal(found, policy.predict_action_chunk(batch(seed=1), noise=noise())[:, 0])


def test_reset_forgets_the_queue(policy):
    policy.select_action(batch(), noise=noise())
    policy.reset()
    found = policy.select_action(batch(seed=1), noise=noise())
    assert torch.equal(found, policy.predict_action_chunk(batch(seed=1), noise=noise())[:, 0])


def test_acting_changes_neither_weights_nor_modules(policy):
    def of_modules() -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in policy.named_modules()}

    inside = of_modules()
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.select_action(batch())
    assert of_modules() == inside
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in weights.items())
    assert not dict(policy.named_buffers())


def test_samples_of_a_batch_do_not_see_one_another(policy):
    together = policy.predict_action_chunk(batch(), noise=noise())
    alone = policy.predict_action_chunk(first(batch()), noise=noise()[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_number_of_denoising_steps_is_the_configs(monkeypatch):
    policy = tiny_policy(num_inference_steps=4)
    calls = count_calls(monkeypatch, policy)
    policy.predict_action_chunk(batch())
    assert calls["velocity"] == 4


# What does not fit.


@pytest.mark.parametrize(("key", "size"), [("observation.state", 5), ("action", 4)])
def test_vector_of_another_size_names_both_sizes(policy, key, size):
    given = batch() | {key: torch.zeros(2, CHUNK, 7) if key == "action" else torch.zeros(2, 7)}
    with pytest.raises(ValueError, match=f"'{key}' has 7 dimensions, the policy was made for {size}"):
        policy(given)


@pytest.mark.parametrize("key", [FRONT, "observation.state"])
def test_missing_observation_names_it_and_what_is_there(policy, key):
    given = batch()
    del given[key]
    with pytest.raises(ValueError, match=rf"no \['{key}'\]; it has \['observation.*--rename_map"):
        policy.select_action(given)


@pytest.mark.parametrize("shape", [(3, 48, 64), (2, 48, 64, 3)])
def test_image_of_another_layout_is_refused(policy, shape):
    with pytest.raises(
        ValueError, match=r"'observation.images.front' must be \(batch, 3, height, width\), got"
    ):
        policy.select_action(batch() | {FRONT: torch.zeros(shape)})


# Freezing.


@pytest.mark.parametrize(
    ("freeze", "frozen"), [("nothing", ()), ("vision", ("model.vision.",)), ("vlm", VLM)]
)
def test_frozen_parts_and_only_they_stay_as_they_are(freeze, frozen):
    policy = tiny_policy(freeze=freeze).train()
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad != (name.startswith(frozen) or is_unused(name)), name
    policy(batch())[0].backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = [parameter for group in policy.get_optim_params() for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in policy.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("freeze", "modules"), [("nothing", ()), ("vision", ("vision",)), ("vlm", ("vision", "vlm"))]
)
def test_frozen_parts_stay_in_eval_mode(freeze, modules):
    policy = tiny_policy(freeze=freeze)
    policy.train()
    for name in ("vision", "vlm", "expert"):
        assert policy.model.get_submodule(name).training == (name not in modules)
    policy.eval()
    assert not any(module.training for module in policy.modules())


def test_freezing_the_vlm_does_not_change_the_experts_gradients():
    gradients: list[Any] = []
    for freeze in ("nothing", "vlm"):
        policy = tiny_policy(freeze=freeze)  # in eval mode: the same noise and time
        policy(batch())[0].backward()
        gradients.append(policy.get_parameter("model.expert.layers.0.q_proj.weight").grad)
    assert torch.equal(*gradients)


def test_gradient_checkpointing_changes_memory_not_gradients():
    gradients: list[Any] = []
    for checkpointing in (False, True):
        policy = tiny_policy(gradient_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        policy(batch())[0].backward()
        gradients.append(policy.get_parameter("model.vision.layers.0.q_proj.weight").grad)
    assert torch.equal(*gradients)


# Cards and adapters.


@pytest.mark.parametrize(
    ("tokenizer", "given", "licence"),
    [("small", None, "apache-2.0"), ("google/paligemma-3b-pt-224", None, "gemma"), ("small", "mit", "mit")],
)
def test_model_card_names_the_licence_and_the_plugin(policy, monkeypatch, tokenizer, given, licence):
    monkeypatch.setattr(policy.config, "tokenizer", tokenizer)
    card = policy.generate_model_card("me/data", "lerobot_pi0", given, None, cfg=None, dataset_meta=None)
    assert card.data.license == licence
    assert "pip install lerobot-policy-pi0" in str(card)
    assert "lerobot_pi0" in str(card)


@pytest.mark.parametrize(("base", "published"), [("lerobot/pi0_base", True), ("/home/me/pi0", False)])
def test_model_card_names_a_base_model_that_others_can_have(policy, monkeypatch, base, published):
    monkeypatch.setattr(policy.config, "base_checkpoint", base)
    monkeypatch.setattr(policy.config, "base_revision", "cafe")
    card = policy.generate_model_card("me/data", "lerobot_pi0", None, None)
    assert card.data.base_model == (base if published else None)
    assert ("at revision `cafe`" in str(card)) == published
    assert (base in str(card)) == published


@pytest.mark.parametrize(("model", "name"), [("pi0", "π0"), ("pi05", "π0.5")])
def test_model_card_is_of_its_model(model, name):
    card = tiny_policy(model).generate_model_card("me/data", "", None, None)
    assert {model, f"lerobot_{model}"} < {*card.data.to_dict()["tags"]}
    assert f"A [{name}](https://www.physicalintelligence.company/blog/{model}) policy" in card.text


@pytest.mark.parametrize(("key", "robot"), [("observation.images.front", True), ("observation.image", False)])
def test_model_card_has_a_robots_command_only_for_a_robots_cameras(key, robot):
    camera = PolicyFeature(FeatureType.VISUAL, (3, 48, 64))
    inputs = {key: camera, "observation.state": PolicyFeature(FeatureType.STATE, (STATE,))}
    card = str(tiny_policy(input_features=inputs).generate_model_card("me/data", "lerobot_pi0", None, None))
    assert ("lerobot-rollout" in card) == robot
    assert ("front: {type: opencv, index_or_path: INDEX, width: 64, height: 48" in card) == robot
    assert "lerobot-eval" in card


# Cameras.


def keys(*names: str) -> list[str]:
    return [f"observation.images.{name}" for name in names]


@pytest.mark.parametrize(
    ("names", "slots"),
    [
        (["front"], {"base": "front"}),
        (["wrist", "front"], {"base": "front", "left_wrist": "wrist"}),
        (
            ["cam_high", "cam_left_wrist", "cam_right_wrist"],
            {"base": "cam_high", "left_wrist": "cam_left_wrist", "right_wrist": "cam_right_wrist"},
        ),
        (
            ["right_hand", "top", "left_hand"],
            {"base": "top", "left_wrist": "left_hand", "right_wrist": "right_hand"},
        ),
        (["gripper"], {"left_wrist": "gripper"}),
        (
            ["wrist_1", "wrist_2", "top"],
            {"base": "top", "left_wrist": "wrist_1", "right_wrist": "wrist_2"},
        ),
        (["wrist", "left_wrist"], {"left_wrist": "left_wrist", "right_wrist": "wrist"}),
        (["front", "side"], {"base": "front", "left_wrist": "side"}),
        (["a", "b", "c", "d"], {"base": "a", "left_wrist": "b", "right_wrist": "c", "d": "d"}),
    ],
)
def test_cameras_find_their_slots_by_name(names, slots):
    found = assign_cameras(keys(*names), {})
    assert found == {slot: f"observation.images.{name}" for slot, name in slots.items()}
    assert list(found) == list(slots)


def test_random_weights_are_warned_of_where_published_ones_would_fit(caplog, monkeypatch):
    assert Pi0Config(device="cpu").has_published_sizes
    tiny_policy()
    assert "random weights" not in caplog.text
    monkeypatch.setattr(Pi0Config, "has_published_sizes", True)
    tiny_policy()
    assert "random weights. To start from published ones: --policy.pretrained_path=" in caplog.text


def test_assignment_by_name_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        assign_cameras(keys("front"), {})
    assert "{'base': 'observation.images.front'} (change with --policy.cameras)" in caplog.text


def test_given_cameras_are_taken_in_the_models_order_and_others_left_out():
    found = assign_cameras(keys("a", "b", "c"), {"left_wrist": "c", "base": "observation.images.a"})
    assert list(found.items()) == [("base", "observation.images.a"), ("left_wrist", "observation.images.c")]


def test_assignment_once_made_is_stable():
    once = assign_cameras(keys("wrist", "front", "x", "y"), {})
    assert assign_cameras(keys("y", "x", "front", "wrist"), once) == once


def test_unknown_camera_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"puts 'top' into slot 'base', but the cameras are \['observation.images.a'\]"
    ):
        assign_cameras(keys("a"), {"base": "top"})


def test_camera_in_two_slots_is_refused():
    with pytest.raises(ValueError, match=r"one camera into two slots"):
        assign_cameras(keys("a", "b"), {"base": "a", "left_wrist": "observation.images.a"})


def test_views_stand_in_slot_order_whatever_the_datasets_order():
    features = {
        "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
    }
    policy = tiny_policy(input_features=features)
    given = batch() | {
        "observation.images.wrist": torch.ones(2, 3, 32, 32),
        "observation.images.front": torch.zeros(2, 3, 32, 32),
    }
    images = policy.observation(given).images
    assert images[:, 0].unique().tolist() == [-1]
    assert images[:, 1].unique().tolist() == [1]


def test_slot_without_a_camera_costs_nothing(monkeypatch):
    policy, seen = tiny_policy(), []
    original = policy.model.vision.embed
    monkeypatch.setattr(policy.model.vision, "embed", lambda i, d: seen.append(len(i)) or original(i, d))
    policy.predict_action_chunk(batch(2))
    assert seen == [2]


def test_keywords_of_lerobots_factory_are_accepted():
    config = tiny_config()
    policy = Pi0Policy(config, dataset_stats=None, dataset_meta=None, something_new=1)
    assert policy.config is config
    assert policy.state_dict().keys() == tiny_policy().state_dict().keys()
