"""Files and directories appear whole or not at all."""

import pytest

import jaxprune
from jaxprune.files import whole_directory, whole_file


def test_a_file_replaces_another_at_the_end(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with whole_file(target) as file:
        file.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_what_was_there(error, tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(error), whole_file(target) as file:
        file.write_text("ne")
        raise error
    with pytest.raises(error), whole_directory(tmp_path / "b") as directory:
        (directory / "c").touch()
        raise error
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "old"


def test_a_directory_appears_at_the_end(tmp_path):
    with whole_directory(tmp_path / "x" / "a") as directory:
        (directory / "c").touch()
        assert not (tmp_path / "x" / "a").exists()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    assert (tmp_path / "x" / "a" / "c").exists()


@pytest.mark.parametrize("name", ["file/a", "a" * 300, "nowhere/a"])
def test_a_file_that_cannot_be_written(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(jaxprune.UserError, match="Cannot write"), whole_file(tmp_path / name) as x:
        x.write_text("new")


@pytest.mark.parametrize("name", ["file/a", "a" * 300])
def test_a_directory_that_cannot_be_written(name, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(jaxprune.UserError, match="Cannot write"),
        whole_directory(tmp_path / name) as x,
    ):
        (x / "c").touch()
