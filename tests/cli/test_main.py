"""What holds for all commands: exit codes, --help, the ways in."""

import runpy
import signal

import pytest

import jaxprune
from jaxprune.cli import main
from tests import builders

COMMANDS = ("generate", "show", "cost", "bench", "evaluate", "calibrate", "methods", "convert")


@pytest.fixture(autouse=True)
def signals_as_before():
    """What a whole process's `main` does to Ctrl-C is undone: here more comes after it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    signal.set_wakeup_fd(-1)


def test_help_lists_the_commands_in_order(run):
    done = run("--help")
    assert done.code == 0 and done.err == ""
    first = [line.split()[1] for line in done.out.splitlines() if line.startswith("│ ")]
    assert [word for word in first if word in COMMANDS] == list(COMMANDS)


def test_the_version(run):
    assert run("--version").out == f"jaxprune {jaxprune.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, run):
    done = run(command, "--help")
    assert done.code == 0 and f" {command} [OPTIONS]" in done.out
    flags = [line for line in done.out.splitlines() if "<bool>" in line]
    assert all("--help" in line for line in flags)  # which is not ours


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dance"], "No such command 'dance'"),
        (["generate"], "There is no --prompt"),
        (["generate", "--prompt", "a", "--keep", "few"], "Invalid value for '--keep'"),
        (["convert", "somewhere"], "Missing argument"),
    ],
)
def test_usage(arguments, message, refused):
    assert message in refused(*arguments)


def test_any_other_error_is_not_hidden(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(jaxprune, "load", broken)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--prompt", "What?"])


def test_brackets_in_a_message_are_text(refused):
    assert "[bold]x does not exist" in refused("generate", "--prompt", "a", "--model", "[bold]x")


def test_python_m_runs_the_process_arguments(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jaxprune", "methods", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jaxprune", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert '"name": "prumerge"' in capsys.readouterr().out


def test_python_m_checkpoints_convert_is_convert(tmp_path, monkeypatch, capsys):
    builders.write_directory(tmp_path / "in", builders.tiny_config())
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jaxprune.checkpoints_convert", run_name="__main__")
    assert ended.value.code == 0
    assert "read back and equal" in capsys.readouterr().out
