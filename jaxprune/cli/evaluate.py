"""`jaxprune evaluate`."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

import jaxprune
from jaxprune.cli import interrupt
from jaxprune.cli.options import (
    COMPARED,
    NO_VALUE,
    AdapterOption,
    DownloadOption,
    DtypeOption,
    JsonOption,
    MethodsOption,
    ModelOption,
    TextTowerOption,
    TowerOption,
)
from jaxprune.cli.output import note, print_wide, refuse_existing
from jaxprune.evaluate import Evaluation, Row, prepare, run
from jaxprune.methods.written import one_by_one
from jaxprune.reports.accuracy_plot import plot_accuracy
from jaxprune.reports.recipe_plot import figure


def evaluate(
    method: MethodsOption = None,
    data: Annotated[
        pathlib.Path | None,
        typer.Option(help="JSONL with image, question, answer; without it, drawn scenes."),
    ] = None,
    scoring: Annotated[
        str | None,
        typer.Option(
            help="exact, vqa, textvqa, pope, mme, choice or scienceqa; else as each line says."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Questions, from the first; without it all, or 240 scenes.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Answers as JSON lines; what is there is not asked again."),
    ] = None,
    intervals: Annotated[
        bool,
        typer.Option("--intervals", metavar=NO_VALUE, help="Those of each kind of question too."),
    ] = False,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the accuracy against FLOPs here.")
    ] = None,
    model: ModelOption = None,
    vision_tower: TowerOption = None,
    text_tower: TextTowerOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "auto",
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare how well methods answer questions, none among them, and how sure that is."""
    # What can be wrong is looked at before the model is loaded, which may take minutes.
    if plot is not None:
        refuse_existing(plot)
        figure()  # refuses without matplotlib
    task = prepare(
        data, methods=one_by_one(method or COMPARED), scoring=scoring, samples=samples,
        max_new_tokens=max_new_tokens, batch_size=batch_size, out=out,
    )  # fmt: skip
    if out is not None:
        interrupt.say_at_the_end("The same command resumes.")
        if task.done:
            note(f"{task.done} of {len(task.lines)} answers are there already.")
    params = jaxprune.load(
        model,
        dtype=dtype,
        vision_tower=vision_tower,
        text_tower=text_tower,
        adapter=adapter,
        download=download,
    )
    found = run(params, task)
    if plot is not None:
        plot_accuracy(found, plot)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        print_wide(_table(found.rows))
        if found.rows[0].figures:
            print_wide(_figures(found.rows))
        if found.rows[0].kinds:
            print_wide((_by_kind if intervals else _kinds)(found.rows))
        print(_caption(found))
    failed = sum(row.errors for row in found.rows)
    if failed:
        first = next(row for row in found.rows if row.errors)
        note(
            f"{failed} answers, of all methods, are missing and count as wrong; the first, under "
            f"{first.method}: {first.first_error}"
        )
        raise typer.Exit(1)


def _table(rows: Sequence[Row]) -> Table:
    failed = any(row.errors for row in rows)
    names = [*_ACCURACY, "visual tokens", "GFLOPs", "ms"]
    table = _of_methods([*names, "errors"] if failed else names)
    for row in rows:
        table.add_row(
            escape(row.method),
            *_accuracy(vars(row)),
            "-" if row.visual_tokens is None else f"{row.visual_tokens:.1f}",
            "-" if row.macs is None else f"{2e-9 * row.macs:.3g}",
            "-" if row.seconds is None else f"{1e3 * row.seconds:.1f}",
            *([str(row.errors)] if failed else []),
        )
    return table


def _figures(rows: Sequence[Row]) -> Table:
    """What benchmarks of yes and no give of each method besides the accuracy."""
    table = _of_methods([name.replace("_", " ") for name in rows[0].figures])
    for row in rows:
        # MME's score is a sum and no share.
        values = [x if name == "score" else 100 * x for name, x in row.figures.items()]
        table.add_row(escape(row.method), *(f"{value:.1f}" for value in values))
    return table


def _kinds(rows: Sequence[Row]) -> Table:
    """The accuracies of each kind, a column each."""
    kinds = rows[0].kinds
    table = _of_methods([f"{kind} ({own['samples']})" for kind, own in kinds.items()])
    for row in rows:
        shown = [_starred(f"{100 * own['accuracy']:.1f}", own) for own in row.kinds.values()]
        table.add_row(escape(row.method), *shown)
    return table


def _of_methods(names: Sequence[str]) -> Table:
    table = Table(Column("method", overflow="fold"))
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    return table


def _by_kind(rows: Sequence[Row]) -> Table:
    """The accuracies of each kind, with their intervals."""
    table = Table("kind", Column("method", overflow="fold"))
    for name in _ACCURACY:
        table.add_column(name, justify="right")
    for kind, own in rows[0].kinds.items():
        table.add_section()
        for number, row in enumerate(rows):
            label = f"{kind} ({own['samples']})" if number == 0 else ""
            table.add_row(escape(label), escape(row.method), *_accuracy(row.kinds[kind]))
    return table


_ACCURACY = ("accuracy", "95 % interval", "difference (95 % interval)")


def _accuracy(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    """An accuracy, its interval, and its difference to the first row's with a star if it is one."""
    difference = ""
    if figures["difference"] is not None:
        between = _range(figures["difference_interval"], "+")
        difference = _starred(f"{100 * figures['difference']:+.1f} ({between})", figures)
    return f"{100 * figures['accuracy']:.1f}", _range(figures["interval"]), difference


def _starred(text: str, figures: Mapping[str, Any]) -> str:
    return f"{text} *" if figures["significant"] else text


def _range(bounds: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in bounds)
    return f"{low} to {high}"


def _caption(found: Evaluation) -> str:
    scored = ", ".join(f"{number} {rule}" for rule, number in found.scoring.items())
    return (
        f"{found.samples} questions, scored as: {scored}. Accuracies and intervals in per cent, "
        "intervals by bootstrap over images.\n"
        f"difference: to {found.rows[0].method}, question by question; * where it is more than "
        "chance would make of it.\n"
        "visual tokens: into a layer, mean; GFLOPs: the decoder's for a prompt; ms: an answer's "
        "share of its batch, without batches that compiled."
    )
