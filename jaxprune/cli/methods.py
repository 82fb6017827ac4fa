"""`jaxprune methods`."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from jaxprune.cli.options import JsonOption
from jaxprune.cli.output import print_wide
from jaxprune.errors import UserError
from jaxprune.methods import METHODS, describe
from jaxprune.methods.base import MethodClass
from jaxprune.methods.recipes import published_recipes
from jaxprune.model import clip_of, read_config
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of
from jaxprune.ops.visual import TEXT_SIMILARITY, Signal


def methods(
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or preset: what each method goes by there."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the pruning methods with paper, family and options; for a model, what applies."""
    rows = [describe(cls) for cls in METHODS.values()]
    if model is not None:
        config = read_config(model)
        pairs = zip(rows, METHODS.values(), strict=True)
        rows = [{**row, **on_model(cls, config)} for row, cls in pairs]
    if as_json:
        print(json.dumps(rows))
        return
    there = ("on this model",) if model is not None else ("options",)
    table = Table("method", "family", "what it does", *there, "paper")
    for row in rows:
        last = _told(row) if model is not None else ", ".join(row["options"])
        table.add_row(row["name"], row["family"], row["summary"], last, row["paper"])
    print_wide(table)


def on_model(cls: MethodClass, config: ModelConfig) -> dict[str, Any]:
    """What a method goes by on a model.

    Returns:
        "reads": what the vision tower gives for each signal that the method asks for, by name;
        "recipes": what published recipes there are for the model, by what they save;
        "refused": why the method cannot be used, or None.
    """
    signals: frozenset[Signal] = getattr(cls, "signals", frozenset())
    refused = None
    try:
        config.tower.check(signals)
        if TEXT_SIMILARITY in signals:
            clip_of(config)
    except UserError as error:
        refused = str(error)
    fitting = [recipe for recipe in published_recipes(cls.name) if recipe.fits(depth_of(config))]
    saves = (recipe.asked.get("save", recipe.reached.get("keep_rate")) for recipe in fitting)
    return {
        "reads": {signal.kind: config.tower.instead(signal).kind for signal in sorted(signals)},
        "recipes": [share for share in saves if share is not None],
        "refused": refused,
    }


def _told(row: dict[str, Any]) -> str:
    """What applies, in words."""
    if row["refused"]:
        return f"no: {row['refused']}"
    reads = [asked if asked == given else f"{given}, which stands in for {asked}"
             for asked, given in row["reads"].items()]  # fmt: skip
    told = [f"reads {', '.join(reads)}"] if reads else []
    if row["recipes"]:
        told.append(f"published recipes: {', '.join(f'{x:g}' for x in row['recipes'])}")
    return "; ".join(told) or "yes"
