"""The decoder-side methods of 2024 to 2026 against the plain decoder, and their counts."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample, encode_samples, score
from jaxprune.engine.answer import answers_of
from jaxprune.engine.cost import estimate
from jaxprune.methods.dart import cosines, taken
from jaxprune.methods.resolve import described_cut
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import AFTER_ATTENTION, Score
from jaxprune.ops.tiles import VisualSize
from tests.builders import start, tiny_next_config, write_directory
from tests.cases import mostly_slow, picture
from tests.methods import plain_decoder as plain
from tests.methods.comparing import DEPTH, SEVEN_B, L, N, compare


def lowest(score, where, keep):
    """All but the `keep` places with the highest scores; ties keep the lower place."""
    return where[np.argsort(-score[where], kind="stable")[keep:]]


# ---- DART


def dart(tokens, layer):
    def delete(l, place, _weights, visual, question, seen):
        if place != "between_layers" or l + 1 != layer:
            return np.array([], int)
        where = np.nonzero(visual)[0]
        norms = np.abs(seen.k).sum(axis=(0, 2))

        def pivots(among):
            return sorted(np.nonzero(among)[0].tolist(), key=lambda i: (-norms[i], i))[:4]

        z = seen.normed / np.linalg.norm(seen.normed, axis=-1, keepdims=True)
        kept = pivots(visual)
        free = [i for i in where.tolist() if i not in kept]
        for pivot in kept + pivots(question):
            cosine = z @ z[pivot]
            least = sorted(free, key=lambda i: (cosine[i], i))[: min(tokens, len(where) - 4) // 8]
            kept = kept + least
            free = [i for i in free if i not in least]
        return np.setdiff1d(where, kept)

    return delete


@pytest.mark.parametrize("tokens, layer, left", [(24, 2, 28), (47, 1, 44), (999, 3, 60)])
def test_dart_equals_the_plain_decoder(model, tokens, layer, left):
    run = compare(model, jaxprune.Dart(tokens=tokens, layer=layer), dart(tokens, layer))
    (kept,) = answers_of(run)[0].kept_by_layer.values()
    assert len(kept[0]) == left


@pytest.mark.parametrize("tokens, left", [(192, 196), (128, 132), (64, 68)])
def test_dart_keeps_the_published_numbers(tokens, left):
    kept = 576 - jaxprune.Dart(tokens=tokens).removed(576, SEVEN_B)
    assert kept.tolist() == [576] + [left] * 31


def test_few_pivots_take_as_much(model):
    """A prompt of two text tokens, and one that ends with its image: no text to be a pivot."""
    method = jaxprune.Dart(tokens=24, layer=1)
    for prompt in ("<image> it?", "What is this? <image>"):
        run = start(model, picture(4), prompt, method=method, chat=False)
        (kept,) = answers_of(run)[0].kept_by_layer.values()
        assert len(kept[0]) == 28


def test_dart_keeps_few_tokens_whole(model):
    removed = [jaxprune.Dart(tokens=8).removed(number, DEPTH)[-1] for number in range(13)]
    assert removed == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]
    pair = (jaxprune.UniformPlaces(keep=3), jaxprune.Dart(tokens=8))
    whole = start(model, picture(4), "What?", method=pair[0])
    pruned = start(model, picture(4), "What?", method=pair)
    chex.assert_trees_all_close(pruned.first_logits, whole.first_logits, atol=1e-5)


def test_alike_tokens_are_taken_in_their_order():
    """Vectors of no length tie for both pivots: no NaN, and lower slots come first."""
    similar = cosines(jnp.zeros((1, 6, 3)), jnp.array([[4, 5]]))
    free = jnp.array([[True, True, True, True, False, False]])
    for number, expected in [(0, 0), (2, 2), (3, 3), (4, 4)]:
        found = taken(similar, jnp.ones((1, 2), bool), free, jnp.array([number]))
        assert found[0].tolist() == [i < expected for i in range(6)]


# ---- FEATHER


def feather(rates, layers, stride, patches):
    """Of the visual tokens that stand for `patches` of an 8 x 8 grid."""

    def delete(l, place, _weights, visual, _question, seen):
        if place != "between_layers" or l + 1 not in layers:
            return np.array([], int)
        cut, where = layers.index(l + 1), np.nonzero(visual)[0]
        score = np.zeros(len(visual))
        for h, q in enumerate(seen.q_plain):
            k = seen.k_plain[h // (len(seen.q_plain) // len(seen.k_plain))]
            logits = k[where] @ q[-1] / np.sqrt(len(q[-1]))
            grown = np.exp(logits - logits.max())
            score[where] += grown / grown.sum() / len(seen.q_plain)
        gone = lowest(score, where, max(1, int(rates[cut] * len(where))))
        if cut == 0:
            on_grid = [p // 8 % stride == 0 and p % 8 % stride == 0 for p in patches]
            grid = np.intersect1d(gone, where[on_grid])
            gone = np.setdiff1d(gone, grid)
        return gone

    return delete


@pytest.mark.parametrize(
    "rates, layers, stride", [((0.3, 0.09), (1, 3), 3), ((0.1, 0.5, 0.2), (1, 2, 3), 2)]
)
def test_feather_equals_the_plain_decoder(model, rates, layers, stride):
    method = jaxprune.Feather(keep_rates=rates, cut_layers=layers, stride=stride)
    compare(model, method, feather(rates, layers, stride, range(N)))


@pytest.mark.parametrize("keep, rate, stride", [(20, 0.3, 3), (16, 0.1, 2)])
def test_the_grid_is_that_of_the_patches_that_are_left(model, keep, rate, stride):
    """Of 20 patches few are on it; of 16 eight are."""
    patches = [(2 * j + 1) * N // (2 * keep) for j in range(keep)]
    method = jaxprune.Feather(keep_rates=(rate,), cut_layers=(2,), stride=stride)
    pair = (jaxprune.UniformPlaces(keep=keep), method)
    compare(model, pair, feather((rate,), (2,), stride, patches))


def test_feather_keeps_the_published_numbers():
    """At most: 172 of the best and a grid of 64, of which it keeps 21 later."""
    kept = 576 - jaxprune.Feather().removed(576, SEVEN_B)
    assert (kept[6], kept[7], kept[14], kept[15], kept[31]) == (576, 236, 236, 21, 21)
    few = [n - jaxprune.Feather(cut_layers=(1, 2)).removed(n, DEPTH) for n in range(4)]
    assert [kept.tolist() for kept in few] == [[0] * 4, [1] * 4, [2, 1, 1, 1], [2, 1, 1, 1]]


@pytest.mark.parametrize("name", ["llava-1.6-vicuna-7b", "internvl2-8b", "llava-hr-7b"])
@pytest.mark.parametrize("stride", [2, 3, 5])
def test_feather_has_room_for_the_whole_grid(name, stride):
    """Of images of any shape, and of tiles whose side the stride does not divide."""
    config = jaxprune.read_config(name)
    rows, columns = config.tower.grid
    method, seen = jaxprune.Feather(stride=stride, keep_rates=(0.3,), cut_layers=(8,)), set()
    for ratio in np.geomspace(0.02, 50, 120):
        tiling = config.tiling(VisualSize(round(400 / ratio**0.5), round(400 * ratio**0.5)))
        row, column = np.divmod(tiling.slots[tiling.slots >= 0] % (rows * columns), columns)
        number = int(((row % stride == 0) & (column % stride == 0)).sum())
        tokens = tiling.num_tokens
        left = tokens - method.removed(tokens, depth_of(config))[-1]
        assert left >= int(0.3 * tokens) + number
        seen.add(tokens)
        if tokens % (rows * columns) == 0:  # no more than that where tiles are whole
            assert left == int(0.3 * tokens) + number
    assert len(seen) > 5 or name == "llava-hr-7b"


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """Images of several tiles of 4 x 4 patches, with newlines and padding."""
    directory = tmp_path_factory.mktemp("tiled") / "m"
    write_directory(directory, tiny_next_config(text={"num_hidden_layers": L}), seed=3)
    return jaxprune.load(directory)


def test_every_tile_has_its_grid(tiled):
    """The best apart, the grid of every tile stays, and no newline with it."""
    method = jaxprune.Feather(keep_rates=(0.05,), cut_layers=(1,), stride=2)
    (answer,) = answers_of(start(tiled, picture(3, (60, 50)), "What?", method=method))
    entered, (kept,) = answer.kept_indices[0], *answer.kept_by_layer.values()
    grid = [p for p in entered.tolist() if p >= 0 and p % 16 // 4 % 2 == 0 and p % 4 % 2 == 0]
    assert len(set(np.array(grid) // 16)) == 5  # tiles
    assert set(grid) < set(kept.tolist())
    assert len(kept) - len(grid) <= int(0.05 * len(entered))


# ---- attention without positions, as an option of other methods


def without_rope(delete):
    """A deletion by attention, given that of queries and keys before rotation."""

    def instead(l, place, weights, visual, question, seen):
        own = np.zeros_like(weights)
        for h, q in enumerate(seen.q_plain):
            k = seen.k_plain[h // (len(seen.q_plain) // len(seen.k_plain))]
            for t in range(len(q)):
                logits = k[: t + 1] @ q[t] / np.sqrt(q.shape[1])
                grown = np.exp(logits - logits.max())
                own[h, t, : t + 1] = grown / grown.sum()
        return delete(l, place, own, visual, question, seen)

    return instead


RATES = (1.0, 0.8, 0.45, 0.1)


@pytest.mark.parametrize(
    "method, rates, queries",
    [
        (jaxprune.FastV(keep_rate=0.3, without_rope=True), (1, 1, 0.3, 0.3), "last"),
        (jaxprune.GSearch(keep_rates=RATES, without_rope=True), RATES, "text"),
        pytest.param(
            jaxprune.PyramidDrop(without_rope=True),
            (1, 0.5, 0.25, 0.125),
            "last",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fastv", "gsearch", "pyramiddrop"],
)
def test_without_rope_equals_the_plain_decoder(model, method, rates, queries):
    delete = plain.keep_rates(rates, N, queries)
    run = compare(model, method, without_rope(delete))
    rotated = start(model, picture(4), "Where is it, please?",
                    method=dataclasses.replace(method, without_rope=False))  # fmt: skip
    both = (answers_of(run)[0].kept_by_layer, answers_of(rotated)[0].kept_by_layer)
    assert any(both[0][l][0].tolist() != both[1][l][0].tolist() for l in both[0])


def test_a_score_without_rope_of_everybody(tiny_model):
    """All queries, whose sums come from the attention itself: gather is mask there too."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Everybody(jaxprune.FastV):
        score = Score(queries=("all",), later=True, rotated=False)

    gather, mask = (
        start(tiny_model, picture(0), "What?", method=Everybody(layer=1), gather=how)
        for how in (True, False)
    )
    chex.assert_trees_all_close(gather.first_logits, mask.first_logits, atol=1e-4)


def test_recipes_say_whether_their_score_is_rotated():
    """Those that are older than the option do not say it, and still fit."""
    for rotated, expected in [(True, None), (False, False)]:
        method = jaxprune.PSigmoid(keep_rate=0.5, k=0.8, without_rope=not rotated)
        cut, score = described_cut(method)
        assert cut == "between_layers" and score.get("rotated") is expected


# ---- V2Drop


def v2drop(rates, layers):
    def delete(l, place, _weights, visual, _question, seen):
        if place != "between_layers" or l + 1 not in layers:
            return np.array([], int)
        where = np.nonzero(visual)[0]
        change = np.sqrt(((seen.after - seen.before) ** 2).sum(-1))
        return lowest(change, where, max(1, int(rates[layers.index(l + 1)] * len(where))))

    return delete


@pytest.mark.parametrize("rates, layers", [((0.4, 0.1), (1, 3)), ((0.5, 0.3, 0.0), (1, 2, 3))])
def test_v2drop_equals_the_plain_decoder(model, rates, layers):
    compare(model, jaxprune.V2Drop(keep_rates=rates, cut_layers=layers), v2drop(rates, layers))


@pytest.mark.parametrize(
    "budget, left, mean",
    [(192, (288, 86, 1), 193.8), (128, (161, 40, 1), 131), (64, (28, 1, 1), 66.7)],
)
def test_v2drop_keeps_the_published_numbers(budget, left, mean):
    kept = 576 - jaxprune.V2Drop(budget=budget).removed(576, SEVEN_B)
    assert (kept[1], *kept[[2, 16, 21]]) == (576, *left)
    entering = np.append(576, kept[:-1])
    assert round(float(entering.mean()), 1) == mean


def test_v2drop_leaves_a_token_of_few():
    for number, expected in [(0, 0), (1, 1), (10, 1)]:
        method = jaxprune.V2Drop(keep_rates=(0.1,), cut_layers=(2,))
        assert number - method.removed(number, DEPTH)[-1] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either budget, e.g. budget=128, or keep_rates"),
        ({"budget": 100}, "budget is 100; expected one of: 192, 128, 64; the nearest is 128"),
        ({"keep_rates": (0.5,)}, r"expected a share for each of the layers \(3, 17, 22"),
        ({"keep_rates": 0.5}, "keep_rates are 0.5"),
        ({"keep_rates": (2, 0, 0)}, "keep_rates is 2"),
        (
            {"budget": 64, "cut_layers": (3, 2, 1)},
            "cut_layers are .3, 2, 1.; expected",
        ),
        ({"budget": 64, "cut_layers": (1, 2, 9)}, "cut_layers is 9, but the decoder has 4 layers"),
    ],
)
def test_v2drop_names_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.methods.resolve("v2drop", DEPTH, **options)


# ---- all of them

METHODS = {
    "dart": jaxprune.Dart(tokens=30, layer=1),
    "feather": jaxprune.Feather(cut_layers=(1, 2)),
    "fastv without rope": jaxprune.FastV(keep_rate=0.3, without_rope=True),
    "sparsevlm": jaxprune.SparseVLM(keep_tokens=(300, 120), cut_layers=(1, 3)),
    "sparsevlm, renumbered": jaxprune.SparseVLM(
        keep_tokens=(300, 120), cut_layers=(1, 3), positions="renumber"
    ),
    "sparsevlm plus": jaxprune.SparseVLM(keep_tokens=(300, 120), cut_layers=(1, 3), version="plus"),
    "v2drop": jaxprune.V2Drop(keep_rates=(0.6, 0.3), cut_layers=(1, 3)),
}


@pytest.mark.parametrize("name", mostly_slow(METHODS, ["sparsevlm"]))
def test_gather_equals_mask_on_tiles(name, tiled):
    """Rows of images of different sizes, one of them without."""
    images = [picture(0, (60, 50)), picture(1, (30, 100)), None, picture(2, (33, 31))]
    prompts = ["What?", "Where is it, and why?", "a b c", "Is there one?"]
    gather, mask = (
        start(tiled, images, prompts, method=METHODS[name], gather=how) for how in (True, False)
    )
    chex.assert_trees_all_close(gather.first_logits, mask.first_logits, atol=1e-4)
    for one, other in zip(answers_of(gather), answers_of(mask), strict=True):
        for layer, kept in one.kept_by_layer.items():
            assert [x.tolist() for x in kept] == [x.tolist() for x in other.kept_by_layer[layer]]


def test_ranking_costs_what_it_looks_at(model):
    """As much as the same cuts by a score do; nothing of attention where none is looked at."""

    def macs(method):
        return estimate(model.config, method, text_tokens=30).score_macs

    half = (1.0, 0.5, 0.5, 0.5)
    assert macs(jaxprune.Feather(keep_rates=(0.3,), cut_layers=(1,))) == macs(
        jaxprune.FastV(keep_rate=0.3, layer=1)
    )
    assert macs(jaxprune.SparseVLM(keep_tokens=(300,), cut_layers=(1,))) == macs(
        jaxprune.GSearch(keep_rates=half)
    )
    assert macs(METHODS["dart"]) == macs(METHODS["v2drop"]) == 0


def test_what_recycles_cuts_between_layers():
    class Late(jaxprune.SparseVLM):
        cut: ClassVar = AFTER_ATTENTION

    with pytest.raises(jaxprune.UserError, match="recycles tokens, but cuts in the middle"):
        Late(budget=64)


QUESTION = "Where is it, please?"


@pytest.fixture(scope="module")
def samples(model):
    few = [Sample(picture(i), QUESTION, answer) for i, answer in enumerate(("a", "b"))]
    return encode_samples(model, few, show_progress=False)


@pytest.mark.parametrize("name", mostly_slow(METHODS, ["sparsevlm, renumbered"]))
def test_calibration_scores_what_is_generated(name, model, samples):
    """The log-probabilities of answers after masked prompts are those after shortened ones."""
    (batch,) = samples.batches
    said = []
    for i, answer in enumerate(batch.answers[: batch.rows]):
        ids = answer[answer >= 0].tolist()
        for n, token in enumerate(ids):
            run = start(model, picture(i), QUESTION, method=METHODS[name], answers=[ids[:n]])
            said.append(float(jax.nn.log_softmax(run.first_logits[0])[token]))
    assert len(said) > 2
    assert score(samples, METHODS[name], "logprob") == pytest.approx(np.mean(said), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_nothing_compiles_after_a_warm_up(name, model):
    buckets = jaxprune.Buckets(
        batch=(2,), images=(2,), row_images=(1,), text=(64,), visual=(64,), new_tokens=(8,)
    )
    pair = (jaxprune.PruMergePlus(), METHODS[name])
    jaxprune.warmup(model, method=pair, buckets=buckets, show_progress=False)
    with jaxprune.no_compilation():
        for second in ("Where?", "Where is it, and what is it, and why, of all places, there?"):
            jaxprune.generate(
                model, [picture(0), picture(1)], ["What?", second], method=pair,
                max_new_tokens=3, buckets=buckets,
            )  # fmt: skip
