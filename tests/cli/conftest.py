import pathlib
from typing import NamedTuple

import pytest

from jaxprune.cli import main
from jaxprune.data import scenes
from tests.reports.pixels import white


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """A function that runs a command in this process, as the installed `jaxprune` would."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Done(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """A function that runs a command which must be refused, and returns what it says."""

    def refused(*arguments):
        there = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        done = run(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert "Traceback" not in done.err
        assert sorted(tmp_path.rglob("*")) == there  # nothing is left lying about
        return " ".join(done.err.split())

    return refused


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("image") / "scene.png"
    drawn, _ = scenes.sample("held-out", 0, 0)
    scenes.draw(drawn).save(path)
    return path


@pytest.fixture(scope="session")
def white_image(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("image") / "white.png"
    white(32, 32).save(path)
    return path
