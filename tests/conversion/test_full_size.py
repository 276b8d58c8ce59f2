"""Conversion at the published size, from random weights made on the spot: what it takes of memory.

    pytest -m full_size -s tests/conversion/test_full_size.py -k "2 and pi05"     # two layers of full width

Takes minutes, and 20 (bfloat16) or 40 GB (float32) of disk. The largest leaf is written in one piece, for
which this process, not the conversion, needs 10 GB.
"""

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from openpi_jax import write_leaf

# Of π0; π0.5 differs by `_pi05`.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "PaliGemma/img/": {
        "embedding/kernel": (14, 14, 3, 1152),
        "embedding/bias": (1152,),
        "pos_embedding": (1, 256, 1152),
        "Transformer/encoder_norm/scale": (1152,),
        "Transformer/encoder_norm/bias": (1152,),
        "head/kernel": (1152, 2048),
        "head/bias": (2048,),
    },
    "PaliGemma/img/Transformer/encoderblock/": {
        **{f"LayerNorm_{i}/{kind}": (27, 1152) for i in (0, 1) for kind in ("scale", "bias")},
        "MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        "MlpBlock_0/Dense_0/bias": (27, 4304),
        "MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        "MlpBlock_0/Dense_1/bias": (27, 1152),
        **{
            f"MultiHeadDotProductAttention_0/{name}/{kind}": (27, *shape)
            for name in ("query", "key", "value")
            for kind, shape in (("kernel", (1152, 16, 72)), ("bias", (16, 72)))
        },
        "MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, 1152),
        "MultiHeadDotProductAttention_0/out/bias": (27, 1152),
    },
    "PaliGemma/llm/": {
        "embedder/input_embedding": (257152, 2048),
        "final_norm/scale": (2048,),
        "final_norm_1/scale": (1024,),
        **{
            f"layers/{name.format(suffix)}": (18, *shape)
            for suffix, width, mlp in (("", 2048, 16384), ("_1", 1024, 4096))
            for name, shape in {
                "attn/q_einsum{}/w": (8, width, 256),
                "attn/kv_einsum{}/w": (2, 1, width, 256),
                "attn/attn_vec_einsum{}/w": (8, 256, width),
                "mlp{}/gating_einsum": (2, width, mlp),
                "mlp{}/linear": (mlp, width),
                "pre_attention_norm{}/scale": (width,),
                "pre_ffw_norm{}/scale": (width,),
            }.items()
        },
    },
    "": {
        "state_proj/kernel": (32, 1024),
        "action_in_proj/kernel": (32, 1024),
        "action_time_mlp_in/kernel": (2048, 1024),
        "action_time_mlp_out/kernel": (1024, 1024),
        "action_out_proj/kernel": (1024, 32),
        **{f"{name}/bias": (1024,) for name in ("state_proj", "action_in_proj")},
        **{f"action_time_mlp_{name}/bias": (1024,) for name in ("in", "out")},
        "action_out_proj/bias": (32,),
    },
}
LEAVES = {prefix + name: shape for prefix, leaves in SIZES.items() for name, shape in leaves.items()}


def _pi05(leaves: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The leaves of π0.5: adaptive norms in the expert, no state, and a time MLP of its own."""
    changed: dict[str, tuple[int, ...]] = {}
    for name, shape in leaves.items():
        if name.endswith("_1/scale") and "/llm/" in name:
            *depth, width = shape
            dense = name.replace("scale", "Dense_0")
            changed[f"{dense}/kernel"] = (*depth, width, 3 * width)
            changed[f"{dense}/bias"] = (*depth, 3 * width)
        elif name.startswith("action_time_mlp_"):
            renamed = name.removeprefix("action_")
            changed[renamed] = (1024, 1024) if name.endswith("kernel") else shape
        elif not name.startswith("state_proj"):
            changed[name] = shape
    return changed


MODELS = {"pi0": LEAVES, "pi05": _pi05(LEAVES)}
FLAGS = {"pi0": (), "pi05": ("--chunk_size=50", "--state_in_prompt=true")}
GOAL = 4e9  # bytes of resident memory, mapped files included


@pytest.fixture(params=MODELS)
def model(request) -> str:
    return request.param


@pytest.fixture(params=itertools.product(["bfloat16", "float32"], [2, None]), ids=str)
def source(request, model, tmp_path) -> Iterator[Path]:
    """With all layers, or with two of each stack: as large in each layer, and in the embedding."""
    kind, layers = request.param
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32)
    block = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32)
    block = (block * 0.02).astype(dtype)
    for number, (path, shape) in enumerate(MODELS[model].items()):
        if layers and shape[0] in (18, 27):
            shape = (layers, *shape[1:])

        # Numbers of one block, from another place on for each part.
        def read(i: int, number: int = number, shape: tuple[int, ...] = shape) -> np.ndarray:
            numbers, size = np.roll(block, 977 * i + 7919 * number), int(np.prod(shape[1:]))
            return np.tile(numbers, -(-size // len(numbers)))[:size].reshape(shape[1:])

        if len(shape) > 1 and shape[0] < 30:
            write_leaf(tmp_path / "jax" / "params", path, shape, dtype, read)
        else:  # no layers
            size = int(np.prod(shape))
            whole = np.tile(block, -(-size // len(block)))[:size].reshape(shape)
            write_leaf(tmp_path / "jax" / "params", path, shape, dtype, whole)
    yield tmp_path / "jax"
    shutil.rmtree(tmp_path)


def convert(source: Path, target: Path, *flags: str) -> int:
    """The most memory that the command took; what of it is its own is printed too."""
    command = [sys.executable, "-m", "lerobot_pi0.cli", "convert", str(source), str(target), *flags]
    started, anonymous, peak = time.monotonic(), 0, 0
    with subprocess.Popen([*command, "--tokenizer=small", "--statistics=false"]) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line}
            anonymous = max(anonymous, int(memory.get("RssAnon", 0)) * 1024)
            peak = max(peak, int(memory.get("VmHWM", 0)) * 1024)
            time.sleep(0.05)
        assert process.returncode == 0
    print(
        f"{source.name} → {target.name}: {time.monotonic() - started:.0f} s, {anonymous / 1e9:.2f} GB of its "
        f"own at most, {peak / 1e9:.2f} GB with mapped files",
        flush=True,
    )
    return peak


@pytest.mark.full_size
def test_conversion_needs_little_memory(source, model, request, tmp_path):
    assert convert(source, tmp_path / "ours", *FLAGS[model]) < GOAL
    if "None" in request.node.callspec.id:  # the others have names for all layers alone
        for layout in ("lerobot", "openpi-pytorch"):
            assert convert(tmp_path / "ours", tmp_path / layout, f"--to={layout}") < GOAL
            shutil.rmtree(tmp_path / layout)
