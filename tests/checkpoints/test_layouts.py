"""Names of tensors: every published layout gives the tensors of `Pi0`, each in its place."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.pi0.configuration_pi0 import PI0Config as InTreeConfig
from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
from lerobot.policies.pi05.configuration_pi05 import PI05Config as InTreePi05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch
from openpi_jax import from_openpi_jax
from tiny_policy import EXPERT, VISION, VLM, tiny_network, tiny_policy
from torch import Tensor
from transformers import PI0Config as NativeConfig
from transformers import PI0ForConditionalGeneration

from lerobot_pi0.checkpoints.files import Checkpoint, load_weights
from lerobot_pi0.checkpoints.layouts import FAMILIES, PI0, PI05, Family, family_of, from_published, to_openpi
from lerobot_pi0.conversion.convert import convert
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.errors import CheckpointError
from lerobot_pi0.model import ExpertConfig, GemmaConfig, Pi0, Pi05, SiglipConfig
from lerobot_pi0.modeling_pi0 import Pi0Policy

PALIGEMMA = "paligemma_with_expert.paligemma."
TABLE = PALIGEMMA + "model.language_model.embed_tokens.weight"
HEAD = PALIGEMMA + "lm_head.weight"
EXPERT_MODEL = "paligemma_with_expert.gemma_expert.model."
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"

# One of each kind of tensor, written by hand: shapes alone would not tell keys from values, or gate from up.
VISION_LAYER = "model.vision_tower.vision_model.encoder.layers.1."
NAMES = {
    "model.vision_tower.vision_model.embeddings.patch_embedding.weight": "vision.patch_embedding.weight",
    "model.vision_tower.vision_model.embeddings.position_embedding.weight": "vision.position_embedding",
    VISION_LAYER + "layer_norm1.bias": "vision.layers.1.attention_norm.bias",
    VISION_LAYER + "layer_norm2.bias": "vision.layers.1.mlp_norm.bias",
    VISION_LAYER + "self_attn.q_proj.weight": "vision.layers.1.q_proj.weight",
    VISION_LAYER + "self_attn.k_proj.weight": "vision.layers.1.k_proj.weight",
    VISION_LAYER + "self_attn.v_proj.weight": "vision.layers.1.v_proj.weight",
    VISION_LAYER + "self_attn.out_proj.bias": "vision.layers.1.o_proj.bias",
    VISION_LAYER + "mlp.fc1.weight": "vision.layers.1.up_proj.weight",
    VISION_LAYER + "mlp.fc2.weight": "vision.layers.1.down_proj.weight",
    "model.vision_tower.vision_model.post_layernorm.weight": "vision.norm.weight",
    "model.multi_modal_projector.linear.weight": "vision.projector.weight",
    "model.language_model.layers.1.input_layernorm.weight": "vlm.layers.1.attention_norm.weight",
    "model.language_model.layers.1.post_attention_layernorm.weight": "vlm.layers.1.mlp_norm.weight",
    "model.language_model.layers.1.self_attn.q_proj.weight": "vlm.layers.1.q_proj.weight",
    "model.language_model.layers.1.self_attn.k_proj.weight": "vlm.layers.1.k_proj.weight",
    "model.language_model.layers.1.self_attn.v_proj.weight": "vlm.layers.1.v_proj.weight",
    "model.language_model.layers.1.self_attn.o_proj.weight": "vlm.layers.1.o_proj.weight",
    "model.language_model.layers.1.mlp.gate_proj.weight": "vlm.layers.1.gate_proj.weight",
    "model.language_model.layers.1.mlp.up_proj.weight": "vlm.layers.1.up_proj.weight",
    "model.language_model.layers.1.mlp.down_proj.weight": "vlm.layers.1.down_proj.weight",
    "model.language_model.norm.weight": "vlm.norm.weight",
    "lm_head.weight": "token_embedding.weight",
}
EXPERT_NAMES = {
    "layers.1.input_layernorm.weight": "expert.layers.1.attention_norm.weight",
    "layers.1.post_attention_layernorm.weight": "expert.layers.1.mlp_norm.weight",
    "layers.1.self_attn.q_proj.weight": "expert.layers.1.q_proj.weight",
    "layers.1.self_attn.k_proj.weight": "expert.layers.1.k_proj.weight",
    "layers.1.self_attn.v_proj.weight": "expert.layers.1.v_proj.weight",
    "layers.1.self_attn.o_proj.weight": "expert.layers.1.o_proj.weight",
    "layers.1.mlp.gate_proj.weight": "expert.layers.1.gate_proj.weight",
    "layers.1.mlp.up_proj.weight": "expert.layers.1.up_proj.weight",
    "layers.1.mlp.down_proj.weight": "expert.layers.1.down_proj.weight",
    "norm.weight": "expert.norm.weight",
}
ADAPTIVE_NAMES = {
    theirs.replace("norm.weight", "norm.dense.weight"): ours.replace("norm.weight", "norm.dense.weight")
    for theirs, ours in EXPERT_NAMES.items()
}
PROJECTIONS = {
    PI0: ["state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj"],
    PI05: ["action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj"],
}
OPENPI = {
    family: {
        **{PALIGEMMA + theirs: ours for theirs, ours in NAMES.items()},
        **{EXPERT_MODEL + theirs: ours for theirs, ours in expert.items()},
        **{f"{name}.{kind}": f"{name}.{kind}" for name in PROJECTIONS[family] for kind in ("weight", "bias")},
    }
    for family, expert in ((PI0, EXPERT_NAMES), (PI05, ADAPTIVE_NAMES))
}


@pytest.fixture(scope="module", params=FAMILIES, ids=["pi0", "pi05"])
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def in_tree(family) -> dict[str, Tensor]:
    """What LeRobot's own policy of the published size saves, without its values."""
    with torch.device("meta"):
        network = (
            PI0Pytorch(InTreeConfig(device="cpu"))
            if family is PI0
            else PI05Pytorch(InTreePi05Config(device="cpu"))
        )
    return {f"model.{name}": tensor for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def published_shapes(family) -> dict[str, torch.Size]:
    with torch.device("meta"):
        sizes = SiglipConfig(), GemmaConfig(), ExpertConfig()
        network = Pi0(*sizes, 32, 32, torch.float32) if family is PI0 else Pi05(*sizes, 32, torch.float32)
    return shapes(network.state_dict())


@pytest.fixture(scope="module")
def tiny(family) -> dict[str, Tensor]:
    """The tensors of a tiny network of ours."""
    return tiny_policy(family.in_tree).model.state_dict()


def shapes(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state_dict.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_openpi_names_of_every_kind_of_tensor_are_the_ones_written_by_hand(family, tiny):
    published, by_hand = to_openpi(tiny), OPENPI[family]
    for theirs, name in by_hand.items():
        assert published[theirs] is tiny[name]
    kinds = {re.sub(r"layers\.\d+", "layers.1", name).replace(".bias", ".weight") for name in published}
    assert kinds == {name.replace(".bias", ".weight") for name in by_hand}


def test_openpi_round_trip_is_the_identity(tiny):
    assert_same(from_published(to_openpi(tiny)), tiny)
    published = to_openpi(tiny)
    assert_same(to_openpi(from_published(published)), published)


def test_a_file_of_ours_passes_through(tiny):
    assert_same(from_published({f"model.{name}": tensor for name, tensor in tiny.items()}), tiny)


def test_what_another_model_has_is_left_over(family, tiny):
    """Norms of the other kind, projections that the model does not have, old LeRobot's statistics of π0.5."""
    strays = {
        PI0: [f"{EXPERT_MODEL}norm.bias"],
        PI05: [
            f"{EXPERT_MODEL}norm.weight",
            "state_proj.weight",
            "normalize_targets.buffer_action.std",
        ],
    }[family]
    found = from_published(to_openpi(tiny) | dict.fromkeys(strays, torch.zeros(1)))
    assert len(found.keys() - tiny.keys()) == len(strays)


def test_in_tree_at_the_published_size_fits_name_for_name_and_shape_for_shape(in_tree, published_shapes):
    assert shapes(from_published(in_tree)) == published_shapes


def test_in_tree_without_prefix_and_with_the_embedding_only_under_the_text_head(in_tree, published_shapes):
    """The layout of lerobot/pi0_base."""
    bare = {name.removeprefix("model."): tensor for name, tensor in in_tree.items()}
    table = bare.pop(TABLE)
    assert shapes(from_published(bare)) == published_shapes
    assert from_published(bare | {TABLE: table})["token_embedding.weight"] is table  # where both are there


def test_openpi_pytorch_at_the_published_size(in_tree):
    """In-tree's names, unprefixed, and the embedding under the text head's name only."""
    published = {name.removeprefix("model."): tensor for name, tensor in in_tree.items()}
    published.pop(TABLE)
    published.pop(EXPERT_HEAD)
    assert shapes(to_openpi(from_published(published))) == shapes(published)


@pytest.mark.parametrize("stored", ["embed_tokens", "lm_head"])
def test_old_lerobot_names_with_statistics_among_them(stored):
    ours = tiny_network().state_dict()
    old = {
        "normalize_inputs.buffer_observation_state.mean": torch.zeros(5),
        "normalize_targets.buffer_action.std": torch.ones(4),
        "unnormalize_outputs.buffer_action.std": torch.ones(4),
        "model." + EXPERT_HEAD: torch.zeros(1024, 32),
    }
    for name, tensor in to_openpi(ours).items():
        name = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
        name = name.replace("paligemma.model.vision_tower.", "paligemma.vision_tower.")
        name = name.replace("paligemma.model.multi_modal_projector.", "paligemma.multi_modal_projector.")
        name = name.replace(
            "paligemma.lm_head.",
            "paligemma.language_model.model.embed_tokens."
            if stored == "embed_tokens"
            else "paligemma.language_model.lm_head.",
        )
        old["model." + name] = tensor
    assert_same(from_published(old), ours)


@pytest.fixture(scope="module")
def native() -> PI0ForConditionalGeneration:
    """transformers' own π0 in our tiny sizes."""
    torch.manual_seed(0)
    heads = {
        "model_type": "gemma",
        "num_hidden_layers": VLM.depth,
        "num_attention_heads": VLM.num_heads,
        "num_key_value_heads": VLM.num_kv_heads,
        "head_dim": VLM.head_dim,
        "vocab_size": VLM.vocab_size,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": VISION.width,
        "intermediate_size": VISION.mlp_dim,
        "patch_size": VISION.patch_size,
        "image_size": VISION.image_size,
        "num_hidden_layers": VISION.depth,
        "num_attention_heads": VISION.num_heads,
        "vision_use_head": False,
    }
    sizes: dict[str, Any] = {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": heads | {"hidden_size": VLM.width, "intermediate_size": VLM.mlp_dim},
            "vision_config": vision,
            "projection_dim": VLM.width,
            "image_token_id": VLM.vocab_size - 1,
        },
        "dit_config": heads | {"hidden_size": EXPERT.width, "intermediate_size": EXPERT.mlp_dim},
        "max_state_dim": 8,
        "max_action_dim": 8,
        "chunk_size": 6,
    }
    return PI0ForConditionalGeneration(NativeConfig(**sizes))


def test_transformers_native_fills_our_network(native):
    found = from_published(native.state_dict())
    assert shapes(found) == shapes(tiny_network().state_dict())
    vlm, expert = native.model.vlm, native.model.dit
    vision = vlm.vision_tower.vision_model.encoder
    for name, tensor in {
        "token_embedding.weight": vlm.language_model.embed_tokens.weight,
        "vision.layers.1.k_proj.weight": vision.layers[1].self_attn.k_proj.weight,
        "vlm.layers.1.gate_proj.weight": vlm.language_model.layers[1].mlp.gate_proj.weight,
        "expert.layers.0.v_proj.weight": expert.layers[0].self_attn.v_proj.weight,
        "action_in_proj.weight": native.embed_action_time.action_in_proj.weight,
        "action_out_proj.bias": native.action_out_proj.bias,
    }.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("largest_shard", ["5GB", "100KB"])
def test_what_transformers_native_writes_to_disk_reads_the_same(native, tmp_path, largest_shard):
    native.save_pretrained(tmp_path, max_shard_size=largest_shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (largest_shard == "5GB")
    assert_same(dict(Checkpoint(tmp_path)), from_published(native.state_dict()))


def test_transformers_native_converts_into_a_policy_of_ours(native, tmp_path):
    native.save_pretrained(tmp_path / "native")
    flags: dict[str, Any] = {"tokenizer": "small", "statistics": False}
    text = convert(ConvertConfig(str(tmp_path / "native"), tmp_path / "ours", **flags))
    assert "from transformers' π0" in text
    policy = Pi0Policy.from_pretrained(tmp_path / "ours")
    assert (policy.config.chunk_size, policy.config.dtype) == (6, "float32")
    assert (policy.config.vision, policy.config.vlm, policy.config.expert) == (VISION, VLM, EXPERT)
    assert_same(policy.model.state_dict(), from_published(native.state_dict()))


def random_jax_leaves() -> dict[str, np.ndarray]:
    """Shapes of semantics of openpi's JAX checkpoint, at sizes that are all different."""
    depth, vision_depth, heads, head, width, mlp, expert_width, expert_mlp, vocab = (
        2,
        3,
        4,
        6,
        10,
        14,
        22,
        26,
        34,
    )
    vision_depth, v_width, v_mlp, v_heads, v_head, patches, image = 3, 15, 21, 3, 5, 9, "PaliGemma/img/"
    block = image + "Transformer/encoderblock/"
    layout = {
        image + "embedding/kernel": (2, 2, 3, v_width),
        image + "embedding/bias": (v_width,),
        image + "pos_embedding": (1, patches, v_width),
        **{
            f"{block}LayerNorm_{i}/{kind}": (vision_depth, v_width)
            for i in (0, 1)
            for kind in ("scale", "bias")
        },
        block + "MlpBlock_0/Dense_0/kernel": (vision_depth, v_width, v_mlp),
        block + "MlpBlock_0/Dense_0/bias": (vision_depth, v_mlp),
        block + "MlpBlock_0/Dense_1/kernel": (vision_depth, v_mlp, v_width),
        block + "MlpBlock_0/Dense_1/bias": (vision_depth, v_width),
        **{
            f"{block}MultiHeadDotProductAttention_0/{which}/kernel": (vision_depth, v_width, v_heads, v_head)
            for which in ("query", "key", "value")
        },
        **{
            f"{block}MultiHeadDotProductAttention_0/{which}/bias": (vision_depth, v_heads, v_head)
            for which in ("query", "key", "value")
        },
        block + "MultiHeadDotProductAttention_0/out/kernel": (vision_depth, v_heads, v_head, v_width),
        block + "MultiHeadDotProductAttention_0/out/bias": (vision_depth, v_width),
        image + "Transformer/encoder_norm/scale": (v_width,),
        image + "Transformer/encoder_norm/bias": (v_width,),
        image + "head/kernel": (v_width, width),
        image + "head/bias": (width,),
        "PaliGemma/llm/embedder/input_embedding": (vocab, width),
        "state_proj/kernel": (8, expert_width),
        "state_proj/bias": (expert_width,),
        "action_in_proj/kernel": (8, expert_width),
        "action_in_proj/bias": (expert_width,),
        "action_time_mlp_in/kernel": (2 * expert_width, expert_width),
        "action_time_mlp_in/bias": (expert_width,),
        "action_time_mlp_out/kernel": (expert_width, expert_width),
        "action_time_mlp_out/bias": (expert_width,),
        "action_out_proj/kernel": (expert_width, 8),
        "action_out_proj/bias": (8,),
    }
    for suffix, w, m in (("", width, mlp), ("_1", expert_width, expert_mlp)):
        layers = "PaliGemma/llm/layers/"
        layout |= {
            f"{layers}attn/q_einsum{suffix}/w": (depth, heads, w, head),
            f"{layers}attn/kv_einsum{suffix}/w": (depth, 2, 1, w, head),
            f"{layers}attn/attn_vec_einsum{suffix}/w": (depth, heads, head, w),
            f"{layers}mlp{suffix}/gating_einsum": (depth, 2, w, m),
            f"{layers}mlp{suffix}/linear": (depth, m, w),
            f"{layers}pre_attention_norm{suffix}/scale": (depth, w),
            f"{layers}pre_ffw_norm{suffix}/scale": (depth, w),
            f"PaliGemma/llm/final_norm{suffix}/scale": (w,),
        }
    generator = np.random.default_rng(0)
    return {path: generator.standard_normal(shape, dtype=np.float32) for path, shape in layout.items()}


def test_jax_leaves_cover_the_network_in_shape():
    vision = SiglipConfig(image_size=6, patch_size=2, width=15, depth=3, mlp_dim=21, num_heads=3)
    vlm = GemmaConfig(width=10, depth=2, mlp_dim=14, num_heads=4, num_kv_heads=1, head_dim=6, vocab_size=34)
    network = Pi0(vision, vlm, ExpertConfig(width=22, mlp_dim=26), 8, 8, torch.float32)
    tensors = from_openpi_jax(random_jax_leaves())
    assert shapes(tensors) == shapes(network.state_dict())
    load_weights(network, tensors, dict.fromkeys(tensors, torch.float32))


def test_jax_leaves_compute_what_openpi_computes_with_them():
    """Each leaf in the einsum that openpi's JAX code has it in, against torch's linear layer with ours."""
    leaves = random_jax_leaves()
    ours = {name: tensor.numpy() for name, tensor in from_openpi_jax(leaves).items()}
    generator = np.random.default_rng(1)

    def x(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def same(found: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

    for suffix, stack, width, mlp in (("", "vlm", 10, 14), ("_1", "expert", 22, 26)):
        theirs, own = "PaliGemma/llm/layers/", f"{stack}.layers.1."
        t = x(7, width)
        q = np.einsum("TD,NDH->TNH", t, leaves[f"{theirs}attn/q_einsum{suffix}/w"][1])
        same(t @ ours[own + "q_proj.weight"].T, q.reshape(7, -1))
        k, v = np.einsum("SD,PKDH->PSKH", t, leaves[f"{theirs}attn/kv_einsum{suffix}/w"][1])
        same(t @ ours[own + "k_proj.weight"].T, k.reshape(7, -1))
        same(t @ ours[own + "v_proj.weight"].T, v.reshape(7, -1))
        heads = x(7, 4, 6)
        o = np.einsum("TNH,NHD->TD", heads, leaves[f"{theirs}attn/attn_vec_einsum{suffix}/w"][1])
        same(heads.reshape(7, -1) @ ours[own + "o_proj.weight"].T, o)
        same(t @ ours[own + "gate_proj.weight"].T, t @ leaves[f"{theirs}mlp{suffix}/gating_einsum"][1, 0])
        same(t @ ours[own + "up_proj.weight"].T, t @ leaves[f"{theirs}mlp{suffix}/gating_einsum"][1, 1])
        t = x(7, mlp)
        same(t @ ours[own + "down_proj.weight"].T, t @ leaves[f"{theirs}mlp{suffix}/linear"][1])
        same(ours[own + "attention_norm.weight"], leaves[f"{theirs}pre_attention_norm{suffix}/scale"][1])
        same(ours[own + "mlp_norm.weight"], leaves[f"{theirs}pre_ffw_norm{suffix}/scale"][1])
        same(ours[f"{stack}.norm.weight"], leaves[f"PaliGemma/llm/final_norm{suffix}/scale"])

    attention = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/"
    t = x(7, 15)
    for which, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        wanted = np.einsum("TD,DNH->TNH", t, leaves[f"{attention}{which}/kernel"][2])
        wanted = wanted + leaves[f"{attention}{which}/bias"][2]
        own = f"vision.layers.2.{name}."
        same(t @ ours[own + "weight"].T + ours[own + "bias"], wanted.reshape(7, -1))
    heads = x(7, 3, 5)
    wanted = np.einsum("TNH,NHD->TD", heads, leaves[attention + "out/kernel"][2])
    same(heads.reshape(7, -1) @ ours["vision.layers.2.o_proj.weight"].T, wanted)
    block = "PaliGemma/img/Transformer/encoderblock/"
    same(ours["vision.layers.2.o_proj.bias"], leaves[attention + "out/bias"][2])
    same(ours["vision.layers.0.attention_norm.weight"], leaves[block + "LayerNorm_0/scale"][0])
    same(ours["vision.layers.0.mlp_norm.bias"], leaves[block + "LayerNorm_1/bias"][0])
    same(t @ ours["vision.layers.0.up_proj.weight"].T, t @ leaves[block + "MlpBlock_0/Dense_0/kernel"][0])
    same(ours["vision.layers.0.down_proj.bias"], leaves[block + "MlpBlock_0/Dense_1/bias"][0])
    same(t @ ours["vision.projector.weight"].T, t @ leaves["PaliGemma/img/head/kernel"])
    same(ours["vision.norm.weight"], leaves["PaliGemma/img/Transformer/encoder_norm/scale"])
    patch = x(2, 2, 3)  # height, width, colour
    convolution = torch.nn.functional.conv2d(
        torch.from_numpy(patch.transpose(2, 0, 1)[None]),
        torch.from_numpy(ours["vision.patch_embedding.weight"]),
    )
    wanted = np.einsum("hwc,hwcd->d", patch, leaves["PaliGemma/img/embedding/kernel"])
    same(convolution.flatten().numpy(), wanted)
    same(ours["vision.position_embedding"], leaves["PaliGemma/img/pos_embedding"][0])
    t = x(7, 8)
    same(t @ ours["state_proj.weight"].T, t @ leaves["state_proj/kernel"])


def test_jax_paths_as_openpi_training_saves_them():
    leaves = random_jax_leaves()
    saved = {f"params/{path}/value": leaf for path, leaf in leaves.items()}
    assert_same(from_openpi_jax(saved), from_openpi_jax(leaves))


def test_jax_lora_leaves_are_refused_by_name():
    leaves = random_jax_leaves() | {"PaliGemma/llm/layers/attn/q_einsum/lora_a": np.zeros((2, 4, 10, 3))}
    with pytest.raises(CheckpointError, match=r"q_einsum/lora_a.*no leaf of openpi's plain π0"):
        from_openpi_jax(leaves)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "SmolVLA",
            ["model.vlm_with_expert.lm_expert.norm.weight", "model.action_in_proj.bias"],
        ),
        ("π0-FAST", ["model.paligemma_with_expert.paligemma.model.language_model.norm.weight"]),
        ("π0-FAST", ["model.pi0_paligemma.language_model.model.norm.weight"]),
    ],
)
def test_other_families_are_recognized_by_name(family, names):
    with pytest.raises(CheckpointError, match=f"{family}.*not π0"):
        from_published({name: torch.zeros(1) for name in names})


def test_other_families_are_recognized_in_jax():
    with pytest.raises(CheckpointError, match=r"π0-FAST.*not π0"):
        from_openpi_jax({"PaliGemma/llm/layers/attn/q_einsum/w": np.zeros((2, 4, 10, 3))})


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (PI05, ["action_in_proj.weight", "time_mlp_in.weight"]),
        (PI05, ["model.time_mlp_in.bias"]),
        (PI05, ["time_mlp_in/kernel"]),
        (PI05, [f"model.{EXPERT_MODEL}layers.0.input_layernorm.dense.weight", "action_in_proj.weight"]),
        (PI05, ["PaliGemma/llm/layers/pre_attention_norm_1/Dense_0/kernel", "action_in_proj/kernel"]),
        (PI05, ["model.expert.layers.0.mlp_norm.dense.bias"]),
        # It holds π0.5's `time_mlp_in` as a part.
        (PI0, ["action_time_mlp_in.weight", "state_proj.weight"]),
        (PI0, ["model.action_time_mlp_in.weight"]),
        (PI0, ["PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]),
        (PI0, [f"{EXPERT_MODEL}layers.0.input_layernorm.weight"]),
    ],
)
def test_the_model_is_recognized_by_any_tensor_that_the_other_has_not(family, names):
    assert family_of(names) is family


def test_unfit_tensors_are_counted_and_named():
    network = tiny_network()
    tensors = dict(network.state_dict())
    for name in ("action_out_proj.bias", "expert.norm.weight", "state_proj.bias", "state_proj.weight"):
        del tensors[name]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["vlm.norm.weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_weights(network, tensors, dict.fromkeys(network.state_dict(), torch.float32))
    message = str(error.value)
    assert "4 missing: action_out_proj.bias, expert.norm.weight, state_proj.bias, …" in message
    assert "1 unexpected: extra.weight." in message.replace(";", ".")
    assert "1 of another shape: vlm.norm.weight is (7,), the config says (48,)" in message


def test_weights_of_the_right_dtype_are_taken_without_a_copy():
    tensors = tiny_network().state_dict()
    with torch.device("meta"):
        network = tiny_network()
    load_weights(network, tensors, dict.fromkeys(tensors, torch.float32))
    assert network.get_parameter("state_proj.weight").data_ptr() == tensors["state_proj.weight"].data_ptr()
