"""A training run, from its beginning or its last checkpoint to its end.

DIRECTORY/checkpoints/   see `checkpoints`
DIRECTORY/log.jsonl      a line for each update, and for each evaluation
DIRECTORY/adapter/       at the end, in PEFT's form, where adapters are trained
DIRECTORY/llava-lora/    instead, in LLaVA's own form, where that is asked for
DIRECTORY/model/         at the end, in Hugging Face's, where parts are trained in full
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax

from jaxprune.checkpoints_convert.adapters_write import FORMS, LLAVA, write_adapter
from jaxprune.devices.memory import told_if_exhausted
from jaxprune.devices.mesh import devices_of, mesh_of
from jaxprune.errors import UserError, UserNote, check_choice, check_whole
from jaxprune.evaluate.methods import name_methods
from jaxprune.evaluate.run import Task
from jaxprune.evaluate.run import prepare as questions
from jaxprune.evaluate.run import run as answered
from jaxprune.files import as_path, remove_partial
from jaxprune.model import Params, export, weights_digest
from jaxprune.models.family import is_original
from jaxprune.ops.axes import DATA_AXIS
from jaxprune.train.checkpoints import RUN, Checkpoints, check_same
from jaxprune.train.data import read_data
from jaxprune.train.log import Log, Progress, summary_writer
from jaxprune.train.order import Position
from jaxprune.train.recipes import settings_of
from jaxprune.train.rows import MicroBatch, Rows
from jaxprune.train.settings import Settings
from jaxprune.train.stopping import stopping
from jaxprune.train.trained import LORA, merged
from jaxprune.train.work import training_flops

if TYPE_CHECKING:
    from jaxprune.train.step import State, Update

ACCURACY = "accuracy"
_CHECKPOINTS, _LOG = "checkpoints", "log.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """What a run does beside learning; a run that resumes may have others.

    Attributes:
        save_every: updates between checkpoints; None: a twentieth of the run.
        keep: how many of the last checkpoints stay; the best one stays as well.
        eval_data: questions as for `jaxprune.evaluate`; None asks none.
        eval_every: updates between evaluations; None: at the end alone.
        base: the model's directory or name, as its adapter calls it; None: where its processor
            is from.
        adapter_form: "peft", or "llava" for a base in LLaVA's original format (needs torch); see
            `checkpoints_convert.write_adapter`.
        tensorboard: also write what is logged to this folder, for TensorBoard.
    """

    save_every: int | None = None
    keep: int = 2
    eval_data: Any = None
    eval_every: int | None = None
    base: Any = None
    adapter_form: str = "peft"
    tensorboard: Any = None

    def __post_init__(self) -> None:
        check_whole("keep", self.keep)
        check_choice("adapter_form", self.adapter_form, tuple(FORMS))
        if self.adapter_form == LLAVA and importlib.util.find_spec("torch") is None:
            raise UserError(
                "LLaVA's own form of an adapter is a PyTorch pickle; install torch, or leave out "
                "adapter_form."
            )
        for name in ("save_every", "eval_every"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.eval_every is not None and self.eval_data is None:
            raise UserError("eval_every says how often to evaluate, but there is no eval_data.")
        if self.tensorboard is not None:
            summary_writer()  # refuses where it is missing


@dataclasses.dataclass(frozen=True)
class Finished:
    """What came of a run.

    Attributes:
        params: the model with what was trained merged into it, of the best checkpoint where
            there were evaluations; None for a base of 8 bits, which takes nothing in.
        step: the updates that it has.
        accuracy: its share of right answers to `eval_data`, or None.
        directory: the adapter's, or the whole model's.
        trained: float32: the factors of adapters, as `checkpoints_convert.write_adapter` takes
            them, and parts in full.
    """

    params: Params | None
    step: int
    accuracy: float | None
    directory: pathlib.Path
    trained: Mapping[str, Any]


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop: it has saved a checkpoint, and the same call resumes."""


def train(
    params: Params,
    data: Any,
    out: Any,
    *,
    recipe: Any = None,
    images: Any = None,
    skip: bool = False,
    max_length: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    eval_data: Any = None,
    eval_every: int | None = None,
    base: Any = None,
    adapter_form: str = "peft",
    tensorboard: Any = None,
    show_progress: bool | None = None,
    **settings: Any,
) -> Finished:
    """Fine-tune a model with its visual tokens pruned.

    The loss is on answers and their ends alone. A run that was interrupted, by Ctrl-C or
    otherwise, resumes from its last checkpoint when it is called again with the same arguments,
    and ends as if it had not been.

    Args:
        params: what `jaxprune.load` gives.
        data: the path of a JSON or JSONL file (docs/fine_tuning.md has the forms), or a list of
            `jaxprune.calibrate.Sample`.
        out: the run's directory.
        recipe: a paper's, by its name or file, whose settings those given here replace.
        images: the folder to which paths of images in the data are relative; None: the file's.
        skip: leave out samples that are wrong and count them; else they are errors.
        max_length: text and visual tokens of a row, at most; None: the model's context.
        save_every, keep, eval_data, eval_every, base, adapter_form, tensorboard: see `Habits`.
        show_progress: a bar on stderr; None shows it in a terminal.
        settings: see `Settings`: method, train, rank, learning_rate, and so on.

    Raises:
        jaxprune.UserError: for settings, data, or a directory that do not work, and for a loss
            that is no number; the last good state is saved.
        Stopped: after Ctrl-C, which a second one does not wait for.
    """
    if not isinstance(params, Params):
        raise UserError(f"params is a {type(params).__name__}; expected what jaxprune.load gives.")
    prepared = prepare(
        data,
        out,
        settings=settings_of(recipe, settings),
        habits=Habits(
            save_every=save_every, keep=keep, eval_data=eval_data, eval_every=eval_every,
            base=base, adapter_form=adapter_form, tensorboard=tensorboard,
        ),
        images=images,
        skip=skip,
        max_length=max_length,
    )  # fmt: skip
    run = begin(params, prepared, show_progress=show_progress)
    with stopping() as asked_to_stop:
        run.go(asked_to_stop, show_progress=show_progress)
    if not run.done:
        raise Stopped(f"Stopped after {run.step} of {run.updates} updates; the same call resumes.")
    return run.finish()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is checked as far as it can be without a model.

    Attributes:
        samples: what is learned.
        out: the run's directory.
        settings: what decides the run.
        habits: what it does beside learning.
        task: the questions of its evaluations, or None.
        skip, max_length: see `train`.
    """

    samples: Sequence[Any]
    out: pathlib.Path
    settings: Settings
    habits: Habits
    task: Task | None
    skip: bool
    max_length: int | None


def prepare(
    data: Any,
    out: Any,
    *,
    settings: Settings,
    habits: Habits,
    images: Any = None,
    skip: bool = False,
    max_length: int | None = None,
) -> Prepared:
    """Read and check what `train` takes, all but the model.

    Raises:
        UserError: as `train`.
    """
    place, task = _run_directory(out), _evaluation(settings, habits)
    if (place / _CHECKPOINTS / RUN).exists():
        check_same(place / _CHECKPOINTS, settings, {})
    samples = data if isinstance(data, list | tuple) else read_data(data, images, skip=skip)
    return Prepared(
        samples=samples, out=place, settings=settings, habits=habits, task=task, skip=skip,
        max_length=max_length,
    )  # fmt: skip


def begin(params: Params, prepared: Prepared, *, show_progress: bool | None = None) -> "Run":
    """A prepared run of a model, at its beginning or where it was.

    Raises:
        UserError: as `train`.
    """
    rows = Rows(
        params, prepared.samples, prepared.settings, max_length=prepared.max_length,
        skip=prepared.skip, show_progress=show_progress,
    )  # fmt: skip
    return Run(params, rows, prepared.out, prepared.habits, prepared.task)


def _run_directory(out: Any) -> pathlib.Path:
    """The directory of a run: one that is new or empty, or that a run has.

    Raises:
        UserError: for any other.
    """
    place = as_path(out, "The run's directory")
    if place.is_dir():
        names = sorted(path.name for path in place.iterdir())
        if names and _CHECKPOINTS not in names:
            raise UserError(
                f"{place} holds {names[0]} and no training run; name another directory."
            )
    elif place.exists():
        raise UserError(f"{place} is a file; name a directory for the run.")
    return place


def _evaluation(settings: Settings, habits: Habits) -> Task | None:
    """The questions of a run's evaluations, asked under its method; checked without a model.

    Raises:
        UserError: as `jaxprune.evaluate`.
    """
    if habits.eval_data is None:
        return None
    (own,) = [one for one in name_methods(settings.method) if one.label == settings.method.strip()]
    task = questions(habits.eval_data, methods=settings.method)
    return dataclasses.replace(task, methods=[own])


class Run:
    """A run that is ready to go on.

    Args:
        params: the model.
        rows: of its data, and with its settings.
        out: its directory.
        habits: what it does beside learning.
        task: the questions of its evaluations, or None.

    Attributes:
        updates: of the whole run.
        step: updates that are done.

    Raises:
        UserError: for the directory of another run, or what cannot be trained.
    """

    def __init__(
        self, params: Params, rows: Rows, out: pathlib.Path, habits: Habits, task: Task | None
    ) -> None:
        self.params, self.rows, self.out = params, rows, out
        self.settings, self.habits, self.task = rows.settings, habits, task
        if task is not None and params.config.text_config.int8:
            raise UserError(
                "Adapters of a base of 8 bits cannot be evaluated; leave out eval_data."
            )
        if habits.adapter_form == LLAVA and not is_original(params.config):
            raise UserError(
                "LLaVA's own form of an adapter is for a base in LLaVA's original format, and this "
                "one is not; leave out adapter_form."
            )
        from jaxprune.train.step import Trainer  # optax, which whoever does not train is spared

        self.updates = self.settings.steps or rows.updates(self.settings.epochs)
        self.trainer = Trainer(params, self.settings, self.updates)
        self.checkpoints = Checkpoints(
            out / _CHECKPOINTS,
            self.settings,
            identity={"data": rows.digest, "weights or dtype": weights_digest(params)},
            keep=habits.keep,
            best=ACCURACY,
        )
        remove_partial(out)  # what a killed run was writing at its end
        found = self.checkpoints.restore(self.trainer.state_shapes)
        self.state: State = self.trainer.begin(params) if found is None else found.state
        self.step = 0 if found is None else found.step
        self.position = Position() if found is None else Position.of(found.data)
        self.metrics = {} if found is None else dict(found.metrics)
        self.log = Log(out / _LOG, after=self.step, tensorboard=habits.tensorboard)
        self.left_out: set[str] = set()
        self._note_waste()

    @property
    def done(self) -> bool:
        return self.step >= self.updates

    def go(self, asked_to_stop: Callable[[], bool], *, show_progress: bool | None = None) -> None:
        """All updates that are left, or as many as there are until it is to stop; then save.

        Raises:
            UserError: where the loss is no number; the state before it is saved.
        """
        each = self.settings.batch_size // self.settings.micro_batch
        source, on = self.rows.batches(self.position), devices_of(self.params.arrays)
        with (
            self._saved_whatever_comes(),
            contextlib.closing(source),
            self.log,
            Progress(self.step, self.updates, devices=on, show=show_progress) as bar,
        ):
            while not self.done and not asked_to_stop():
                began = time.perf_counter()
                batches = list(itertools.islice(source, each))
                found = self._update(batches)
                line = self._line(found, batches, time.perf_counter() - began)
                self.log.write(line)
                shown = ("loss", "tokens", "seconds", "flops")
                bar.show(self.step, **{name: line[name] for name in shown})
                evaluates = self.done or self._due(self.habits.eval_every)
                if evaluates:
                    self._evaluate()
                if evaluates or self._due(self.habits.save_every or math.ceil(self.updates / 20)):
                    self._save()

    def finish(self) -> Finished:
        """Write what was trained, of the best checkpoint if there is one."""
        if self.task is not None and self.checkpoints.best() is None:  # asked for afterwards
            with self.log:
                self._evaluate()
        step, state, accuracy = self.step, self.state, self.metrics.get(ACCURACY)
        best = self.checkpoints.best()
        if best is not None and best != step:
            found = self.checkpoints.restore(self.trainer.state_shapes, best)
            assert found is not None
            step, state, accuracy = found.step, found.state, found.metrics[ACCURACY]
        trained, params = state.trained, None
        if not self.params.config.text_config.int8:
            params = self._merged(state)
        adapters = "llava-lora" if self.habits.adapter_form == LLAVA else "adapter"
        place = self.out / (adapters if LORA in trained else "model")
        if not place.exists() and LORA in trained:
            write_adapter(
                jax.device_get(trained),
                self.params.config,
                place,
                alpha=self.settings.alpha,
                dropout=self.settings.dropout,
                base=self.habits.base or self._directory(),
                form=self.habits.adapter_form,
            )
        elif not place.exists() and params is not None:
            export(params, place)
        return Finished(params, step, accuracy, place, trained)

    def _update(self, batches: list[MicroBatch]) -> "Update":
        advice = 'resume with remat="full", or take a smaller micro_batch in another directory'
        with told_if_exhausted(advice):
            state, found = self.trainer.update(self.state, [own.batch for own in batches])
            found = cast("Update", jax.device_get(found))
        self.state = state  # what it was where it is not finite
        if not found.finite:
            samples = [text for own in batches for text in own.samples]
            named = ", ".join([*samples[:20], *(["..."] if len(samples) > 20 else [])])
            raise UserError(
                f"The loss of update {self.step + 1} is {found.loss:.4g}, the norm of its "
                f"gradients {found.norm:.4g}; these, or the weights that it makes, are no numbers. "
                f"The state before it is saved in {self.checkpoints.directory}. Look at its "
                f"samples ({named}), or try a lower learning rate, in another directory."
            )
        self.step, self.position = self.step + 1, batches[-1].next
        self.metrics = {}
        return found

    def _line(self, found: "Update", batches: list[MicroBatch], seconds: float) -> dict[str, Any]:
        """What is logged of an update."""
        scored = found.scored
        line = {
            "update": self.step,
            "epoch": self.position.epoch + self.position.batch / self.rows.micro_batches,
            "loss": float(found.loss),
            "norm": float(found.norm),
            "learning_rate": float(found.learning_rate),
            "right": int(scored.right) / max(int(scored.rows), 1),
            "answer_tokens": int(scored.tokens),
            "tokens": sum(int(own.batch.layout.lengths.sum()) for own in batches),
            "flops": sum(training_flops(own.batch, self.settings) for own in batches),
            "seconds": seconds,
        }
        left_out = [text for own in batches for text in own.left_out]
        self.left_out.update(left_out)
        return {**line, "left_out": left_out} if left_out else line

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _evaluate(self) -> None:
        if self.task is None:
            return
        (row,) = answered(self._merged(self.state), self.task, show_progress=False).rows
        self.metrics = {ACCURACY: row.accuracy}
        self.log.write(
            {"update": self.step, ACCURACY: row.accuracy, "evaluation": dataclasses.asdict(row)}
        )

    @contextlib.contextmanager
    def _saved_whatever_comes(self) -> Iterator[None]:
        """A context behind which the last whole state is saved, also where an error ends it."""
        try:
            yield
        except Exception:
            with contextlib.suppress(UserError):  # of the two errors the first one is told
                self._save()
            raise
        self._save()

    def _note_waste(self) -> None:
        """Warn where an update needs more rows than there are, or each device takes all rows."""
        size = self.settings.micro_batch
        mesh = mesh_of(self.params.arrays)
        parts = 1 if mesh is None else mesh.shape.get(DATA_AXIS, 1)
        if size % parts:
            warnings.warn(
                f"micro_batch is {size}, which {parts} devices along {DATA_AXIS!r} do not divide, "
                "so each of them takes all rows; choose a multiple.",
                UserNote,
                stacklevel=4,
            )
        rows, size = len(self.rows), self.settings.batch_size
        if rows < size:
            warnings.warn(
                f"An update takes {size} rows and there are {rows}, so each is seen "
                f"{size / rows:.1f} times in it; a smaller batch_size gives more updates.",
                UserNote,
                stacklevel=4,
            )

    def _directory(self) -> pathlib.Path | None:
        """Where the model came from, as far as it knows."""
        return None if self.params.processor is None else self.params.processor.directory

    def _save(self) -> None:
        data = dataclasses.asdict(self.position)
        self.checkpoints.save(self.step, self.state, data=data, metrics=self.metrics)

    def _merged(self, state: "State") -> Params:
        arrays = merged(self.params.arrays, state.trained, self.settings)
        return dataclasses.replace(self.params, arrays=arrays)
