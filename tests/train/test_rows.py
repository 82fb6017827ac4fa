"""Batches of a training run: what is in them, in which order, of which shapes."""

import dataclasses
import json
import shutil
import threading
import time

import chex
import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.errors import UserNote
from jaxprune.inputs.request import NO_LABEL
from jaxprune.train.data import Conversation, Turn, read_data
from jaxprune.train.order import Position, micro_batches
from jaxprune.train.prefetch import prefetched
from jaxprune.train.rows import Rows
from jaxprune.train.settings import Settings
from tests import builders
from tests.cases import FEW, picture

BUCKETS = jaxprune.Buckets(text=(32, 64, 128), row_images=(1, 2))


def settings(method="none", micro_batch=4, **fields):
    return Settings(
        method=method, micro_batch=micro_batch, batch_size=2 * micro_batch, **fields
    )  # fmt: skip


def talk(images=1, turns=1, words=1, name="x"):
    """A conversation about images, whose every answer says its name."""
    said = [Turn("What? " * words, f"{name} {i}", images if i == 0 else 0) for i in range(turns)]
    return Conversation([picture(i, (8, 8)) for i in range(images)], said, where=f"talk {name}")


def mixed(number=23):
    """Conversations with none to two images, short and long."""
    return [talk(i % 3, 1 + i % 2, (1, 5, 12)[i % 3], f"n{i:02}") for i in range(number)]


def rows_of(model, samples, method="none", **fields):
    own = {name: fields.pop(name) for name in ("max_length", "skip") if name in fields}
    return Rows(model, samples, settings(method, **fields), buckets=BUCKETS, **own)


def take(rows, number, position=None, **fields):
    made = rows.batches(Position() if position is None else position, **fields)
    found = [next(made) for _ in range(number)]
    made.close()
    return found


def answers(processor, batch):
    """What is learned of a batch: the text of each row's labels."""
    return [
        processor.tokenizer.decode(own[own != NO_LABEL]) for own in batch.labels
        if (own != NO_LABEL).any()
    ]  # fmt: skip


def shape_of(batch):
    leaves, tree = jax.tree.flatten(batch)
    return str(tree), tuple(np.shape(leaf) for leaf in leaves)


@pytest.mark.parametrize("method", ["none", "fastv:layer=1"])
def test_an_epoch_has_every_answer_once(tiny_model, method):
    samples = mixed()
    rows = rows_of(tiny_model, samples, method)
    turns = [f" {turn.answer}</s>" for sample in samples for turn in sample.turns]
    together = method == "none"
    assert len(rows) == (len(samples) if together else len(turns))
    for epoch in (0, 1):
        made = take(rows, rows.micro_batches, Position(epoch))
        found = "".join(x for one in made for x in answers(tiny_model.processor, one.batch))
        assert sorted(found.split("</s>")[:-1]) == sorted(x.removesuffix("</s>") for x in turns)
        assert made[-1].next == Position(epoch + 1)
        assert all(len(one.batch.labels) == 4 for one in made)
    assert rows.updates(1.0) == -(-rows.micro_batches // 2)
    assert rows.updates(2.0) == rows.micro_batches


def test_shapes_are_few(tiny_model):
    rows = rows_of(tiny_model, mixed(60), micro_batch=2)
    made = take(rows, 2 * rows.micro_batches)
    kinds = {tuple(need) for need in rows.places[:, 2:].tolist()}
    assert len({shape_of(one.batch) for one in made}) <= len(kinds)
    assert len(kinds) <= 3 * 3 < rows.micro_batches


def test_one_that_goes_on_has_the_batches_of_one_that_never_stopped(tiny_model):
    samples = mixed()
    rows = rows_of(tiny_model, samples, seed=3)
    whole = take(rows, 14)
    for number in (3, 11):
        noted = json.loads(json.dumps(dataclasses.asdict(whole[number].next)))
        again = rows_of(tiny_model, samples, seed=3)
        rest = take(again, 13 - number, Position.of(noted), ahead=0)
        for one, other in zip(whole[number + 1 :], rest, strict=True):
            assert one.next == other.next
            chex.assert_trees_all_equal(one.batch, other.batch)
    other = take(rows_of(tiny_model, samples, seed=4), 14)
    assert any(shape_of(a.batch) != shape_of(b.batch) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("method", ["none", "prumerge", "prumerge_plus:keep=6", "mmtok:keep=5"])
def test_a_batch_is_that_of_its_prompts(tiny_model, method):
    """The arrays of `jaxprune.batch`, adaptive methods' counts and read questions included."""
    samples = [Sample(picture(i), f"What {i}?", f"answer {i}") for i in range(3)]
    rows = Rows(tiny_model, samples, settings(method, micro_batch=3))
    (made,) = take(rows, 1)
    order = rows.places[rows.order(0)[0], 0]
    name, _, options = method.partition(":keep=")
    expected = jaxprune.batch(
        tiny_model,
        [samples[i].image for i in order],
        [samples[i].question for i in order],
        answers=[samples[i].answer for i in order],
        method=name,
        gather=True,
        buckets=rows.engine.buckets,
        **({"keep": int(options)} if options else {}),
    )
    chex.assert_trees_all_equal(made.batch, expected)


def test_rows_that_fill_up_learn_nothing(tiny_model):
    rows = rows_of(tiny_model, [talk(name="a"), talk(name="b"), talk(0, name="c")], seed=1)
    made = take(rows, 2)
    assert sorted(len(answers(tiny_model.processor, one.batch)) for one in made) == [1, 2]
    assert rows.micro_batches == 2


@pytest.mark.parametrize(
    "gather, method, lengths",
    [(None, "fastv:layer=1", True), (False, "fastv:layer=1", False), (None, "none", False)],
)
def test_sequences_are_shortened_where_the_decoder_drops_tokens(
    tiny_model, gather, method, lengths
):
    (made,) = take(rows_of(tiny_model, [talk()] * 4, method, gather=gather), 1)
    assert (made.batch.schedule.lengths is not None) == lengths


def test_a_method_that_reads_the_question_has_a_row_a_turn(tiny_model):
    assert len(rows_of(tiny_model, [talk(turns=3)], "mmtok:keep=5")) == 3
    assert len(rows_of(tiny_model, [talk(turns=3)], "divprune:keep=5")) == 1


@pytest.fixture(scope="module")
def tiled_model(tmp_path_factory):
    """A LLaVA-NeXT, whose images differ in tiles."""
    directory = tmp_path_factory.mktemp("tiled") / "m"
    text = {"max_position_embeddings": 128}
    builders.write_directory(directory, builders.tiny_next_config(text=text))
    return jaxprune.load(directory)


def tiled(size):
    return Sample(picture(0, size), "What?", "red")


def test_images_of_several_tiles(tiled_model):
    """The room goes by the tiles that come; a row's length by those of its own image."""
    samples = [tiled((32, 96)), tiled((64, 64))] * 6
    rows = Rows(tiled_model, samples, settings(), buckets=FEW)
    made = take(rows, 6)
    assert len({shape_of(one.batch) for one in made}) == 1
    short, long = sorted({int(n) for one in made for n in one.batch.layout.lengths})
    # So close to the limit that the image decides.
    with pytest.warns(UserNote, match=f"6 of 12 (.|\n)*has {long} tokens"):
        found = Rows(tiled_model, samples, settings(), buckets=FEW, max_length=short, skip=True)
    assert len(found) == 6


def test_a_damaged_image(tiny_model, tmp_path):
    for name in ("good", "bad"):
        picture(0, (8, 8)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2])
    lines = [
        {"image": f"{name}.png", "question": "What?", "answer": name} for name in ("good", "bad")
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = read_data(tmp_path / "d.jsonl")
    message = r"d\.jsonl, line 2: The image .*bad\.png is damaged"
    for ahead in (0, 2):
        with pytest.raises(jaxprune.UserError, match=message):
            take(rows_of(tiny_model, samples), 1, ahead=ahead)
    (made,) = take(rows_of(tiny_model, samples, skip=True), 1)
    assert answers(tiny_model.processor, made.batch) == [" good</s>"]
    (told,) = made.left_out
    assert "bad.png is damaged" in told
    (made,) = take(rows_of(tiny_model, samples[1:], skip=True), 1)
    assert not answers(tiny_model.processor, made.batch)


def test_files_that_are_no_images(tiny_model, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    samples = [Sample(tmp_path / "a.png", "What?", "a"), Sample(picture(0, (8, 8)), "What?", "b")]
    with pytest.raises(jaxprune.UserError, match=r"Sample 1: .*a\.png \(8 bytes\) is not an image"):
        rows_of(tiny_model, samples)
    with pytest.warns(UserNote, match="1 of 2 samples are left out"):
        assert len(rows_of(tiny_model, samples, skip=True)) == 1


def test_images_of_one_name_in_two_folders(tiny_model, tmp_path):
    for folder, shade in (("a", 0), ("b", 200)):
        (tmp_path / folder).mkdir()
        picture(shade, (8, 8)).save(tmp_path / folder / "1.png")

    def digest(*folders, place=tmp_path):
        samples = [Sample(place / one / "1.png", "What?", "x") for one in folders]
        return rows_of(tiny_model, samples).digest

    assert digest("a", "b") != digest("b", "a")
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "moved" / "b")
    # With all its images elsewhere it is the same data.
    assert digest("a", "b", place=tmp_path / "moved") == digest("a", "b")


def test_samples_that_are_too_long(tiny_model):
    samples = [*(talk(name=f"n{i}", words=90) for i in range(12)), talk()]
    with pytest.raises(jaxprune.UserError, match="12 samples of the data are wrong") as told:
        rows_of(tiny_model, samples)
    assert "talk n9: It has" in str(told.value) and "talk n10" not in str(told.value)
    assert "expected at most 255" in str(told.value)
    with pytest.warns(UserNote, match="12 of 13 samples are left out"):
        assert len(rows_of(tiny_model, samples, skip=True)) == 1
    length = int(take(rows_of(tiny_model, [talk()]), 1)[0].batch.layout.lengths[0])
    assert len(rows_of(tiny_model, [talk()], max_length=length)) == 1
    with pytest.raises(jaxprune.UserError, match=f"has {length} tokens .* at most {length - 1}"):
        rows_of(tiny_model, [talk()], max_length=length - 1)
    assert len(rows_of(tiny_model, [talk()], "random:keep=5", max_length=length - 11)) == 1


def test_mistakes(tiny_model):
    for samples in ([], "data.json", None):
        with pytest.raises(jaxprune.UserError, match="samples are no list"):
            rows_of(tiny_model, samples)
    with pytest.raises(jaxprune.UserError, match="Sample 2 is a int"):
        rows_of(tiny_model, [talk(), 7])
    with pytest.raises(jaxprune.UserError, match="talk x: The prompt has 1 <image> placeholder"):
        rows_of(tiny_model, [dataclasses.replace(talk(), images=[])])
    with pytest.raises(jaxprune.UserError, match=r"talk x: .*text=.* over the largest bucket"):
        rows_of(tiny_model, [talk(words=70)])
    with pytest.raises(jaxprune.UserError, match=r"keep is 99, but an image .* has 16 patches"):
        rows_of(tiny_model, [talk()], "divprune:keep=99")
    with pytest.raises(jaxprune.UserError, match=r"has 1 micro-batches, but .* at number 5"):
        take(rows_of(tiny_model, [talk()]), 1, Position(0, 4))
    for fields in ({"epoch": -1}, {"batch": 1.5}, {"step": 1}):
        with pytest.raises(jaxprune.UserError, match="expected"):
            Position.of(fields)


def test_the_digest_knows_the_data(tiny_model, tmp_path):
    def digest(samples, **fields):
        return rows_of(tiny_model, samples, **fields).digest

    samples = mixed(5)
    first = digest(samples)
    assert first == digest(mixed(5)) and len(first) == 16
    (turn,) = samples[0].turns
    others = [
        samples[:4],
        samples[::-1],
        [dataclasses.replace(samples[0], turns=[turn._replace(answer="y")]), *samples[1:]],
        [samples[0], dataclasses.replace(samples[1], images=[picture(9)]), *samples[2:]],
        [dataclasses.replace(samples[0], system="Be brief."), *samples[1:]],
    ]
    assert len({first, *map(digest, others), digest(samples, micro_batch=2)}) == 7


@pytest.mark.parametrize("seed", range(3))
def test_order(seed):
    rng = np.random.default_rng(seed)
    needs = np.stack([rng.choice([0, 1, 4], 101), rng.choice([32, 64, 128], 101)], axis=1)
    found = micro_batches(needs, 8, seed=seed, epoch=0)
    assert sorted(np.concatenate(found)) == list(range(101))
    for images in (0, 1, 4):
        number = int((needs[:, 0] == images).sum())
        own = [rows for rows in found if needs[rows[0], 0] == images]
        assert all((needs[rows, 0] == images).all() for rows in own)
        assert sorted(map(len, own)) == sorted(
            [8] * (number // 8) + [number % 8] * (number % 8 > 0)
        )
        # Rows of a smaller size among others are no more than what did not fill a batch.
        for size in (32, 64):
            alone = [rows for rows in own if (needs[rows, 1] <= size).all()]
            rest = ((needs == (images, size)).sum(axis=1) == 2).sum() - sum(
                (needs[rows, 1] == size).sum() for rows in alone
            )
            assert 0 <= rest < 8
    again = micro_batches(needs, 8, seed=seed, epoch=0)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    other = micro_batches(needs, 8, seed=seed, epoch=1)
    assert len(other) == len(found)
    assert np.concatenate(other).tolist() != np.concatenate(found).tolist()


# ---- the thread


def counted(number, made, error=None):
    for i in range(number):
        made.append(i)
        yield i
    if error is not None:
        raise error


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_thread_makes_few_ahead_and_ends():
    made = []
    items = prefetched(counted(100, made), 3)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) == 5  # one taken, three ready, one in hand
    items.close()
    assert not threads() and len(made) <= 6
    assert list(prefetched(counted(5, []), 2)) == list(range(5))
    assert not threads()


@pytest.mark.parametrize("error", [jaxprune.UserError("no"), KeyboardInterrupt()])
def test_errors_come_in_their_place(error):
    items, seen = prefetched(counted(2, [], error), 8), []
    with pytest.raises(type(error)):
        seen += items
    assert seen == [0, 1]
    assert not threads()


def test_an_error_of_who_uses_them_ends_the_thread():
    items = prefetched(counted(100, []), 2)
    next(items)
    with pytest.raises(KeyboardInterrupt):
        items.throw(KeyboardInterrupt)
    assert not threads()
