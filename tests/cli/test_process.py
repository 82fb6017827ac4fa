"""The command line as a process of its own; the other files call `main`."""

import subprocess
import sys

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
