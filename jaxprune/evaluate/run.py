"""Every method over every question: checked first, then answered, written down and compared."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

from jaxprune.engine.answer import Answer
from jaxprune.engine.buckets import DEFAULT_BUCKETS
from jaxprune.engine.engine import Engine
from jaxprune.errors import UserError, check_whole
from jaxprune.evaluate.answers_file import (
    Outcome,
    append,
    append_method,
    appending,
    check_options,
    digest_of,
    read_answers,
)
from jaxprune.evaluate.data import Item, read_items
from jaxprune.evaluate.methods import Named, labels_of, name_methods
from jaxprune.evaluate.results import Evaluation, evaluation, score_of
from jaxprune.files import as_path
from jaxprune.generate import generate_many, plan_of
from jaxprune.inputs.pixels import size_of
from jaxprune.inputs.request import make_request
from jaxprune.inputs.videos import Visual
from jaxprune.methods.base import Plan
from jaxprune.model import Params, weights_digest
from jaxprune.models.registry import fingerprint
from jaxprune.progress import track


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation that is checked as far as it can be without a model.

    Attributes:
        items: what is asked.
        methods: the first is what the others are compared with.
        max_new_tokens: of an answer, at most.
        batch_size: prompts that run together.
        out: the file of answers, or None.
        identity: what the answers in the file are of, but for the model.
        done: how many of the answers the file has.
    """

    items: list[Item]
    methods: list[Named]
    max_new_tokens: int
    batch_size: int
    out: pathlib.Path | None
    identity: dict[str, Any]
    done: int

    @property
    def lines(self) -> list[tuple[str, int]]:
        """Method and number of the question of every answer, in their order."""
        numbers = range(1, len(self.items) + 1)
        return list(itertools.product(labels_of(self.methods), numbers))


def prepare(
    data: Any = None,
    *,
    methods: Any,
    scoring: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    samples: int | None = None,
    out: Any = None,
) -> Task:
    """Read and check what `evaluate` takes, all but the model.

    Raises:
        UserError: as `evaluate`.
    """
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("batch_size", batch_size)
    named = name_methods(methods)
    items = read_items(data, scoring=scoring, samples=samples)
    path = None if out is None else as_path(out, "The file of answers")
    if path is None:
        return Task(items, named, max_new_tokens, batch_size, None, {}, 0)
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no directory; make it first.")
    identity = {"data": digest_of(items), "max_new_tokens": max_new_tokens}
    task = Task(items, named, max_new_tokens, batch_size, path, identity, 0)
    outcomes = read_answers(path, identity, len(items)).outcomes
    return dataclasses.replace(task, done=sum(line in outcomes for line in task.lines))


def evaluate(
    params: Params,
    data: Any = None,
    *,
    methods: Any,
    scoring: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    samples: int | None = None,
    out: Any = None,
    show_progress: bool | None = None,
) -> Evaluation:
    """How well a model answers under each method, and whether the difference is one.

    Every method answers every question, greedily. What cannot be answered is wrong. Intervals
    come from drawing images again, with all their questions.

    Args:
        params: what `jaxprune.load` gives.
        data: the path of a JSONL file with "image", "question" and "answer" (docs/evaluating.md
            has the rest), a list of `Item`, or None for drawn scenes.
        methods: one or a list of: a name or a text "name:keep=64;order=raster", an instance, a
            recipe or its path, a pair as a tuple, or a dict with "method" and its options.
            "none" goes in front unless it is named. The others are compared with the first.
        scoring: one of `scoring.SCORINGS` for all; None: each question's own.
        max_new_tokens: of an answer, at most.
        batch_size: prompts that run together, at most.
        samples: how many questions, from the first; None: all, or 240 scenes.
        out: a JSONL file to which answers are written as they come. One that is there has to be
            of the same data and model; what it holds of these methods is not asked again.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        UserError: for data, methods or a file that do not work; a question's own error is
            counted and the others go on.
    """
    task = prepare(
        data, methods=methods, scoring=scoring, max_new_tokens=max_new_tokens,
        batch_size=batch_size, samples=samples, out=out,
    )  # fmt: skip
    return run(params, task, show_progress=show_progress)


def run(params: Params, task: Task, *, show_progress: bool | None = None) -> Evaluation:
    """Do what was prepared.

    Raises:
        UserError: for a method that does not fit the model, or answers of another one.
    """
    if not isinstance(params, Params):
        raise UserError(f"params is a {type(params).__name__}; expected what jaxprune.load gives.")
    # All of them before the first runs for an hour.
    plans = {method.label: _plan(params, method, task.items[0]) for method in task.methods}
    outcomes: dict[tuple[str, int], Outcome] = {}
    if task.out is None:
        outcomes.update(_answered(params, task, outcomes, show_progress))
    else:
        options = {label: _digest(plan) for label, plan in plans.items()}
        identity = {
            **task.identity,
            "model": fingerprint(params.config),
            "weights": weights_digest(params),
        }
        known = read_answers(task.out, identity, len(task.items))
        check_options(task.out, known.methods, options)
        outcomes.update(known.outcomes)
        begun = set(known.methods)
        with appending(task.out, identity, known.whole) as file:
            for (label, number), outcome in _answered(params, task, known.outcomes, show_progress):
                if label not in begun:
                    append_method(file, label, options[label])
                    begun.add(label)
                item = task.items[number - 1]
                append(file, label, number, item, outcome, score_of(item, outcome))
                outcomes[label, number] = outcome
    found = [outcomes[line] for line in task.lines]
    N = len(task.items)
    by_method = [found[first : first + N] for first in range(0, len(found), N)]
    return evaluation(task.items, labels_of(task.methods), by_method, task.max_new_tokens)


def _plan(params: Params, method: Named, item: Item) -> Plan:
    """The plan of a method.

    Raises:
        UserError: for one that does not fit the model, or the image of a question.
    """
    options = dict(method.arguments)
    try:
        plan = plan_of(options.pop("method"), params.config, 0, options)
        engine = Engine(params, plan, DEFAULT_BUCKETS)
        images = _images(engine, item)
        engine.check_images(images, [params.config.tiling(size_of(image)) for image in images])
    except UserError as error:
        raise UserError(f"{method.label}: {error}") from None
    return plan


def _images(engine: Engine, item: Item) -> Sequence[Visual]:
    """A question's images; none where it cannot be asked, which it is told of in its place."""
    images = item.image if isinstance(item.image, list | tuple) else [item.image]
    try:
        return make_request(engine.processor, [[*images]], [item.question], chat=True).images
    except UserError:
        return []


def _digest(plan: Plan) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:12]


def _answered(
    params: Params, task: Task, known: Container[tuple[str, int]], show_progress: bool | None
) -> Iterator[tuple[tuple[str, int], Outcome]]:
    """The answers that are not known, each behind its method and number, in their order."""
    due = [line for line in task.lines if line not in known]
    answers = itertools.chain.from_iterable(
        _of_method(params, task, method, [n for label, n in due if label == method.label])
        for method in task.methods
    )
    yield from zip(due, track(answers, "Evaluating", len(due), show=show_progress), strict=True)


def _of_method(
    params: Params, task: Task, method: Named, numbers: Sequence[int]
) -> Iterator[Outcome]:
    """A method's answers to some of the questions."""
    if not numbers:
        return
    items = [task.items[number - 1] for number in numbers]
    answers = generate_many(
        params,
        [{"image": item.image, "prompt": item.question} for item in items],
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        return_details=True,
        return_errors=True,
        show_progress=False,
        **method.arguments,
    )
    yield from map(_outcome, answers)


def _outcome(answer: Answer | UserError) -> Outcome:
    if isinstance(answer, UserError):
        return Outcome(None, str(answer), None, None, None, 0)
    return Outcome(
        text=answer.text,
        error=None,
        visual_tokens=answer.cost.visual_per_layer,
        macs=answer.cost.macs,
        seconds=round(sum(answer.seconds.values()) / answer.batch, 6),
        compiled=answer.compiled,
    )
