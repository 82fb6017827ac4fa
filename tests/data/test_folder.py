import json

import pytest
from PIL import Image

from jaxprune.data import scenes
from jaxprune.data.folder import write_questions
from jaxprune.data.samples import read_samples
from jaxprune.errors import UserError
from jaxprune.evaluate.data import read_items


@pytest.fixture
def asked(tmp_path):
    photograph = tmp_path / "seven.png"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(photograph)
    return [
        (photograph, scenes.Question("color", "What color is it?", "red")),
        (photograph, scenes.Question("yes/no", "Is it round?", "no")),
        (Image.new("RGB", (4, 4), (0, 0, 250)), scenes.Question("color", "And it?", "blue")),
    ]


def test_evaluation_and_calibration_read_what_was_written(asked, tmp_path):
    file = write_questions(tmp_path / "data", asked)
    items = read_items(file)
    assert [(item.question, item.answers, item.kind) for item in items] == [
        (question.question, (question.answer,), question.kind) for _, question in asked
    ]
    assert items[0].image == items[1].image
    colors = [Image.open(sample.image).getpixel((0, 0)) for sample in read_samples(file)]
    assert colors == [(200, 10, 10), (200, 10, 10), (0, 0, 250)]
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2


def test_nothing_is_overwritten_or_half_written(asked, tmp_path):
    def broken():
        yield asked[0]
        raise UserError("The disk is full.")

    with pytest.raises(UserError, match="disk"):
        write_questions(tmp_path / "data", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["seven.png"]
    write_questions(tmp_path / "data", asked[:1])
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_questions(tmp_path / "data", asked)
    lines = (tmp_path / "data" / "questions.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["image"] == "images/seven.png"
