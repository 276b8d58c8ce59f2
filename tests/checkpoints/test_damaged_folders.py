"""A damaged checkpoint folder: the policy acts exactly as the undamaged one, or an error names the folder."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot.configs.default import PeftConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_policy import FRONT, noise, raw_batch, statistics, tiny_policy
from torch import Tensor

from lerobot_pi0 import Pi0Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.flags import PolicyFlags
from lerobot_pi0.inputs.policy import load_policy, policy_class

Damage = Callable[[Path, random.Random], object]
ANYTHING: tuple[Any, ...] = (None, True, 3, -1, 1.5, 1e308, "", "x", [], [1, "a"], {}, {"a": {}})
NUMBERS = (float("nan"), float("inf"), float("-inf"))
WEIGHTS = "model.safetensors"
# How a policy is meant to act: draccus reads `true` as 1, and nothing else in the folder knows better.
SETTINGS = ("num_inference_steps", "max_length", r"expert\..*")


def in_one_file(folder: Path, model: str) -> Pi0Config:
    policy = tiny_policy(model)
    policy.save_pretrained(folder)
    return policy.config


def in_shards(folder: Path, model: str) -> Pi0Config:
    config = in_one_file(folder, model)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": dict([*tensors.items()][i::3]) for i in range(3)}
    for name, held in shards.items():
        save_file(held, folder / name)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return config


def as_adapters(folder: Path, model: str) -> Pi0Config:
    """Over a base in another folder, which stays undamaged."""
    base = folder.with_name("base")
    policy: Any = policy_class(in_one_file(base, model)).from_pretrained(base)
    wrapped = policy.wrap_with_peft(peft_cli_overrides=vars(PeftConfig(r=2)))
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    wrapped.config.save_pretrained(folder)
    return wrapped.config


KINDS = [(in_one_file, "pi0"), (in_one_file, "pi05"), (in_shards, "pi05"), (as_adapters, "pi0")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}")
def undamaged(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undamaged") / "saved"
    make, model = request.param
    config = make(folder, model)
    for pipeline in make_pre_post_processors(config, dataset_stats=statistics()):
        pipeline.save_pretrained(folder)
    return folder


def act(folder: Path) -> Tensor:
    """One chunk by the path of the package's commands, in the robot's units."""
    loaded = load_policy(PolicyFlags(path=str(folder), device="cpu"))
    observation = {key: raw_batch(1)[key] for key in (FRONT, "observation.state", "task")}
    return loaded.postprocess(
        loaded.policy.predict_action_chunk(loaded.preprocess(observation), noise=noise(1))
    )


@pytest.fixture(scope="module")
def wanted(undamaged) -> Tensor:
    return act(undamaged)


def files(folder: Path, ending: str = "") -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending))


def cut(folder: Path, chance: random.Random) -> None:
    file = chance.choice(files(folder))
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def empty(folder: Path, chance: random.Random) -> None:
    chance.choice(files(folder)).write_bytes(b"")


def delete(folder: Path, chance: random.Random) -> None:
    chance.choice(files(folder)).unlink()


def swap(folder: Path, chance: random.Random) -> None:
    a, b = chance.sample(files(folder), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def garble(folder: Path, chance: random.Random) -> None:
    """Bytes of a text, or of a header: a changed number of the weights is a policy as good as any."""
    file = chance.choice(files(folder))
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
    for _ in range(chance.randint(1, 4)):
        # No letter or digit: that makes another name or another number, which may be as good.
        data[chance.randrange(end)] = chance.choice(b"\x00\xff{}[]\"',:\\\x80")
    file.write_bytes(bytes(data))


def another_json(folder: Path, chance: random.Random) -> None:
    chance.choice(files(folder, ".json")).write_text(json.dumps(chance.choice(ANYTHING)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) of a JSON value."""
    keys: Any = (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def change_json(folder: Path, chance: random.Random, change: Callable[[Any, Any], object]) -> None:
    file = chance.choice(files(folder, ".json"))
    found = json.loads(file.read_text())
    change(*chance.choice([place for place in places(found) if place[1] not in SETTINGS]))
    file.write_text(json.dumps(found))


def drop_key(folder: Path, chance: random.Random) -> None:
    change_json(folder, chance, lambda container, key: container.pop(key))


def rename_key(folder: Path, chance: random.Random) -> None:
    def rename(container: Any, key: Any) -> None:
        value = container.pop(key)
        if isinstance(container, dict):
            container[f"{key}_"] = value
        else:
            container.append(value)

    change_json(folder, chance, rename)


def change_type(folder: Path, chance: random.Random) -> None:
    def replace(container: Any, key: Any) -> None:
        container[key] = chance.choice([x for x in ANYTHING if type(x) is not type(container[key])])

    change_json(folder, chance, replace)


def change_tensor(
    file: Path, change: Callable[[dict[str, Tensor], str], object], chance: random.Random
) -> None:
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, chance.choice(sorted(tensors)))
    save_file(tensors, file, metadata)


def state_number(folder: Path, chance: random.Random) -> None:
    """NaN, infinities and huge numbers in the statistics of one pipeline."""

    def set_one(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].clone()
        flat = tensors[name].view(-1)
        number = chance.choice((*NUMBERS, 1e38)) if flat.is_floating_point() else 255
        flat[chance.randrange(len(flat))] = number

    change_tensor(chance.choice(files(folder, "processor.safetensors")), set_one, chance)


def weight_number(folder: Path, chance: random.Random) -> None:
    """NaN and infinities in the weights; other finite numbers are another policy, which nothing can tell."""

    def set_all(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = torch.full_like(tensors[name], chance.choice(NUMBERS))

    change_tensor(chance.choice(sorted(folder.glob("*model*.safetensors"))), set_all, chance)


def rename_tensor(folder: Path, chance: random.Random) -> None:
    def rename(tensors: dict[str, Tensor], name: str) -> None:
        tensors[f"{name}_"] = tensors.pop(name)

    change_tensor(chance.choice(files(folder, ".safetensors")), rename, chance)


def drop_tensor(folder: Path, chance: random.Random) -> None:
    change_tensor(
        chance.choice(files(folder, ".safetensors")), lambda tensors, name: tensors.pop(name), chance
    )


def change_dtype(folder: Path, chance: random.Random) -> None:
    # Not to float64, which holds the same numbers, nor to bfloat16, in which policies are published.
    kind = chance.choice((torch.int32, torch.uint8, torch.complex64, torch.bool))

    def cast(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].to(kind)

    change_tensor(chance.choice(files(folder, ".safetensors")), cast, chance)


def change_shape(folder: Path, chance: random.Random) -> None:
    def shorten(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name][:-1].clone()

    change_tensor(chance.choice(files(folder, ".safetensors")), shorten, chance)


DAMAGES: tuple[Damage, ...] = (
    cut,
    empty,
    delete,
    swap,
    garble,
    another_json,
    drop_key,
    rename_key,
    change_type,
    state_number,
    weight_number,
    rename_tensor,
    drop_tensor,
    change_dtype,
    change_shape,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_folder_acts_as_before_or_is_named(undamaged, wanted, tmp_path_factory, damage, seed):
    folder = tmp_path_factory.mktemp("damaged") / "saved"
    shutil.copytree(undamaged, folder)
    try:
        damage(folder, random.Random(seed))
        try:
            actions, message = act(folder), None
        except UserError as error:
            actions, message = wanted, str(error)
        assert torch.equal(actions, wanted)
        assert message is None or str(folder) in message
    finally:
        shutil.rmtree(folder.parent)
