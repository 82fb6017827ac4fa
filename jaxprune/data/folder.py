"""Questions as a folder: `questions.jsonl`, as `jaxprune evaluate` reads it, and its images."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from PIL import Image

from jaxprune.data.scenes import Question
from jaxprune.files import new_path, whole_directory


def write_questions(
    directory: Any, asked: Iterable[tuple[Image.Image | pathlib.Path, Question]]
) -> pathlib.Path:
    """Write a folder of questions, which appears whole or not at all.

    Args:
        directory: a new folder.
        asked: image and question of each. The file of a path is there once, however many questions
            go with it; an image is written as PNG.

    Returns:
        The JSONL file in it: image, question, answer and kind in each line.

    Raises:
        UserError: for a folder that is there already, or cannot be written.
    """
    target = new_path(directory, "The folder of questions")
    with whole_directory(target) as partial:
        (partial / "images").mkdir()
        with (partial / "questions.jsonl").open("w", encoding="utf-8") as lines:
            for number, (image, question) in enumerate(asked):
                name = (
                    f"images/{image.name if isinstance(image, pathlib.Path) else f'{number}.png'}"
                )
                if isinstance(image, Image.Image):
                    image.save(partial / name)
                elif not (partial / name).exists():
                    (partial / name).write_bytes(image.read_bytes())
                fields = {
                    "image": name,
                    "question": question.question,
                    "answer": question.answer,
                    "kind": question.kind,
                }
                lines.write(json.dumps(fields) + "\n")
    return target / "questions.jsonl"
