"""Costs against the papers' figures, the compiler's count and the arrays themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.engine import stages
from jaxprune.engine.answer import answers_of
from jaxprune.engine.cost import estimate, executed, prompt_cost
from jaxprune.engine.schedules import gather_schedule
from jaxprune.engine.shapes import RowRoom
from jaxprune.methods import Depth, Plan, resolve
from jaxprune.methods.recipes import published
from jaxprune.model import read_config
from jaxprune.models.clip import ClipTextConfig
from jaxprune.models.clip.modeling import text_tower_shapes
from jaxprune.models.llama import LlamaConfig, LlamaDecoder
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.attention import limits
from jaxprune.ops.cuts import NO_CUTS, Tokens
from jaxprune.ops.tiles import VisualSize, one_tile
from jaxprune.ops.visual import PROJECTED, VisionOutput
from tests.builders import start, tiny_config
from tests.cases import picture
from tests.methods.builders import packing_of

SEVEN_B = Depth(32, frozenset({"llava-1.5-7b"}))
GIVEN = {
    name: published(name, SEVEN_B, save).options
    for name, save in (("fitprune", 0.6), ("gsearch", None))
}
METHODS = {
    "none": None,
    "fitprune": jaxprune.FitPrune(
        deletions=tuple(GIVEN["fitprune"]["deletions"]), num_tokens=GIVEN["fitprune"]["num_tokens"]
    ),
    "gsearch": jaxprune.GSearch(keep_rates=tuple(GIVEN["gsearch"]["keep_rates"])),
    "psigmoid": jaxprune.PSigmoid(keep_rate=0.262, k=0.4568),
    "fastv": jaxprune.FastV(),
    "vtw": jaxprune.VTW(),
}


@pytest.mark.parametrize(
    "save, visual", [(0.1, 6.4), (0.3, 27.9), (0.4, 38.8), (0.5, 49.7), (0.55, 54.5),
                     (0.6, 59.7), (0.7, 69.7), (0.8, 79.7), (0.9, 89.7)]
)  # fmt: skip
def test_published_recipes_save_what_they_are_known_to(save, visual):
    found = estimate(LlavaConfig.llava_1_5_7b(), "fitprune", save=save, text_tokens=75)
    assert round(100 * found.saved["visual_macs"], 1) == visual
    if save == 0.6:
        assert round(100 * found.saved["macs"], 1) == 53.0
        assert round(found.visual_per_layer) == 245


def test_unpruned_cost_is_the_papers_formula():
    found = prompt_cost(LlavaConfig.llava_1_5_7b(), Plan(), text_tokens=64)
    n, D, m = 576, 4096, 11008
    assert found.visual_macs == 32 * (4 * n * D * D + 2 * n * n * D + 3 * n * D * m)
    assert found.cache_bytes == 32 * 2 * (n + 64) * D * 4


@pytest.mark.parametrize(
    "name, shared",
    [
        ("fitprune", 2),
        ("gsearch", 2),
        *((name, 8) for name in METHODS),
    ],
)
@pytest.mark.slow
def test_close_to_the_compilers_count(name, shared, monkeypatch):
    """Unchunked and unpadded, with the logits of the last token and the ranking counted."""
    monkeypatch.setattr(limits, "QUERY_CHUNK", 10**6)
    monkeypatch.setattr(limits, "SHORT", 10**6)
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
    plan = resolve(METHODS[name], depth_of(config))
    T, N = 32, 576
    decoder = LlamaDecoder(text)
    schedule, counts = NO_CUTS, None
    if plan.decoder:
        room = RowRoom(T, N)
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
        shape((1, T + N), jnp.int32),
    )
    init = functools.partial(decoder.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.eval_shape(init)["params"]
    compiled = jax.jit(run).lower(params, tokens, counts).compile()
    found = prompt_cost(config, plan, text_tokens=T)
    macs = found.macs + found.lm_head_macs + found.score_macs
    assert 2 * macs == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.slow
def test_what_is_left_out_is_below_a_hundredth():
    """Projecting every patch, comparing all pairs, and CLIP's text tower, as XLA counts them."""
    config, N = read_config("llava-1.5-7b", "float32"), 576
    width, shape = config.text_config.hidden_size, jax.ShapeDtypeStruct
    features, one = shape((1, N, 1024), jnp.float32), packing_of([one_tile(N)])
    family, text = family_of(config), ClipTextConfig()

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    def choose(features, projected):
        vision = VisionOutput(features, None, {PROJECTED: projected})
        method = jaxprune.DivPrune(keep=64)
        return stages.select(vision, one, None, method, capacity=64, images=1)

    def compare(params, features, texts):
        return stages.compare(params, VisionOutput(features, None, {}), one, texts, config=text)

    texts = shape((1, 1, 77), jnp.int32)
    found = {
        "projecting": flops(
            lambda params, x: family.project(params, config, x),
            family.param_shapes(config),
            features,
        ),
        "comparing": flops(choose, features, shape((1, N, width), jnp.float32)),
        "reading": flops(compare, text_tower_shapes(text), features, texts),
    }
    expected = {"projecting": 24.3e9, "comparing": 2.7e9, "reading": 14.2e9}  # engine/cost.py's
    assert found == {name: pytest.approx(x, rel=0.05) for name, x in expected.items()}
    assert max(found.values()) < 0.01 * 2 * prompt_cost(config, Plan(), text_tokens=64).macs


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
    for b, answer in enumerate(answers_of(run)):
        valid = sum(int(np.asarray(cache.valid)[b].sum()) for cache in run.state.caches)
        item = 2 * c.num_key_value_heads * c.head_dim * 4
        assert answer.cost.cache_bytes == valid * item
        allocated = sum(
            x.nbytes
            for cache in run.state.caches
            for x in (cache.k, cache.v, cache.new_k, cache.new_v)
        )
        assert answer.cost.executed["cache_bytes"] * len(images) == allocated


def test_rounded_lengths_hold_every_row():
    config = LlavaConfig.llava_1_5_7b()
    depth = depth_of(config)
    for method in METHODS.values():
        if method is None:
            continue
        exact = gather_schedule(method, depth, RowRoom(64, 576), distinct=None)
        rounded = gather_schedule(method, depth, RowRoom(64, 576), distinct=8)
        assert len(set(rounded.lengths)) <= 8
        assert all(a >= b for a, b in zip(rounded.lengths, exact.lengths, strict=True))
        cost = [executed(config, 640, s, new_slots=64)["macs"] for s in (exact, rounded)]
        assert cost[0] <= cost[1] <= 1.1 * cost[0]
        for n in (1, 100, 575, 576):
            assert (64 + n - method.removed(n, depth) <= exact.lengths).all()


# ---- what a prompt would cost, from a config alone


def test_an_estimate_is_the_plans_cost():
    plain, next_ = read_config("llava-1.5-7b"), read_config("llava-1.6-vicuna-7b")
    plan = resolve("fitprune", depth_of(plain), save=0.4)
    expected = prompt_cost(plain, plan, text_tokens=50)
    assert estimate(plain, "fitprune", save=0.4, text_tokens=50) == expected

    assert estimate(plain).visual_tokens == 576
    assert estimate(plain, visual_tokens=100).layers[0].visual_in == 100
    assert estimate(plain, "uniform", keep=64).visual_tokens == 64
    pruned = estimate(plain, "prumerge", visual_tokens=40)
    assert pruned.visual_tokens == 40 and pruned.unpruned.visual_tokens == 576

    assert estimate(next_).visual_tokens == 2928
    wide = estimate(next_, image_size=(1008, 336))
    assert wide.visual_tokens == next_.tiling(VisualSize(336, 1008)).num_tokens
    assert estimate(next_, "prumerge", image_size=(336, 1008), visual_tokens=99).visual_tokens == 99


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("prumerge", {}, "depends on the image"),
        ("none", {"text_tokens": -3}, "text_tokens is -3; expected a number from 0 to 1,000,000"),
        ("none", {"visual_tokens": 10**9}, "visual_tokens is 1000000000; expected a number"),
        ("none", {"visual_tokens": True}, "visual_tokens is True"),
        ("none", {"text_tokens": 1.5}, "text_tokens is 1.5"),
        ("none", {"text_tokens": None}, "text_tokens is None"),
        ("uniform", {"keep": 4, "visual_tokens": 4}, "leave out visual_tokens"),
        (jaxprune.PruMerge(keep=4), {"visual_tokens": 4}, "leaves 5 visual tokens of every image"),
        ("prumerge", {"visual_tokens": 577}, "577, but an image has 576 before pruning"),
        ("none", {"image_size": "672x672"}, "expected width and height in pixels"),
        ("none", {"image_size": (0, 672)}, "expected width and height in pixels"),
        ("fastv", {"depth": 3}, "There is no option depth"),
    ],
)
def test_estimates_are_refused(method, options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        estimate(LlavaConfig(), method, **options)


def test_an_estimate_is_of_a_config():
    with pytest.raises(jaxprune.UserError, match="config is a str; expected one of: LlavaConfig"):
        estimate("llava-1.5-7b")


def test_a_tiled_image_bounds_its_visual_tokens():
    config = read_config("llava-1.6-vicuna-7b")
    with pytest.raises(jaxprune.UserError, match="but an image has 1176 before pruning"):
        estimate(config, "prumerge", image_size=(336, 336), visual_tokens=1177)


def test_configs_are_found_by_preset_directory_or_neither(tiny_directory):
    assert read_config("llava-1.5-13b", "float16") == LlavaConfig.llava_1_5_13b(dtype="float16")
    assert read_config(tiny_directory, "float32") == tiny_config()
    assert read_config(str(tiny_directory)) == tiny_config(
        vision={"dtype": "bfloat16"}, text={"dtype": "bfloat16"}
    )
    assert read_config().text_config.vocab_size == 512


@pytest.mark.parametrize(
    "model, dtype, message",
    [
        (
            "llava-9b",
            "bfloat16",
            "llava-9b does not exist; .* It is no preset either; those are: llava-1.5-7b",
        ),
        ("~nobody-of-this-name/m", "bfloat16", "is not a path; .* It is no preset either"),
        (None, "int4", "dtype is 'int4'; expected one of"),
    ],
)
def test_unknown_configs(model, dtype, message):
    with pytest.raises(jaxprune.UserError, match=message):
        read_config(model, dtype)
