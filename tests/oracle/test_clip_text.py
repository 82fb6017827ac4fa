"""CLIP's text tower and projections against transformers, on tiny random models."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

import jaxprune
from jaxprune.checkpoints_convert.load import load_text_tower
from jaxprune.models.clip import ClipTextConfig, ClipTextTower
from jaxprune.models.clip.modeling import similar_to_texts, text_tower_shapes
from jaxprune.models.clip.weights import CLIP_TEXT
from tests.oracle import builders

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "vocab_size": 60,
    "projection_dim": 20,
}


def torch_clip(**text):
    config = transformers.CLIPConfig(
        text_config={**TEXT, **text}, vision_config=builders.VISION, projection_dim=20
    )
    torch.manual_seed(0)
    return builders.perturbed(transformers.CLIPModel(config).eval())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 58])
def test_texts_and_patches(rng, tmp_path, act, eos):
    model = torch_clip(hidden_act=act, eos_token_id=eos)
    model.save_pretrained(tmp_path / "clip")
    params, config = load_text_tower(tmp_path / "clip", dtype="float32")
    # Whole texts, filled up; one without an end; one that goes on after its end.
    ids = rng.integers(3, 58, size=(4, 12))
    ids[:, 0], ids[0, 5], ids[1, 11], ids[3, [4, 9]] = 57, 58, 58, 58
    ids[0, 6:] = 0
    features = rng.normal(size=(2, 16, 32)).astype(np.float32)
    with torch.no_grad():
        alone = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "clip").eval()
        said = alone(torch.from_numpy(ids), attention_mask=torch.from_numpy(ids != 0).long())
        normed = model.vision_model.post_layernorm(torch.from_numpy(features))
        seen = model.visual_projection(normed).numpy()
    found = ClipTextTower(config).apply(
        {"params": params}, jnp.asarray(ids, jnp.int32), jnp.asarray(features)
    )
    chex.assert_trees_all_close(found, (said.text_embeds.numpy(), seen), atol=1e-5)

    # The first image has three parts of a text, the second one.
    texts = np.full((2, 3, 12), -1, np.int32)
    texts[0], texts[1, 0] = ids[:3], ids[3]
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (said.text_embeds.numpy(), seen)]
    each = np.einsum("fne,qe->fnq", unit[1], unit[0])
    expected = np.stack([each[0, :, 3], each[1, :, :3].mean(-1)])
    similar = similar_to_texts(params, config, jnp.asarray(features), texts, np.array([1, 0]))
    chex.assert_trees_all_close(similar, expected.astype(np.float32), atol=1e-5)


def test_every_tensor_of_the_published_sizes():
    fields = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 12},
        "text_config_dict": {"hidden_size": 768, "vocab_size": None},  # as the Hub's says it twice
        "vision_config": {"hidden_size": 1024},
    }
    config = ClipTextConfig.from_hf(fields)
    assert config == ClipTextConfig()
    published = transformers.CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        vision_config={"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1},
        projection_dim=768,
    )
    with torch.device("meta"):
        stored = transformers.CLIPModel(published).state_dict()
    expected = {}
    for key, tensor in stored.items():
        name = CLIP_TEXT.canonical_key(key)
        if name is not None:
            expected[CLIP_TEXT.rule_of_key(name).paths[0]] = tuple(tensor.shape)
    found = {
        path: CLIP_TEXT.rule_of_path(path).stored_shape([leaf.shape])
        for path, leaf in flatten_dict(text_tower_shapes(config), sep="/").items()
    }
    assert found == expected


def test_another_model_is_refused(tmp_path):
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**builders.VISION))
    vision.save_pretrained(tmp_path / "clip")
    with pytest.raises(jaxprune.UserError, match=r"clip_vision_model.*expected a whole CLIP"):
        load_text_tower(tmp_path / "clip", dtype="float32")
