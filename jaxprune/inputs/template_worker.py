"""The process that renders chat templates: lines of JSON in, lines of JSON out.

Run as a script, apart from the rest of the package; see `template.py`.
"""

import contextlib
import json
import pathlib
import signal
import sys
from collections.abc import Mapping
from typing import Any

MEMORY = 1 << 29  # bytes that a template may take beyond what the process has
MOST_TEXT = 10_000_000


def rendered(asked: Mapping[str, Any]) -> dict[str, str]:
    """{"text": ...} of a conversation under a template, or {"error": ...}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        found = render_jinja_template(
            conversations=[asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["variables"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever a template raises, of its own or Jinja's
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    text: str = found[0][0]
    if len(text) > MOST_TEXT:
        return {"error": f"it makes a text of over {MOST_TEXT:,} letters"}
    return {"text": text}


def _bound_memory() -> None:
    import resource

    pages = pathlib.Path("/proc/self/statm").read_text().split()[0]
    now = int(pages) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def main() -> None:
    """Answer until there is nothing more to read."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # where anything else goes
    rendered({"messages": [], "template": "", "variables": {}})  # imports what it takes
    with contextlib.suppress(ImportError, OSError, ValueError):  # not a Linux: time alone is bound
        _bound_memory()
    for line in sys.stdin:
        with contextlib.suppress(AttributeError):  # ends it, should who asked be gone
            signal.alarm(60)
        asked = json.loads(line)
        print(json.dumps(rendered(asked) if asked else {"text": ""}), file=answers, flush=True)


if __name__ == "__main__":
    main()
