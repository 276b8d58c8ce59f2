"""What happens to data before and after the network, against openpi's transforms (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lerobot_pi0 import Pi0Config, Pi0Policy
from lerobot_pi0.data.normalization import FLOOR, NEARLY_CONSTANT
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig
from lerobot_pi0.processor_pi0 import (
    Pi0TokenizerStep,
    clean_prompt,
    make_lerobot_pi0_pre_post_processors,
)

CASES = ("a_480x640", "b_240x320", "c_300x300", "d_333x201", "e_100x121")
FLOAT32 = 2.0**-23
PROMPTS = json.loads((Path(__file__).parent.parent / "golden" / "golden_prompts.json").read_text())


@pytest.fixture
def device() -> str:
    """Of the processors, wherever the network runs."""
    return "cpu"


def config(state_dim: int = 8, action_dim: int = 8, mode: NormalizationMode = NormalizationMode.MEAN_STD):
    return Pi0Config(
        vision=SiglipConfig(image_size=224, patch_size=112, width=8, depth=1, mlp_dim=8, num_heads=1),
        vlm=GemmaConfig(width=8, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8),
        expert=ExpertConfig(width=8, mlp_dim=8),
        chunk_size=6,
        n_action_steps=6,
        tokenizer="small",
        device="cpu",
        normalization_mapping={"VISUAL": NormalizationMode.IDENTITY, "STATE": mode, "ACTION": mode},
        input_features={
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)),
            "observation.state": PolicyFeature(FeatureType.STATE, (state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
    )


def batch_of(images=None, state=None):
    """A processed batch of one camera: (n, h, w, 3) images and (n, dims) states."""
    images = torch.zeros(1, 224, 224, 3) if images is None else images
    return {
        "observation.images.front": images.permute(0, 3, 1, 2),
        "observation.state": torch.zeros(len(images), 8) if state is None else state,
        "observation.language.tokens": torch.zeros(len(images), 8, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(len(images), 8, dtype=torch.bool),
    }


@pytest.fixture
def to_model_images():
    """(n, h, w, 3) uint8 → what the policy hands to the network, (n, 3, 224, 224)."""
    policy = Pi0Policy(config())
    return lambda images: policy.observation(batch_of(images)).images[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_letterbox_is_within_one_level_of_pillows(golden, to_model_images, case):
    images = golden("images.npz")
    levels = (to_model_images(images[f"in/{case}"][None])[0] + 1) / 2 * 255
    difference = (levels.permute(1, 2, 0) - images[f"pil/{case}"].float()).abs()
    # Pillow rounds to whole levels, after the rows and again after the columns; ours stays a float.
    assert difference.max() <= 1
    assert difference.mean() < 0.25


@pytest.mark.parametrize("case", CASES)
def test_letterbox_puts_black_where_openpi_does(golden, to_model_images, case):
    white = torch.full_like(golden("images.npz")[f"in/{case}"], 255)
    top, bottom, left, right = golden("aux.json")["resize_nonblack_box"][case]["pil"]
    expected = torch.full((3, 224, 224), -1.0)
    expected[:, top:bottom, left:right] = 1
    assert (to_model_images(white[None])[0] - expected).abs().max() < 1e-5


def test_uint8_becomes_the_models_float_exactly(golden, to_model_images):
    levels = torch.arange(256, dtype=torch.uint8)
    image = levels.repeat(1, 224 * 224 * 3 // 256).view(1, 224, 224, 3)
    expected = golden("images.npz")["uint8_to_model_float"][image.long()]
    assert torch.equal(to_model_images(image), expected.permute(0, 3, 1, 2))


@pytest.fixture
def stand_in_tokenizer(tmp_path):
    """The tokenizer of the golden prompts: 2 for the beginning, 1000 + code point for each character."""
    tokenizer = Tokenizer(WordLevel({"<bos>": 2} | {chr(code): 1000 + code for code in range(128)}, "<bos>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Pi0TokenizerStep(str(tmp_path), max_length=20, vocab_size=2000)


def tokenized(step, prompts):
    observation = step({TransitionKey.COMPLEMENTARY_DATA: {"task": prompts}})[TransitionKey.OBSERVATION]
    tokens = observation["observation.language.tokens"]
    return tokens, observation.get("observation.language.attention_mask", torch.ones_like(tokens).bool())


@pytest.mark.parametrize("record", PROMPTS, ids=lambda record: repr(record["prompt"]))
def test_prompt_is_cleaned_encoded_and_cut_as_in_openpi(stand_in_tokenizer, record):
    expected, real = torch.tensor(record["ids_max_len_20"]), torch.tensor(record["mask_max_len_20"])
    assert clean_prompt(record["prompt"]) == record["cleaned"]
    (ids,), (mask,) = tokenized(stand_in_tokenizer, [record["prompt"]])
    assert torch.equal(ids[mask], expected[real])
    assert not mask[real.sum() :].any()  # padding is on the right
    assert not ids[~mask].any()  # of id 0, as openpi's


def test_prompts_of_a_batch_are_padded_alike(stand_in_tokenizer):
    ids, mask = tokenized(stand_in_tokenizer, [record["prompt"] for record in PROMPTS])
    assert torch.equal(ids, torch.tensor([record["ids_max_len_20"] for record in PROMPTS]))
    assert torch.equal(mask, torch.tensor([record["mask_max_len_20"] for record in PROMPTS]))


def processors(golden, mode, dims=8):
    stored = golden("transforms.npz")
    statistics = {name: stored[name][:dims].numpy() for name in ("mean", "std", "q01", "q99")}
    return make_lerobot_pi0_pre_post_processors(
        config(dims, dims, mode), {"observation.state": statistics, "action": statistics}
    )


def normalized(golden, mode, dims=8):
    """State and actions of the golden file as the preprocessor hands them to the policy."""
    stored = golden("transforms.npz")
    batch = processors(golden, mode, dims)[0](
        {
            "observation.state": stored["state"][None, :dims],
            "action": stored["actions"][None, :, :dims],
            "task": ["a"],
        }
    )
    return batch["observation.state"][0], batch["action"][0]


MODES = {"z": NormalizationMode.MEAN_STD, "q": NormalizationMode.QUANTILES}


@pytest.mark.parametrize("form", MODES)
@pytest.mark.parametrize(("dims", "suffix"), [(8, ""), (5, "_first5")])
def test_normalization_but_for_the_floor_under_near_constant_dimensions(golden, form, dims, suffix):
    stored = golden("transforms.npz")
    for ours, name in zip(normalized(golden, MODES[form], dims), ("state", "actions"), strict=True):
        expected = stored[f"{form}_norm_{name}{suffix}"]
        # openpi computes in float64, LeRobot in float32: roundings of the value, the statistics and their
        # difference are divided by a spread of as little as 1e-6.
        low, high, scale = ("mean", "std", 1) if form == "z" else ("q01", "q99", 2)
        low, high = stored[low][:dims], stored[high][:dims]
        spread = (high if form == "z" else high - low) + 1e-6
        # openpi has no floor: what hardly moves it divides by as little as 1e-6.
        floored = torch.where(spread < NEARLY_CONSTANT, spread / FLOOR, 1).double()
        expected = expected * floored if form == "z" else (expected + 1) * floored - 1
        size = stored[name].double()[..., :dims].abs() + low.abs() + high.abs()
        rounding = 2 * FLOAT32 * size / spread * floored * (scale + expected.abs()) + 1e-6
        assert ours.dtype == torch.float32
        assert ((ours.double() - expected).abs() <= rounding).all()
        moving = spread > 1e-2  # the dimensions that a robot really moves: no worse than float32 itself
        assert (ours.double() - expected).abs()[..., moving].max() < 1e-5


def assert_unnormalized_as_in_openpi(golden, form, ours, expected, normalized_actions):
    stored = golden("transforms.npz")
    low, high = (stored[name] for name in (("mean", "std") if form == "z" else ("q01", "q99")))
    rounding = 2 * FLOAT32 * (low.abs() + high.abs() * (1 + normalized_actions.double().abs()))
    moving = (high if form == "z" else high - low) >= NEARLY_CONSTANT
    assert ((ours.double() - expected).abs() <= rounding)[..., moving].all()


@pytest.mark.parametrize("form", MODES)
def test_unnormalization_of_predicted_actions(golden, form):
    stored = golden("transforms.npz")
    predicted = stored["pred_actions_32"][:, :8]
    ours = processors(golden, MODES[form])[1](predicted.clone())
    expected = stored[f"{form}_unnorm_pred_actions_32"][:, :8]
    assert_unnormalized_as_in_openpi(golden, form, ours, expected, predicted)


@pytest.mark.parametrize("form", MODES)
def test_normalized_actions_come_back_in_robot_units(golden, form):
    _, actions = normalized(golden, MODES[form])
    ours = processors(golden, MODES[form])[1](actions.clone())
    expected = golden("transforms.npz")[f"{form}_roundtrip_actions"]
    assert_unnormalized_as_in_openpi(golden, form, ours, expected, actions)


def test_state_is_padded_with_zeros(golden):
    stored = golden("transforms.npz")
    observation = Pi0Policy(config()).observation(batch_of(state=stored["delta_state"][None]))
    assert torch.equal(observation.state[0], stored["pad_state_32"])


def test_actions_are_padded_with_zeros(golden, monkeypatch):
    stored = golden("transforms.npz")
    policy, seen = Pi0Policy(config(action_dim=7)), []

    def loss(observation, actions, noise, time, prefix):
        seen.append(actions)
        return torch.zeros_like(noise)

    monkeypatch.setattr(policy.model, "loss", loss)
    policy.forward(batch_of() | {"action": stored["delta_in_actions"][None]})
    assert torch.equal(seen[0][0], stored["pad_actions_32"])
