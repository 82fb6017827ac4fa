"""Evaluations that are done, kept on disk so that an interrupted search resumes."""

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxprune.errors import UserError
from jaxprune.files import as_path, read_json, whole_file


class ProgressFile:
    """A context in which `remember(key, make)` makes a value once, whatever interrupts it.

    Searches are deterministic, so that one begun again asks for the same keys and finds
    the values of its first run.

    Args:
        path: the file, or None to keep nothing.
        identity: what the values depend on; a file of something else is refused.
        label: shown beside the bar.
        show: a bar on stderr; None shows it in a terminal.
    """

    def __init__(
        self, path: Any, identity: dict[str, Any], *, label: str, show: bool | None
    ) -> None:
        self.path = None if path is None else as_path(path, "The progress file")
        self.identity = json.loads(json.dumps(identity))
        self.values: dict[str, Any] = {}
        self.asked = 0
        columns = (TextColumn("Calibrating {task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._bar.add_task(label, total=None)
        if self.path is not None and self.path.exists():
            saved = read_json(self.path, repair="remove it")
            if saved.get("identity") != self.identity:
                raise UserError(
                    f"{self.path} is of a calibration with other settings, samples or model; "
                    "remove it, or write to another file."
                )
            if not isinstance(saved.get("values"), dict):
                raise UserError(f"{self.path} has no values; remove it.")
            self.values = saved["values"]

    def __enter__(self) -> "ProgressFile":
        self._bar.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._bar.stop()
        # Kept for another try after an interruption or a crash, not where the answer is known.
        finished = kind is None or issubclass(kind, UserError)
        if finished and self.path is not None:
            self.path.unlink(missing_ok=True)

    def expect(self, evaluations: int) -> None:
        """Say about how many evaluations there will be, for the bar."""
        self._bar.update(self._task, total=evaluations)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key, made only if it is not known; JSON types alone."""
        self.asked += 1
        if key not in self.values:
            self.values[key] = make()
            self._save()
        self._bar.update(self._task, completed=self.asked)
        return self.values[key]

    def _save(self) -> None:
        if self.path is None:
            return
        with whole_file(self.path) as file:
            file.write_text(json.dumps({"identity": self.identity, "values": self.values}))
