"""Calibration samples: an image, a question and its reference answer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.data import scenes
from jaxprune.data.lines import check_images, image_paths, parse_lines, read_text
from jaxprune.errors import UserError
from jaxprune.files import as_path

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
        UserError: for a missing or empty file, or lines that are no samples; it names them.
    """
    text, path = read_text(path), as_path(path, "The data file")

    def parse(where: str, fields: Mapping[str, Any]) -> Sample:
        image, question, answer = (fields.get(n, "") for n in ("image", "question", "answer"))
        if not all(isinstance(x, str) for x in (image, question, answer)) or not (
            image.strip() and question.strip()
        ):
            raise UserError(
                f"{where} is no sample; expected an object with the texts 'image', 'question' "
                "and 'answer'."
            )
        images = image_paths(where, image, path.parent)
        check_images(where, images)
        return Sample(images[0], question, answer)

    return parse_lines(text, path, "sample", parse)
