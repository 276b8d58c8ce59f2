"""A tiny π0 or π0.5 with random weights and one batch, for this package and those it is compared with."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from lerobot_pi0.checkpoints.files import load_weights
from lerobot_pi0.checkpoints.layouts import from_published
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Network, Observation, Pi0, Pi05, SiglipConfig

VISION = SiglipConfig(image_size=28, patch_size=14, width=32, depth=2, mlp_dim=48, num_heads=2)
# LeRobot's π0 has eight query heads written into its attention.
VLM = GemmaConfig(width=64, depth=3, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16, vocab_size=128)
EXPERT = ExpertConfig(width=32, mlp_dim=48)


@pytest.fixture(scope="session")
def sizes() -> tuple[SiglipConfig, GemmaConfig, ExpertConfig]:
    return VISION, VLM, EXPERT


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], None]:
    """Every parameter random: initializers leave norms and biases at values that hide mistakes."""

    def fill(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread

    return fill


@pytest.fixture(scope="session")
def ours_with() -> Callable[..., Network]:
    """ours_with(published, dtype): our network with the weights of a published layout's state dict."""

    def make(published: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Network:
        tensors = {name: tensor.detach().clone() for name, tensor in from_published(published).items()}
        sizes = VISION, VLM, EXPERT
        with torch.device("meta"):
            is_pi0 = "state_proj.weight" in tensors
            model = Pi0(*sizes, 32, 32, dtype) if is_pi0 else Pi05(*sizes, 32, dtype)
        load_weights(model, tensors, dict.fromkeys(tensors, dtype))
        return model

    return make


@pytest.fixture(scope="session")
def observation() -> Observation:
    """Three samples, two cameras; the second camera is absent in one, two prompts are padded."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 4, 6])
    return Observation(
        images=torch.rand(3, 2, 3, 28, 28, generator=generator) * 2 - 1,
        image_mask=torch.tensor([[True, True], [True, False], [True, True]]),
        tokens=torch.randint(1, 128, (3, 7), generator=generator),
        token_mask=torch.arange(7) < lengths[:, None],
        state=torch.randn(3, 32, generator=generator),
    )


@pytest.fixture(scope="session")
def training_pair() -> tuple[Tensor, Tensor, Tensor]:
    """Actions, noise, time."""
    generator = torch.Generator().manual_seed(2)
    actions, noise = torch.randn(2, 3, 10, 32, generator=generator)
    return actions, noise, torch.tensor([0.9, 0.5, 0.1])


@pytest.fixture(scope="session")
def assert_same_gradients() -> Callable[[Network, nn.Module], None]:
    """Those of our parameters and those of another implementation's, both after a backward pass."""

    def compare(ours: Network, theirs: nn.Module) -> None:
        expected = from_published(
            {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        )
        whole = sum(gradient.square().sum().item() for gradient in expected.values()) ** 0.5
        for name, parameter in ours.named_parameters():
            if parameter.grad is None:
                assert name not in expected or not expected[name].any(), name
            else:
                # Absolute for what cancels in the softmax (biases of SigLIP's keys): both sides are rounding.
                difference = (parameter.grad - expected[name]).norm().item()
                assert difference < 1e-3 * expected[name].norm().item() + 1e-6 * whole, name

    return compare
