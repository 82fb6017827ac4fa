"""Rows of conversations against what `transformers` makes of them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune.engine.forward import batch_of
from jaxprune.inputs.processor import load_processor
from jaxprune.inputs.prompts import AS_TEXT
from jaxprune.inputs.request import NO_LABEL, Request, make_request
from jaxprune.inputs.template import ChatTemplate
from jaxprune.methods.written import with_options
from jaxprune.train.data import Conversation, Turn
from jaxprune.train.turns import row_of, rows_of
from tests import builders
from tests.cases import FEW, mostly_slow, picture

# Templates of this file, in which transformers is told what the assistant says: all that comes
# after what `generate` is given, a space included.
_PARTS = "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>\\n' }}{% endfor %}"
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: " + _PARTS + " ASSISTANT:{% else %}"
    "{% generation %}{{ ' ' }}" + _PARTS + "</s>{% endgeneration %}{% endif %}{% endfor %}"
)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}" + _PARTS
    + "<|im_end|>\n{% else %}{% generation %}" + _PARTS + "<|im_end|>{% endgeneration %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip


@pytest.fixture(scope="module")
def processors(tmp_path_factory, tiny_model):
    """LLaVA-1.5's template without ends within, the same with them, and InternVL's."""
    folder = tmp_path_factory.mktemp("turns")
    internvl = builders.write_published_internvl(folder / "internvl")
    (internvl / "chat_template.jinja").write_text(CHATML)
    llava = tiny_model.processor
    return {
        "llava": llava,
        "vicuna": dataclasses.replace(llava, template=ChatTemplate(VICUNA, {})),
        "internvl": load_processor(internvl, jaxprune.read_config(internvl)),
    }


def whole_conversation(sample):
    """All of a conversation, its last answer too, as transformers takes it."""
    messages, _ = sample.asked(len(sample.turns) - 1)
    messages = [*messages, {"role": "assistant", "content": sample.turns[-1].answer}]
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else m
        for m in messages
    ]


def around(processor, text):
    """A text with images as the model reads them."""
    before, after = processor.around_images
    return text.replace("<image>", f"{before}{image_token(processor)}{after}")


def image_token(processor):
    known = "<image>" in processor.tokenizer.get_vocab()
    return "<image>" if known else processor.image_token


def templated(processor, sample):
    """Token ids of a whole conversation by transformers, and which the assistant says."""
    template = "{{ bos_token }}" + around(processor, processor.template.text)
    found = processor.tokenizer.apply_chat_template(
        whole_conversation(sample),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


def flat(processor, row):
    """A row's token ids, an image's token for each image, and the labels beside them."""
    image = processor.tokenizer.convert_tokens_to_ids(image_token(processor))
    ids = list(row.pieces[0])
    for piece in row.pieces[1:]:
        ids += [image, *piece]
    labels = row.answer if row.labels is None else row.labels
    return [*ids, *row.answer], [*[NO_LABEL] * len(ids), *labels]


def spans(labels):
    """Labels without a gap between them."""
    groups = itertools.groupby(labels, key=lambda label: label != NO_LABEL)
    return [list(own) for labelled, own in groups if labelled]


TALK = Conversation(
    ["x"],
    [Turn("What is it?", "A cat, or\n\ntwo.", 1), Turn("Why?", "So.", 0), Turn("é?", "ÿ 猫", 0)],
)


@pytest.mark.parametrize("name", ["vicuna", "internvl"])
def test_ids_and_labels_are_those_of_the_template(name, processors):
    processor = processors[name]
    (row,) = rows_of(processor, TALK, together=True)
    ids, said = templated(processor, TALK)
    found, labels = flat(processor, row)
    assert found == ids[: len(found)]
    assert set(said[len(found) :]) <= {0}
    assert labels == [i if own else NO_LABEL for i, own in zip(found, said, strict=False)]


def test_an_end_that_the_template_does_not_write(processors):
    """It is learned after each answer nevertheless, and the text goes on as in generate."""
    processor = processors["llava"]
    (row,) = rows_of(processor, TALK, together=True)
    ids, _ = templated(processor, TALK)
    found, labels = flat(processor, row)
    end = processor.tokenizer.eos_token_id
    assert end not in ids and found == [*ids[: len(found) - 1], end]
    assert [processor.tokenizer.decode(own) for own in spans(labels)] == [
        f" {turn.answer}</s>" for turn in TALK.turns
    ]


# Letters of all kinds, but for those that begin a special token or stand for "<image>" as text.
LETTERS = st.characters(
    codec="utf-8", exclude_characters=f"<{AS_TEXT[0]}", exclude_categories=["Cc"]
)
WORDS = st.text(st.one_of(st.sampled_from("ab .:\nU"), LETTERS), min_size=1, max_size=8)
TEXTS = WORDS.filter(lambda text: text.strip() and "\x00" not in text)


@st.composite
def conversations(draw):
    images = draw(st.integers(0, 2))
    spread = draw(st.booleans())
    number = draw(st.integers(1, 3))
    own = [0] * number
    for _ in range(images):
        own[draw(st.integers(0, number - 1)) if spread else 0] += 1
    turns = [Turn(draw(TEXTS), draw(TEXTS).strip(), n) for n in own]
    return Conversation(["x"] * images, turns)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sample=conversations(), name=st.sampled_from(["llava", "vicuna", "internvl"]))
def test_every_answer_is_labelled_as_in_a_row_of_its_own(processors, sample, name):
    processor = processors[name]
    tokenizer, end = processor.tokenizer, processor.eos_token_ids[0]
    apart = [flat(processor, row_of(processor, sample, n)) for n in range(len(sample.turns))]
    for (_, labels), turn in zip(apart, sample.turns, strict=True):
        (own,) = spans(labels)
        assert own[-1] == end
        assert tokenizer.decode(own[:-1], clean_up_tokenization_spaces=False).strip() == turn.answer
    found = rows_of(processor, sample, together=True)
    if len(found) == 1 < len(sample.turns):
        ids, labels = flat(processor, found[0])
        places = np.flatnonzero(np.array(labels) != NO_LABEL).tolist()
        for own_ids, own_labels in apart:
            for place in np.flatnonzero(np.array(own_labels) != NO_LABEL):
                assert place == places.pop(0)
                assert ids[:place] == own_ids[:place] and labels[place] == own_labels[place]
        assert not places
    else:
        assert [flat(processor, row) for row in found] == apart


def test_when_turns_are_put_together(processors):
    def number(turns, images, name="llava"):
        return len(rows_of(processors[name], Conversation(images, turns), together=True))

    for name in processors:
        assert number(TALK.turns, ["x"], name) == 1
        assert number([Turn("Hi", "Hello", 0), Turn("a", "b", 0)], [], name) == 1
        assert number([Turn("a", "b", 0), Turn("c", "d", 1)], ["x"], name) == 2
    assert len(rows_of(processors["llava"], TALK, together=False)) == 3


def test_a_template_that_forgets_what_was_said(processors):
    """As those that leave out earlier thoughts."""
    forgetful = VICUNA.replace("</s>", "{% if loop.last %}</s>{% endif %}").replace(
        "{% else %}{% generation", "{% elif loop.last %}{% generation"
    )
    processor = dataclasses.replace(processors["vicuna"], template=ChatTemplate(forgetful, {}))
    rows = rows_of(processor, TALK, together=True)
    assert len(rows) == 3
    assert "cat" not in processor.tokenizer.decode(rows[1].pieces[-1])


def test_they_are_what_generate_is_asked(tiny_model):
    """A turn's row is that of the same conversation in `jaxprune.batch`."""
    processor = tiny_model.processor
    messages, _ = TALK.asked(2)
    expected = make_request(
        processor, [picture(0)], [messages], chat=True, answers=[TALK.turns[2].answer]
    )
    assert row_of(processor, TALK, 2) == expected.rows[0]


@pytest.mark.parametrize("method", mostly_slow(["none", "prumerge:keep=5"], ["prumerge:keep=5"]))
def test_answers_together_have_the_likelihoods_that_they_have_apart(tiny_model, method):
    engine = builders.engine_of(tiny_model, buckets=FEW, **with_options(method))

    def scored(rows):
        batch = batch_of(engine, Request(rows, [picture(0)], single=False))
        found = jax.jit(jaxprune.forward)(tiny_model, batch)
        likely = np.asarray(jax.nn.log_softmax(found.logits))
        b, s = np.nonzero(batch.labels != NO_LABEL)
        return likely[b, s, batch.labels[b, s]], batch.labels[b, s]

    one, labels = scored(rows_of(tiny_model.processor, TALK, together=True))
    each, others = scored(rows_of(tiny_model.processor, TALK, together=False))
    assert labels.tolist() == others.tolist() and len(labels) > 10
    np.testing.assert_allclose(one, each, atol=1e-4)
