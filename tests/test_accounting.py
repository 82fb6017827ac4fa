"""Costs against the papers' figures, the compiler's count and the arrays themselves."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxprune
from jaxprune.cli import app
from jaxprune.engine.cost import executed, prompt_cost
from jaxprune.engine.lengths import gather_schedule
from jaxprune.engine.shapes import Lengths
from jaxprune.methods import depth_of, resolve
from jaxprune.models.llama import LlamaConfig, LlamaDecoder, Tokens
from jaxprune.models.llava import LlavaConfig
from jaxprune.ops import attention
from jaxprune.ops.cuts import NO_CUTS
from tests.builders import start
from tests.test_generate import picture

METHODS = {
    "none": {},
    "fitprune": {"save": 0.6},
    "gsearch": {},
    "psigmoid": {"keep_rate": 0.262},
    "fastv": {},
    "vtw": {},
}
LONG = ("fitprune", "psigmoid")  # to compile


@pytest.mark.parametrize(
    "save, visual", [(0.1, 6.4), (0.3, 27.9), (0.4, 38.8), (0.5, 49.7), (0.55, 54.5),
                     (0.6, 59.7), (0.7, 69.7), (0.8, 79.7), (0.9, 89.7)]
)  # fmt: skip
def test_published_recipes_save_what_they_are_known_to(save, visual):
    options = ["cost", "--model", "llava-1.5-7b", "--method", "fitprune", "--save", str(save)]
    result = CliRunner().invoke(app, [*options, "--text-tokens", "75", "--json"])
    found = json.loads(result.stdout)
    assert round(100 * found["saved"]["visual_macs"], 1) == visual
    if save == 0.6:
        assert round(100 * found["saved"]["macs"], 1) == 53.0
        assert round(np.mean([layer["visual_in"] for layer in found["layers"]])) == 245


def test_unpruned_cost_is_the_papers_formula():
    found = prompt_cost(LlavaConfig.llava_1_5_7b(), resolve("none", LlavaConfig()), text_tokens=64)
    n, D, m = 576, 4096, 11008
    assert found.visual_macs == 32 * (4 * n * D * D + 2 * n * n * D + 3 * n * D * m)
    assert found.cache_bytes == 32 * 2 * (n + 64) * D * 4


@pytest.mark.parametrize(
    "name, shared",
    [
        *((name, 8) for name in METHODS if name not in LONG),
        ("fitprune", 2),
        *(pytest.param(name, 8, marks=pytest.mark.slow) for name in LONG),
        pytest.param("gsearch", 2, marks=pytest.mark.slow),
    ],
)
def test_close_to_the_compilers_count(name, shared, monkeypatch):
    """Unchunked and unpadded, with the logits of the last token and the ranking counted."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 10**6)
    monkeypatch.setattr(attention, "SHORT", 10**6)
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=shared,
        head_dim=64,
    )
    config = LlavaConfig(text_config=text)
    plan = resolve(name, config, **METHODS[name])
    T, N = 32, 576
    decoder = LlamaDecoder(text)
    schedule, counts = NO_CUTS, None
    if plan.decoder:
        room = Lengths(T, N)
        schedule = gather_schedule(plan.decoder, depth_of(config), room, distinct=None)
        counts = jax.ShapeDtypeStruct((32, 1), jnp.int32)

    def run(params, tokens, counts):
        variables = {"params": params}
        options = {"new_slots": 0, "schedule": schedule, "counts": counts}
        found = decoder.apply(variables, tokens, method="prefill", **options)
        return decoder.apply(variables, found.tokens.x[:, -1], method="logits")

    shape = jax.ShapeDtypeStruct
    tokens = Tokens(
        shape((1, T + N, 512), jnp.float32),
        shape((1, T + N), jnp.int32),
        shape((1, T + N), bool),
        shape((1, T + N), jnp.int32),
    )
    init = functools.partial(decoder.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.eval_shape(init)["params"]
    compiled = jax.jit(run).lower(params, tokens, counts).compile()
    found = prompt_cost(config, plan, text_tokens=T)
    macs = found.macs + found.lm_head_macs + found.score_macs
    assert 2 * macs == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "fitprune", "deletions": (3, 5, 2), "num_tokens": 16},
        {"method": "gsearch", "keep_rates": (1.0, 0.6, 0.2)},
        {"method": ("prumerge", "vtw"), "keep": 9},
    ],
)
def test_cache_bytes_are_those_of_the_arrays(tiny_model, options):
    images, prompts = [picture(0), picture(1)], ["What?", "Where is the red circle?"]
    run = start(tiny_model, images, prompts, **options)
    c = tiny_model.config.text_config
    for b, answer in enumerate(run.answers()):
        valid = sum(int(np.asarray(cache.valid)[b].sum()) for cache in run.state.caches)
        item = 2 * c.num_key_value_heads * c.head_dim * 4
        assert answer.cost.cache_bytes == valid * item
        allocated = sum(x.nbytes for cache in run.state.caches for x in (cache.k, cache.v))
        assert answer.cost.executed["cache_bytes"] * len(images) == allocated


def test_rounded_lengths_hold_every_row():
    config = LlavaConfig.llava_1_5_7b()
    depth = depth_of(config)
    for name, options in METHODS.items():
        method = resolve(name, config, **options).decoder
        if method is None:
            continue
        exact = gather_schedule(method, depth, Lengths(64, 576), distinct=None)
        rounded = gather_schedule(method, depth, Lengths(64, 576), distinct=8)
        assert len(set(rounded.lengths)) <= 8
        assert all(a >= b for a, b in zip(rounded.lengths, exact.lengths, strict=True))
        cost = [executed(config, 640, s, new_slots=64)["macs"] for s in (exact, rounded)]
        assert cost[0] <= cost[1] <= 1.1 * cost[0]
        for n in (1, 100, 575, 576):
            assert (64 + n - method.removed(n, depth) <= exact.lengths).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "prumerge"], "depends on the image"),
        (["--model", "llava-9b"], "presets: llava-1.5-7b"),
        (["--text-tokens", "-3"], "expected a number from 0"),
        (["--option", "c"], "expected name=value"),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_mistakes(options, message):
    result = CliRunner().invoke(app, ["cost", *options])
    assert isinstance(result.exception, jaxprune.UserError)
    assert message in str(result.exception)
