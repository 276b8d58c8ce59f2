"""Layers that are compiled for training: few graphs for all of them, the same gradients."""

import pytest
from forked import Program, script
from tiny_policy import MODELS, statistics, tiny_config, tiny_policy

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.model.layers import Layer

COMPILED = """
from dataclasses import replace
import torch
from tiny_policy import EXPERT, VISION, VLM, batch, tiny_policy

graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph.forward

compile = torch.compile
torch.compile = lambda function: compile(function, backend=keep)

def step(settings, number, compiled):
    depths = {"vision": replace(VISION, depth=4), "vlm": replace(VLM, depth=5)}
    policy = tiny_policy(MODEL, ema_decay=0, **depths, **settings)
    policy.config.backend = "compile" if compiled else "auto"
    policy.get_optim_params()
    torch.manual_seed(0)
    policy.train().trained.seed = 0
    loss, _ = policy(batch(size=number, model=MODEL))
    loss.backward()
    return loss, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

for settings in ({}, {"gradient_checkpointing": True}, {"freeze": "vlm"}, {"dtype": "bfloat16"}):
    torch._dynamo.reset()
    graphs.clear()
    (loss, gradients), (wanted, others) = (step(settings, 2, compiled) for compiled in (True, False))
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-2 if "dtype" in settings else 1e-5)
    assert gradients.keys() == others.keys()
    found, expected = (torch.cat([of[name].flatten() for name in others]) for of in (gradients, others))
    distance = (found - expected).norm() / expected.norm()
    assert distance < (0.05 if "dtype" in settings else 1e-4), (settings, distance)
    # A few of each stack, at any depth.
    assert len(graphs) <= 5, (settings, len(graphs))
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_a_stack_share_a_graph_and_their_gradients_are_the_eager_ones(model, tmp_path):
    # In a process of its own: in this one every function of the network is wrapped in a check of its shapes.
    Program(tmp_path / "log.txt", script, f"MODEL = {model!r}\n{COMPILED}").succeed()


def test_layers_are_compiled_in_training_alone_and_where_it_is_asked_for():
    def compiled(policy) -> set[bool]:
        return {module.compiled for module in policy.modules() if isinstance(module, Layer)}

    policy = tiny_policy(backend="compile")
    assert compiled(policy) == {False}
    assert compiled(policy.train()) == {True}
    assert compiled(policy.eval()) == {False}  # golden actions are those of the network as it is written down
    assert compiled(tiny_policy().train()) == {False}


@pytest.mark.parametrize("backend", ["int8", "fp8"])
def test_a_backend_of_rounded_weights_is_refused_for_training(backend):
    config = tiny_config(backend=backend)
    with pytest.raises(UserError, match=f"backend={backend} is for running a policy: train without it"):
        policy_class(config)(config, dataset_stats=statistics())
