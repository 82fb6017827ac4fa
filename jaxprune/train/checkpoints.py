"""A training run's checkpoints: the state by orbax, and as JSON where it is in its data.

    DIRECTORY/run.json             what the run is: its settings, digests of data and model
    DIRECTORY/00000200/state/      the arrays, as orbax writes them
    DIRECTORY/00000200/about.json  place in the data, and metrics

A checkpoint appears whole or not at all, under the number of its updates, and goes the same way;
what a killed run left half-written is taken away by the next one. Saving waits until all is on
disk, so that the buffers may be donated to the next step.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxprune.errors import UserError, check_whole, first_line, is_number
from jaxprune.files import (
    as_path,
    read_json,
    remove_partial,
    remove_whole,
    whole_directory,
    whole_file,
)

RUN, _STATE, _ABOUT = "run.json", "state", "about.json"
_MARK, _FORMAT = "jaxprune_training", 1
_FREE = ("remat",)
"""Settings with which a run may go on otherwise than it began: they say how gradients are made, not
which. `micro_batch` is none of them, as losses are means of a micro-batch's, and `gather` is none,
as dropout draws for the tokens that are there."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        step: the number of updates that were done.
        state: the arrays, as a tree like the one that was asked for.
        data: where in its data the run was, as JSON has it.
        metrics: by name.
    """

    step: int
    state: Any
    data: Mapping[str, Any]
    metrics: Mapping[str, float]


class Checkpoints:
    """The checkpoints of one run in a directory of their own.

    Args:
        directory: made if it is not there.
        settings: the run's: a dataclass, `Settings` or another.
        identity: what else has to be the same for the run to go on, by what a message calls it:
            `{"data": digest, "model": digest}`.
        keep: how many of the last ones stay.
        best: the metric whose best one stays too; None: no other than the last.
        lower: whether less of it is better.

    Raises:
        UserError: for a directory of another run or of something else, or none that can be
            written.
    """

    def __init__(
        self,
        directory: Any,
        settings: Any,
        *,
        identity: Mapping[str, str],
        keep: int = 2,
        best: str | None = None,
        lower: bool = False,
    ) -> None:
        check_whole("keep", keep)
        if jax.process_count() > 1:
            raise UserError(
                f"Checkpoints are written by one process alone, and here are {jax.process_count()};"
                " train on the devices of one host."
            )
        self.directory = as_path(directory, "The directory of checkpoints").absolute()
        self._keep, self._metric, self._lower = keep, best, lower
        run = {"settings": dataclasses.asdict(settings), **identity}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_partial(self.directory)
            there = sorted(path.name for path in self.directory.iterdir())
        except OSError as error:
            raise UserError(f"{self.directory} cannot hold checkpoints ({error}).") from None
        if RUN in there:
            check_same(self.directory, settings, identity)
        elif there:
            raise UserError(
                f"{self.directory} holds no checkpoints but {there[0]}; name a directory that is "
                "empty or not there."
            )
        else:
            with whole_file(self.directory / RUN) as file:
                file.write_text(json.dumps({_MARK: _FORMAT, **run}, indent=2) + "\n")

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order."""
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))

    def best(self) -> int | None:
        """The step of the checkpoint with the best metric, the earliest of equals."""
        if self._metric is None:
            return None
        values = {step: self._about(step)["metrics"].get(self._metric) for step in self.steps()}
        known = {step: value for step, value in values.items() if is_number(value)}
        sign = 1 if self._lower else -1
        return min(known, key=lambda step: (sign * known[step], step), default=None)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a checkpoint, unless the step has one; then let go of those that need not stay.

        Args:
            step: the number of updates that were done.
            state: any tree of arrays.
            data: where in its data the run is: JSON.
            metrics: of the model as it is now.

        Raises:
            UserError: when it cannot be written, as on a full disk; the last one is kept.
        """
        target = self._place(step)
        if target.exists():
            return
        self._check_room(state)
        about = json.dumps({"data": dict(data), "metrics": dict(metrics or {})}, indent=2) + "\n"
        with whole_directory(target) as place:
            try:
                with _quiet(), _checkpointer() as writer:
                    writer.save(place / _STATE, args=_orbax().args.StandardSave(state))
            except Exception as error:  # of several libraries, each with its own types
                raise OSError(first_line(error)) from None
            (place / _ABOUT).write_text(about)
        for old in set(self.steps()[: -self._keep]) - {self.best()}:
            remove_whole(self._place(old))

    def restore(self, like: Any, step: int | None = None) -> Checkpoint | None:
        """A checkpoint's arrays, bit for bit.

        Args:
            like: a tree of the same structure, shapes, dtypes and placement, of arrays or of
                `jax.ShapeDtypeStruct`: each array comes back where the one in it lies.
            step: whose; None: the last one's.

        Returns:
            The checkpoint; None where there is none yet.

        Raises:
            UserError: for one that is damaged, or of another tree.
        """
        steps = self.steps()
        if not steps:
            return None
        step = steps[-1] if step is None else step
        wanted = jax.tree.map(_orbax().utils.to_shape_dtype_struct, like)
        try:
            with _quiet(), _checkpointer() as reader:
                args = _orbax().args.StandardRestore(wanted)
                state = reader.restore(self._place(step) / _STATE, args=args)
        except Exception as error:  # of several libraries, each with its own types
            raise UserError(
                f"{self._place(step)} cannot be read ({first_line(error)}). Remove it to go on from"
                " the checkpoint before, if there is one."
            ) from None
        return Checkpoint(step, state, **self._about(step))

    def _place(self, step: int) -> pathlib.Path:
        return self.directory / f"{step:08}"

    def _about(self, step: int) -> dict[str, Any]:
        about = read_json(self._place(step) / _ABOUT, repair=f"remove {self._place(step)}")
        return {"data": about.get("data", {}), "metrics": about.get("metrics", {})}

    def _check_room(self, state: Any) -> None:
        """Raise `UserError` where the disk has no room; what is said halfway says less."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"A checkpoint takes up to {needed / 2**30:.3f} GiB, and the disk of "
                f"{self.directory} has {free / 2**30:.3f} GiB left; the last one is kept. Make "
                "room, and resume."
            )


def check_same(directory: pathlib.Path, settings: Any, identity: Mapping[str, str]) -> None:
    """Raise `UserError` unless a directory of checkpoints is of a run.

    Args:
        directory: of the checkpoints of some run.
        settings, identity: as for `Checkpoints`; of the identity what is known yet.
    """
    fields = dataclasses.fields(settings)
    defaults = {x.name: x.default for x in fields if x.default is not dataclasses.MISSING}
    run = {"settings": dataclasses.asdict(settings), **identity}
    run, defaults = json.loads(json.dumps([run, defaults]))
    there = read_json(directory / RUN, repair="name another directory")
    if there.get(_MARK) != _FORMAT:
        raise UserError(f"{directory / RUN} is not of this program; name another directory.")
    # A setting that is newer than the run had its default's effect.
    old = {**defaults, **there.get("settings", {})}
    new = run["settings"]
    differ = [
        f"{name} (there {json.dumps(old[name])}, here {json.dumps(new.get(name))})"
        for name in old
        if name not in _FREE and old.get(name) != new.get(name)
    ]
    differ += [
        f"other {name}" for name in run if name != "settings" and run[name] != there.get(name)
    ]
    if differ:
        raise UserError(
            f"{directory} is of a run with {', '.join(differ)}. Go on with what it began with, or "
            "name another directory."
        )


def _orbax() -> Any:
    import orbax.checkpoint  # which takes .4 s; whoever does not train is spared them

    return orbax.checkpoint


def _checkpointer() -> Any:
    return _orbax().Checkpointer(_orbax().StandardCheckpointHandler())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which orbax says by exceptions alone what goes wrong, not in logs as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
