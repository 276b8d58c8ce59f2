"""The tiny π0 and π0.5 of openpi's golden values, their inputs, and ways to look into a run of them.

`pytest tests/model --device=cuda` runs them on a GPU.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from openpi_jax import from_openpi_jax
from torch import Tensor

from lerobot_pi0.checkpoints.files import load_weights
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Network, Observation, Pi0, Pi05, SiglipConfig

TESTS = Path(__file__).parent.parent
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(autouse=True)
def shapes_are_checked() -> Iterator[None]:
    """Those in the signatures of the network, at each call."""
    jaxtyping.config.update("jaxtyping_disable", False)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the network runs: cpu, cuda, cuda:1, …")


@pytest.fixture
def device(request) -> str:
    # A run of all tests reads this file after its options.
    return request.config.getoption("--device", default="cpu")


@pytest.fixture(autouse=True)
def tensors_are_on_the_device(device) -> Iterator[None]:
    """Float32 there is IEEE's, without TF32, and no kernel adds up in an order that changes."""
    if device == "cpu":
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(device):
        yield


@functools.cache
def read_golden(which: str, name: str, device: str) -> Any:
    path = TESTS / {"pi0": "golden", "pi05": "golden_pi05"}[which] / f"golden_{name}"
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return {key: torch.from_numpy(value).to(device) for key, value in np.load(path).items()}


@pytest.fixture
def which(request) -> str:
    """The network that the other fixtures are of: π0, where a test or its module does not say."""
    return getattr(request, "param", "pi0")


@pytest.fixture
def golden(which, device) -> Callable[[str], Any]:
    """golden("f32.npz") is a dict of tensors, golden("prompts.json") what the file holds."""
    return lambda name: read_golden(which, name, device)


@functools.cache
def read_weights(which: str, device: str) -> dict[str, Tensor]:
    leaves = read_golden(which, "params.npz", "cpu")
    weights = from_openpi_jax({path: leaf.numpy() for path, leaf in leaves.items()})
    return {name: tensor.to(device) for name, tensor in weights.items()}


@pytest.fixture
def golden_weights(which, device) -> dict[str, Tensor]:
    return read_weights(which, device)


@pytest.fixture
def build(which, golden_weights) -> Callable[..., Network]:
    """build(dtype, parameter_dtype): the golden model, what it computes in and what its parameters are."""

    def make(dtype: torch.dtype = torch.float32, parameter_dtype: torch.dtype = torch.float32) -> Network:
        vision = SiglipConfig(image_size=56, patch_size=14, width=32, depth=2, mlp_dim=64, num_heads=2)
        vlm = GemmaConfig(
            width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=512
        )
        sizes = (vision, vlm, ExpertConfig(width=32, mlp_dim=64))
        with torch.device("meta"):
            model = Pi0(*sizes, 32, 32, dtype) if which == "pi0" else Pi05(*sizes, 32, dtype)
        copies = {name: tensor.clone() for name, tensor in golden_weights.items()}  # training changes them
        load_weights(model, copies, dict.fromkeys(copies, parameter_dtype))
        return model

    return make


@pytest.fixture
def model(build) -> Network:
    return build()


@pytest.fixture
def observe(golden) -> Callable[..., Observation]:
    """observe(*cameras): the golden observation, with all three cameras or with those named."""

    def make(*cameras: str) -> Observation:
        inputs = golden("inputs.npz")
        images = torch.stack([inputs[f"image/{camera}"] for camera in cameras or CAMERAS], 1)
        return Observation(
            images=images.permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1,
            image_mask=torch.stack([inputs[f"image_mask/{camera}"] for camera in cameras or CAMERAS], 1),
            tokens=inputs["tokenized_prompt"].long(),
            token_mask=inputs["tokenized_prompt_mask"].clone(),  # a test may change it
            state=inputs["state"],
        )

    return make


@pytest.fixture
def observation(observe) -> Observation:
    return observe()


@pytest.fixture
def training_pair(golden) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, noise, time."""
    inputs = golden("inputs.npz")
    return inputs["actions"], inputs["noise"], inputs["time"]


@pytest.fixture
def stored_time_embedding(golden, monkeypatch) -> None:
    """openpi's own embedding of each stored time: its fastest sinusoid amplifies rounding 1,571 times."""
    file = golden("f32.npz")
    embeddings = dict(zip(golden("inputs.npz")["time"].tolist(), file["time_emb"], strict=True))
    for steps in (10, 4):
        times = file[f"sample_times_{steps}"].tolist()
        embeddings |= dict(zip(times, file[f"time_emb_steps_{steps}"], strict=True))

    def embed_time(time: Tensor, dim: int) -> Tensor:
        rows = torch.stack([embeddings[t] for t in time.flatten().tolist()])
        assert rows.shape[1] == dim
        return rows.unflatten(0, time.shape)

    monkeypatch.setattr("lerobot_pi0.model.network.embed_time", embed_time)


@pytest.fixture
def entering() -> Callable[[torch.nn.Module], list[Tensor]]:
    """entering(module): a list that fills with the first argument of each call of the module."""

    def record(module: torch.nn.Module) -> list[Tensor]:
        calls: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
        return calls

    return record


@pytest.fixture
def leaving() -> Callable[[torch.nn.Module], list[Tensor]]:
    """leaving(module): a list that fills with the result of each call of the module, the first of several."""

    def record(module: torch.nn.Module) -> list[Tensor]:
        calls: list[Tensor] = []

        def keep(_: Any, __: Any, out: Any) -> None:
            calls.append((out[0] if isinstance(out, tuple) else out).detach())

        module.register_forward_hook(keep)
        return calls

    return record
