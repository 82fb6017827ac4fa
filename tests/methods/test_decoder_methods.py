"""Every decoder-side method against the plain decoder: survivors, caches, logits, answers."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.engine.answer import answers_of
from jaxprune.methods import Depth
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import VISUAL
from tests.builders import start, tiny_config, write_directory
from tests.cases import picture
from tests.methods import plain_decoder as plain
from tests.methods.comparing import compare

N, L = 16, 4
SEVEN_B = Depth(32, frozenset({"llava-1.5-7b"}))
RATES = (1.0, 0.8, 0.45, 0.1)
CASES = {
    "fitprune": (
        jaxprune.FitPrune(deletions=(3, 0, 5, 2), num_tokens=N), plain.fitprune((3, 0, 5, 2)),
    ),
    "fitprune, scaled": (
        jaxprune.FitPrune(deletions=(6, 0, 10, 4), num_tokens=32), plain.fitprune((3, 0, 5, 2)),
    ),
    "gsearch": (jaxprune.GSearch(keep_rates=RATES), plain.keep_rates(RATES, N, "text")),
    "gsearch, last": (
        jaxprune.GSearch(keep_rates=RATES, queries="last"), plain.keep_rates(RATES, N, "last"),
    ),
    "fastv": (jaxprune.FastV(keep_rate=0.3), plain.keep_rates((1, 1, 0.3, 0.3), N, "last")),
    "pyramiddrop": (jaxprune.PyramidDrop(), plain.keep_rates((1, 0.5, 0.25, 0.125), N, "last")),
    "vtw": (jaxprune.VTW(), plain.keep_rates((1, 1, 0, 0), N, "last")),
}  # fmt: skip


@pytest.fixture(scope="module", params=[4, 2], ids=["multi-head", "grouped-query"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "m"
    text = {"num_hidden_layers": L, "num_key_value_heads": request.param}
    write_directory(directory, tiny_config(text=text), seed=3)
    return jaxprune.load(directory)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_decoder(model, name):
    run = compare(model, *CASES[name])
    assert run.survivors


@pytest.mark.parametrize("name", ["fitprune", "gsearch"])
def test_a_prompt_that_ends_with_its_image(model, name):
    """The last token, a visual one, asks; it is never pruned and no candidate."""
    method = CASES[name][0]
    run = start(model, picture(4), "What is this? <image>", method=method, chat=False)
    assert run.prompt.layout.embedded.kind[0].tolist().count(VISUAL) == N - 1
    for positions, valid in run.survivors:
        assert (
            int(np.asarray(positions)[np.asarray(valid)].max())
            == run.prompt.layout.embedded.lengths[0] - 1
        )
    left = [len(kept[0]) for kept in answers_of(run)[0].kept_by_layer.values()]
    counts = (N - method.removed(N, depth_of(model.config)))[list(run.prompt.schedule.layers)]
    assert left == counts.tolist()


def test_everything_may_go_but_the_last_token(model):
    run = start(model, picture(4), "What is this? <image>", method="vtw", chat=False)
    (kept,) = answers_of(run)[0].kept_by_layer.values()
    assert kept[0].tolist() == [N - 1]


def test_several_images_are_ranked_together(model):
    """Text between two images is never pruned and never asks."""
    images, prompt = [picture(1), picture(2)], "<image> before <image> after, please?"
    run = start(model, [images], [prompt], method="gsearch", keep_rates=RATES, chat=False)
    answer = answers_of(run)[0]
    left = [sum(len(kept) for kept in images) for images in answer.kept_by_layer.values()]
    assert left == [round(2 * N * rate) for rate in RATES[1:]]
    text = answer.prompt_tokens - 2 * N
    valid = [int(np.asarray(cache.valid[0]).sum()) for cache in run.state.caches]
    assert valid == [text + round(2 * N * rate) for rate in RATES]


@pytest.mark.parametrize("rows", ["text", "all"])
@pytest.mark.parametrize("prune_text", [True, False])
def test_interaction_equals_the_plain_decoder(model, rows, prune_text):
    method = jaxprune.Iti(c=30.0, stage2=0.5, layer=2, rows=rows, prune_text=prune_text)
    stage1 = start(model, picture(4), "Where is it, please?", method=method.plan().vision)
    gone = int(np.floor(0.5 * answers_of(stage1)[0].visual_tokens[0] + 0.5))
    assert gone > 0
    compare(model, method, plain.interaction(2, gone, rows, prune_text))


def test_sigmoid_points_and_rates():
    """The published operating points reproduce their alpha; rates meet the keep rate."""
    from jaxprune.methods.gsearch import solve_alpha
    from jaxprune.methods.recipes import published_recipes

    points = [recipe for recipe in published_recipes("psigmoid") if recipe.fits(SEVEN_B)]
    assert len(points) == 5
    for recipe in points:
        rate, k = recipe.options["keep_rate"], recipe.options["k"]
        alpha = solve_alpha(rate, k, first_pruned_layer=2, num_hidden_layers=32)
        assert abs(alpha + 1 - recipe.reached["alpha_counted_from_1"]) < 0.1
        method = jaxprune.PSigmoid(keep_rate=rate)
        rates = method.rates(SEVEN_B)
        assert abs(np.mean(rates) - rate) < 1e-6
        kept = 576 - method.removed(576, SEVEN_B)
        assert abs(kept[:-1] / 576 - rates[1:]).max() <= 0.5 / 576


def reference_tail_start(s, c):
    d = np.sort(s.astype(np.float64))[::-1]
    N = len(d)
    best, place = -np.inf, N
    for i in range(1, N):
        if d[i - 1] < d[0]:
            f = np.log(N - i) + c * np.log(np.float32(d[0]) - np.float32(d[i - 1]))
            if f > best:
                best, place = f, i
    return place


@pytest.mark.parametrize("c", [0.01, 0.5, 4.0, 1e5])
def test_where_the_tail_begins(rng, c):
    from jaxprune.methods.iti import tail_start

    curves = [rng.random(50) ** p for p in (1, 4, 20)]
    curves += [np.full(50, 0.02), np.r_[np.full(49, 0.01), 0.5]]
    found = np.asarray(tail_start(jnp.array(curves, jnp.float32), c))
    assert found.tolist() == [reference_tail_start(np.float32(s), c) for s in curves]


def test_published_fitprune_recipes_scale():
    """At 144 tokens the 60 recipe keeps what round(144 kept / 576) says, and no less than 0."""
    method = jaxprune.FitPrune(save=0.6)
    deletions, made_for, _ = method.recipe(SEVEN_B)
    kept = made_for - np.cumsum(deletions)
    assert (576 - method.removed(576, SEVEN_B) == kept).all()
    scaled = 144 - method.removed(144, SEVEN_B)
    assert (scaled == np.floor(144 * kept / 576 + 0.5)).all()
    authors = jaxprune.FitPrune(save=0.6, scaling="authors").removed(144, SEVEN_B)
    assert (authors == np.cumsum([t * 144 // 576 for t in deletions])).all()
