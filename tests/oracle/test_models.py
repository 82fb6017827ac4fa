"""Logits and greedy continuations against `transformers`, float32."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxprune import checkpoints_convert
from jaxprune.engine import stages
from jaxprune.inputs.layout import ImageRoom, lay_out, row_length
from jaxprune.inputs.request import Row
from jaxprune.models.clip import ClipVisionTower
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import VisualSize, pack_tilings
from jaxprune.ops.visual import Signal
from tests.builders import forward_logits
from tests.cases import mostly_slow
from tests.oracle import builders

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
VARIANTS = {
    "multi-head": {},
    "grouped-query": {"text": {"num_key_value_heads": 2}},
    "multi-query, tied": {"text": {"num_key_value_heads": 1, "tie_word_embeddings": True}},
    "tied": {"text": {"tie_word_embeddings": True}},
    "biases": {"text": {"attention_bias": True, "mlp_bias": True}},
    "wide heads": {"text": {"head_dim": 20}},
    "gelu tower": {"vision": {"hidden_act": "gelu"}},
    "odd image": {"vision": {"image_size": 45, "patch_size": 7}},
    "full strategy": {"vision_feature_select_strategy": "full"},
    "last feature layer": {"vision_feature_layer": -1},
    "first feature layer": {"vision_feature_layer": 1},
    "several feature layers": {"vision_feature_layer": [-3, -2, 1]},
    "projector without bias": {"multimodal_projector_bias": False},
    "theta": {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    "linear RoPE": {
        "text": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    },
    "llama3 RoPE": {"text": {"rope_parameters": LLAMA3}},
}


def ours(model, directory):
    return checkpoints_convert.load_checkpoint(builders.save(model, directory), dtype="float32")


def logits_of_both(model, directory, rng, images=1):
    params, config = ours(model, directory)
    pixels, ids = builders.prompt(model, rng, images)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits.numpy()
    ids = ids.numpy()
    found = forward_logits(params, config, pixels.numpy().transpose(0, 2, 3, 1), ids, ids == 4)
    return np.asarray(found), expected


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name, rng, tmp_path):
    found, expected = logits_of_both(builders.torch_llava(**VARIANTS[name]), tmp_path, rng)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_two_images_in_a_prompt(rng, tmp_path):
    found, expected = logits_of_both(builders.torch_llava(), tmp_path, rng, images=2)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
def test_576_tokens(text, rng, tmp_path):
    model = builders.torch_llava(vision={"image_size": 336, "patch_size": 14}, text=text)
    found, expected = logits_of_both(model, tmp_path, rng)
    assert expected.shape[1] > 576
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def continue_greedily(params, config, pixels, row, new):
    """Token ids from prefill and single decode steps, and the logits of each."""
    family = family_of(config)
    tilings = [config.tiling(VisualSize(1, 1))] * len(pixels)
    K = tilings[0].num_tokens
    packing = pack_tilings(tilings, images=len(pixels), tiles=len(pixels), image_tiles=1, slots=K)
    vision = family.encode(params, config, jnp.asarray(pixels))
    selection = stages.select(vision, packing, None, None, capacity=K, images=len(pixels))
    counts = np.full(len(pixels), K)
    length = row_length(row, counts)
    room = ImageRoom(counts, counts, np.zeros(len(pixels), int), K)
    layout = lay_out([row], room, batch=1, sequence=length + 5)
    tokens = family.embed(params, config, layout.embedded, selection)
    prefilled = family.prefill(params, config, tokens, new_slots=new)
    logits = family.logits(params, config, prefilled.tokens.x[:, length - 1])
    caches = prefilled.caches
    ids, steps = [], []
    for step in range(new):
        steps.append(np.asarray(logits[0]))
        ids.append(int(logits.argmax()))
        logits, caches = family.decode(
            params, config, jnp.asarray([ids[-1]]), jnp.asarray([length + step]), caches,
            jnp.int32(step), jnp.arange(new)[None] < step,
        )  # fmt: skip
    return ids, np.stack(steps)


DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}


DECODED = {
    "multi-head": {},
    "grouped-query": {"text": {"num_key_value_heads": 2}},
    "tied": {"text": {"tie_word_embeddings": True}},
    "dynamic RoPE": {"text": DYNAMIC},
    "llama3 RoPE": VARIANTS["llama3 RoPE"],
    "576 tokens": {"vision": {"image_size": 336, "patch_size": 14}},
    "576 tokens, multi-query, tied": {
        "vision": {"image_size": 336, "patch_size": 14},
        "text": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    },
}


@pytest.mark.parametrize(
    "name",
    mostly_slow(DECODED, ["dynamic RoPE", "576 tokens, multi-query, tied"]),
)
def test_prefill_and_decode_continue_as_transformers_does(name, rng, tmp_path):
    model = builders.torch_llava(**DECODED[name])
    params, config = ours(model, tmp_path)
    pixels, ids = builders.prompt(model, rng)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
    expected = torch.cat(out.logits).numpy()
    plain = ids[0].tolist()
    first = plain.index(4)
    row = Row([plain[:first], [t for t in plain[first:] if t != 4]], [0])
    found, logits = continue_greedily(params, config, pixels.numpy().transpose(0, 2, 3, 1), row, 20)
    assert found == out.sequences[0, ids.shape[1] :].tolist()
    chex.assert_trees_all_close(logits, expected, atol=1e-4)


def test_signals_of_the_tower(rng, tmp_path):
    """CLS attention and keys against the last layer's own projections in PyTorch."""
    model = builders.torch_llava()
    params, config = ours(model, tmp_path)
    pixels, _ = builders.prompt(model, rng, images=2)
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[-1]
        x = layer.layer_norm1(states[-2])
        q, k = layer.self_attn.q_proj(x)[:, :1], layer.self_attn.k_proj(x)
        single = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, -1)[:, 0, 1:]
        heads = lambda y: y.reshape(2, -1, 4, 8).transpose(1, 2)  # noqa: E731
        each = torch.softmax(heads(q) @ heads(k).transpose(2, 3) / 8**0.5, -1)[:, :, 0, 1:]
        before = tower.encoder.layers[1]  # what made the features
        y = before.layer_norm1(states[1])
        everybody = heads(before.self_attn.q_proj(y)) @ heads(before.self_attn.k_proj(y)).transpose(
            2, 3
        )
        received = torch.softmax(everybody / 8**0.5, -1).mean((1, 2))[:, 1:]
        projected = model.model.multi_modal_projector(states[-2][:, 1:])
    expected = {
        Signal("cls_attention", heads="joined"): single,
        Signal("cls_attention"): each.mean(1),
        Signal("cls_attention", heads="sum"): each.sum(1),
        Signal("keys", heads="joined"): k[:, 1:],
        Signal("keys"): heads(k)[:, :, 1:].mean(1),
        Signal("received_attention", layer=-2): received,
        Signal("received_attention", layer="feature"): received,
        Signal("hidden_states", layer=0): states[1][:, 1:],
        Signal("features"): states[-2][:, 1:],
        Signal("projected"): projected,
    }
    pixels = jnp.asarray(pixels.numpy().transpose(0, 2, 3, 1))
    found = family_of(config).encode(params, config, pixels, frozenset(expected))
    chex.assert_trees_all_close(
        found.signals, {signal: x.numpy() for signal, x in expected.items()}, atol=1e-5
    )
    chex.assert_trees_all_close(found.features, states[-2][:, 1:].numpy(), atol=1e-5)


def test_pooled_output_of_the_tower(rng, tmp_path):
    model = builders.torch_llava()
    params, config = ours(model, tmp_path)
    pixels, _ = builders.prompt(model, rng)
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True)
    states, pooled = ClipVisionTower(config.vision_config).apply(
        {"params": params["vision_tower"]}, jnp.asarray(pixels.numpy().transpose(0, 2, 3, 1))
    )
    chex.assert_trees_all_close(pooled, out.pooler_output.numpy(), atol=1e-5)
    chex.assert_trees_all_close(states[-1], out.hidden_states[-1].numpy(), atol=1e-5)
