"""Collages of Fashion-MNIST's photographs, with questions drawn from their labels.

Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747; MIT) has 70,000 grey photographs of
28 x 28 pixels of ten kinds of garment. A collage has two to five of them, as they are, in
different cells of a 3 x 3 grid on muted ground, 96 x 96 pixels. Everything follows from a seed,
and the splits share no photograph: `held-out` takes the test file, `calibration` the last 5,000
of the training file, `train` the others.
"""

import dataclasses
import gzip
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxprune.data.scenes import (
    MAX_OBJECTS,
    POSITIONS,
    SCENE_SIZE,
    SPLITS,
    Question,
    only,
    random_generator,
)
from jaxprune.errors import UserError, check_choice
from jaxprune.files import as_path

DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the files."""
PLURALS = {
    "t-shirt": "t-shirts",
    "trousers": "trousers",
    "pullover": "pullovers",
    "dress": "dresses",
    "coat": "coats",
    "sandal": "sandals",
    "shirt": "shirts",
    "sneaker": "sneakers",
    "bag": "bags",
    "boot": "boots",
}
GARMENTS = tuple(PLURALS)  # in the order of the labels 0 to 9
SHOES = ("sandal", "sneaker", "boot")
KINDS = ("garment", "count", "position", "comparison", "yes/no")
SIDE = 28
CALIBRATION = 5000
_IMAGES, _LABELS = 2051, 2049  # what files of the IDX format begin with


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The photographs of one split.

    Attributes:
        split: one of `scenes.SPLITS`.
        pixels: 0 is black.
        labels: 0 to 9, as `GARMENTS`.
        first: which one of its file the first of them is.
    """

    split: str
    pixels: UInt8[np.ndarray, "n 28 28"]
    labels: UInt8[np.ndarray, " n"]
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Garment:
    """One photograph in a collage: which, what it shows and where its top left corner is."""

    photograph: int
    name: str
    position: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Collage:
    garments: tuple[Garment, ...]
    ground: tuple[int, int, int]


def read(split: str, directory: Any = None) -> Photographs:
    """The photographs of a split.

    Args:
        split: "train", "calibration" or "held-out".
        directory: the folder with the four files, as they are published or unpacked; None:
            where Debian's package puts them.

    Raises:
        UserError: for files that are missing or damaged; it says where they are to be had.
    """
    check_choice("split", split, SPLITS)
    folder = as_path(DEBIAN if directory is None else directory, "The folder of Fashion-MNIST")
    file = "t10k" if split == "held-out" else "train"
    pixels = _array(folder, f"{file}-images-idx3-ubyte", _IMAGES).reshape(-1, SIDE, SIDE)
    labels = _array(folder, f"{file}-labels-idx1-ubyte", _LABELS)
    if len(pixels) != len(labels) or labels.max(initial=0) >= len(GARMENTS):
        raise UserError(f"{folder} has images and labels that do not belong together.")
    cut = max(len(labels) - CALIBRATION, len(labels) // 2)  # small files for tests are halved
    start, end = {"train": (0, cut), "calibration": (cut, None), "held-out": (0, None)}[split]
    return Photographs(split, pixels[start:end], labels[start:end], start)


def _array(folder: pathlib.Path, name: str, magic: int) -> np.ndarray:
    """The numbers of an IDX file, packed or not: uint8, in one row."""
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {name}.gz of Fashion-MNIST; name its folder, or install it with "
            "`apt-get install dataset-fashion-mnist`. It is also at "
            "https://github.com/zalandoresearch/fashion-mnist."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); get it again.") from None
    # The format: what it is, the lengths of its axes, all as big-endian int32; then the bytes.
    axes = 3 if magic == _IMAGES else 1
    sizes = np.frombuffer(content[: 4 * (1 + axes)], ">i4")
    wanted = (magic, SIDE, SIDE) if axes == 3 else (magic,)
    numbers = np.frombuffer(content[4 * (1 + axes) :], np.uint8)
    if (
        len(sizes) != 1 + axes
        or (sizes[0], *sizes[2:]) != wanted
        or numbers.size != np.prod(sizes[1:])
    ):
        raise UserError(f"{folder / name} is no whole file of Fashion-MNIST; get it again.")
    return numbers


def sample_collage(photographs: Photographs, rng: np.random.Generator) -> Collage:
    """Two to five photographs of at most four kinds of garment."""
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    # Few kinds, so that counting is not always one.
    kinds = rng.choice(np.unique(photographs.labels), size=4)
    chosen = kinds[rng.integers(4, size=count)]
    garments = []
    for label, cell in zip(chosen, rng.permutation(9)[:count], strict=True):
        which = int(rng.choice(np.flatnonzero(photographs.labels == label)))
        dx, dy = rng.integers(SCENE_SIZE // 3 - SIDE + 1, size=2)
        x, y = cell % 3 * SCENE_SIZE // 3 + dx, cell // 3 * SCENE_SIZE // 3 + dy
        garments.append(Garment(which, GARMENTS[label], POSITIONS[cell], int(x), int(y)))
    red, green, blue = (int(v) for v in rng.uniform(70, 130) + rng.uniform(-12, 12, size=3))
    return Collage(tuple(garments), (red, green, blue))


def draw(collage: Collage, photographs: Photographs) -> Image.Image:
    """The collage as an RGB image of 96 x 96 pixels."""
    pixels = np.full((SCENE_SIZE, SCENE_SIZE, 3), collage.ground, np.uint8)
    for item in collage.garments:
        photograph = photographs.pixels[item.photograph]
        pixels[item.y : item.y + SIDE, item.x : item.x + SIDE] = photograph[..., None]
    return Image.fromarray(pixels)


def sample(
    photographs: Photographs, seed: int, index: int, kind: str | None = None
) -> tuple[Collage, Question]:
    """Collage `index` and one question; kinds take turns unless one is named."""
    rng = random_generator(photographs.split, seed, index)
    kind = KINDS[index % len(KINDS)] if kind is None else kind
    while True:
        collage = sample_collage(photographs, rng)
        question = ask(collage, kind, rng)
        if question is not None:
            return collage, question


def ask(collage: Collage, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one kind with its answer, or None where the collage allows none."""
    found = _ASK[kind](collage, rng)
    return None if found is None else Question(kind, *found)


def _ask_garment(collage: Collage, rng: np.random.Generator) -> tuple[str, str]:
    item = collage.garments[rng.integers(len(collage.garments))]
    return f"What is at the {item.position}?", item.name


def _ask_count(collage: Collage, rng: np.random.Generator) -> tuple[str, str]:
    names = [item.name for item in collage.garments]
    groups = {PLURALS[name]: names.count(name) for name in GARMENTS}
    groups["shoes"] = sum(groups[PLURALS[name]] for name in SHOES)
    groups["items"] = len(names)
    # First the number, then the group: else nearly every answer would be zero.
    number = int(rng.choice(sorted(set(groups.values()))))
    group = str(rng.choice([name for name, n in groups.items() if n == number]))
    return f"How many {group} are there?", str(number)


def _ask_position(collage: Collage, rng: np.random.Generator) -> tuple[str, str] | None:
    single = _single(collage)
    if not single:
        return None
    item = single[rng.integers(len(single))]
    return f"Where {_is(item.name)} the {item.name}?", item.position


def _ask_comparison(collage: Collage, rng: np.random.Generator) -> tuple[str, str] | None:
    single = _single(collage)
    if len(single) < 2:
        return None
    a, b = (single[i] for i in rng.permutation(len(single))[:2])
    (column_a, row_a), (column_b, row_b) = (
        (POSITIONS.index(item.position) % 3, POSITIONS.index(item.position) // 3) for item in (a, b)
    )
    clear = []
    if column_a != column_b:
        clear.append(("further left", a if column_a < column_b else b))
    if row_a != row_b:
        clear.append(("higher", a if row_a < row_b else b))
    how, answer = clear[rng.integers(len(clear))]
    return f"Which is {how}, the {a.name} or the {b.name}?", answer.name


def _ask_yes_no(collage: Collage, rng: np.random.Generator) -> tuple[str, str]:
    there = sorted({item.name for item in collage.garments})
    absent = [name for name in GARMENTS if name not in there]
    yes = rng.random() < 0.5
    name = str(rng.choice(there if yes else absent))
    article = "" if name == "trousers" else "a "
    return f"{_is(name).capitalize()} there {article}{name}?", "yes" if yes else "no"


def _is(name: str) -> str:
    return "are" if name == "trousers" else "is"


def _single(collage: Collage) -> list[Garment]:
    """Those that no other one is called like."""
    names = only([item.name for item in collage.garments])
    return [item for item in collage.garments if item.name in names]


_ASK = {
    "garment": _ask_garment,
    "count": _ask_count,
    "position": _ask_position,
    "comparison": _ask_comparison,
    "yes/no": _ask_yes_no,
}
