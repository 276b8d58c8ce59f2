"""Prefix caches: the same gradients without the vision-language model, and nothing that is stale."""

import json
import logging
import multiprocessing
import shutil
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, WeakFileLock, filter_repo_objects
from tiny_policy import CHUNK, FRONT, STATE, tiny_policy
from torch import Tensor

from lerobot_pi0.model import Observation, Pi0
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.prefix_cache import FOLDER, PrefixCache, fingerprint, open_prefix_cache

FRAMES = 6


def policy(**changes: Any) -> Pi0Policy:
    return tiny_policy(**{"freeze": "vlm", "dtype": "bfloat16"} | changes)


def dataset(root: Path, **changes: Any) -> Any:
    """What the cache reads of a dataset's metadata."""
    known = {"root": root, "repo_id": "local/doors", "revision": "v3.0", "total_frames": FRAMES}
    return SimpleNamespace(**known | changes)


def open_cache(of: Pi0Policy, root: Path, **changes: Any) -> PrefixCache:
    return open_prefix_cache(of.config, of.model, dataset(root, **changes))


TOKEN_MASK = torch.arange(16) < torch.tensor([5, 11, 3])[:, None]
TOKENS = torch.arange(100, 148).view(3, 16) * TOKEN_MASK


def frames(of: Pi0Policy, *index: int) -> tuple[Observation, Tensor]:
    """The dataset's frames, with three instructions in turn: batches differ in how far prompts are padded."""
    images = [torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(frame)) for frame in index]
    task = torch.tensor(index) % 3
    length = 8 * -(-int(TOKEN_MASK[task].sum(1).max()) // 8)
    processed = {
        FRONT: torch.stack(images),
        "observation.state": torch.stack([image[0, 0, :STATE] for image in images]),
        "observation.language.tokens": TOKENS[task, :length],
        "observation.language.attention_mask": TOKEN_MASK[task, :length],
    }
    return of.observation(processed), torch.tensor(index)


def valid(cache: Cache) -> list[Tensor]:
    """Keys and values of real tokens: those of others are never read."""
    return [x.transpose(1, 2)[cache.mask] for layer in cache.layers for x in layer]


def never(observation: Observation) -> Cache:
    raise AssertionError("the vision-language model was run")


def expert_gradients(model: Pi0, observation: Observation, prefix: Cache) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = len(observation.state)
    actions, noise = (torch.randn(size, CHUNK, 8, generator=generator) for _ in range(2))
    model.zero_grad()
    model.loss(observation, actions, noise, torch.linspace(0.2, 0.8, size), prefix=prefix).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_with_the_cache_are_those_without_it_bit_for_bit(tmp_path):
    trained = policy().train()
    model = trained.model
    for _epoch in range(2):
        cache = open_cache(trained, tmp_path)
        for index in ((0, 1, 2), (3, 4, 5)):
            observation, frame = frames(trained, *index)
            with torch.no_grad():
                computed = model.prefix(observation)
            wanted = expert_gradients(model, observation, computed)
            found = expert_gradients(model, observation, cache.lookup(observation, frame, model.prefix))
            assert len(wanted) == len(found) > 10
            for a, b in zip(wanted, found, strict=True):
                assert a.abs().max() > 0
                assert torch.equal(a, b)


def test_in_the_second_epoch_the_vision_language_model_is_not_run(tmp_path):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    for index in ((0, 1), (2, 3), (4, 5)):
        cache.lookup(*frames(trained, *index), trained.model.prefix)
    for index in ((5, 0, 3), (2, 1, 4)):
        observation, frame = frames(trained, *index)
        found = open_cache(trained, tmp_path).lookup(observation, frame, never)
        computed = trained.model.prefix(observation)
        assert torch.equal(found.mask, computed.mask)
        for a, b in zip(found.layers, computed.layers, strict=True):
            assert [x.shape for x in a] == [x.shape for x in b]
            assert all(x.dtype == torch.bfloat16 and not x.requires_grad for x in a)


def test_only_frames_that_are_not_stored_are_computed(tmp_path):
    trained = policy()
    cache, computed = open_cache(trained, tmp_path), []

    def compute(observation: Observation) -> Cache:
        computed.append(len(observation.images))
        return trained.model.prefix(observation)

    for index in ((0, 1), (1, 2, 3), (0, 3)):
        cache.lookup(*frames(trained, *index), compute)
    assert computed == [2, 2]


def test_prefixes_are_computed_without_a_graph(tmp_path):
    trained, graphs = policy(), []

    def compute(observation: Observation) -> Cache:
        graphs.append(torch.is_grad_enabled())
        return trained.model.prefix(observation)

    open_cache(trained, tmp_path).lookup(*frames(trained, 0), compute)
    assert graphs == [False]


def test_a_frame_is_the_same_in_whatever_batch_it_stands(tmp_path):
    """Prompts are padded to the batch's longest, records are not."""
    trained = policy()
    cache = open_cache(trained, tmp_path)
    everything = cache.lookup(*frames(trained, *range(FRAMES)), trained.model.prefix)
    observation, frame = frames(trained, 2)
    alone = cache.lookup(observation, frame, never)
    assert alone.mask.shape[1] <= everything.mask.shape[1]
    real = int(alone.mask.sum())
    for together, single in zip(everything.layers, alone.layers, strict=True):
        for x, y in zip(together, single, strict=True):
            assert torch.equal(x[2, :, :real], y[0, :, :real])


def test_float32_prefixes_are_stored_in_16_bits_and_float16_is_the_closer_one(tmp_path):
    trained = policy(dtype="float32")
    observation, frame = frames(trained, 0, 1, 2)
    exact = trained.model.prefix(observation)
    found = open_cache(trained, tmp_path).lookup(observation, frame, trained.model.prefix)
    for a, b in zip(valid(found), valid(exact), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 2**-11 * b.abs().max()
        assert (b.bfloat16() - b).abs().max() > (a - b).abs().max()


def test_values_beyond_the_stored_range_are_refused(tmp_path):
    trained = policy(dtype="float32")
    observation, frame = frames(trained, 0)

    def huge(observation: Observation) -> Cache:
        prefix = trained.model.prefix(observation)
        return Cache([(k * 1e6, v) for k, v in prefix.layers], prefix.mask)

    cache = open_cache(trained, tmp_path)
    with pytest.raises(ValueError, match=r"not finite as torch.float16.*--policy.dtype=bfloat16"):
        cache.lookup(observation, frame, huge)
    cache.lookup(observation, frame, trained.model.prefix)


def test_the_size_is_announced_before_anything_is_written(tmp_path, caplog):
    trained = policy()
    with caplog.at_level(logging.INFO):
        open_cache(trained, tmp_path).lookup(*frames(trained, 0, 1), trained.model.prefix)
        open_cache(trained, tmp_path)
    first, second = (record.getMessage() for record in caplog.records if "prefix cache" in record.message)
    # 64 tokens, 16 of one image and 48 of the prompt, of 2 layers, keys and values, 16 numbers of 2 bytes.
    assert "up to 4.92e-05 GB" in first
    assert f"({FRAMES} frames, 0.00819 MB each, as bfloat16); 0 frames are there" in first
    assert "2 frames are there" in second


def test_too_little_disk_is_refused_with_the_numbers_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"needs up to 4.92e-05 GB more .* 1e-06 GB free.*--dataset.root"):
        open_cache(policy(), tmp_path)
    assert not list(tmp_path.rglob("records"))


def test_a_folder_that_cannot_be_written_is_refused_with_a_way_out(tmp_path):
    (tmp_path / FOLDER.parts[0]).write_text("a file where a folder should be")
    with pytest.raises(OSError, match=r"no prefix cache can be made.*--dataset.root"):
        open_cache(policy(), tmp_path)


def test_other_weights_get_a_cache_of_their_own(tmp_path, caplog):
    trained, tuned = policy(), policy()
    open_cache(trained, tmp_path).lookup(*frames(trained, 0), trained.model.prefix)
    with torch.no_grad():
        tuned.model.token_embedding.weight[0, 0] += 1e-2
    assert fingerprint(tuned.model) != fingerprint(trained.model)
    with caplog.at_level(logging.INFO):
        cache = open_cache(tuned, tmp_path)
    assert f"prefixes of other weights: {fingerprint(trained.model)[:16]}" in caplog.text
    with pytest.raises(AssertionError, match="was run"):
        cache.lookup(*frames(tuned, 0), never)


@pytest.mark.parametrize("part", ["vision", "token_embedding", "vlm"])
def test_the_fingerprint_changes_with_every_part_that_the_prefix_depends_on(part):
    trained = policy()
    before = fingerprint(trained.model)
    with torch.no_grad():
        next(getattr(trained.model, part).parameters()).flatten()[-1] += 1
    assert fingerprint(trained.model) != before


def test_the_fingerprint_does_not_change_with_the_expert():
    trained = policy()
    before = fingerprint(trained.model)
    with torch.no_grad():
        for parameter in trained.model.expert.parameters():
            parameter.add_(1)
    assert fingerprint(trained.model) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": "0" * 32}, r"weights: .*delete"),
        ({"cameras": ["observation.images.top"]}, r"cameras: .*'observation.images.top'.*--policy.cameras"),
        ({"image_size": 64}, r"image_size: 32, now 64.*--policy.vision.image_size"),
        ({"prompt_tokens": 96}, r"prompt_tokens: 48, now 96.*--policy.tokenizer_max_length"),
        ({"dtype": "float32"}, r"dtype: 'bfloat16', now 'float32'.*--policy.dtype"),
        ({"dataset": "local/drawers"}, r"dataset: 'local/doors', now 'local/drawers'.*delete"),
        ({"revision": "v3.1"}, r"revision: 'v3.0', now 'v3.1'.*delete"),
        ({"frames": FRAMES + 1}, r"frames: 6, now 7.*delete"),
        ({"format": 2}, r"format: 1, now 2.*delete"),
    ],
)
def test_prefixes_of_another_source_are_refused_with_what_differs_and_the_cure(tmp_path, changes, says):
    cache = open_cache(policy(), tmp_path)
    with pytest.raises(ValueError, match=says) as refusal:
        PrefixCache(cache.folder, replace(cache.source, **changes))
    assert str(cache.folder) in str(refusal.value)
    assert "--policy.cache_prefix=false" in str(refusal.value)


def test_the_policys_settings_and_dataset_are_what_is_compared(tmp_path):
    open_cache(policy(), tmp_path)
    with pytest.raises(ValueError, match=r"prompt_tokens: 48, now 24"):
        open_cache(policy(tokenizer_max_length=24), tmp_path)
    with pytest.raises(ValueError, match=r"frames: 6, now 9"):
        open_cache(policy(), tmp_path, total_frames=9)


@pytest.mark.parametrize("change", ["flip", "brightness", "prompt", "shorter prompt"])
def test_changed_pixels_or_prompts_are_refused_with_the_cure(tmp_path, change):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0, 1)
    cache.lookup(observation, frame, trained.model.prefix)
    images, tokens, mask = (
        observation.images.clone(),
        observation.tokens.clone(),
        observation.token_mask.clone(),
    )
    if change == "flip":
        images[1] = images[1].flip(-1)
    elif change == "brightness":
        images[1, 0, 0, 0, 0] += 1 / 255
    elif change == "prompt":
        tokens[1, 1] += 1
    else:
        mask[1, int(mask[1].sum()) - 1] = False
    changed = replace(observation, images=images, tokens=tokens, token_mask=mask)
    with pytest.raises(ValueError, match=r"frame 1 .*--dataset.image_transforms.enable=false.*delete"):
        cache.lookup(changed, frame, never)


def test_padding_of_a_prompt_is_no_change(tmp_path):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0)
    found = cache.lookup(observation, frame, trained.model.prefix)
    padded = replace(
        observation,
        tokens=torch.nn.functional.pad(observation.tokens, (0, 8), value=5),
        token_mask=torch.nn.functional.pad(observation.token_mask, (0, 8)),
    )
    again = cache.lookup(padded, frame, never)
    assert again.mask.shape[1] == found.mask.shape[1] + 8
    assert all(torch.equal(a, b) for a, b in zip(valid(found), valid(again), strict=True))


def test_frames_of_another_dataset_are_refused(tmp_path):
    trained = policy()
    observation, _ = frames(trained, 0)
    for outside in (FRAMES, -1):
        with pytest.raises(ValueError, match=rf"frames {outside} .*only 6: .*--policy.cache_prefix=false"):
            open_cache(trained, tmp_path).lookup(observation, torch.tensor([outside]), trained.model.prefix)


def test_a_prompt_beyond_the_records_is_refused(tmp_path):
    trained = policy()
    observation, frame = frames(trained, 0)
    longer = replace(
        observation,
        tokens=torch.nn.functional.pad(observation.tokens, (0, 48)),
        token_mask=torch.nn.functional.pad(observation.token_mask, (0, 48)),
    )
    with pytest.raises(ValueError, match=r"room for 48.*--policy.tokenizer_max_length"):
        open_cache(trained, tmp_path).lookup(longer, frame, trained.model.prefix)


@pytest.mark.parametrize("name", ["records", "checksums", "contents.json"])
def test_a_truncated_file_is_refused_with_the_cure(tmp_path, name):
    file = open_cache(policy(), tmp_path).folder / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*delete"):
        open_cache(policy(), tmp_path)


@pytest.mark.parametrize("name", ["records", "checksums"])
def test_a_missing_file_is_refused_with_the_cure(tmp_path, name):
    (open_cache(policy(), tmp_path).folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged.*delete"):
        open_cache(policy(), tmp_path)


def test_without_its_contents_file_stored_prefixes_are_not_trusted(tmp_path):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    cache.lookup(*frames(trained, 0, 1), trained.model.prefix)
    (cache.folder / "contents.json").unlink()
    with pytest.raises(AssertionError, match="was run"):
        open_cache(trained, tmp_path).lookup(*frames(trained, 0), never)


def test_a_damaged_record_is_refused_with_the_cure(tmp_path):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    cache.lookup(*frames(trained, 0, 1), trained.model.prefix)
    with (cache.folder / "records").open("r+b") as file:
        file.seek(cache.source.record_size + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    cache.lookup(*frames(trained, 0), never)
    with pytest.raises(ValueError, match=r"record of frame 1 in .*damaged: delete"):
        cache.lookup(*frames(trained, 1), never)


def test_a_record_without_its_checksum_counts_as_missing(tmp_path, monkeypatch):
    """A run that was killed while it wrote."""
    trained = policy()
    cache = open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0, 1)

    crc32, calls = zlib.crc32, iter(range(100))

    def killed_at_the_second_record(*arguments: Any) -> int:
        # Before it there are those of two samples' images, masks and prompts, and of the first record.
        if next(calls) == 7:
            raise KeyboardInterrupt
        return crc32(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(zlib, "crc32", killed_at_the_second_record)
        with pytest.raises(KeyboardInterrupt):
            cache.lookup(observation, frame, trained.model.prefix)
    reopened, computed = open_cache(trained, tmp_path), []

    def compute(observation: Observation) -> Cache:
        computed.append(len(observation.images))
        return trained.model.prefix(observation)

    found = reopened.lookup(observation, frame, compute)
    assert computed == [1]
    reference = trained.model.prefix(observation)
    for a, b in zip(valid(found), valid(reference), strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0)


def test_a_full_disk_is_an_error_and_the_frame_stays_missing(tmp_path):
    resource = pytest.importorskip("resource")
    trained = policy()
    cache = open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space left on device: .*records"):
            cache.lookup(observation, frame, trained.model.prefix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(AssertionError, match="was run"):
        cache.lookup(observation, frame, never)


def test_what_another_process_has_stored_meanwhile_is_kept(tmp_path):
    """Others may have read it already, and rounding differs between machines."""
    trained = policy()
    slow, fast = open_cache(trained, tmp_path), open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0)

    def compute(observation: Observation) -> Cache:
        fast.lookup(observation, frame, trained.model.prefix)
        prefix = trained.model.prefix(observation)
        return Cache([(k + 1, v + 1) for k, v in prefix.layers], prefix.mask)

    found, kept = slow.lookup(observation, frame, compute), fast.lookup(observation, frame, never)
    assert all(torch.equal(a, b) for a, b in zip(valid(found), valid(kept), strict=True))
    assert torch.equal(valid(kept)[0], valid(trained.model.prefix(observation))[0])


def test_one_process_writes_at_a_time(tmp_path):
    trained = policy()
    cache = open_cache(trained, tmp_path)
    observation, frame = frames(trained, 0)
    with WeakFileLock(cache.folder / "lock"):
        thread = threading.Thread(target=cache.lookup, args=(observation, frame, trained.model.prefix))
        thread.start()
        thread.join(timeout=0.5)
        assert not any((cache.folder / "checksums").read_bytes())
    thread.join()
    cache.lookup(observation, frame, never)


def fill(root: Path, start: Any, rounding: float) -> None:
    """One of several trainings that start at the same moment, on machines that round differently."""
    torch.set_num_threads(1)  # the child of a fork has no others
    trained = policy()

    def compute(observation: Observation) -> Cache:
        prefix = trained.model.prefix(observation)
        return Cache([(k * rounding, v * rounding) for k, v in prefix.layers], prefix.mask)

    start.wait(timeout=60)
    cache = open_cache(trained, root, total_frames=240)
    for first in range(0, 240, 4):
        cache.lookup(*frames(trained, *range(first, first + 4)), compute)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_fill_one_cache_at_once(tmp_path):
    context = multiprocessing.get_context("fork")  # a spawned one would import LeRobot for half a minute
    start = context.Barrier(2)
    processes = [
        context.Process(target=fill, args=(tmp_path, start, rounding), daemon=True) for rounding in (1, 1.01)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    trained = policy()
    cache = open_cache(trained, tmp_path, total_frames=240)
    for first in range(0, 240, 4):
        cache.lookup(*frames(trained, *range(first, first + 4)), never)


def test_a_trained_vision_language_model_is_refused(tmp_path):
    trained = policy()
    trained.model.vlm.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vlm.norm.weight.*--policy.freeze=vlm"):
        open_cache(trained, tmp_path)


def test_pushing_the_dataset_leaves_the_cache_out(tmp_path):
    cache = open_cache(policy(), tmp_path)
    (tmp_path / "info.json").write_text("{}")
    files = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("records" in file for file in files)
    assert cache.folder.is_relative_to(tmp_path)
    assert list(filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)) == ["info.json"]


def test_the_contents_say_what_was_computed_from_what(tmp_path):
    cache = open_cache(policy(), tmp_path)
    contents = json.loads((cache.folder / "contents.json").read_text())
    assert contents["dataset"] == "local/doors"
    assert contents["cameras"] == [FRONT]
    assert len(contents["weights"]) == 32
