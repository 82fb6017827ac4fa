"""Methods of a user's own, of every kind that the two interfaces allow."""

import dataclasses
from typing import ClassVar

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.engine.answer import answers_of
from jaxprune.engine.cost import estimate
from jaxprune.methods import Merged
from jaxprune.ops.cuts import AFTER_ATTENTION, Score
from jaxprune.ops.tiles import ExtraTokens
from tests.builders import start
from tests.cases import picture

FEATURES, PROJECTED = jaxprune.Signal("features"), jaxprune.Signal("projected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loudest(jaxprune.VisionMethod):
    """Keep the longest features."""

    keep: int = 6
    signals: ClassVar = frozenset({FEATURES})

    def fixed_count(self, num_patches):
        return min(self.keep, num_patches)

    def choose(self, patches):
        return patches.best(jnp.linalg.norm(patches.signals[FEATURES], axis=-1), self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(jaxprune.VisionMethod):
    """Keep what is most like the question, in the decoder's embeddings."""

    keep: int = 5
    signals: ClassVar = frozenset({PROJECTED})
    reads_question: ClassVar = True

    def choose(self, patches):
        words, valid = patches.questions
        each = jnp.einsum("itnd,iqd->itnq", patches.signals[PROJECTED], words)
        return patches.best(jnp.where(valid[:, None, None], each, -jnp.inf).max(-1), self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framed(Loudest):
    """One token more in front of the image, two after it: sums of what is gone."""

    @property
    def extra_tokens(self):
        return ExtraTokens(front=1, after=2)

    def merge_tokens(self, tiles, kept, indices):
        rest = jnp.where(kept[..., None], 0, tiles.features).sum(1)[:, None]
        tokens = jnp.take_along_axis(tiles.features, indices[..., None], axis=1)
        return Merged(tokens, jnp.concatenate([rest, 2 * rest, 3 * rest], axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MostMoved(jaxprune.KeepRates):
    """From layer 1 on keep what layer 0 changed most."""

    keep_rate: float = 0.5

    def rates(self, depth):
        return (1.0, *[self.keep_rate] * (depth.num_hidden_layers - 1))

    def rank(self, view):
        return jnp.linalg.norm(view.after - view.before, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverySecond(MostMoved):
    """A mask of its own: every second place, by the keys before rotation where they tie."""

    cut: ClassVar = AFTER_ATTENTION

    @property
    def score(self):
        return Score(queries=("last",))

    def keep(self, view, candidates, count):
        assert view.received.shape[0] == 1 and view.k_plain.shape == view.k.shape
        return view.tokens.slot % 2 == 0  # of candidates or not, and how many: not its business


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holey(MostMoved):
    """Scores of which half are the least that there can be, or none."""

    def rank(self, view):
        least = jnp.where(view.tokens.slot % 4 == 0, jnp.nan, -jnp.inf)
        return jnp.where(view.tokens.slot % 2 == 0, least, super().rank(view))


METHODS = {
    "features": Loudest(),
    "question": Asked(),
    "extra tokens": Framed(),
    "extra tokens, original positions": Framed(positions="original"),
    "hidden states": MostMoved(),
    "hidden states, renumbered": MostMoved(positions="renumber"),
    "mask": EverySecond(),
    "scores that are none": Holey(),
    "pair": (Loudest(), MostMoved()),
    "pair with a named one": ("prumerge", MostMoved()),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_the_same_alone_in_a_batch_and_masked(name, tiny_model):
    images, prompts = [picture(i) for i in range(3)], ["What?", "Where is it, and why?", "a b c"]
    batch = start(tiny_model, images, prompts, method=METHODS[name])
    masked = start(tiny_model, images, prompts, method=METHODS[name], gather=False)
    chex.assert_trees_all_close(batch.first_logits[:3], masked.first_logits[:3], atol=1e-4)
    alone = start(tiny_model, images[1], prompts[1], method=METHODS[name])
    chex.assert_trees_all_close(batch.first_logits[1], alone.first_logits[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features", "question", "hidden states", "pair"])
def test_nothing_compiles_after_a_warm_up(name, tiny_model):
    text = (32, 64) if name == "question" else (64,)
    buckets = jaxprune.Buckets(
        batch=(2,), images=(2,), row_images=(1,), text=text, visual=(8, 16), new_tokens=(8,)
    )
    jaxprune.warmup(tiny_model, method=METHODS[name], buckets=buckets)
    with jaxprune.no_compilation():
        for second in ("Where?", "Where is it, and what is it, and why, of all places, there?"):
            jaxprune.generate(
                tiny_model, [picture(0)] * 2, ["What?", second], method=METHODS[name],
                max_new_tokens=3, buckets=buckets,
            )  # fmt: skip


def test_who_keeps_some_tokens_says_which(tiny_model):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(jaxprune.KeepRates):
        share: float = 0.5

        def rates(self, depth):
            return (1.0, *[self.share] * (depth.num_hidden_layers - 1))

    with pytest.raises(jaxprune.UserError, match=r"Silent keeps some .* neither score nor rank"):
        jaxprune.generate(tiny_model, picture(0), "What?", method=Silent())
    jaxprune.generate(tiny_model, picture(0), "What?", method=Silent(share=0.0), max_new_tokens=1)


def test_one_image_is_pruned_by_each_of_its_questions(tiny_model):
    prompts = ["red circle", "Where is the blue star, and how many?"]
    both = answers_of(start(tiny_model, picture(3), prompts, method=Asked()))
    kept = [answer.kept_indices[0].tolist() for answer in both]
    for prompt, own in zip(prompts, kept, strict=True):
        (alone,) = answers_of(start(tiny_model, picture(3), prompt, method=Asked()))
        assert alone.kept_indices[0].tolist() == own
    assert kept[0] != kept[1]  # or this tests nothing


def test_extra_tokens_stand_where_they_are_said_to(tiny_model):
    run = start(tiny_model, picture(0), "What?", method=Framed())
    (answer,) = answers_of(run)
    indices = answer.kept_indices[0].tolist()
    assert indices[0] == -1 and indices[-2:] == [-1, -1] and -1 not in indices[1:-2]
    tokens = np.asarray(run.seen.selection.tokens[0])
    chex.assert_trees_all_close(tokens[7], 2 * tokens[0], rtol=1e-5)
    chex.assert_trees_all_close(tokens[8], 3 * tokens[0], rtol=1e-5)


def test_original_positions_are_those_of_the_whole_image(tiny_model):
    """Extra tokens are at the last patch that they stand for; the text keeps its places."""
    plain = start(tiny_model, picture(0), "What?").prompt.layout
    run = start(tiny_model, picture(0), "What?", method=Framed(positions="original"))
    (answer,) = answers_of(run)
    indices = answer.kept_indices[0].tolist()
    gone = max(set(range(16)) - set(indices))
    expected = [gone if index == -1 else index for index in indices]
    assert np.asarray(run.seen.selection.positions[0])[: len(indices)].tolist() == expected
    assert run.prompt.layout.next_position.tolist() == plain.next_position.tolist()


def test_renumbered_layers_have_positions_of_their_own(tiny_model):
    run = start(tiny_model, picture(0), "What?", method=MostMoved(positions="renumber"))
    shifts = [int(cache.shift[0]) for cache in run.state.caches]
    assert shifts == [0, 8, 8]
    kept = start(tiny_model, picture(0), "What?", method=MostMoved())
    assert all(cache.shift is None for cache in kept.state.caches)
    assert np.abs(np.asarray(run.first_logits - kept.first_logits)).max() > 1e-3


def test_cost_names_and_promises(tiny_model):
    assert estimate(tiny_model.config, Loudest()).visual_tokens == 6
    assert estimate(tiny_model.config, Framed()).visual_tokens == 9
    layers = estimate(tiny_model.config, MostMoved()).layers
    assert [layer.visual_in for layer in layers] == [16, 8, 8]
    assert (Loudest.name, Loudest.summary) == ("Loudest", "Keep the longest features")

    class Wrong(Loudest):
        def fixed_count(self, num_patches):
            return 7

    with pytest.raises(jaxprune.UserError, match=r"leaves \[6\] .* fixed_count promises 7"):
        jaxprune.generate(tiny_model, picture(0), "What?", method=Wrong())


class TooShort(MostMoved):
    def rates(self, depth):
        return (1.0,)


class Unscored(MostMoved):
    def rank(self, view):
        return view.received[0]


class TooEarly(MostMoved):
    cut: ClassVar = AFTER_ATTENTION


class FromTheStart(MostMoved):
    def rates(self, depth):
        return (0.5, 0.5, 0.5)


class Coming(jaxprune.DecoderMethod):
    score = Score(queries=("text",))

    def removed(self, num_tokens, depth):
        return [3, 2, 1]


class Undeclared(Loudest):
    signals: ClassVar = frozenset()


def cuts_elsewhere():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Elsewhere(MostMoved):
        cut: ClassVar = "after-attention"

    return Elsewhere()


def adds_what_it_does_not_make():
    class Adds(Loudest):
        extra_tokens = ExtraTokens(after=1)

    return Adds()


@pytest.mark.parametrize(
    "method, message",
    [
        (Loudest, "method is the class Loudest; pass an instance"),
        ((Loudest(), Asked()), "are vision-side, Loudest and Asked"),
        (TooShort(), "keep rates for 1 layers, but the decoder has 3"),
        (Unscored(), "this one has no score; give it one"),
        (TooEarly(), "read view.tokens.x, or cut"),
        (
            FromTheStart(),
            r"of FromTheStart are \(0.5, 0.5, 0.5\); expected one a layer from 1 down",
        ),
        (MostMoved(keep_rate=25), "expected one a layer from 1 down"),
        (Coming(), r"Coming.removed gives \[3, 2, 1\] of 64 visual tokens; expected"),
        (Undeclared(), "reads Signal.*'features'.*, which its `signals` do not name"),
    ],
)
def test_mistakes(method, message, tiny_model):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate(tiny_model, picture(0), "What?", method=method)


@pytest.mark.parametrize(
    "make, message",
    [
        (cuts_elsewhere, "Elsewhere.cut is 'after-attention'; expected one of"),
        (adds_what_it_does_not_make, "Adds has extra_tokens, but no merge_tokens"),
        (lambda: Score(queries=("question",)), "queries is 'question'; expected one of"),
        (lambda: Score(queries=()), "expected a tuple of names"),
        (lambda: Score(queries=("text",), heads="sum"), "heads is 'sum'; expected one of"),
    ],
)
def test_mistakes_of_a_class(make, message):
    with pytest.raises(jaxprune.UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_room_for_more_tiles_changes_nothing(name, tiny_model):
    buckets = jaxprune.Buckets(image_tiles=(5,))
    found = [
        answers_of(start(tiny_model, picture(0), "What?", method=name, **more))[0].kept_indices[0]
        for more in ({}, {"buckets": buckets})
    ]
    assert found[0].tolist() == found[1].tolist() != sorted(found[0].tolist())


def test_there_is_one_of_features_whatever_the_layer(tiny_model):
    class Counted(Loudest):
        signals: ClassVar = frozenset({jaxprune.Signal("projected", layer=1)})

        def choose(self, patches):
            (projected,) = patches.signals.values()
            assert projected.shape[-1] == tiny_model.config.text_config.hidden_size
            return patches.best(projected[..., 0], self.keep)

    jaxprune.generate(tiny_model, picture(0), "What?", method=Counted(), max_new_tokens=1)


@pytest.mark.parametrize(
    "signal",
    [{"kind": "attention"}, {"kind": "cls_attention", "heads": "max"}],
)
def test_signals_are_checked(signal):
    with pytest.raises(jaxprune.UserError, match="There is no signal"):
        jaxprune.Signal(**signal)


def test_a_layer_that_the_tower_does_not_have(tiny_model):
    class Deep(Loudest):
        signals: ClassVar = frozenset({jaxprune.Signal("hidden_states", layer=9)})

    with pytest.raises(jaxprune.UserError, match=r"layer=9.*has 3 layers"):
        jaxprune.generate(tiny_model, picture(0), "What?", method=Deep())
