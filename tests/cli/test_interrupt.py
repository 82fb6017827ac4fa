"""Ctrl-C ends a command at once, whatever it is in the middle of."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

# A signal that comes while Python collects garbage, where an exception would be lost.
WHILE_COLLECTING = """
import gc, os, signal, sys
from jaxprune.cli import main

def collecting(phase, info):
    if phase == "start" and "jax" in sys.modules and seen:
        os.kill(os.getpid(), signal.SIGINT)

seen = []
gc.callbacks.append(collecting)
import jaxprune
load = jaxprune.load
def noted(*a, **k):
    found = load(*a, **k)
    seen.append(1)
    gc.collect()
    return found
jaxprune.load = noted
main(["generate", "--prompt", "Is there a red star?"])
"""


def test_one_that_comes_while_garbage_is_collected():
    done = subprocess.run(
        [sys.executable, "-c", WHILE_COLLECTING], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().endswith("Interrupted.") and "Traceback" not in done.stderr


READY = """
import sys
from jaxprune.cli import main
print("ready", file=sys.stderr, flush=True)
main()
"""
COMMANDS = {
    "generate": ["generate", "--images", "images", "--prompt", "What?", "--out", "answers.jsonl"],
    "bench": ["bench", "--rounds", "50"],
    "calibrate": ["calibrate", "--method", "gsearch", "--out", "recipe.json"],
    "convert": ["convert", "model", "copy"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_at_any_moment(command, tmp_path, tiny_directory, white_image):
    """JAXPRUNE_INTERRUPTS says how many; by hand 25 of each."""
    number = int(os.environ.get("JAXPRUNE_INTERRUPTS", "3"))
    moments = random.Random(command)
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(white_image.read_bytes())
    (tmp_path / "model").symlink_to(tiny_directory)
    before = sorted(path.name for path in tmp_path.iterdir())
    allowed = {*before, "answers.jsonl", "recipe.json.progress"}
    longest = 1.5 if command == "convert" else 9.0
    for _ in range(number):
        process = subprocess.Popen(
            [sys.executable, "-c", READY, *COMMANDS[command]],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr.readline() == "ready\n"  # the seconds before are Python's, importing
        time.sleep(0.1 + longest * moments.random())
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        if process.returncode:  # else it was done before
            assert process.returncode == 130, said
            assert time.monotonic() - began < 2
            assert "Traceback" not in said
            assert {path.name for path in tmp_path.iterdir()} <= allowed
        for name in ("answers.jsonl", "recipe.json", "recipe.json.progress"):
            (tmp_path / name).unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
