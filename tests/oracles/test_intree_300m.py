"""LeRobot's in-tree π0 with a Gemma 300M as language model and the published SigLIP, in float32: by hand.

`pytest -m full_size tests/oracles` takes minutes, 19 GB of memory (with mapped files) and 10 GB on disk. The
two sides run one after the other in processes of their own: in-tree leaves weights and results in files.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lerobot_pi0.checkpoints.files import Checkpoint, load_weights
from lerobot_pi0.checkpoints.layouts import from_published
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Observation, Pi0, SiglipConfig

STEPS = 10


def batch() -> tuple[Observation, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two samples, two cameras (one absent), a padded prompt; and actions, noise, time."""
    generator = torch.Generator().manual_seed(0)
    observation = Observation(
        images=torch.rand(2, 2, 3, 224, 224, generator=generator) * 2 - 1,
        image_mask=torch.tensor([[True, True], [True, False]]),
        tokens=torch.randint(0, 257152, (2, 48), generator=generator),
        token_mask=torch.arange(48) < torch.tensor([[48], [11]]),
        state=torch.randn(2, 32, generator=generator),
    )
    actions, noise = torch.randn(2, 2, 50, 32, generator=generator)
    return observation, (actions, noise, torch.tensor([0.8, 0.3]))


def run_in_tree(folder: Path) -> None:
    from lerobot.policies.pi0.modeling_pi0 import PI0Config, PI0Pytorch

    network = PI0Pytorch(PI0Config(paligemma_variant="gemma_300m", dtype="float32", device="cpu"))
    paligemma, expert = network.paligemma_with_expert.paligemma, network.paligemma_with_expert.gemma_expert
    # In-tree projects images to 2048 whatever the width of the language model, and then cannot join them.
    paligemma.model.multi_modal_projector.linear = torch.nn.Linear(1152, 1024)
    paligemma.lm_head = expert.lm_head = None  # text heads that nothing uses
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(std=spread, generator=generator)
    save_file(network.state_dict(), folder / "model.safetensors")

    observation, (actions, noise, time) = batch()
    assert observation.image_mask is not None
    inputs = (
        observation.images.unbind(1),
        observation.image_mask.unbind(1),
        observation.tokens,
        observation.token_mask,
        observation.state,
    )
    sampled = network.sample_actions(*inputs, noise=noise, num_steps=STEPS)
    loss = network(*inputs, actions, noise, time)
    loss.mean().backward()
    save_file({"loss": loss.detach(), "actions": sampled}, folder / "results.safetensors")
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    save_file(gradients, folder / "gradients.safetensors")


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest keeps its folders for three runs


@pytest.mark.full_size
def test_loss_gradients_and_actions(folder, record_property):
    subprocess.run([sys.executable, __file__, str(folder)], check=True)
    vlm = GemmaConfig(width=1024, mlp_dim=4096)
    with torch.device("meta"):
        ours = Pi0(SiglipConfig(), vlm, ExpertConfig(), 32, 32, torch.float32)
    weights = Checkpoint(folder)
    load_weights(ours, weights, dict.fromkeys(weights, torch.float32))

    observation, (actions, noise, time) = batch()
    sampled = ours.sample(observation, noise, STEPS)
    loss = ours.loss(observation, actions, noise, time)
    loss.mean().backward()
    with safe_open(folder / "results.safetensors", framework="pt") as results:
        apart = {name: results.get_tensor(name) for name in ("loss", "actions")}
    apart = {
        "loss": abs(loss.mean().item() - apart["loss"].mean().item()),
        "actions": (sampled - apart["actions"]).abs().max().item(),
    }
    with safe_open(folder / "gradients.safetensors", framework="pt") as file:
        names = list(file.keys())
        gradients = from_published({name: file.get_tensor(name) for name in names})
    whole = sum(gradient.square().sum().item() for gradient in gradients.values()) ** 0.5
    relative = {}
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert name not in gradients or not gradients[name].any(), name
        else:
            # The floor is for what cancels in the softmax (biases of SigLIP's keys): rounding on both sides.
            size = max(gradients[name].norm().item(), 1e-5 * whole)
            relative[name] = (parameter.grad - gradients[name]).norm().item() / size
    worst = max(relative, key=lambda name: relative[name])
    for name, value in (*apart.items(), (f"gradient of {worst}", relative[worst])):
        record_property(name, value)
        print(f"{name}: {value:.2e}")
    assert apart["loss"] < 1e-4
    assert apart["actions"] < 1e-4
    assert relative[worst] < 1e-3


if __name__ == "__main__":
    run_in_tree(Path(sys.argv[1]))
