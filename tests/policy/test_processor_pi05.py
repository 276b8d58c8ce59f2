"""The prompts of π0.5: openpi's text and bins, the state normalized first, what is cut or dropped."""

import json
import logging
from ast import literal_eval
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from tiny_policy import MODELS, STATE, VLM, batch, raw_batch, statistics, tiny_config, tiny_policy
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lerobot_pi0.data.action_space import ActionSpace
from lerobot_pi0.data.relative_actions import reference_state_of
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.errors import UserError
from lerobot_pi0.processor_pi0 import LANGUAGE, WITHOUT_TASK, load_tokenizer
from lerobot_pi0.processor_pi05 import Pi05TokenizerStep, state_bins

TOKENS, MASK = LANGUAGE
GOLDEN = Path(__file__).parent.parent / "golden_pi05"
PROMPTS = json.loads((GOLDEN / "golden_prompts.json").read_text())
TEXTS = json.loads((GOLDEN / "golden_transforms_text.json").read_text())
HORIZONS = {"pi05_libero": 10, "pi05_droid": 15, "pi05_full_droid_finetune": 16, "pi05_aloha": 50}
RELATIVE = {"pi05_full_droid_finetune": range(7), "pi05_aloha": [*range(6), *range(7, 13)]}


@pytest.fixture(scope="module")
def transforms() -> dict[str, Any]:
    return dict(np.load(GOLDEN / "golden_transforms.npz"))


@pytest.fixture
def stand_in(tmp_path) -> str:
    """The tokenizer of the golden prompts: 2 for the beginning, 1000 + code point for each character."""
    characters = {chr(code): 1000 + code for code in range(256)}
    tokenizer = Tokenizer(WordLevel({"<bos>": 2} | characters, "<bos>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def step(tokenizer: str = "small", max_length: int = 200, state_in_prompt: bool = True) -> Pi05TokenizerStep:
    return Pi05TokenizerStep(tokenizer, max_length, 2000, state_in_prompt=state_in_prompt)


@pytest.mark.parametrize("record", PROMPTS, ids=lambda record: f"{record['prompt'][:20]}-{record['max_len']}")
def test_prompt_is_openpis(stand_in, record):
    state = record["state"]
    if state is not None:
        state = torch.tensor(state, dtype=getattr(torch, record["state_dtype"]))
    tokenize = step(stand_in, record["max_len"], state is not None)
    assert tokenize.prompt(record["prompt"], state).parts == tuple(text for text, _ in record["encode_calls"])
    ids, mask = np.array(record["ids"]), np.array(record["mask"])
    assert tokenize.encode(record["prompt"], state) == ids[mask].tolist()


def test_bins_are_openpis(transforms):
    for kind in ("f64", "f32"):
        values = torch.from_numpy(transforms[f"digitize_values_{kind}"])
        assert state_bins(values).tolist() == transforms[f"digitize_bins_{kind}"].tolist()
    rounded = torch.from_numpy(transforms["digitize_values_f32"]).bfloat16()
    assert state_bins(rounded).tolist() == transforms["digitize_bins_bf16_input"].tolist()
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert state_bins(infinite).tolist() == transforms["digitize_nan_inf"][1:].tolist()


def test_a_state_that_is_nan_is_refused_by_its_dimension():
    """openpi writes 255."""
    with pytest.raises(UserError, match=r"is NaN in dimension 2"):
        state_bins(torch.tensor([0.0, 1.0, torch.nan]))


def golden_of(name: str, transforms: dict[str, Any]) -> dict[str, Any]:
    return {
        key.removeprefix(f"{name}/"): value for key, value in transforms.items() if key.startswith(f"{name}/")
    }


@pytest.mark.parametrize("name", HORIZONS)
def test_prompt_of_each_config_is_openpis(name, stand_in, transforms):
    of = golden_of(name, transforms)
    state = torch.from_numpy(of["state"][: len(of["stats_state_q01"])])
    tokenize = step(stand_in, state_in_prompt=name != "pi05_libero")
    assert tokenize.prompt(TEXTS[name]["prompt"], state).text == TEXTS[name]["text"]


@pytest.mark.parametrize("name", HORIZONS)
def test_whole_chain_of_a_config_is_openpis(name, stand_in, transforms):
    """ALOHA's joints, normalize, write the prompt, relative actions; and back to the robot."""
    of = golden_of(name, transforms)
    statistics = {
        feature: {statistic: of[f"stats_{theirs}_{statistic}"] for statistic in ("mean", "std", "q01", "q99")}
        for feature, theirs in (("observation.state", "state"), ("action", "actions"))
    }
    raw = [value for key, value in of.items() if key.startswith(("raw_observation", "raw_state"))]
    raw_state = np.concatenate(raw)
    actions = of["raw_actions"].shape[1]
    config = tiny_config(
        "pi05",
        state_in_prompt=name != "pi05_libero",
        adapt_to_pi=name == "pi05_aloha",
        chunk_size=HORIZONS[name],
        max_action_dim=32,
        vlm=replace(VLM, vocab_size=2000),
        tokenizer=stand_in,
        input_features={
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
            "observation.state": PolicyFeature(FeatureType.STATE, (len(raw_state),)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (actions,))},
    )
    prepared = prepare_statistics(replace(config, adapt_to_pi=False), statistics)  # openpi's joints' already
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=prepared)
    if relative := RELATIVE.get(name):
        config.reference_state = reference_state_of(config, prepared, [(i, i) for i in relative])
    space = ActionSpace(config)
    batch = preprocess(
        {
            "observation.state": torch.from_numpy(raw_state),
            "action": torch.from_numpy(of["raw_actions"])[None],
            "task": TEXTS[name]["prompt"],
        }
    )
    mask = batch.get(MASK, torch.ones_like(batch[TOKENS], dtype=torch.bool))[0]  # none: not padded
    assert batch[TOKENS][0][mask].tolist() == of["tokenized_prompt"][of["tokenized_prompt_mask"]].tolist()
    np.testing.assert_allclose(batch["observation.state"][0], of["state"][: len(raw_state)], atol=1e-6)
    reference = space.reference(batch["observation.state"])
    np.testing.assert_allclose(space.to_network(batch, reference)[0], of["actions"], atol=2e-6)
    predicted = space.from_network(torch.from_numpy(of["pred_actions"])[None], reference)
    np.testing.assert_allclose(postprocess(predicted)[0], of["out_actions"], atol=2e-6)


def processors(**changes: Any):
    return make_pre_post_processors(tiny_config("pi05", **changes), dataset_stats=statistics())


def test_the_state_is_normalized_before_it_is_written():
    """The statistics' ends are -1 and 1: bins 0 and 255."""
    raw, ends = raw_batch(), statistics()["observation.state"]
    raw["observation.state"] = torch.stack((ends["q01"], ends["q99"]))
    tokens, mask = (processors()[0](raw)[key] for key in (TOKENS, MASK))
    for row, kept, task, number in zip(tokens, mask, raw["task"], (0, 255), strict=True):
        text = f"Task: {task}, State: {' '.join([str(number)] * STATE)};\nAction: "
        assert load_tokenizer("small").decode(row[kept].tolist()) == text


def test_prompts_are_padded_to_the_longest_of_the_batch():
    tokens, mask = (processors()[0](raw_batch())[key] for key in (TOKENS, MASK))
    assert tokens.shape == mask.shape
    assert tokens.shape[1] % 8 == 0
    assert tokens.shape[1] - mask.sum(1).max() < 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_whole_numbers_are_normalized_as_floats_are(dtype):
    raw = raw_batch()
    for key in ("observation.state", "action"):
        raw[key] = (20 + 3 * raw[key]).round()
    wanted = processors()[0](raw)
    found = processors()[0](raw | {key: raw[key].to(dtype) for key in ("observation.state", "action")})
    for key in ("observation.state", "action", TOKENS):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0)


def test_a_longer_prompt_loses_its_end_and_says_so_once(caplog):
    tokenize, state = step(max_length=30), torch.zeros(40)
    with caplog.at_level(logging.WARNING):
        ids = tokenize.encode("open the door", state)
        tokenize.encode("open the door", state + 0.5)
    assert len(ids) == 30
    (message,) = caplog.messages
    assert "cut to 30 (--policy.tokenizer_max_length): 'open the door'. It loses its end, '" in message
    assert "128 128" in message.partition("loses its end")[2]
    kept = load_tokenizer("small").decode(ids)
    lost = literal_eval(message.partition("loses its end, ")[2].partition("…")[0])
    assert tokenize.prompt("open the door", state).text.startswith(kept + lost[:20])


def test_a_batch_without_state_is_refused_unless_the_prompt_has_none():
    raw = raw_batch()
    del raw["observation.state"]
    with pytest.raises(UserError, match=r"needs the state for its prompt.*\(2, dims\), got None"):
        processors()[0](raw)
    assert processors(state_in_prompt=False)[0](raw)[TOKENS].shape == (2, 5)


def test_prompt_without_state_is_that_of_pi0():
    observed = {key: value for key, value in raw_batch().items() if key != "action"}
    found = processors(state_in_prompt=False)[0](observed)
    assert torch.equal(found[TOKENS], batch()[TOKENS])
    assert MASK not in found | batch()  # of one length, and few lengths there are


def test_words_of_a_prompt_have_its_tokens_and_know_the_states_numbers():
    tokenize, state = step(), torch.tensor([-1.0, -2.0, 0.0])
    words = tokenize.words("open the door", state)
    assert sum(word.num_tokens for word in words) == len(tokenize.encode("open the door", state))
    assert [word.text for word in words if word.is_state] == ["0", "-1", "128"]
    assert [word.text for word in words if not word.is_state] == (
        ["<bos>", "Task:", "open", "the", "door,", "State:", "newline", "Action:"]
    )


@pytest.mark.parametrize("tasks", [["open the door", "close it"], ["push", "push"], ["", ""]])
@pytest.mark.parametrize("model", MODELS)
def test_dropout_leaves_the_prompt_of_an_empty_instruction(model, tasks):
    """The state of π0.5 stays, and at run time an empty instruction gives the same tokens."""
    preprocess, _ = make_pre_post_processors(tiny_config(model), dataset_stats=statistics())
    raw = raw_batch() | {"task": tasks}
    without = preprocess(raw | {"task": ["", ""]})
    without.setdefault(MASK, torch.ones_like(without[TOKENS], dtype=torch.bool))
    given = preprocess(raw)
    length = without[TOKENS].shape[1]
    for key, bare in zip((TOKENS, MASK), WITHOUT_TASK, strict=True):
        assert torch.equal(given[bare][:, :length], without[key])
        assert not given[bare][:, length:].any()
    observed = {key: value for key, value in raw.items() if key != "action"}
    assert not set(WITHOUT_TASK) & preprocess(observed).keys()  # running a policy needs none
    policy = tiny_policy(model, prompt_dropout=0.999999, augmentation=False).train()
    loss, _ = policy.forward(given)
    wanted, _ = tiny_policy(model, augmentation=False).train().forward(without)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)


def test_pipelines_come_back_from_a_checkpoint(tmp_path):
    for pipeline in processors():
        pipeline.save_pretrained(tmp_path)
    config = tiny_config("pi05", tokenizer="nowhere/to-be-found")
    again, _ = make_pre_post_processors(config, pretrained_path=str(tmp_path))
    wanted, found = processors()[0](raw_batch()), again(raw_batch())
    assert torch.equal(found[TOKENS], wanted[TOKENS])
