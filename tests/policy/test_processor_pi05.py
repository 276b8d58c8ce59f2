"""The prompts of π0.5: openpi's text and bins, the state normalized first, what is cut or dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lerobot_pi0.errors import UserError
from lerobot_pi0.processor_pi05 import Pi05TokenizerStep, state_bins

GOLDEN = Path(__file__).parent.parent / "golden_pi05"
PROMPTS = json.loads((GOLDEN / "golden_prompts.json").read_text())
TEXTS = json.loads((GOLDEN / "golden_transforms_text.json").read_text())
HORIZONS = {"pi05_libero": 10, "pi05_droid": 15, "pi05_full_droid_finetune": 16, "pi05_aloha": 50}


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
    return Pi05TokenizerStep(tokenizer, max_length, 2000, state_in_prompt)


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
