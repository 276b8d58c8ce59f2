"""The plan: bytes computed from shapes against those of real steps; what it recommends fits."""

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.default import PeftConfig
from shipped_configs import read_training_config
from tiny_dataset import noise_episodes, write_dataset
from tiny_policy import SIZES, batch, first, tiny_config
from torch import Tensor

from benchmarks import memory
from benchmarks.training import peak_growth
from lerobot_pi0 import Pi0Config, cli
from lerobot_pi0.inputs.dataset import DatasetSource, read_dataset
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.tools import plan as planning
from lerobot_pi0.tools.memory import AllocationTracker, MemoryEstimate, estimate_memory
from lerobot_pi0.tools.plan import GIGABYTE, Row, Schedule, choose
from lerobot_pi0.tools.step_time import StepTimes, measure_rate

LORA = PeftConfig()


@pytest.fixture(autouse=True, scope="module")
def each_estimate_is_made_once() -> Iterator[None]:
    """A plan needs a dozen, which take 20 seconds, and several tests plan for the same policy."""
    made: dict[str, MemoryEstimate] = {}

    def estimate(*given: Any, **rest: Any) -> MemoryEstimate:
        key = repr((given, rest))
        if key not in made:
            made[key] = estimate_memory(*given, **rest)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "estimate_memory", estimate)
        yield


def planned(
    peft: PeftConfig | None = None, device: Any = "cpu", model: str = "pi0", **changes: Any
) -> MemoryEstimate:
    config = tiny_config(model, pretrained_path="lerobot/pi0_base", **changes)
    config.validate_features()
    return estimate_memory(config, peft, device)


def real(config: Pi0Config, peft: PeftConfig | None = None) -> tuple[Pi0Policy, torch.optim.Optimizer]:
    policy = policy_class(config)(config)
    if peft is not None:
        adapters: Any = policy.adapter_config(dataclasses.asdict(peft))
        policy.requires_grad_(False)
        __import__("peft").get_peft_model(policy, adapters)
    optimizer: Any = config.get_optimizer_preset().build(policy.get_optim_params())
    return policy.train(), optimizer


CASES = [
    pytest.param(None, {}, id="full"),
    pytest.param(None, {"gradient_checkpointing": True}, id="checkpointing"),
    pytest.param(None, {"freeze": "vision", "num_flow_samples": 3}, id="vision-frozen"),
    pytest.param(None, {"freeze": "vlm"}, id="expert"),
    pytest.param(None, {"freeze": "vlm", "gradient_checkpointing": True}, id="expert-checkpointing"),
    pytest.param(LORA, {}, id="lora"),
    pytest.param(LORA, {"gradient_checkpointing": True}, id="lora-checkpointing"),
    pytest.param(None, {"ema_decay": 0.0}, id="without-average"),
    pytest.param(None, {"model": "pi05"}, id="pi05"),
]


@pytest.mark.parametrize(("peft", "changes"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_real_steps_is_what_was_computed_on_meta_device(peft, changes, dtype):
    """Weights, moments, average, gradients and activations of two whole steps of LeRobot's loop."""
    changes: dict[str, Any] = {"dtype": dtype, "augmentation": False, **changes}
    model = changes.pop("model", "pi0")
    samples = batch(3, model=model)
    changes["tokenizer_max_length"] = samples["observation.language.tokens"].shape[1]
    config = tiny_config(model, pretrained_path="lerobot/pi0_base", **changes)
    on_gpu, on_cpu = planned(peft, "gpu", model, **changes), planned(peft, "cpu", model, **changes)
    # In a batch of one some copies are views, which the plan does not use.
    for size, given, tolerance in ((1, first(samples), 0.03), (3, samples, 0.01)):
        ledger = AllocationTracker(())
        with ledger:
            policy, optimizer = real(config, peft)
            for _ in range(2):
                held = ledger.live
                ledger.line.clear()
                there = {key: x.clone() if isinstance(x, Tensor) else x for key, x in given.items()}
                loss, _ = policy.forward(there)
                loss.backward()
                del loss, there
                optimizer.step()
                optimizer.zero_grad()
                policy.update()
        # Nothing of these weights is mapped from a file, as the plan would have it for a CPU.
        assert on_gpu.held == pytest.approx(held, rel=0.001)
        measured = max(ledger.line) - held
        assert measured == pytest.approx(on_cpu.step(size), rel=tolerance), size


def test_what_lives_after_forward_is_what_torch_saved_for_the_backward_pass():
    """The ledger itself, against torch's own account."""
    policy, _ = real(tiny_config(dtype="bfloat16"))
    given, known = batch(2), {p.untyped_storage().data_ptr() for p in policy.parameters()}
    known |= {value.untyped_storage().data_ptr() for value in given.values() if isinstance(value, Tensor)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ledger = AllocationTracker(policy.parameters())
    with ledger, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = policy.forward(given)
    assert loss.requires_grad
    assert sum(saved.values()) == pytest.approx(ledger.live, rel=0.01)


@pytest.mark.skipif(peak_growth(lambda: None) is None, reason="needs Linux's /proc")
@pytest.mark.slow
def test_resident_memory_grows_in_a_step_by_what_was_computed():
    config = tiny_config(
        vision=SiglipConfig(image_size=112, patch_size=8, width=256, depth=4, mlp_dim=1024, num_heads=4),
        vlm=GemmaConfig(width=256, depth=4, mlp_dim=2048, num_heads=4, head_dim=64, vocab_size=1024),
        expert=ExpertConfig(width=128, mlp_dim=512),
        dtype="bfloat16",
        augmentation=False,
        tokenizer_max_length=16,
    )
    config.validate_features()
    policy, _ = real(config)
    given = batch(3)

    def step() -> None:
        policy.forward(given)[0].backward()
        policy.zero_grad()

    step()
    measured = peak_growth(step)
    assert measured is not None
    computed = estimate_memory(config, device="cpu").step(3)
    # Above it are holes in the C library's heap, which depend on what ran before in this process.
    assert 0.9 * computed < measured < 1.6 * computed


def test_memory_grows_with_the_batch_and_with_cameras():
    one = planned(device="gpu", gradient_checkpointing=True)
    peaks = [one.peak(size) for size in (1, 2, 8, 32)]
    assert peaks == sorted(set(peaks))
    features = tiny_config().input_features or {}
    camera = PolicyFeature(FeatureType.VISUAL, (3, 48, 64))
    two = planned(
        device="gpu",
        gradient_checkpointing=True,
        input_features={**features, "observation.images.wrist": camera},
    )
    assert two.peak(8) > 1.3 * one.peak(8) - 0.3 * one.held
    assert two.flops > one.flops


def test_gpu_attention_keeps_no_square_of_the_tokens():
    """Twice as many tokens, written out, take four times the memory of the logits."""

    def growth(device: str, image_size: int) -> int:
        vision = dataclasses.replace(tiny_config().vision, image_size=image_size, patch_size=4)
        return planned(device=device, vision=vision, dtype="bfloat16").step(64)

    gpu, cpu = (growth(device, 64) / growth(device, 32) for device in ("gpu", "cpu"))
    assert gpu < 4.5
    assert cpu > 1.4 * gpu


def test_frozen_parts_have_no_optimizer_and_checkpointing_trades_memory_for_work():
    full, expert, lora = planned(), planned(freeze="vlm"), planned(LORA)
    assert lora.trained < full.trained
    assert expert.trained < full.trained
    assert (expert.optimizer, expert.ema, expert.gradients) == (
        8 * expert.trained,
        4 * expert.trained,
        4 * expert.trained,
    )
    again = planned(gradient_checkpointing=True)
    assert again.step(32) < full.step(32)
    assert 1.2 * full.flops < again.flops < 1.4 * full.flops


def test_rows_of_the_vocabulary_that_nobody_reads_are_not_in_a_cpus_memory():
    gpu, cpu = planned(freeze="vlm", device="gpu"), planned(freeze="vlm")
    vlm = tiny_config().vlm
    last = 2 * vlm.num_heads * vlm.head_dim * vlm.width + 3 * vlm.mlp_dim * vlm.width
    unread = vlm.vocab_size * vlm.width + last + 2 * vlm.width
    assert gpu.weights - cpu.weights == 4 * unread


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Two cameras, five joints, thirty frames."""
    root = tmp_path_factory.mktemp("data") / "pick"
    cameras = ["observation.images.front", "observation.images.wrist"]
    episodes = noise_episodes(["pick", "pick"], 15, 5, 4)
    write_dataset(root, episodes, list("abcde"), list("abcd"), repo_id="me/pick", fps=30, cameras=cameras)
    return root


def plan(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "plan", *flags])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().out


def command(text: str) -> list[str]:
    _, _, found = text.partition("lerobot-train")
    return shlex.split(f"lerobot-train{found}".replace("\\\n", " ")) if found else []


def tiny(dataset: Path) -> list[str]:
    return ["--dataset.repo_id=me/pick", f"--dataset.root={dataset}", *SIZES]


def test_the_plan_says_what_there_is_and_its_command_is_read_by_lerobot(monkeypatch, capsys, dataset):
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu-memory", "24")
    assert code == 0
    assert "2 episodes, 30 frames at 30 per second" in text
    assert "base ← observation.images.front, left_wrist ← observation.images.wrist" in text
    assert "recommended    full, batches of 32" in text
    assert "3,000, or 3200.0 epochs" in text
    arguments = command(text)
    monkeypatch.setattr("sys.argv", [*arguments, "--policy.device=cpu"])
    config: Any = cast(Callable[[], Any], read_training_config)()
    assert isinstance(config.policy, Pi0Config)
    assert (config.batch_size, config.steps) == (32, 3000)
    assert (config.dataset.repo_id, Path(config.dataset.root)) == ("me/pick", dataset)
    assert config.policy.vlm == tiny_config().vlm
    assert config.policy.gradient_checkpointing is False
    assert (config.policy.freeze, config.peft) == ("nothing", None)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [("full", "pi0"), ("lora", "pi0"), ("expert", "pi0"), ("expert", "pi05")],
)
def test_the_command_of_each_recipe_trains_what_it_says(monkeypatch, capsys, dataset, recipe, model):
    flags = ["--gpu_memory=24", f"--recipe={recipe}", f"--model={model}", "--policy.cameras={base: wrist}"]
    flags += ["--policy.tokenizer_max_length=48"]  # π0's own, and not π0.5's
    flags += ["--policy.state_in_prompt=false"] if model == "pi05" else []
    code, text = plan(monkeypatch, capsys, *tiny(dataset), *flags)
    assert code == 0
    assert "left out: observation.images.front" in text
    monkeypatch.setattr("sys.argv", [*command(text), "--policy.device=cpu"])
    config: Any = cast(Callable[[], Any], read_training_config)()
    assert config.policy.type == f"lerobot_{model}"
    assert config.policy.freeze == ("vlm" if recipe == "expert" else "nothing")
    assert (config.peft is not None) == (recipe == "lora")
    assert config.policy.cameras == {"base": "wrist"}
    assert config.policy.tokenizer_max_length == 48
    assert not getattr(config.policy, "state_in_prompt", False)


def test_settings_of_the_other_model_are_refused(monkeypatch, capsys, dataset):
    code, text = plan(
        monkeypatch, capsys, *tiny(dataset), "--gpu_memory=24", "--policy.state_in_prompt=false"
    )
    assert code == 2
    assert "--policy.state_in_prompt is a setting of π0.5: leave it out, or give --model=pi05" in text


def row(recipe: Any, fixed: float, per_sample: float, checkpointing: bool = False) -> Row:
    """A recipe that takes so many bytes for a step."""
    growth = np.array([[fixed, per_sample]])
    made = MemoryEstimate(1, 0, 0, False, growth, 1)
    return Row(recipe, checkpointing, (), cast(Any, None), made)


def test_the_largest_batch_fits_and_one_more_does_not():
    of = row("lora", 0.5 * GIGABYTE, 0.7 * GIGABYTE)
    for gigabytes in (2, 7.3, 24, 80):
        largest = of.largest_batch(gigabytes * GIGABYTE)
        assert of.needs(largest) <= gigabytes * GIGABYTE < of.needs(largest + 1)
    assert of.largest_batch(1.2 * GIGABYTE) == 0


def test_a_recipe_that_does_not_fit_is_not_recommended(monkeypatch, capsys, dataset):
    full, lora, again, expert = (
        row("full", 60 * GIGABYTE, GIGABYTE),
        row("lora", GIGABYTE, GIGABYTE),
        row("lora", GIGABYTE, 0.2 * GIGABYTE, checkpointing=True),
        row("expert", 12 * GIGABYTE, 0.01 * GIGABYTE),
    )
    rows = [full, lora, again, expert]
    assert choose(rows, 200 * GIGABYTE) is full
    assert choose(rows, 80 * GIGABYTE) is lora  # full fits, with too small a batch
    assert choose(rows, 24 * GIGABYTE) is again
    assert choose([lora, expert], 16 * GIGABYTE) is expert  # the first fits, with too small a batch
    assert choose([full, lora], 10 * GIGABYTE) is lora
    assert choose(rows, 1.5 * GIGABYTE) is None
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu_memory=1")
    assert code == 0
    assert "Nothing fits 1 GB: the least is 1.0 GB" in text
    assert command(text) == []


def test_a_dataset_is_worth_ten_epochs_between_lerobots_example_and_openpis():
    assert Schedule.of(1_000, 32).steps == 3_000
    assert Schedule.of(45_000, 32) == Schedule(32, 14_100, 14_100 * 32 / 45_000)
    assert Schedule.of(10_000_000, 32).steps == 30_000
    assert Schedule.of(10_000_000, 8).steps == 120_000


def test_a_longer_run_than_openpis_gets_a_longer_schedule_of_the_same_shape():
    config = tiny_config()
    assert not any("scheduler" in flag for flag in Schedule.of(45_000, 32).arguments(config))
    flags = Schedule.of(10_000_000, 8).arguments(config)
    assert "--policy.scheduler_decay_steps=120000" in flags
    assert "--policy.scheduler_warmup_steps=4000" in flags


def test_a_dataset_that_is_not_there_is_a_message(monkeypatch, capsys, tmp_path):
    code, text = plan(monkeypatch, capsys, "--dataset.repo_id=me/nothing", "--gpu_memory=24")
    assert code == 1
    assert "the dataset 'me/nothing' is not in LeRobot's folder" in text
    assert "--dataset.root" in text
    with pytest.raises(FileNotFoundError, match=r"no dataset in .*meta/info.json.*--dataset.root"):
        read_dataset(DatasetSource("me/nothing", tmp_path))


@pytest.mark.parametrize("memory_flag", ["0", "-24", "nan", "inf"])
def test_no_memory_is_a_message(monkeypatch, capsys, memory_flag):
    code, text = plan(monkeypatch, capsys, "--dataset.repo_id=me/pick", f"--gpu_memory={memory_flag}")
    assert code == 2
    assert "--gpu_memory is in GB and above 0" in text


def test_settings_that_the_recipes_differ_in_are_refused(monkeypatch, capsys, dataset):
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu_memory=24", "--policy.freeze=vision")
    assert code == 1
    assert "--policy.freeze is what the recipes differ in" in text


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ('{"bas": "front"}', r"names the slots ['bas'], which do not exist: the slots are base, left_wrist"),
        ('{"base": "top"}', "puts 'top' into slot 'base', but the cameras are"),
    ],
)
def test_cameras_that_do_not_exist_are_refused(monkeypatch, capsys, dataset, cameras, message):
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu-memory=24", f"--policy.cameras={cameras}")
    assert code == 1
    assert message in text


@pytest.mark.parametrize(("named", "code"), [([], 0), (["--policy.cameras={base: depth}"], 1)])
def test_a_depth_camera_gets_no_slot(monkeypatch, capsys, caplog, dataset, tmp_path, named, code):
    """Of a dataset as LeRobot records it: the depth picture has one channel."""
    root = shutil.copytree(dataset, tmp_path / "depth")
    info = json.loads((root / "meta" / "info.json").read_text())
    picture = info["features"]["observation.images.wrist"]
    info["features"]["observation.images.depth"] = picture | {"shape": [*picture["shape"][:2], 1]}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    found, text = plan(monkeypatch, capsys, *tiny(root), "--gpu-memory=24", *named)
    assert found == code
    if code:
        assert "takes RGB pictures; 'observation.images.depth' has shape (1, " in text
    else:
        assert "base ← observation.images.front, left_wrist ← observation.images.wrist" in text
        assert "left out: observation.images.depth" in text


def test_without_peft_the_plan_says_so(monkeypatch, capsys, dataset):
    monkeypatch.setattr(planning, "find_spec", lambda _: None)
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu-memory=24")
    assert code == 0
    assert "pip install 'lerobot[peft]'" in text
    assert "LoRA, checkpointing" not in text


def test_the_plan_measures_steps_here_on_request(monkeypatch, capsys, dataset):
    monkeypatch.setattr(planning, "BATCH_SIZE", 3)
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu_memory=24", "--measure")
    assert code == 0
    assert re.search(r"time here +\d+ (min|h|days) on .*: [\d.e-]+ s per step of 3, ", text)
    monkeypatch.setattr(planning, "free_bytes", lambda _: 1e6)
    code, text = plan(monkeypatch, capsys, *tiny(dataset), "--gpu_memory=24", "--measure")
    assert code == 0
    assert re.search(r"time here +not measured: a batch of 1 needs [\d.]+ GB, and .* has 0.0 GB free", text)


class StandIn:
    """A training run whose steps take 2 s and 3 s more per sample."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def times(self, batch_size: int, steps: int = 5, seconds: float = 0) -> StepTimes:
        self.sizes.append(batch_size)
        return StepTimes(batch_size, {"forward_backward": 1.0 + 3 * batch_size, "optimizer": 1.0})


@pytest.mark.parametrize(
    ("seconds", "room", "sizes"),
    [
        (1000, 32, [1, 32]),  # the batch itself
        (1000, 8, [1, 8]),  # for want of memory
        (45, 32, [1, 4]),  # for want of time
        (0, 32, [1]),
    ],
)
def test_a_batch_that_is_too_large_to_measure_is_continued_from_smaller_ones(seconds, room, sizes):
    run = StandIn()
    rate = measure_rate(cast(Any, run), 32, lambda size: size <= room, seconds)
    assert run.sizes == sizes
    assert rate.is_extended == (sizes[-1] != 32)
    # From one batch alone: no more than as many times that.
    assert rate.seconds == pytest.approx(2 + 3 * 32 if len(sizes) > 1 else 32 * 5)


@pytest.mark.parametrize("recipe", ["expert", "lora"])
def test_the_benchmark_of_memory_takes_real_steps(recipe, tmp_path):
    result = memory.main(memory.MemoryConfig(recipe, "tiny", tmp_path))
    assert math.isfinite(result.ratio)
    assert result.peak >= result.before > 0
