"""Raw batch → model batch → robot units, and the tokenizer that travels with the checkpoint."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from tiny_policy import (
    ACTION,
    CHUNK,
    FRONT,
    MODELS,
    STATE,
    batch,
    first,
    noise,
    raw_batch,
    statistics,
    tiny_config,
    tiny_policy,
)
from tokenizers import Tokenizer, models
from torch import Tensor

from lerobot_pi0.configuration_pi0 import TrainingData
from lerobot_pi0.data import training_data
from lerobot_pi0.errors import UserError
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.processor_pi0 import Pi0TokenizerStep, clean_prompt, load_tokenizer, unknown_instruction

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"
LONG = "pick up the red block and then put it to the left of the big green bowl near the small drawer " * 3


def processors(stats: dict | None = None, **changes: Any):
    return make_pre_post_processors(
        tiny_config(**changes), dataset_stats=statistics() if stats is None else stats
    )


def tokenizer_step(**changes: Any) -> Pi0TokenizerStep:
    settings: dict[str, Any] = {"tokenizer": "small", "max_length": 48, "vocab_size": 1024}
    return Pi0TokenizerStep(**settings | changes)


def decode(ids: list[int]) -> str:
    return load_tokenizer("small").decode(ids, skip_special_tokens=True)


def test_prompt_is_beginning_text_newline():
    ids = tokenizer_step().encode("open the door")
    assert ids[0] == load_tokenizer("small").token_to_id("<bos>") == 2
    assert decode(ids) == "open the door\n"


@pytest.mark.parametrize("prompt", ["open_the door", "  open the\ndoor \n"])
def test_prompt_is_cleaned_as_openpi_cleans_it(prompt):
    assert clean_prompt(prompt) == "open the door"
    assert tokenizer_step().encode(prompt) == tokenizer_step().encode("open the door")


def test_prompt_that_is_cut_is_quoted_once(caplog):
    step = tokenizer_step(max_length=10)
    with caplog.at_level(logging.WARNING):
        ids = step.encode(LONG)
        step.encode(LONG)
        step.encode("open the door")
    assert len(ids) == 10
    (record,) = caplog.records
    assert f"cut to 10 (--policy.tokenizer_max_length): {LONG!r}" in record.getMessage()


def test_batch_is_padded_on_the_right_to_the_longest_prompt():
    preprocess, _ = processors()
    found = preprocess(raw_batch(3))
    rows = [tokenizer_step().encode(task) for task in raw_batch(3)["task"]]
    assert found[TOKENS].shape == found[MASK].shape == (3, 8)
    assert found[MASK].dtype == torch.bool
    for row, tokens, mask in zip(rows, found[TOKENS].tolist(), found[MASK].tolist(), strict=True):
        assert tokens == row + [0] * (8 - len(row))
        assert mask == [True] * len(row) + [False] * (8 - len(row))


def test_prompts_of_one_length_are_as_long_as_they_are_and_have_no_mask():
    preprocess, _ = processors()
    raw = raw_batch(2) | {"task": ["open the door"] * 2}
    found, ids = preprocess(raw), tokenizer_step().encode("open the door")
    assert found[TOKENS].tolist() == [ids] * 2
    assert MASK not in found
    observation = tiny_policy().observation(found)
    assert observation.image_mask is observation.token_mask is None


def test_amount_of_padding_does_not_change_the_actions():
    """So a prompt may stand beside a longer one, or alone."""
    policy, preprocess = tiny_policy(), processors()[0]
    alone = policy.predict_action_chunk(preprocess(first(raw_batch())), noise=noise()[:1])
    beside = raw_batch(2)
    beside["task"][1] = LONG
    together = policy.predict_action_chunk(preprocess(beside), noise=noise())
    assert preprocess(beside)[TOKENS].shape[1] == 48
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", [None, [None, None], 3, []])
def test_missing_instruction_says_where_it_comes_from(task):
    with pytest.raises(ValueError, match=r"needs an instruction, but 'task' is .*--task="):
        processors()[0](raw_batch() | {"task": task})


def test_batch_without_a_task_says_where_it_comes_from():
    raw = raw_batch()
    del raw["task"]
    with pytest.raises(ValueError, match=r"needs an instruction"):
        processors()[0](raw)


def test_vocabulary_that_is_too_small_names_both_ways_out():
    with pytest.raises(
        ValueError, match=r"vocabulary has 300 entries: raise --policy.vlm.vocab_size.*--policy.tokenizer"
    ):
        tokenizer_step(vocab_size=300).encode("open the door")


def test_tokenizer_without_a_beginning_token_is_refused(tmp_path):
    Tokenizer(models.WordLevel({"open": 0, "\n": 1}, unk_token="open")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has no token '<bos>'"):
        tokenizer_step(tokenizer=str(tmp_path)).encode("open")


def test_gated_default_tokenizer_offline_names_the_ways_out():
    with pytest.raises(
        OSError, match=r"google/paligemma-3b-pt-224' cannot be downloaded: it is not in the local cache"
    ) as error:
        processors(tokenizer="google/paligemma-3b-pt-224")
    for way in ("hf auth login", "--policy.tokenizer=FOLDER", "--policy.path=", "--policy.tokenizer=small"):
        assert way in str(error.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [(GatedRepoError, "licence has to be accepted"), (RemoteEntryNotFoundError, "no such file")],
)
def test_hub_error_for_the_tokenizer_is_told_apart(monkeypatch, error, message):
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/me/tokens"))

    def fail(*_: Any) -> str:
        raise error("no such file", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OSError, match=f"me/tokens' cannot be downloaded: .*{message}.*Ways out"):
        load_tokenizer("me/tokens")


def test_tokenizer_may_be_a_folder_or_a_file(tmp_path):
    load_tokenizer("small").save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(name)).to_str() == load_tokenizer("small").to_str()


def test_tokenizer_travels_in_the_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    load_tokenizer("small").save(str(tmp_path / "tokens" / "tokenizer.json"))
    preprocess, postprocess = processors(tokenizer=str(tmp_path / "tokens"))
    wanted = preprocess(raw_batch())[TOKENS]
    preprocess.save_pretrained(tmp_path / "saved")
    postprocess.save_pretrained(tmp_path / "saved")
    (tmp_path / "tokens" / "tokenizer.json").unlink()

    def fail(*_: Any) -> None:
        raise AssertionError("a saved pipeline asks for no tokenizer")

    monkeypatch.setattr("lerobot_pi0.processor_pi0.load_tokenizer", fail)
    again, _ = make_pre_post_processors(tiny_config(), pretrained_path=str(tmp_path / "saved"))
    assert torch.equal(again(raw_batch())[TOKENS], wanted)


def standard_names(pipeline: PolicyProcessorPipeline) -> list[str]:
    return [getattr(type(step), "_registry_name", type(step).__name__) for step in pipeline.steps]


def test_standard_steps_stand_under_their_standard_names():
    preprocess, postprocess = processors()
    assert standard_names(preprocess) == [
        "rename_observations_processor",
        "to_batch_processor",
        "lerobot_pi0_tokenizer",
        "device_processor",
        "normalizer_processor",
    ]
    assert standard_names(postprocess) == ["unnormalizer_processor", "device_processor"]


def test_lerobots_overrides_find_their_steps(tmp_path):
    """Those of lerobot-train, -eval and -rollout. An override without a step is an error there."""
    for pipeline in processors():
        pipeline.save_pretrained(tmp_path)
    stats = statistics()
    stats["action"]["mean"] += 100
    features = {**(tiny_config().input_features or {}), **(tiny_config().output_features or {})}
    norm_map = tiny_config().normalization_mapping
    preprocess, postprocess = make_pre_post_processors(
        tiny_config(),
        pretrained_path=str(tmp_path),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": {"observation.images.cam0": FRONT}},
            "normalizer_processor": {"stats": stats, "features": features, "norm_map": norm_map},
        },
        postprocessor_overrides={
            "unnormalizer_processor": {"stats": stats, "features": features, "norm_map": norm_map}
        },
    )
    raw = raw_batch()
    raw["observation.images.cam0"] = raw.pop(FRONT)
    assert FRONT in preprocess(raw)
    torch.testing.assert_close(postprocess(torch.zeros(1, ACTION))[0], stats["action"]["mean"])


@pytest.mark.parametrize("shape", [(2, ACTION), (2, CHUNK, ACTION)])
def test_postprocessor_takes_single_actions_and_chunks(shape):
    _, postprocess = processors()
    found = postprocess(torch.ones(shape))
    torch.testing.assert_close(
        found, (statistics()["action"]["mean"] + statistics()["action"]["std"]).expand(shape)
    )


def test_actions_come_back_from_normalization():
    preprocess, postprocess = processors()
    raw = raw_batch()
    torch.testing.assert_close(postprocess(preprocess(raw)["action"]), raw["action"], atol=1e-6, rtol=1e-6)


def test_one_observation_is_a_batch_of_one():
    """As a robot gives it: no batch dimension, the task a string."""
    raw = {FRONT: raw_batch(1)[FRONT][0], "observation.state": raw_batch(1)["observation.state"][0]}
    found = processors()[0](raw | {"task": "open the door"})
    assert found["observation.state"].shape == (1, STATE)
    assert found[FRONT].shape == (1, 3, 48, 64)
    assert torch.equal(found[TOKENS], processors()[0](raw_batch(1))[TOKENS])


def test_what_the_loss_needs_passes_through():
    found = batch(2)
    assert found["index"].tolist() == [0, 1]
    assert found["action_is_pad"].shape == (2, CHUNK)


@pytest.mark.parametrize("squared", [False, True])
def test_uint8_and_float_images_give_the_same_observation(squared):
    size = (32, 32) if squared else (48, 64)
    levels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    policy, preprocess = tiny_policy(), processors()[0]

    def images(image: Tensor) -> Tensor:
        return policy.observation(preprocess(raw_batch() | {FRONT: image})).images

    torch.testing.assert_close(images(levels), images(levels.float() / 255), atol=1e-6, rtol=0)
    assert images(levels).shape == (2, 1, 3, 32, 32)
    assert images(levels).min() >= -1
    assert images(levels).max() <= 1


def test_pipelines_without_statistics_say_so(caplog):
    with caplog.at_level(logging.WARNING):
        make_pre_post_processors(tiny_config())
    assert "no statistics: state and actions pass as they are" in caplog.text


def test_small_tokenizer_ships_with_the_package():
    import lerobot_pi0

    assert (Path(lerobot_pi0.__file__).parent / "tokenizers" / "small.json").is_file()
    assert load_tokenizer("small").get_vocab_size() <= 1024


def test_an_instruction_that_is_not_of_the_training_data_is_told_once_with_the_nearest(caplog):
    data = TrainingData(30.0, ["open the door", "close the_drawer"])
    policy = tiny_policy(training_data=data)
    caplog.clear()
    for _ in range(2):
        policy.predict_action_chunk(batch(3))  # "open the door", "close the drawer", "push"
    # LeRobot's own set-up of logging, of another test in this process, may let INFO through.
    (message,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the instruction 'push' is none of the training data's" in message
    assert "'open the door'" in message


def test_no_instruction_is_told_unless_the_policy_was_trained_without(caplog):
    data = TrainingData(30.0, ["open the door"])
    caplog.clear()
    for dropout in (0.1, 0.0):
        policy = tiny_policy(training_data=data, prompt_dropout=dropout)
        for task in ([""], "", None):
            policy.predict_action_chunk(batch(1) | {"task": task})
    messages = [message for message in caplog.messages if "instruction" in message]
    assert messages == ["there is no instruction, and the policy was not trained without one"]


def test_of_unknown_training_data_no_instruction_is_unknown():
    assert unknown_instruction("push", TrainingData(30.0, [])) is None
    many = TrainingData(30.0, [f"task {i}" for i in range(10)])
    assert "and 7 others" in (unknown_instruction("push", many) or "")


def test_what_a_policy_was_trained_on_is_saved_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "read_columns", lambda *_, **__: {})
    meta: Any = SimpleNamespace(stats=statistics(), fps=15, tasks=pd.DataFrame(index=["push", "pull"]))
    policy = Pi0Policy(tiny_config(), statistics(), meta)
    policy.save_pretrained(tmp_path)
    assert Pi0Policy.from_pretrained(tmp_path).config.training_data == TrainingData(15.0, ["push", "pull"])


def test_a_tokenizer_that_cannot_be_had_is_told_before_the_weights_are_looked_for(tmp_path):
    config = tiny_config(tokenizer="google/paligemma-3b-pt-224")
    meta: Any = SimpleNamespace(stats=statistics())
    with pytest.raises(OSError, match=r"tokenizer 'google/paligemma-3b-pt-224'"):
        Pi0Policy.from_pretrained(tmp_path, config=config, dataset_stats=statistics(), dataset_meta=meta)


def test_an_instruction_without_end_is_cut_in_the_text_too_and_shown_in_part(caplog):
    policy = tiny_policy(training_data=TrainingData(30.0, ["push"]))
    preprocess, _ = make_pre_post_processors(policy.config)
    raw = {key: value for key, value in raw_batch(1).items() if key in (FRONT, "observation.state")}
    long = "\x1b[2J" + "word " * 400_000
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        policy.predict_action_chunk(preprocess(raw | {"task": [long]}))
    assert "is cut to 48" in caplog.text
    assert "is none of the training data's" in caplog.text
    assert "\x1b" not in caplog.text
    assert len(caplog.text) < 2000


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_whole_numbers_are_normalized_as_floats_are(dtype):
    raw = raw_batch()
    for key in ("observation.state", "action"):
        raw[key] = (20 + 3 * raw[key]).round()
    preprocess, _ = make_pre_post_processors(tiny_config(), dataset_stats=statistics())
    wanted = preprocess(raw)
    found = preprocess(raw | {key: raw[key].to(dtype) for key in ("observation.state", "action")})
    for key in ("observation.state", "action"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize("value", [[0.0] * STATE, np.zeros(STATE, np.float32)], ids=["list", "numpy"])
def test_a_state_that_is_no_tensor_is_refused_by_name(value):
    preprocess, _ = make_pre_post_processors(tiny_config(), dataset_stats=statistics())
    with pytest.raises(UserError, match=r"'observation\.state' is a (list|ndarray).*torch\.as_tensor"):
        preprocess(raw_batch(1) | {"observation.state": value})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, STATE - 1, STATE + 1])
def test_a_state_of_another_size_is_refused_and_not_broadcast(model, size):
    preprocess, _ = make_pre_post_processors(tiny_config(model), dataset_stats=statistics())
    with pytest.raises(UserError, match=f"has {size} numbers, and the policy was trained with {STATE}"):
        preprocess(raw_batch(1) | {"observation.state": torch.zeros(1, size)})
