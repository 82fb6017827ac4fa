"""Slots, kinds and positions of a batch; positions of several axes through the whole model."""

import dataclasses

import chex
import numpy as np
import pytest

from jaxprune.inputs.layout import ImageRoom, lay_out, row_length, text_room
from jaxprune.inputs.prompts import tokenize
from jaxprune.inputs.request import Row
from jaxprune.ops.cuts import ANSWER, CONTEXT, LAST, LAST_VISUAL, QUESTION, VISUAL
from tests.builders import start, tiny_config
from tests.cases import picture

# Of two images 3 and 2 tokens are left; in the whole they took up 5 positions and 2.
ROOM = ImageRoom(np.array([3, 2]), np.array([5, 2]), np.array([1, 0]), 4)


def test_a_row_of_two_images_and_an_answer():
    row = Row([[7, 8], [9], [10, 11]], [0, 1], answer=[12, 2])
    layout = lay_out([row], ROOM, batch=2, sequence=14)
    embedded = layout.embedded
    assert embedded.token_ids[0].tolist() == [7, 8, 0, 0, 0, 9, 0, 0, 10, 11, 12, 2, 0, 0]
    visual = [-1, -1, 0, 1, 2, -1, 4, 5, -1, -1, -1, -1, -1, -1]
    assert embedded.visual_index[0].tolist() == visual
    kinds = [CONTEXT] * 2 + [VISUAL] * 3 + [CONTEXT] + [VISUAL] * 2
    kinds += [QUESTION, LAST, ANSWER, ANSWER, CONTEXT, CONTEXT]
    assert embedded.kind[0].tolist() == kinds
    positions = [0, 1, 2, 2, 2, 7, 8, 8, 10, 11, 12, 13]
    assert embedded.positions[0, :12].tolist() == positions
    assert embedded.lengths.tolist() == [12, 1]
    assert layout.next_position.tolist() == [14, 1]
    assert layout.visual.tolist() == [5, 0]
    assert layout.candidates.tolist() == [4, 0]  # one token is never pruned
    assert row_length(row, ROOM.counts) == 12
    assert text_room(row, ROOM.fixed) == 8


def test_a_prompt_that_ends_with_its_image():
    layout = lay_out([Row([[7], []], [1])], ROOM, batch=1, sequence=4)
    assert layout.embedded.kind[0].tolist() == [CONTEXT, VISUAL, LAST_VISUAL, CONTEXT]
    assert layout.candidates.tolist() == [1]


@pytest.fixture(scope="module")
def flat():
    return tiny_config(text={"rope_sections": (2, 2, 2)})


def test_three_equal_axes_are_one(flat, tiny_model):
    """Rotary positions `[3, B, S]` that count slots on every axis give what `[B, S]` gives."""
    processor = tiny_model.processor
    one, three = (
        dataclasses.replace(tiny_model, config=config, processor=processor)
        for config in (tiny_config(), flat)
    )
    for method in ("none", "prumerge", "vtw"):
        runs = [start(model, picture(0), "What?", method=method) for model in (one, three)]
        chex.assert_trees_all_close(*(run.first_logits for run in runs), atol=1e-5)
        for run in runs:
            run.advance(4)
        assert runs[0].tokens.tolist() == runs[1].tokens.tolist()
    assert runs[1].prompt.layout.embedded.positions.shape[0] == 3


def test_text_around_every_image(tiny_model):
    processor = dataclasses.replace(tiny_model.processor, around_images=(" a ", " b "))
    pieces = tokenize(processor, "<image>\nWhat <image>?", 2)
    plain = tokenize(tiny_model.processor, " a <image> b \nWhat  a <image> b ?", 2)
    assert pieces == plain
    assert len(pieces) == 3
