import numpy as np
import pytest

from jaxprune.data import fashion, scenes
from jaxprune.errors import UserError
from tests.data.third_party import photographs as photographs_of
from tests.data.third_party import write_fashion, write_idx

SPLITS = ("train", "calibration", "held-out")
NOISE = photographs_of(4, 2)[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_fashion(tmp_path_factory.mktemp("fashion"))


def test_files_are_read_packed_or_not(directory, tmp_path):
    images, labels = photographs_of(40, 1)
    write_idx(tmp_path, "t10k", images, labels, pack=bytes)
    for folder in (directory, tmp_path):
        found = fashion.read("held-out", folder)
        assert (found.pixels == images).all() and (found.labels == labels).all()


def test_splits_share_no_photograph(directory):
    splits = [fashion.read(split, directory) for split in SPLITS]
    assert [len(one.labels) for one in splits] == [40, 40, 40]
    assert len({image.tobytes() for one in splits for image in one.pixels}) == 120


def test_a_collage_follows_from_its_seed_and_split(directory):
    train, held_out = (fashion.read(split, directory) for split in ("train", "held-out"))
    a, b = (fashion.sample(train, 0, 7) for _ in range(2))
    assert a == b
    assert (np.asarray(fashion.draw(a[0], train)) == np.asarray(fashion.draw(b[0], train))).all()
    assert fashion.sample(train, 1, 7) != a
    assert fashion.sample(held_out, 0, 7) != a


def test_photographs_are_where_they_are_said_to_be_and_unchanged(directory):
    photographs = fashion.read("train", directory)
    for index in range(40):
        collage, _ = fashion.sample(photographs, 0, index)
        assert 2 <= len(collage.garments) <= scenes.MAX_OBJECTS
        pixels = np.asarray(fashion.draw(collage, photographs))
        assert pixels.shape == (96, 96, 3)
        for item in collage.garments:
            center = (item.y + 14) // 32 * 3 + (item.x + 14) // 32
            assert scenes.POSITIONS[center] == item.position
            there = pixels[item.y : item.y + 28, item.x : item.x + 28]
            assert (there == photographs.pixels[item.photograph][..., None]).all()
            assert fashion.GARMENTS[photographs.labels[item.photograph]] == item.name


@pytest.mark.parametrize("kind", fashion.KINDS)
def test_answers_are_true(directory, kind):
    photographs = fashion.read("train", directory)
    singular = {plural: name for name, plural in fashion.PLURALS.items()}
    for index in range(60):
        collage, question = fashion.sample(photographs, 3, index, kind)
        names = [item.name for item in collage.garments]
        cells = {item.position: item.name for item in collage.garments}
        words = question.question.rstrip("?").split()
        assert question.kind == kind
        if kind == "garment":
            assert cells[" ".join(words[4:])] == question.answer
        elif kind == "position":
            assert names.count(words[-1]) == 1 and cells[question.answer] == words[-1]
        elif kind == "yes/no":
            assert (words[-1] in names) == (question.answer == "yes")
        elif kind == "count":
            group = words[2]
            shoes = [name for name in names if name in ("sandal", "sneaker", "boot")]
            whole = {"items": len(names), "shoes": len(shoes)}
            assert int(question.answer) == whole.get(group, names.count(singular.get(group)))
        else:
            pair = [word.rstrip(",") for word in (words[-4], words[-1])]
            other = pair[1 - pair.index(question.answer)]
            found = {item.name: item for item in collage.garments}
            a, b = found[question.answer], found[other]
            assert a.y < b.y if "higher" in question.question else a.x < b.x
            assert all(names.count(name) == 1 for name in pair)


def test_yes_and_no_are_even(directory):
    photographs = fashion.read("train", directory)
    answers = [fashion.sample(photographs, 5, i, "yes/no")[1].answer for i in range(400)]
    assert 0.42 < answers.count("yes") / 400 < 0.58


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").unlink(), "apt-get install dataset-fashion"),
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no"), "cannot be read"),
        (
            lambda d: (d / "t10k-labels-idx1-ubyte").write_bytes(b"\0" * 20),
            "is no whole file of Fashion-MNIST",
        ),
        (
            lambda d: write_idx(d, "t10k", *photographs_of(40, 1)[:1], np.zeros(3, np.uint8)),
            "together",
        ),
        (
            lambda d: write_idx(d, "t10k", photographs_of(3, 1)[0], np.full(3, 10, np.uint8)),
            "together",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_said(tmp_path, spoil, message):
    write_idx(tmp_path, "t10k", *photographs_of(40, 1))
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        fashion.read("held-out", tmp_path)
