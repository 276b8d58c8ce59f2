"""A chunk is that of the network as it is now, whatever changed since the last one."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policy import batch, noise, tiny_policy
from torch import Tensor

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.errors import UserError

TARGETS = r"model\.(vlm|expert)\.layers\.\d+\.(q|k|v|o|gate|up|down)_proj"

PARAMETER = "model.expert.layers.0.q_proj.weight"


def chunk(policy: Pi0Policy) -> Tensor:
    return policy.predict_action_chunk(batch(), noise=noise())


def of_the_network(policy: Pi0Policy) -> Tensor:
    given = {key: value for key, value in batch().items() if isinstance(value, Tensor)}
    return policy.predict_with_network(given, noise(), policy.config.num_inference_steps, "euler")


def randomize(policy: Pi0Policy, part: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if part in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def scale(policy: Pi0Policy) -> None:
    for module in policy.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)  # pyrefly: ignore[not-callable]


@pytest.mark.parametrize(
    "change",
    [
        lambda wrapped: wrapped.set_adapter("second"),
        lambda wrapped: wrapped.base_model.disable_adapter_layers(),
        lambda wrapped: scale(wrapped),
        lambda wrapped: wrapped.base_model.merge_adapter(),
    ],
    ids=["set_adapter", "disable", "scale", "merge"],
)
def test_a_chunk_is_that_of_the_adapters_that_are_active(change: Callable):
    policy = tiny_policy()
    settings = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["action_out_proj"])
    wrapped = get_peft_model(policy, settings)
    wrapped.add_adapter("second", copy.deepcopy(settings))
    randomize(policy, "lora_B")
    randomize(policy, "modules_to_save")
    policy.eval()
    chunk(policy)
    change(wrapped)
    policy.eval()
    torch.testing.assert_close(chunk(policy), of_the_network(policy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "lora_bias"])
def test_adapters_that_cannot_be_folded_are_refused(kind):
    policy = tiny_policy()
    get_peft_model(policy, LoraConfig(r=4, target_modules=["state_proj", "action_out_proj"], **kind))
    with pytest.raises(UserError, match=r"adapter 'default'.*cannot be folded into the weights"):
        chunk(policy.eval())


def edit_data(policy: Pi0Policy) -> None:
    policy.get_parameter(PARAMETER).data.mul_(2)


def edit_with_numpy(policy: Pi0Policy) -> None:
    policy.get_parameter(PARAMETER).detach().numpy()[:] *= 2


def step_fused(policy: Pi0Policy) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(policy.parameters(), lr=0.05, fused=True).step()


@pytest.mark.parametrize("edit", [edit_data, edit_with_numpy, step_fused])
def test_edits_that_torch_does_not_count_are_noticed(edit: Callable):
    policy = tiny_policy()
    chunk(policy)
    edit(policy)
    torch.testing.assert_close(chunk(policy), of_the_network(policy), rtol=1e-4, atol=1e-4)
