"""Conversations as rows of token ids, and what is learned of them: answers and their ends.

A row is what `jaxprune.generate` reads when the question of a turn is asked, with the answer and
its end behind it. Where nothing depends on which question comes last, the turns of a conversation
are one row: between two answers stands what the chat template writes there, and the last token
of each answer learns the end of an answer whether the template writes one or not. So each answer
has the labels that it has in a row of its own.
"""

from collections.abc import Sequence

from jaxprune.inputs.processor import Processor
from jaxprune.inputs.prompts import as_messages, question_of, render, tokenize
from jaxprune.inputs.request import NO_LABEL, Row, answer_ids
from jaxprune.train.data import Conversation


def rows_of(processor: Processor, sample: Conversation, *, together: bool) -> list[Row]:
    """A conversation's rows: one, or one a turn with the turns before it as context.

    Args:
        processor: of the model.
        sample: the conversation.
        together: put all answers into one row, where it has an image in its first turn alone and
            the chat template leaves what was said as it was.

    Raises:
        UserError: for what cannot be asked.
    """
    rows = [row_of(processor, sample, turn) for turn in range(len(sample.turns))]
    joined = _joined(rows) if together else None
    return rows if joined is None else [joined]


def row_of(processor: Processor, sample: Conversation, turn: int) -> Row:
    """The row of one turn; its images are numbered as the conversation's.

    Raises:
        UserError: for what cannot be asked.
    """
    asked, images = sample.asked(turn)
    messages, images = as_messages(asked, images)
    text = render(processor, messages)
    pieces = tokenize(processor, text, len(images))
    answer = answer_ids(processor, text, sample.turns[turn].answer, pieces)
    return Row(pieces, list(range(len(images))), answer, question_of(asked))


def _joined(rows: Sequence[Row]) -> Row | None:
    """Rows of one turn each as one row of all; None where one does not go on where another ends."""
    first, *others = rows
    *answer, end = first.answer
    labels = list(answer)
    for row in others:
        before = [*first.pieces[-1], *answer]
        *earlier, last = row.pieces
        if earlier != first.pieces[:-1] or last[: len(before)] != before:
            return None
        between = last[len(before) :]
        *said, end = row.answer
        answer += [*between, *said]
        labels += [end, *[NO_LABEL] * (len(between) - 1), *said]
    return Row(first.pieces, first.images, [*answer, end], first.question, [*labels, end])
