"""Chat templates: conversations -> prompts, rendered by `transformers`.

A template of a model's directory is a program of whoever wrote the model. Jinja's sandbox keeps
it from files and the network; that it ends, and how much memory it takes, is bounded by rendering
it in a process of its own.
"""

import atexit
import functools
import json
import pathlib
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.errors import UserError, first_line
from jaxprune.models.family import IMAGE_PLACEHOLDER

SECONDS = 10.0  # that a template may take, its process's start apart
START_SECONDS = 120.0
_WORKER = pathlib.Path(__file__).with_name("template_worker.py")
_PROBE = "what is said"


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    Args:
        text: in Jinja; None where there is none.
        variables: what it can name besides the messages.
        trusted: rendered in this process.
    """

    def __init__(
        self, text: str | None, variables: Mapping[str, Any], *, trusted: bool = False
    ) -> None:
        self.text, self.variables, self.trusted = text, dict(variables), trusted
        if text is not None and not trusted:
            _worker().start()  # while the weights are read

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether a message's content may be parts; a text tokenizer's template takes strings."""
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        try:
            text = self.render([{"role": "user", "content": parts}])
        except TemplateEnded:
            raise
        except UserError:
            return False
        return text.count(IMAGE_PLACEHOLDER) == 1 and _PROBE in text and "'type'" not in text

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation up to where the model is to answer.

        Raises:
            UserError: for what the template refuses or fails at, or where there is none.
        """
        if self.text is None:
            raise UserError(
                "The model's directory has no chat template, and its family none that fits every "
                "model; pass the whole prompt yourself, with chat=False."
            )
        asked = {"template": self.text, "messages": list(messages), "variables": self.variables}
        if not self.trusted:
            return _worker().render(asked)
        from jaxprune.inputs import template_worker

        return _told(template_worker.rendered(asked))


class TemplateEnded(UserError):
    """A template that took too long, or too much."""


def _told(answer: Mapping[str, str]) -> str:
    if "error" in answer:
        raise UserError(
            f"The model's chat template cannot render this conversation ({answer['error']}); "
            "pass the whole prompt yourself, with chat=False."
        )
    return answer["text"]


class _Worker:
    """The process that renders; started anew after one that was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False  # it has answered once, so it has started
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin the process's start, without waiting for it."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._ready = False
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )

    def render(self, asked: Mapping[str, Any]) -> str:
        """See `ChatTemplate.render`."""
        try:
            line = json.dumps(asked).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"A message holds what a chat template cannot be given ({first_line(error)}); "
                "expected texts, numbers, lists and dicts."
            ) from None
        with self._lock:
            self._start()
            try:
                self._ready = self._ready or self._ask(b"{}\n", START_SECONDS) is not None
                answer = self._ask(line, SECONDS) if self._ready else None
            except BaseException:  # its answer would be taken for the next one's
                self.end()
                raise
            if answer is None:
                self.end()
        if answer is None:
            raise TemplateEnded(
                f"The model's chat template takes over {SECONDS:g} s, or too much memory; pass the "
                "whole prompt yourself, with chat=False."
            )
        return _told(answer)

    def _ask(self, line: bytes, seconds: float) -> dict[str, str] | None:
        """What the process says to a line; None where it does not in time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                if not ready.select(seconds):
                    return None
            found: dict[str, str] = json.loads(process.stdout.readline())
            return found
        except (OSError, ValueError):  # it has ended
            return None

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # waits, and closes its pipes
                pass
            self._process = None


@functools.cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.end)
    return worker
