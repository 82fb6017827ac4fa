"""`jaxprune calibrate`."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import typer

import jaxprune
from jaxprune import Recipe
from jaxprune.calibrate import Settings
from jaxprune.cli import interrupt
from jaxprune.cli.options import (
    AdapterOption,
    DownloadOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SaveOption,
    TowerOption,
)
from jaxprune.cli.output import refuse_existing
from jaxprune.errors import UserError
from jaxprune.reports.recipe_plot import figure, plot_recipe


def calibrate(
    method: Annotated[str, typer.Option(help="fitprune, gsearch, psigmoid or iti.")],
    out: Annotated[pathlib.Path, typer.Option(help="The recipe to write, e.g. recipe.json.")],
    save: SaveOption = None,
    keep_rate: Annotated[
        float | None,
        typer.Option(help="psigmoid: mean over layers; iti: share left by both stages."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="gsearch: how much the score may fall.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="gsearch, psigmoid: accuracy or logprob.")
    ] = "accuracy",
    search: Annotated[str, typer.Option(help="gsearch: bisection or bayesian.")] = "bisection",
    evaluations: Annotated[int, typer.Option(help="Of the score, in Bayesian searches.")] = 24,
    first_pruned_layer: Annotated[int, typer.Option(help="gsearch, psigmoid.")] = 2,
    queries: Annotated[str, typer.Option(help="gsearch, psigmoid: text or last.")] = "text",
    stage2: Annotated[float, typer.Option(help="iti: share that the second stage removes.")] = 0.5,
    data: Annotated[
        pathlib.Path | None,
        typer.Option(help="JSONL with image, question, answer; without it, drawn scenes."),
    ] = None,
    model: ModelOption = None,
    vision_tower: TowerOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the Bayesian searches.")] = 0,
    download: DownloadOption = False,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the keep rates over depth here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a decoder-side method to a model; interrupted, the same command resumes."""
    settings: dict[str, Any] = {
        "method": method, "save": save, "keep_rate": keep_rate, "tolerance": tolerance,
        "metric": metric, "search": search, "evaluations": evaluations,
        "first_pruned_layer": first_pruned_layer, "queries": queries, "stage2": stage2,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    _check(settings, out, plot)
    params = jaxprune.load(
        model, dtype=dtype, vision_tower=vision_tower, adapter=adapter, download=download
    )
    progress = out.with_name(out.name + ".progress")
    interrupt.say_at_the_end("The same command resumes.")
    recipe = jaxprune.calibrate(params, data, progress_file=progress, **settings)
    jaxprune.save_recipe(recipe, out)
    if plot is not None:
        plot_recipe(recipe, params.config, plot)
    print(json.dumps(dataclasses.asdict(recipe)) if as_json else _summary(recipe, out))


def _check(settings: dict[str, Any], out: pathlib.Path, plot: pathlib.Path | None) -> None:
    """Raise `UserError` for a mistake before anything is loaded."""
    Settings(**settings)
    if out.suffix != ".json":
        raise UserError(f"--out is {out}; a recipe's name has to end in .json.")
    refuse_existing(out)
    if plot is not None:
        refuse_existing(plot)
        figure()  # refuses without matplotlib


def _summary(recipe: Recipe, out: pathlib.Path) -> str:
    reached = ", ".join(f"{name} {value:.4g}" for name, value in recipe.reached.items())
    made = recipe.calibration
    return (
        f"{out}: {recipe.method}, {made['samples']} samples, {made['seconds']:.1f} s. "
        f"Reached: {reached}."
    )
