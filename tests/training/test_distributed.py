"""Several processes do what one does: FSDP of both versions on its units, DDP through `lerobot-train`.

accelerate runs FSDP on accelerators alone (on a CPU it silently takes DDP), so here torch's FSDP stands by
itself, and the policy is wrapped, saved and restored as LeRobot would.
"""

import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Program, commands
from lerobot.common import train_utils
from safetensors.torch import load_file
from tiny_dataset import noise_episodes, write_dataset
from tiny_policy import ACTION, SIZES, STATE, batch, statistics, tiny_config, tiny_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy

lerobots: Any = train_utils
# The versions of FSDP that LeRobot has: after 0.6.1 the second alone.
LEROBOTS = (1, 2) if hasattr(lerobots, "load_fsdp_optimizer_state") else (2,)

pytestmark = pytest.mark.slow

PROCESSES = 2
STEPS = 2
# FSDP1 flattens a unit's parameters into one, of one dtype: where frozen ones are bfloat16, units are leaves.
FSDP1_UNITS = ("Linear", "RMSNorm", "LayerNorm", "Embedding", "Siglip")


@dataclass(frozen=True)
class Case:
    """How the policy is trained: by what version of FSDP, what of it, in what precision."""

    fsdp: int
    freeze: str = "nothing"  # as in the config, or "most": the attention's projections train, all over
    checkpointing: bool = False
    frozen_dtype: torch.dtype = torch.bfloat16
    computes_in: torch.dtype | None = None  # FSDP's mixed precision
    model: str = "pi0"

    def __str__(self) -> str:
        parts = (f"fsdp{self.fsdp}", self.model, self.freeze, self.frozen_dtype, self.computes_in or "")
        return "-".join(str(part).removeprefix("torch.") for part in parts if part) + (
            "-checkpointing" if self.checkpointing else ""
        )


EXACT = [
    Case(2, frozen_dtype=torch.float32),
    Case(2, checkpointing=True),
    Case(2, "vision"),
    Case(2, "vlm"),
    Case(2, "vlm", checkpointing=True),
    Case(2, "most"),
    Case(2, checkpointing=True, model="pi05"),
    Case(1, "vision"),
    Case(1, "vlm", checkpointing=True),
    Case(1, "most"),
    Case(1, "vision", model="pi05"),
]
SAVED = [Case(fsdp, "vision") for fsdp in LEROBOTS] + [Case(2, "vision", model="pi05")]
ROUNDED = [
    Case(2, checkpointing=True, computes_in=torch.bfloat16),
    Case(1, "vlm", checkpointing=True, computes_in=torch.bfloat16),
]


def make_policy(case: Case) -> tuple[Pi0Policy, torch.optim.Optimizer]:
    """As LeRobot has policy and optimizer before it hands them to accelerate."""
    freeze: Any = "nothing" if case.freeze == "most" else case.freeze
    settings = {"freeze": freeze, "gradient_checkpointing": case.checkpointing, "ema_decay": 0}
    policy = tiny_policy(case.model, **settings).train()
    if case.freeze == "most":
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ("q_proj" in name or "v_proj" in name))
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(case.frozen_dtype)
    return policy, policy.config.get_optimizer_preset().build(policy.get_optim_params())


def shard(case: Case, policy: Pi0Policy, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    if case.fsdp == 1:
        units = {type(module) for module in policy.modules() if type(module).__name__ in FSDP1_UNITS}
        dtype = case.computes_in
        return FullyShardedDataParallel(
            policy,
            auto_wrap_policy=ModuleWrapPolicy(units),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(dtype, dtype, dtype) if dtype else None,
        )
    mixed_precision = MixedPrecisionPolicy(case.computes_in, case.computes_in, case.computes_in)
    for module in reversed(list(policy.modules())):
        if type(module).__name__ in Pi0Policy._fsdp_wrap_modules:
            fully_shard(module, mp_policy=mixed_precision)
    fully_shard(policy, mp_policy=mixed_precision)
    if optimizer is not None:
        # As accelerate puts the shards in the places of the parameters.
        optimizer.param_groups[0]["params"] = [p for p in policy.parameters() if p.requires_grad]
    return policy


def gradients(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            named = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in module.named_parameters()}
            return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in found.items()}


def step(module: nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> tuple[Tensor, dict]:
    """A step; gives the loss and the gradients."""
    loss = module(given)[0].float()
    loss.backward()
    found = gradients(module)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), found


def mean(loss: Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / PROCESSES


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several; prompts, which in π0.5 are as long as their states are written, are padded."""
    joined = dict(parts[0])
    for key, value in joined.items():
        if isinstance(value, Tensor):
            rows = [row for part in parts for row in part[key]]
            joined[key] = pad_sequence(rows, batch_first=True) if value.ndim > 1 else torch.stack(rows)
    return joined


def compare(case: Case, rank: int) -> dict[str, Any]:
    """Losses of some steps and the first gradients, of one process on the whole batch and of all on parts."""
    (policy, optimizer), (sharded, sharded_optimizer) = make_policy(case), make_policy(case)
    module = shard(case, sharded, sharded_optimizer)
    result: dict[str, Any] = {"losses": [], "wanted": []}
    for i in range(STEPS):
        parts = [batch(2, PROCESSES * i + part, case.model) for part in range(PROCESSES)]
        wanted, wanted_gradients = step(policy, optimizer, whole(parts))
        loss, found = step(module, sharded_optimizer, parts[rank])
        result["losses"].append(mean(loss))
        result["wanted"].append(wanted.item())
        if i == 0:
            result["gradients"], result["wanted_gradients"] = found, wanted_gradients
    return result


def save_and_resume(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """A checkpoint after one step, and losses of the next steps: of the same run, and of a resumed one."""
    policy, optimizer = make_policy(case)
    names = {name: (tensor.shape, tensor.dtype) for name, tensor in policy.state_dict().items()}
    module = shard(case, policy, optimizer)
    step(module, optimizer, batch(2, rank, case.model))
    whole_state = StateDictOptions(full_state_dict=True)
    if case.fsdp == 1:
        # As LeRobot does it, but for offloading to the CPU, where torch frees what is there already.
        settings = FullStateDictConfig(), FullOptimStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *settings):
            weights = module.state_dict()
            moments = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        policy.save_pretrained(folder, state_dict=weights)
    else:
        policy.save_pretrained(folder)
        moments = get_optimizer_state_dict(module, optimizer, options=whole_state)
    state: Any = moments["state"]  # some are the optimizer's own, some share their memory
    moments["state"] = {name: {key: x.clone() for key, x in of.items()} for name, of in state.items()}
    if case.fsdp == 1 and rank == 0:
        lerobots.save_training_state(folder, 1, optimizer, optim_state_dict=moments)
    dist.barrier()
    resumed, resumed_optimizer = make_policy(case)
    resumed.load_state_dict(type(resumed).from_pretrained(folder).state_dict())
    resumed_module = shard(case, resumed, resumed_optimizer)
    if case.fsdp == 1:
        lerobots.load_fsdp_optimizer_state(resumed_module, resumed_optimizer, folder)
    else:
        set_optimizer_state_dict(resumed_module, resumed_optimizer, moments, options=whole_state)
    # On a CPU FSDP1 gathers all moments of a parameter into the same memory: only one step can be right.
    batches = [batch(2, rank + seed, case.model) for seed in ((2,) if case.fsdp == 1 else (2, 4))]
    return {
        "names": names,
        "wanted": [mean(step(module, optimizer, given)[0]) for given in batches],
        "resumed": [mean(step(resumed_module, resumed_optimizer, given)[0]) for given in batches],
    }


def refusal(fsdp: int) -> str:
    """What the policy says to a moving average."""
    policy = Pi0Policy(tiny_config(), statistics(), SimpleNamespace())
    policy.get_optim_params()
    module = shard(Case(fsdp), policy)
    try:
        module.train()(batch())
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: Path) -> None:
    """All that is done under FSDP, by one of the processes; the first leaves the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results: dict[str, Any] = {str(case): compare(case, rank) for case in EXACT + ROUNDED}
    results |= {f"saved {case}": save_and_resume(case, rank, folder / str(case)) for case in SAVED}
    results |= {f"refused {fsdp}": refusal(fsdp) for fsdp in LEROBOTS}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("fsdp")
    finish([Program(folder / f"rank{rank}.txt", work, rank, folder) for rank in range(PROCESSES)])
    return torch.load(folder / "results.pt", weights_only=False), folder


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_loss_and_gradients_under_fsdp_are_those_of_one_process_on_the_whole_batch(sharded, case):
    result = sharded[0][str(case)]
    torch.testing.assert_close(result["losses"], result["wanted"], rtol=1e-5, atol=1e-5)
    assert len(set(result["losses"])) == STEPS
    found, wanted = result["gradients"], result["wanted_gradients"]
    assert found.keys() == wanted.keys()
    assert len(wanted) > 6
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_fsdps_mixed_precision_rounds_the_loss_and_no_more(sharded, case):
    result = sharded[0][str(case)]
    assert result["losses"] != result["wanted"]
    torch.testing.assert_close(result["losses"], result["wanted"], rtol=2e-2, atol=0)


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_sharded_policy_is_saved_as_a_whole_one(sharded, case):
    results, folder = sharded
    policy = policy_class(tiny_config(case.model)).from_pretrained(folder / str(case))
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in policy.state_dict().items()}
    assert found == results[f"saved {case}"]["names"]
    assert policy(batch(model=case.model))[0] > 0


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_sharded_run_goes_on_from_what_it_saved(sharded, case):
    result = sharded[0][f"saved {case}"]
    torch.testing.assert_close(result["resumed"], result["wanted"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fsdp", LEROBOTS)
def test_what_needs_whole_weights_is_refused_under_fsdp(sharded, fsdp):
    assert "--policy.ema_decay=0" in sharded[0][f"refused {fsdp}"]


def train(folder: Path, run: str, processes: int, *arguments: str) -> list[Program]:
    """LeRobot's training command, in as many processes as torchrun would start with the same variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    world = address | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    line = ["lerobot-train", f"--output_dir={folder / run}", *arguments]
    return [
        Program(
            folder / f"{run}{rank}.txt",
            commands,
            [line],
            **(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
        )
        for rank in range(processes)
    ]


def finish(programs: list[Program]) -> None:
    for program in programs:
        program.succeed()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Four steps on four frames each, by one process and by two."""
    folder = tmp_path_factory.mktemp("ddp")
    episodes = noise_episodes(("open the door", "close the drawer"), 10, STATE, ACTION)
    dataset = write_dataset(folder / "data", episodes, list("abcde"), list("abcd"))
    arguments = [
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        "--policy.type=lerobot_pi0",
        *SIZES,
        "--policy.tokenizer=small",
        "--policy.dtype=float32",
        "--policy.gradient_checkpointing=true",
        "--policy.optimizer_lr=1e-3",
        "--policy.optimizer_eps=1e-4",  # a gradient of nearly zero makes a step of nearly zero
        "--policy.scheduler_decay_lr=1e-3",
        "--policy.scheduler_warmup_steps=0",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--num_workers=0",
        "--steps=4",
        "--save_freq=2",
        "--env_eval_freq=0",
    ]
    one = train(folder, "one", 1, *arguments, f"--batch_size={2 * PROCESSES}")
    finish(one + train(folder, "two", PROCESSES, *arguments, "--batch_size=2"))
    return folder


@pytest.fixture(scope="module")
def resumed(trained) -> Path:
    """The last two steps of the two processes, by two new ones."""
    config = trained / "two" / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    finish(train(trained, "resumed", PROCESSES, f"--config_path={config}", "--resume=true"))
    return trained


def saved(folder: Path, run: str, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's weights, which are averages, and the optimizer's state, with the weights it steps on."""
    checkpoint = folder / run / "checkpoints" / f"{step:06d}"
    return (
        load_file(checkpoint / "pretrained_model" / "model.safetensors"),
        load_file(checkpoint / "training_state" / "optimizer_state.safetensors"),
    )


def test_two_processes_train_as_one_does_on_both_batches(trained):
    for one, two in zip(saved(trained, "one", 4), saved(trained, "two", 4), strict=True):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    (_, earlier), (_, later) = saved(trained, "two", 2), saved(trained, "two", 4)
    moved = [(later[name] - earlier[name]).abs().max() for name in later if name.endswith("/weights")]
    assert len(moved) > 50
    assert torch.stack(moved).median() > 1e-4  # ten times what is tolerated


def test_two_processes_resume_bit_for_bit(resumed):
    for wanted, found in zip(saved(resumed, "two", 4), saved(resumed, "resumed", 4), strict=True):
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
