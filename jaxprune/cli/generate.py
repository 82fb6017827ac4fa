"""`jaxprune generate`."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import typer

import jaxprune
from jaxprune import Answer
from jaxprune.cli.options import (
    DtypeOption,
    ExtraOption,
    JsonOption,
    KeepOption,
    KeepRateOption,
    MethodOption,
    ModelOption,
    SaveOption,
    TowerOption,
    method_options,
    parse_method,
)


def generate(
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="An image file; repeat it for several images in one prompt."),
    ] = None,
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
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    vision_tower: TowerOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about an image."""
    (answer,) = jaxprune.generate(
        jaxprune.load(model, dtype=dtype, vision_tower=vision_tower),
        [image] if image else None,
        [prompt],
        method=parse_method(method),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        chat=not raw,
        return_details=True,
        **method_options(option, jaxprune.generate, keep=keep, save=save, keep_rate=keep_rate),
    )
    print(json.dumps({"method": method, **_fields(answer)}) if as_json else answer.text)


def _fields(answer: Answer) -> dict[str, Any]:
    """An answer's fields, for JSON."""
    fields = dataclasses.asdict(answer)
    fields["kept_indices"] = [kept.tolist() for kept in answer.kept_indices]
    fields["kept_by_layer"] = {
        layer: [kept.tolist() for kept in images] for layer, images in answer.kept_by_layer.items()
    }
    fields["cost"] = answer.cost.as_dict()
    fields["seconds"] = {stage: round(value, 6) for stage, value in answer.seconds.items()}
    return fields
