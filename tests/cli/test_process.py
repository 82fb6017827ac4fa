"""The command line as a process of its own; the other files call `main`."""

import os
import subprocess
import sys

import pytest

import jaxprune
from jaxprune.model import DEMO_IMAGE


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_the_answer_alone_is_on_stdout(small_model):
    asked = ["--image", str(DEMO_IMAGE), "--prompt", "What shape is the blue object?"]
    done = run("-m", "jaxprune", "generate", *asked)
    expected = jaxprune.generate(small_model, DEMO_IMAGE, asked[-1])
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_a_mistake_is_one_line_on_stderr():
    done = run("-m", "jaxprune", "cost", "--method", "fitprun")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: Unknown method 'fitprun'; known: none, ")
    assert line.endswith("Did you mean 'fitprune'?")


@pytest.mark.slow
def test_an_answer_outside_the_encoding_of_stdout_is_not_lost():
    """Whatever the terminal can show, what cannot be shown is spelled."""
    program = (
        "import jaxprune, sys\n"
        "from jaxprune.cli import main\n"
        "from jaxprune.engine import answer\n"
        "real = jaxprune.generate\n"
        "import dataclasses\n"
        "def spoken(*a, **k):\n"
        "    return [dataclasses.replace(x, text='caf\\xe9 \\U0001f600') for x in real(*a, **k)]\n"
        "jaxprune.generate = spoken\n"
        "main(['generate', '--prompt', 'Hi', '--max-new-tokens', '1'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\U0001f600\n"), done.stderr


def test_who_reads_may_go_away():
    program = f"{sys.executable} -m jaxprune methods | head -1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
