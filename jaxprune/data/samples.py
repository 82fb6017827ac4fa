"""Calibration samples: an image, a question and its reference answer."""

import dataclasses
from typing import Any

from jaxprune.data import scenes
from jaxprune.errors import UserError
from jaxprune.files import as_path, parse_json

DEFAULT_SAMPLES = 192


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample; `image` is whatever `jaxprune.generate` takes.

    The answer may be empty where a method goes by attention alone (fitprune, iti).
    """

    image: Any
    question: str
    answer: str = ""


def scene_samples(number: int = DEFAULT_SAMPLES, *, seed: int = 0) -> list[Sample]:
    """Drawn scenes of the calibration split, which no accuracy is ever reported on."""
    pairs = [scenes.sample("calibration", seed, i) for i in range(number)]
    return [Sample(scenes.draw(scene), q.question, q.answer) for scene, q in pairs]


def read_samples(path: Any) -> list[Sample]:
    """Samples from a JSONL file; image paths are relative to it, empty lines do not count.

    Raises:
        UserError: for a missing or empty file, or a line that is no sample; it names the line.
    """
    path = as_path(path, "The data file")
    if not path.is_file():
        raise UserError(f"The data file {path} does not exist; expected JSONL.")
    samples = []
    try:
        # Not splitlines: JSON may hold other line separators as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}).") from None
        texts = isinstance(fields, dict) and all(
            isinstance(fields.get(name), str) and fields[name].strip()
            for name in ("image", "question")
        )
        if not texts or not isinstance(fields.get("answer", ""), str):
            raise UserError(
                f"{path}, line {number} is no sample; expected an object with the texts "
                "'image', 'question' and 'answer'."
            )
        try:
            image = path.parent / as_path(fields["image"], "the image")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not image.is_file():
            raise UserError(f"{path}, line {number}: the image {image} does not exist.")
        samples.append(Sample(image, fields["question"], fields.get("answer", "")))
    if not samples:
        raise UserError(f"{path} has no samples.")
    return samples
