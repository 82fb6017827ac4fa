"""`generate_many`: order, batches, errors in their place."""

import itertools

import pytest
from PIL import Image

import jaxprune
from jaxprune.engine import batching, session
from tests.cases import picture


def requests(number):
    prompts = [
        "What?",
        "Where is the red circle, and why is it there, of all places, do you think?",
    ]
    return [(picture(i), prompts[i % 2] if i % 3 else "a b c") for i in range(number)]


def batches(monkeypatch):
    """The sizes of the batches that run from here on."""
    sizes, begin = [], session.begin

    def spy(engine, request, asks, clock):
        sizes.append(len(asks))
        return begin(engine, request, asks, clock)

    monkeypatch.setattr(batching, "begin", spy)
    return sizes


def test_answers_are_those_of_single_requests(tiny_model, monkeypatch):
    sizes = batches(monkeypatch)
    some = requests(7)
    found = list(
        jaxprune.generate_many(tiny_model, some, method="prumerge", max_new_tokens=4, batch_size=4)
    )
    alone = [
        jaxprune.generate(tiny_model, *request, method="prumerge", max_new_tokens=4)
        for request in some
    ]
    assert found == alone
    assert sum(sizes) == 7 and max(sizes) == 4


def test_own_options(tiny_model):
    some = [
        {"prompt": "What?", "image": picture(0), "max_new_tokens": 2},
        {"prompt": "Hello"},
        {"prompt": "<image> and <image>?", "image": [picture(0), picture(1)]},
    ]
    found = list(jaxprune.generate_many(tiny_model, some, max_new_tokens=5, return_details=True))
    assert [len(answer.visual_tokens) for answer in found] == [1, 0, 2]
    for answer, request, limit in zip(found, some, (2, 5, 5), strict=True):
        images = request.get("image")
        images = [images] if isinstance(images, list) else images
        prompt = [request["prompt"]] if isinstance(images, list) else request["prompt"]
        alone = jaxprune.generate(
            tiny_model, images, prompt, max_new_tokens=limit, return_details=True
        )
        alone = alone[0] if isinstance(alone, list) else alone
        assert answer.token_ids == alone.token_ids
        assert len(answer.token_ids) <= limit


def test_limits_of_one_bucket_share_a_batch(tiny_model, monkeypatch):
    sizes = batches(monkeypatch)
    some = [{"prompt": "What?", "image": picture(i), "max_new_tokens": 3 + 2 * i} for i in range(3)]
    found = list(jaxprune.generate_many(tiny_model, some, return_details=True))
    assert sizes == [3]
    for answer, request in zip(found, some, strict=True):
        alone = jaxprune.generate(tiny_model, **request, return_details=True)
        assert answer.token_ids == alone.token_ids
    assert [len(answer.token_ids) for answer in found] == [3, 5, 7]  # or this tests nothing


def test_numbers_of_images_of_one_bucket_share_a_batch(tiny_model, monkeypatch):
    sizes = batches(monkeypatch)
    some = [([picture(i) for i in range(n)], "<image>" * n + " What?") for n in (3, 4, 3)]
    found = list(jaxprune.generate_many(tiny_model, some, max_new_tokens=3))
    assert sizes == [3]
    alone = [jaxprune.generate(tiny_model, [i], [p], max_new_tokens=3)[0] for i, p in some]
    assert found == alone
    buckets = jaxprune.Buckets().up_to(images=8)
    assert found == list(
        jaxprune.generate_many(tiny_model, some, max_new_tokens=3, buckets=buckets)
    )
    assert sizes[-2:] == [2, 1]  # of the ten images eight go together


def test_large_images_are_not_read_far_ahead(tiny_model, monkeypatch):
    monkeypatch.setattr(batching, "IMAGE_BYTES", 1)
    read = []

    def noted():
        for i in range(20):
            read.append(i)
            yield picture(i), "What?"

    found = jaxprune.generate_many(tiny_model, noted(), max_new_tokens=2, batch_size=2)
    assert next(found) == jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=2)
    assert read == [0, 1]


def test_an_error_keeps_nothing_alive(tiny_model):
    some = [(picture(0), "word " * 400), (picture(1), "word " * 400)]
    for error in jaxprune.generate_many(tiny_model, some, return_errors=True):
        assert isinstance(error, jaxprune.UserError)
        assert [error.__traceback__, error.__context__, error.__cause__] == [None] * 3


def test_draws_do_not_depend_on_the_batch(tiny_model):
    some = [{"prompt": "What?", "image": picture(0), "seed": i} for i in range(3)]
    options = {"temperature": 1.0, "max_new_tokens": 6}
    found = list(jaxprune.generate_many(tiny_model, some, **options))
    alone = [
        jaxprune.generate(tiny_model, r["image"], r["prompt"], seed=r["seed"], **options)
        for r in some
    ]
    assert found == alone


def test_errors_come_in_their_place(tiny_model):
    some = requests(6)
    some[1] = ("missing.png", "What?")
    some[3] = (picture(0), "word " * 400)  # over the context: found when its batch runs
    some[4] = 5
    found = list(jaxprune.generate_many(tiny_model, some, max_new_tokens=2, return_errors=True))
    assert [isinstance(f, jaxprune.UserError) for f in found] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    stream = jaxprune.generate_many(tiny_model, some, max_new_tokens=2)
    assert next(stream) == found[0]
    with pytest.raises(jaxprune.UserError, match=r"missing\.png"):
        next(stream)


def test_a_long_prompt_does_not_cut_its_neighbours_answer(tiny_model):
    """The model's context is 256; both prompts are of one bucket."""
    some = [(picture(0), "a b " * 92), (picture(1), "a b " * 75)]
    options = {"max_new_tokens": 60, "return_details": True}
    found = list(jaxprune.generate_many(tiny_model, some, **options))
    for answer, request in zip(found, some, strict=True):
        alone = jaxprune.generate(tiny_model, *request, **options)
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason
    room = [256 - answer.prompt_tokens for answer in found]
    assert room[0] < 60 < room[1]  # or this tests nothing
    assert len(found[0].token_ids) <= room[0]


def test_what_came_before_a_broken_iterator_is_answered(tiny_model):
    def broken():
        yield picture(0), "What?"
        yield picture(1), "What?"
        raise OSError("the disk is gone")

    found = jaxprune.generate_many(tiny_model, broken(), max_new_tokens=2)
    for i in range(2):
        alone = jaxprune.generate(tiny_model, picture(i), "What?", max_new_tokens=2)
        assert next(found) == alone
    with pytest.raises(OSError, match="disk is gone"):
        next(found)


def test_a_compilation_that_is_forbidden_is_named(tiny_model):
    buckets = jaxprune.Buckets(batch=(3,), text=(77,))
    some = jaxprune.generate_many(
        tiny_model, requests(3), max_new_tokens=2, buckets=buckets, batch_size=3,
        return_errors=True,
    )  # fmt: skip
    with (
        pytest.raises(jaxprune.UserError, match="had to be compiled for"),
        jaxprune.no_compilation(),
    ):
        list(some)


def test_endless_requests(tiny_model):
    image = picture(0)
    endless = ((image, "What?") for _ in itertools.count())
    found = jaxprune.generate_many(tiny_model, endless, max_new_tokens=1, batch_size=2)
    assert len(set(itertools.islice(found, 5))) == 1


def test_endless_mistakes_are_delivered(tiny_model):
    found = jaxprune.generate_many(tiny_model, itertools.repeat(5), return_errors=True)
    assert all(isinstance(f, jaxprune.UserError) for f in itertools.islice(found, 300))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"requests": "abc"}, "requests is a str"),
        ({"requests": {"prompt": "a"}}, "requests is a dict"),
        ({"requests": 5}, "requests is a int"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1000}, "over the largest bucket 64"),
        ({"method": "prumrge"}, "Did you mean 'prumerge'"),
    ],
)
def test_mistakes_for_all(change, message, tiny_model):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate_many(tiny_model, **{"requests": [(None, "Hi")], **change})


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"prompt": "a", "colour": 1}, "unknown colour"),
        ({"prompt": ["a", "b"], "image": Image.new("RGB", (9, 9))}, "2 prompts"),
        ({"image": Image.new("RGB", (9, 9))}, "no prompt"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "seed": [1, 2]}, "has 2 seeds"),
    ],
)
def test_mistakes_in_one(request_, message, tiny_model):
    with pytest.raises(jaxprune.UserError, match=message):
        list(jaxprune.generate_many(tiny_model, [request_]))
