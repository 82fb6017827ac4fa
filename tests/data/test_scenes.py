import numpy as np
import pytest

from jaxprune.data import scenes


def test_a_scene_follows_from_its_seed():
    a, b = (scenes.sample("train", 0, 7) for _ in range(2))
    assert a == b
    assert (np.asarray(scenes.draw(a[0])) == np.asarray(scenes.draw(b[0]))).all()
    assert scenes.sample("held-out", 0, 7) != a


def test_objects_are_where_they_are_said_to_be():
    for index in range(50):
        scene = scenes.sample_scene(scenes.random_generator("train", 0, index))
        assert len({item.name for item in scene.objects}) == len(scene.objects)
        pixels = np.asarray(scenes.draw(scene), int)
        for item in scene.objects:
            cell = int(item.y // 32) * 3 + int(item.x // 32)
            assert scenes.POSITIONS[cell] == item.position
            center = pixels[int(item.y), int(item.x)]
            assert np.abs(center - scenes.COLORS[item.color]).max() < 40


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_are_true(kind):
    for index in range(60):
        scene, question = scenes.sample("train", 3, index, kind)
        items = {item.name: item for item in scene.objects}
        words = question.question.rstrip("?").split()
        if kind == "color":
            assert f"{question.answer} {words[-1]}" in items
        elif kind == "shape":
            assert f"{words[4]} {question.answer}" in items
        elif kind == "position":
            assert items[" ".join(words[3:])].position == question.answer
        elif kind == "yes/no":
            assert (" ".join(words[3:]) in items) == (question.answer == "yes")
        elif kind == "count":
            group = words[2:-2]
            matching = [
                n for n in items
                if group == ["objects"] or group[0] in n or group[0].removesuffix("s") in n
                or group[0].removesuffix("es") in n
            ]  # fmt: skip
            assert len(matching) == int(question.answer)
        else:
            assert question.answer in question.question
            assert question.answer in items


def test_yes_and_no_are_even():
    answers = [scenes.sample("train", 5, i, "yes/no")[1].answer for i in range(600)]
    assert 0.42 < answers.count("yes") / 600 < 0.58
