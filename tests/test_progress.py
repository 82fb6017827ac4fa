"""What a log gets instead of a bar."""

import itertools

import pytest

from jaxprune import progress


@pytest.mark.parametrize("show, told", [(None, ["Asking: 2 of 4", "Asking: 4 of 4"]), (False, [])])
def test_a_line_a_minute_where_there_is_no_terminal(show, told, monkeypatch, capsys):
    clock = itertools.count(0, 30)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert list(progress.track("abcd", "Asking", 4, show=show)) == list("abcd")
    assert capsys.readouterr().err.splitlines() == told


def test_a_note_behind_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    progress.PlainLines("Training", 9).tell(3, "loss 0.5")
    assert capsys.readouterr().err == "Training: 3 of 9, loss 0.5\n"
