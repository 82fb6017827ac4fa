"""`jaxprune generate`."""

import functools
import json
import pathlib
import sys
from typing import Annotated, Any

import typer

import jaxprune
from jaxprune.cli import interrupt, many
from jaxprune.cli.options import (
    NO_VALUE,
    AdapterOption,
    DownloadOption,
    DtypeOption,
    ExtraOption,
    JsonOption,
    KeepOption,
    KeepRateOption,
    MethodOption,
    ModelOption,
    SaveOption,
    TextTowerOption,
    TowerOption,
    method_options,
)
from jaxprune.cli.output import note, working
from jaxprune.engine.sampling import Ask
from jaxprune.errors import UserError
from jaxprune.files import as_path
from jaxprune.inputs.images import picture_of
from jaxprune.methods.resolve import check_names
from jaxprune.methods.written import parse_method


def generate(
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    image: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="An image file; repeat it for several images in one prompt."),
    ] = None,
    video: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="A video: a folder of frames, an animated image or a video file."),
    ] = None,
    images: Annotated[
        pathlib.Path | None, typer.Option(help="A folder: the prompt is asked about each image.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file of JSON lines with image and prompt; - reads stdin."),
    ] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="For --images and --data: answers as JSON lines; the same resumes."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="For --images and --data: rows at once.")] = 8,
    model: ModelOption = None,
    method: MethodOption = "none",
    keep: KeepOption = None,
    save: SaveOption = None,
    keep_rate: KeepRateOption = None,
    option: ExtraOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest p.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer.")] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Before these no token ends the answer.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, what was said already is less likely.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities, and so many likeliest tokens'."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", metavar=NO_VALUE, help="No chat template.")] = False,
    vision_tower: TowerOption = None,
    text_tower: TextTowerOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "auto",
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about an image, or many at once."""
    # What can be wrong is looked at before the model is loaded, which may take minutes.
    asked: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "stop": stop or (),
    }  # fmt: skip
    others = {
        "min_new_tokens": min_new_tokens, "repetition_penalty": repetition_penalty,
        "logprobs": logprobs,
    }  # fmt: skip
    asked |= {name: value for name, value in others.items() if value is not None}
    Ask(**asked, seed=seed)
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("--top-k and --top-p say what to draw from; give a --temperature above 0.")
    if logprobs is not None and not as_json:
        raise UserError("--logprobs are part of the details; ask for them with --json.")
    pruning: dict[str, Any] = {
        "method": parse_method(method),
        **method_options(option, jaxprune.generate, keep=keep, save=save, keep_rate=keep_rate),
    }
    check_names(**pruning)
    asked |= {"seed": seed, "chat": not raw, "return_details": True, **pruning}
    if prompt is not None and not prompt.strip():
        raise UserError("The prompt is empty; ask something about the image.")
    load = functools.partial(
        jaxprune.load,
        model,
        dtype=dtype,
        vision_tower=vision_tower,
        text_tower=text_tower,
        adapter=adapter,
        download=download,
    )
    requests = _requests(prompt, [*(video or []), *(image or [])], images, data, out)
    if requests is None:
        assert prompt is not None
        own: list[Any] = [*map(jaxprune.Video, video or []), *map(picture_of, image or [])]
        pictures = [own] if own else None
        with working("Loading the model"):
            params = load()
        with working("Answering; a process's first answer compiles the programs for it"):
            (answer,) = jaxprune.generate(params, pictures, [prompt], **asked)
        print(json.dumps({"method": method, **answer.as_dict()}) if as_json else answer.text)
        return
    loaded = (model, dtype, vision_tower, text_tower, adapter)
    settings = many.settings_digest(*map(str, loaded), as_json, sorted(asked.items()))
    answered: dict[int, dict[str, Any]] = {}
    if out is not None:
        out = as_path(out, "--out")
        if not out.absolute().parent.is_dir():
            raise UserError(f"{out.absolute().parent} is no directory; make it first.")
        there = many.lines_of(out, requests, settings)
        answered = {place: line for place, line in there.items() if "error" not in line}
        interrupt.say_at_the_end("The same command resumes.")
        if there:
            again = len(there) - len(answered)
            errors = f"; {again} with an error are tried again" if again else ""
            note(f"{len(answered)} of {len(requests)} answers are there already{errors}.")
    rest = [request for place, request in enumerate(requests) if place not in answered]
    if not rest:
        return
    answers = jaxprune.generate_many(
        load(), rest, batch_size=batch_size, return_errors=True, **asked
    )
    if out is None:
        failed = many.write(answers, rest, sys.stdout, details=as_json)
    else:
        if out.exists():  # without what was cut off, and errors
            many.rewrite(out, answered)
        with _appending(out) as file:
            failed = many.write(answers, rest, file, details=as_json, settings=settings)
        if max(answered, default=-1) >= len(answered):  # what was tried again stands at the end
            many.rewrite(out, many.lines_of(out, requests, settings))
        note(f"{out}: {len(requests)} answers.")
    if failed:
        note(f"{failed} of {len(rest)} requests could not be answered; their lines have an error.")
        raise typer.Exit(1)


def _requests(
    prompt: str | None,
    image: list[pathlib.Path] | None,
    images: pathlib.Path | None,
    data: str | None,
    out: pathlib.Path | None,
) -> list[dict[str, Any]] | None:
    """The requests of a folder or a file; None where there is one, given by its options."""
    ways = [
        name
        for name, x in (("--image or --video", image), ("--images", images), ("--data", data))
        if x
    ]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} came together; expected one of them.")
    if prompt is None and data is None:
        raise UserError("There is no --prompt; say what to ask.")
    if data is not None:
        return many.from_file(data, prompt)
    if images is not None:
        assert prompt is not None
        return many.from_folder(images, prompt)
    if out is not None:
        raise UserError("--out is for --images and --data; a single answer goes to stdout.")
    return None


def _appending(out: pathlib.Path) -> Any:
    try:
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {out} ({error}).") from None
