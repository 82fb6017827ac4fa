"""What a run tells while it goes on: lines of JSON, a bar, and TensorBoard where it is wanted."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jaxprune.data.lines import whole_lines
from jaxprune.devices.targets import peak_flops
from jaxprune.errors import UserError, is_number
from jaxprune.files import as_path, parse_json, whole_file
from jaxprune.progress import PlainLines


class Log:
    """A context in which lines are written, each at once.

    Args:
        path: of the file; what it says of later updates than `after` will be said again.
        after: updates that are done.
        tensorboard: a folder for TensorBoard, or None.

    Raises:
        UserError: for a file that cannot be written, or a missing tensorboardX.
    """

    def __init__(self, path: pathlib.Path, *, after: int, tensorboard: Any = None) -> None:
        self.path = path
        self._writer = None
        if tensorboard is not None:
            self._writer = summary_writer()(str(as_path(tensorboard, "TensorBoard's folder")))
        self._file: TextIO | None = None
        try:
            lines, _ = whole_lines(path.read_bytes()) if path.exists() else ([], b"")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}).") from None
        with whole_file(path) as file:
            file.write_text("".join(f"{line}\n" for line in lines if _update_of(line) <= after))

    def __enter__(self) -> Self:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._file, self._writer):
            if one is not None:
                with contextlib.suppress(OSError):  # of a full disk, which was told
                    one.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Write what there is to say of an update.

        Raises:
            UserError: when it cannot be written, as on a full disk.
        """
        assert self._file is not None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}).") from None
        if self._writer is not None:
            for name, value in line.items():
                if is_number(value) and name != "update":
                    self._writer.add_scalar(name, value, line["update"])


def _update_of(line: str) -> float:
    """The update that a line is of; none that there is, if it is damaged."""
    with contextlib.suppress(ValueError):
        fields = parse_json(line)
        if isinstance(fields, dict) and is_number(fields.get("update")):
            return float(fields["update"])
    return float("inf")


def summary_writer() -> Any:
    """The class that writes what TensorBoard reads.

    Raises:
        UserError: where tensorboardX is missing.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "What TensorBoard reads is written by tensorboardX, which is not installed; "
            "pip install tensorboardX."
        ) from None
    return SummaryWriter


class Progress:
    """A context with a bar on stderr: updates, loss, tokens a second, and the time left.

    Where stderr is no terminal, a line a minute says so.

    Args:
        done, total: updates.
        name: what the run is called.
        devices: that the run is on.
        show: None shows the bar in a terminal alone.
    """

    def __init__(
        self,
        done: int,
        total: int,
        *,
        devices: Sequence[jax.Device],
        show: bool | None,
        name: str = "Training",
    ) -> None:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bars(
            *columns,
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._lines = PlainLines(name, total) if show is None and self._bar.disable else None
        self._task = self._bar.add_task("", total=total, completed=done, note="")
        peaks = [peak_flops(device) for device in devices]
        self._peak = sum(peak for peak in peaks if peak is not None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(
        self, update: int, *, loss: float, tokens: int, seconds: float, flops: int = 0
    ) -> None:
        """Show what there is to say of an update."""
        note = f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s"
        if self._peak and flops:  # model FLOPs utilisation, where the device's peak is known
            note += f", {flops / seconds / self._peak:.0%} of the peak FLOPs"
        self._bar.update(self._task, completed=update, note=note)
        if self._lines is not None:
            self._lines.tell(update, note)
