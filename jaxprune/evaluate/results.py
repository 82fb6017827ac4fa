"""From answers to figures: a row for each method, compared with the first."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.evaluate.answers_file import Outcome
from jaxprune.evaluate.data import Item
from jaxprune.evaluate.scoring import YES_NO, mme_figures, pope_figures, said_word, score, truth_of
from jaxprune.evaluate.statistics import mean_interval, paired_difference


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's figures. Accuracies are shares; what could not be answered counts as wrong.

    Attributes:
        method: its label.
        errors: questions that could not be answered.
        first_error: why the first of them could not; None where there is none.
        accuracy: the mean score, 0 to 1.
        interval: of the accuracy, at 95 %.
        difference: to the accuracy of the first row; None in it.
        difference_interval: of the difference, at 95 %, by pairs of answers to one question.
        significant: whether the difference can be told from 0.
        figures: what else POPE and MME give: "precision", "recall", "f1", "yes_ratio";
            "accuracy_plus", "score".
        kinds: for each kind of question "samples", these five, and its figures.
        visual_tokens: that enter a layer of the decoder, mean over layers and prompts.
        macs: the decoder's multiply-adds for a prompt, mean; a FLOP count is twice that.
        seconds: wall time of an answer, its share of a batch's, median. Batches in which something
            was compiled are left out; None where that leaves none.
    """

    method: str
    errors: int
    first_error: str | None
    accuracy: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    significant: bool | None
    figures: dict[str, float]
    kinds: dict[str, dict[str, Any]]
    visual_tokens: float | None
    macs: float | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `jaxprune.evaluate` gives.

    Attributes:
        rows: one a method.
        samples: questions, the same for all methods.
        scoring: how many of them are scored by which rule.
        max_new_tokens: of an answer, at most.
    """

    rows: list[Row]
    samples: int
    scoring: dict[str, int]
    max_new_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """All fields as what JSON can say."""
        return dataclasses.asdict(self)


def score_of(item: Item, outcome: Outcome) -> float:
    """What came of a question, 0 to 1; nothing is worth 0."""
    if outcome.text is None:
        return 0.0
    return score(item.scored_by, outcome.text, item.answers, item.choices)


def evaluation(
    items: Sequence[Item],
    labels: Sequence[str],
    outcomes: Sequence[Sequence[Outcome]],
    max_new_tokens: int,
) -> Evaluation:
    """The figures of all methods.

    Args:
        items: the questions.
        labels: of the methods.
        outcomes: for each method one a question.
        max_new_tokens: of an answer.
    """
    groups = image_groups(items)
    rows: list[Row] = []
    first: np.ndarray | None = None
    for label, own in zip(labels, outcomes, strict=True):
        scores = np.array([score_of(*pair) for pair in zip(items, own, strict=True)])
        rows.append(_row(label, items, own, scores, first, groups))
        first = scores if first is None else first
    scoring = collections.Counter(item.scored_by for item in items)
    return Evaluation(rows, len(items), dict(scoring), max_new_tokens)


def image_groups(items: Sequence[Item]) -> np.ndarray:
    """Which questions are about the same images: int `[N]`."""
    numbers: dict[Any, int] = {}
    found = []
    for item in items:
        several = item.image if isinstance(item.image, list | tuple) else [item.image]
        # What is no path is the same where it is the same object; None says nothing.
        key = tuple(str(x) if isinstance(x, str) or hasattr(x, "__fspath__") else id(x)
                    for x in several if x is not None) or (object(),)  # fmt: skip
        found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found)


def _row(
    label: str,
    items: Sequence[Item],
    outcomes: Sequence[Outcome],
    scores: np.ndarray,
    first: np.ndarray | None,
    groups: np.ndarray,
) -> Row:
    kinds = list(dict.fromkeys(item.kind for item in items))
    of_kinds = {}
    if len(kinds) > 1:
        for kind in kinds:
            own = [i for i, item in enumerate(items) if item.kind == kind]
            before = None if first is None else first[own]
            of_kinds["other" if kind is None else kind] = {
                "samples": len(own),
                **_accuracy(scores[own], before, groups[own]),
                **_figures([items[i] for i in own], [outcomes[i] for i in own], scores[own]),
            }
    errors = [outcome.error for outcome in outcomes if outcome.text is None]
    return Row(
        method=label,
        errors=len(errors),
        first_error=errors[0] if errors else None,
        **_accuracy(scores, first, groups),
        figures=_figures(items, outcomes, scores),
        kinds=of_kinds,
        visual_tokens=_mean([outcome.visual_tokens for outcome in outcomes]),
        macs=_mean([outcome.macs for outcome in outcomes]),
        seconds=_median([outcome.seconds for outcome in outcomes if not outcome.compiled]),
    )


def _accuracy(scores: np.ndarray, first: np.ndarray | None, groups: np.ndarray) -> dict[str, Any]:
    """The accuracy and its interval, and the difference to the first method's and its interval."""
    mean, low, high = mean_interval(scores, groups)
    found: dict[str, Any] = {"accuracy": mean, "interval": (low, high)}
    if first is None:
        return found | dict.fromkeys(("difference", "difference_interval", "significant"))
    change = paired_difference(first, scores, groups)
    return found | {
        "difference": change.mean,
        "difference_interval": (change.low, change.high),
        "significant": change.significant,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _figures(
    items: Sequence[Item], outcomes: Sequence[Outcome], scores: np.ndarray
) -> dict[str, float]:
    """What benchmarks of yes and no give besides the accuracy."""
    places = {rule: [i for i, x in enumerate(items) if x.scored_by == rule] for rule in YES_NO}
    found: dict[str, float] = {}
    if own := places["pope"]:
        texts = [outcomes[i].text for i in own]
        said = [None if text is None else said_word("pope", text) for text in texts]
        found |= pope_figures(said, [truth_of(items[i].answers[0]) for i in own])
    if own := places["mme"]:
        pairs = [(items[i].kind, items[i].pair) for i in own]
        found |= mme_figures([float(scores[i]) for i in own], pairs)
        # MME adds its score up over the categories, which differ in size.
        found["score"] = sum(
            mme_figures(
                [float(scores[i]) for i in own if items[i].kind == kind],
                [pair for pair in pairs if pair[0] == kind],
            )["score"]
            for kind in dict.fromkeys(kind for kind, _ in pairs)
        )
    found.pop("accuracy", None)  # which is there without
    return found
