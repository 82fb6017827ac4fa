"""easy-VQA (PyPI, MIT): 5,000 drawings of one shape, 64 x 64 pixels, with 48,000 questions.

Three in four questions are answered by yes or no, and "no" in half of them asks for what is
*not* there: a guess without the image has .67 of all. Its kinds tell them apart: "color" and
"shape" are open, of eight and three answers.

Its test images are the split `held-out`, the last 500 of its training images `calibration`, the
others `train`.
"""

import importlib.util
import pathlib
from typing import Any

from jaxprune.data.scenes import SPLITS, Question
from jaxprune.errors import UserError, check_choice
from jaxprune.files import as_path, parse_json

COLORS = ("red", "green", "blue", "yellow", "teal", "gray", "black", "brown")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("color", "shape", "yes/no")
CALIBRATION = 500
_KIND = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(("yes", "no"), "yes/no"),
}


def read(split: str, directory: Any = None) -> list[tuple[pathlib.Path, Question]]:
    """The questions of a split, each with the path of its image (PNG).

    Args:
        split: "train", "calibration" or "held-out".
        directory: the folder that has the folders `train` and `test`; None: of the installed
            package.

    Raises:
        UserError: for files that are missing or of another form; it says what to install.
    """
    check_choice("split", split, SPLITS)
    folder = _installed() if directory is None else as_path(directory, "The folder of easy-VQA")
    folder /= "test" if split == "held-out" else "train"
    path = folder / "questions.json"
    try:
        lines = parse_json(path.read_text(encoding="utf-8"))
        asked = [(int(image), Question(_KIND[a], q, a)) for q, a, image in lines]
        last = 1 + max(image for image, _ in asked)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no questions.json of easy-VQA; name the folder data of the package "
            "`easy-vqa`, or install it with `pip install easy-vqa`."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not easy-VQA's list of questions ({error}).") from None
    cut = max(last - CALIBRATION, last // 2)  # small files for tests are halved
    taken = {"train": range(cut), "calibration": range(cut, last), "held-out": range(last)}[split]
    found = [(folder / "images" / f"{i}.png", question) for i, question in asked if i in taken]
    for image in {image for image, _ in found}:
        if not image.is_file():
            raise UserError(f"{image} of easy-VQA is missing; `pip install easy-vqa` again.")
    return found


def _installed() -> pathlib.Path:
    """Its data in the installed package, which is not imported."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError(
            "easy-VQA is not installed; `pip install easy-vqa`, or name the folder of its data."
        )
    return pathlib.Path(spec.origin).parent / "data"
