"""Attention recorded while the network runs: its own, and shown where it belongs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_policy import MODELS, VLM, batch, noise, tiny_config, tiny_policy

from lerobot_pi0 import cli
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.processor_pi0 import Pi0TokenizerStep, Word
from lerobot_pi0.tools.attention import divide, recorded_attention, sampling_attention, without_letterbox

PATCHES = 16


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@torch.no_grad()
def test_attention_is_the_networks_own(num_kv_heads):
    """Values weighted by it are what the layer goes on with; each row sums to 1; what is masked gets none."""
    policy = tiny_policy(vlm=replace(VLM, num_kv_heads=num_kv_heads))
    observation, layer = policy.observation(batch()).padded(8), policy.model.expert.layers[1]
    assert observation.token_mask is not None
    assert not observation.token_mask.all()
    context = policy.model.with_state(policy.model.prefix(observation), observation.state)
    values, attended = [], []
    layer.register_forward_hook(lambda _, __, out: values.append(out[1][1]))
    layer.get_submodule("o_proj").register_forward_pre_hook(lambda _, given: attended.append(given[0]))
    with recorded_attention(policy.model.expert) as attention:
        policy.model.velocity(context, noise(), torch.tensor([0.3, 0.9]))
    policy.model.velocity(context, noise(), torch.tensor([0.3, 0.9]))  # is not recorded
    assert len(attention) == VLM.depth
    own = attention[1] @ values[0].repeat_interleave(VLM.num_heads // num_kv_heads, 1)
    torch.testing.assert_close(own.transpose(1, 2).flatten(2), attended[0], rtol=0, atol=1e-5)
    rows = torch.stack(attention)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    padding = torch.nn.functional.pad(~observation.token_mask, (PATCHES, 1 + noise().shape[1]))
    assert rows.permute(1, 4, 0, 2, 3)[padding].max() == 0
    assert rows.permute(1, 4, 0, 2, 3)[~padding].min() > 0


@torch.no_grad()
def test_camera_that_is_not_there_is_not_looked_at():
    policy = tiny_policy()
    observation = policy.observation(batch()).padded(8)
    two = replace(
        observation,
        images=observation.images.repeat(1, 2, 1, 1, 1),
        image_mask=torch.tensor([[True, False]] * 2),
    )
    first = replace(two, **{key: getattr(two, key)[:1] for key in vars(two)})
    attention = sampling_attention(policy.model, first, noise(1), 2)
    padded, actions = two.tokens.shape[1], noise().shape[1]
    words = [Word("all", 8)]
    seen = divide(attention.mean((0, 1)).numpy(), ["front", "absent"], 4, words, padded, actions)
    assert seen.cameras["absent"].sum() == 0
    assert seen.cameras["front"].min() > 0
    assert sum(share for _, share in seen.shares()) == pytest.approx(1)


@torch.no_grad()
def test_attention_moves_with_the_patches():
    """Patches that change places in the cache take their attention along, and the velocity stays."""
    policy = tiny_policy()
    observation = policy.observation(batch()).padded(8)
    context = policy.model.with_state(policy.model.prefix(observation), observation.state)
    mask = context.mask
    assert mask is not None
    order = torch.arange(mask.shape[1])
    order[:PATCHES] = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))
    shuffled = Cache([(k[:, :, order], v[:, :, order]) for k, v in context.layers], mask[:, order])
    time = torch.tensor([0.5, 0.5])
    with recorded_attention(policy.model.expert) as attention:
        velocity = policy.model.velocity(context, noise(), time)
    with recorded_attention(policy.model.expert) as moved:
        moved_velocity = policy.model.velocity(shuffled, noise(), time)
    torch.testing.assert_close(moved_velocity, velocity, rtol=0, atol=1e-5)
    for before, after in zip(attention, moved, strict=True):
        torch.testing.assert_close(after[..., : len(order)], before[..., order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (32, 32), (90, 200)])
def test_patch_is_drawn_over_what_the_model_sees_there(height, width):
    """A bright spot, found again in the square that the model sees, is where the map shows it."""
    for row, column in ((0.1, 0.1), (0.5, 0.5), (0.9, 0.2), (0.4, 0.95)):
        picture, y, x = torch.zeros(1, 1, height, width), int(row * height), int(column * width)
        picture[..., y, x] = 1.0
        square = letterbox(picture, 32)
        patches = torch.nn.functional.avg_pool2d(square, 8)[0, 0].numpy()
        hot = (patches == patches.max()).astype(float)
        shown = without_letterbox(hot, 32, height, width)
        assert shown.shape == (height, width)
        near = shown[max(y - height // 16, 0) : y + height // 16, max(x - width // 16, 0) : x + width // 16]
        assert near.max() == 1
        assert shown.mean() < 0.3


def test_attention_is_divided_by_what_the_tokens_stand_for():
    attention = np.arange(2 * 4 + 8 + 1 + 3, dtype=float)
    words = [Word("<bos>", 1), Word("faucet", 2), Word("newline", 1)]
    seen = divide(attention, ["front", "wrist"], 2, words, 8, 3)
    np.testing.assert_array_equal(seen.cameras["wrist"], [[4, 5], [6, 7]])
    assert seen.words == [("<bos>", 8.0), ("faucet", 9.0 + 10.0), ("newline", 11.0)]
    assert (seen.state_token, seen.actions) == (16.0, 17.0 + 18.0 + 19.0)


def test_attention_to_a_state_in_the_prompt_is_the_states():
    attention = np.arange(4 + 8 + 3, dtype=float)
    words = [Word("<bos>", 1), Word("State:", 2), Word("0 128", 3, is_state=True), Word("1 -1", 1, True)]
    seen = divide(attention, ["front"], 2, words, 8, 3)
    assert (seen.words, seen.state_words) == (
        [("<bos>", 4.0), ("State:", 5.0 + 6.0)],
        [("0 128", 7.0 + 8.0 + 9.0), ("1 -1", 10.0)],
    )
    assert dict(seen.shares())["state"] == 7.0 + 8.0 + 9.0 + 10.0
    assert (seen.state_token, seen.actions) == (0.0, 12.0 + 13.0 + 14.0)


@pytest.mark.parametrize(
    "prompt", ["open the door", " Rotate_the faucet counter-clockwise", "schnell öffnen!"]
)
def test_words_of_a_prompt_have_its_tokens(prompt):
    config = tiny_config()
    step = Pi0TokenizerStep("small", 48, config.vlm.vocab_size)
    words = step.words(prompt)
    assert sum(word.num_tokens for word in words) == len(step.encode(prompt))
    assert [word.text for word in words[1:-1]] == prompt.strip().replace("_", " ").split()
    short = Pi0TokenizerStep("small", 4, config.vlm.vocab_size).words(prompt)
    assert sum(word.num_tokens for word in short) == 4


@pytest.mark.parametrize(("tiny", "model"), [(of, of) for of in MODELS], indirect=["tiny"], ids=MODELS)
@pytest.mark.slow
def test_picture_is_drawn_and_shares_are_told(tiny, model, tmp_path, monkeypatch, capsys):
    flags = [*tiny, f"--output={tmp_path / 'a.png'}"]
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "attention", *flags, "--frame=3", "--head=1"])
    cli.main()
    said = capsys.readouterr().out
    assert "Episode 0, frame 3: open the faucet" in said
    assert "front " in said
    assert "'faucet" in said  # π0.5 writes a comma behind it
    assert ("'State:' " in said) == (model == "pi05")
    assert len(set(Image.open(tmp_path / "a.png").convert("RGB").get_flattened_data())) > 100
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "attention", *flags, "--frame=12"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "episode 0 has frames 0 to 11" in capsys.readouterr().err
