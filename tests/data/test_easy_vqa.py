import json

import pytest

from jaxprune.data import easy_vqa
from jaxprune.errors import UserError
from tests.data.third_party import write_easy_vqa

SPLITS = ("train", "calibration", "held-out")


@pytest.fixture
def directory(tmp_path):
    return write_easy_vqa(tmp_path)


def test_questions_come_with_their_images_and_kinds(directory):
    found = easy_vqa.read("held-out", directory)
    assert [path for path, _ in found] == [
        directory / "test" / "images" / f"{image}.png" for image in (0, 0, 0, 1, 1, 1)
    ]
    assert [(q.kind, q.answer) for _, q in found[:3]] == [
        ("shape", "triangle"), ("color", "teal"), ("yes/no", "no"),
    ]  # fmt: skip


def test_splits_share_no_image(directory):
    images = [{path for path, _ in easy_vqa.read(split, directory)} for split in SPLITS]
    assert [len(one) for one in images] == [2, 2, 2]
    assert len(set.union(*images)) == 6


def test_the_calibration_split_is_the_last_500_images(directory):
    for image in range(4, 1200):
        (directory / "train" / "images" / f"{image}.png").write_bytes(b"")
    asked = [["is there a circle?", "no", image] for image in range(1200)]
    (directory / "train" / "questions.json").write_text(json.dumps(asked))
    found = easy_vqa.read("calibration", directory)
    assert [path.stem for path, _ in found] == [str(i) for i in range(700, 1200)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "test" / "questions.json").unlink(), "pip install easy-vqa"),
        (lambda d: (d / "test" / "images" / "1.png").unlink(), "1.png of easy-VQA is missing"),
        (lambda d: (d / "test" / "questions.json").write_text("[[1, 2]]"), "not easy-VQA's list"),
        (lambda d: (d / "test" / "questions.json").write_text("{"), "not easy-VQA's list"),
        (lambda d: (d / "test" / "questions.json").write_text("[]"), "not easy-VQA's list"),
        (
            lambda d: (d / "test" / "questions.json").write_text('[["who?", "mauve", 0]]'),
            "not easy-VQA's list",
        ),
    ],
)
def test_what_is_missing_or_of_another_form_is_said(directory, spoil, message):
    spoil(directory)
    with pytest.raises(UserError, match=message):
        easy_vqa.read("held-out", directory)
    assert easy_vqa.read("train", directory)


def test_a_split_that_there_is_not_is_refused(directory):
    with pytest.raises(UserError, match="expected one of: train, held-out, calibration"):
        easy_vqa.read("test", directory)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        easy_vqa.read("held-out")
