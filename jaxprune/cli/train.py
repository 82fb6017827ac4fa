"""`jaxprune train`."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import typer

import jaxprune
from jaxprune.cli import interrupt
from jaxprune.cli.options import (
    NO_VALUE,
    AdapterOption,
    DownloadOption,
    JsonOption,
    ModelOption,
    TextTowerOption,
    TowerOption,
)
from jaxprune.cli.output import note
from jaxprune.errors import UserError, check_whole
from jaxprune.train.recipes import published_recipes, settings_of
from jaxprune.train.run import Habits, begin, prepare
from jaxprune.train.stopping import stopping


def train(
    data: Annotated[
        pathlib.Path | None, typer.Option(help="LLaVA's JSON, or JSONL: what is learned.")
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="The run's directory; the same command resumes.")
    ] = None,
    images: Annotated[
        pathlib.Path | None, typer.Option(help="The folder of the data's images; else its own.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A paper's settings: a name (see --recipes) or a file.")
    ] = None,
    recipes: Annotated[
        bool, typer.Option("--recipes", metavar=NO_VALUE, help="List the papers' recipes and exit.")
    ] = False,
    method: Annotated[
        str | None, typer.Option(help="What prunes, e.g. 'prumerge_plus:keep=144'.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--train", help="lora (with the projector), projector, decoder, or all."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapters: 128.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Adapters act times alpha / rank: 256.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapters' inputs: .05.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak: 2e-4.")] = None,
    projector_rate: Annotated[float | None, typer.Option(help="The projector's: 2e-5.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's: 0.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the updates: .03.")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of gradients: 1; 0: any.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of an update: 160.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Samples at once: 16.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes through the data: 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates, instead of epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, beginning and dropout: 0.")] = None,
    remat: Annotated[
        str | None, typer.Option(help="Computed again, to save memory: none, dots, or full.")
    ] = None,
    gather: Annotated[
        bool | None,
        typer.Option(
            "--gather/--mask", metavar=NO_VALUE, help="Shorten pruned sequences, or mask them."
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row, at most.")] = None,
    skip: Annotated[
        bool, typer.Option("--skip", metavar=NO_VALUE, help="Leave out and count wrong samples.")
    ] = False,
    save_every: Annotated[int | None, typer.Option(help="Updates between checkpoints.")] = None,
    keep_last: Annotated[int, typer.Option(help="Checkpoints that stay, beside the best.")] = 2,
    eval_data: Annotated[
        pathlib.Path | None, typer.Option(help="Questions, as for evaluate; the best run counts.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Updates between evaluations.")] = None,
    adapter_form: Annotated[
        str, typer.Option(help="peft; or llava, for a base in LLaVA's own format (needs torch).")
    ] = "peft",
    tensorboard: Annotated[
        pathlib.Path | None, typer.Option(help="A folder for TensorBoard (needs tensorboardX).")
    ] = None,
    model: ModelOption = None,
    vision_tower: TowerOption = None,
    text_tower: TextTowerOption = None,
    adapter: AdapterOption = None,
    dtype: Annotated[str, typer.Option(help="Of what is not trained; see generate.")] = "auto",
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model with its visual tokens pruned; LoRA unless told otherwise."""
    if recipes:
        listed = {name: dataclasses.asdict(one) for name, one in published_recipes().items()}
        print(json.dumps(listed, indent=None if as_json else 2, ensure_ascii=False))
        return
    if data is None or out is None:
        raise UserError("--data and --out are needed: what is learned, and the run's directory.")
    given: dict[str, Any] = {
        "method": method, "train": part, "rank": rank, "alpha": alpha, "dropout": dropout,
        "learning_rate": learning_rate, "projector_rate": projector_rate,
        "weight_decay": weight_decay, "warmup": warmup, "clip": clip, "batch_size": batch_size,
        "micro_batch": micro_batch, "epochs": epochs, "steps": steps, "seed": seed, "remat": remat,
        "gather": gather,
    }  # fmt: skip
    # What can be wrong is looked at before the model is loaded, which may take minutes.
    settings = settings_of(recipe, {name: x for name, x in given.items() if x is not None})
    check_whole("--keep-last", keep_last)
    habits = Habits(
        save_every=save_every, keep=keep_last, eval_data=eval_data, eval_every=eval_every,
        base=model, adapter_form=adapter_form, tensorboard=tensorboard,
    )  # fmt: skip
    prepared = prepare(
        data, out, settings=settings, habits=habits, images=images, skip=skip,
        max_length=max_length,
    )  # fmt: skip
    params = jaxprune.load(
        model, dtype=dtype, vision_tower=vision_tower, text_tower=text_tower, adapter=adapter,
        download=download,
    )  # fmt: skip
    run = begin(params, prepared)
    if run.step:
        note(f"{run.step} of {run.updates} updates are done already.")
    interrupt.say_at_the_end("The same command resumes from the last checkpoint.")
    with interrupt.leaving_the_first_one(), stopping() as asked_to_stop:
        run.go(asked_to_stop)
    if not run.done:
        note(f"Stopped after {run.step} of {run.updates} updates; the same command resumes.")
        raise typer.Exit(interrupt.INTERRUPTED)
    if run.left_out:
        note(f"{len(run.left_out)} samples with damaged images were left out; log.jsonl has them.")
    done = run.finish()
    if as_json:
        found = {"directory": str(done.directory), "updates": done.step, "accuracy": done.accuracy}
        print(json.dumps(found))
        return
    said = "" if done.accuracy is None else f", {100 * done.accuracy:.1f} % of eval_data right"
    print(f"{done.directory} (after {done.step} of {run.updates} updates{said})")
