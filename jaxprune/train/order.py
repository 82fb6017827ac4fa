"""The order of an epoch's rows: a pure function of a seed, the epoch and what the rows need."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxprune.errors import UserError, check_whole


@dataclasses.dataclass(frozen=True, order=True)
class Position:
    """Which micro-batch comes next; `dataclasses.asdict` gives it as JSON.

    Attributes:
        epoch: from 0.
        batch: of that epoch's micro-batches, from 0.
    """

    epoch: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        check_whole("epoch", self.epoch, least=0)
        check_whole("batch", self.batch, least=0)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Position":
        """A position that was written as JSON.

        Raises:
            UserError: for anything else.
        """
        try:
            return cls(**fields)
        except TypeError:
            raise UserError(
                f"A position in the data is {fields!r}; expected an epoch and a batch."
            ) from None


def micro_batches(
    needs: Int[np.ndarray, "R 2"], size: int, *, seed: int, epoch: int
) -> list[Int[np.ndarray, " r"]]:
    """The rows of each micro-batch of an epoch, every row once.

    As LLaVA's `group_by_modality_length`, rows of one micro-batch have as many images and about as
    much text, so that little is padded. Rows that are left over once a size's micro-batches are
    full go with those of the next larger size; so of each number of images one micro-batch alone
    may have fewer rows.

    Args:
        needs: images and text tokens that there has to be room for, in buckets.
        size: rows of a micro-batch.
        seed, epoch: what the order follows from.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(needs))
    found: list[np.ndarray] = []
    for images in np.unique(needs[:, 0]):
        rest = shuffled[:0]
        for text in np.unique(needs[needs[:, 0] == images, 1]):
            alike = (needs[shuffled] == (images, text)).all(axis=1)
            rows = np.append(rest, shuffled[alike])
            full = len(rows) // size * size
            found += list(rows[:full].reshape(-1, size))
            rest = rows[full:]
        found += [rest] if len(rest) else []
    return [found[number] for number in rng.permutation(len(found))]
