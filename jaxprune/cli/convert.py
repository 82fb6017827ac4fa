"""`jaxprune convert`."""

import dataclasses
import json
import pathlib
from typing import Annotated

import typer

from jaxprune import checkpoints_convert
from jaxprune.cli.options import NO_VALUE, AdapterOption, JsonOption, TowerOption


def convert(
    source: Annotated[pathlib.Path, typer.Argument(help="A model directory of any spelling.")],
    destination: Annotated[pathlib.Path, typer.Argument(help="A directory to be made.")],
    dtype: Annotated[str | None, typer.Option(help="Cast to this; else keep.")] = None,
    format: Annotated[
        str, typer.Option(help="hf: what transformers loads. jaxprune: this library's layout.")
    ] = "hf",
    vision_tower: TowerOption = None,
    adapter: AdapterOption = None,
    verify: Annotated[
        bool, typer.Option(metavar=NO_VALUE, help="Read back and compare bit by bit.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a checkpoint as one clean directory, and check it."""
    report = checkpoints_convert.convert(
        source,
        destination,
        dtype=dtype,
        format=format,
        verify=verify,
        vision_tower=vision_tower,
        adapter=adapter,
    )
    if as_json:
        print(json.dumps({"destination": str(destination), **dataclasses.asdict(report)}))
        return
    checked = f"{report.verified} read back and equal" if verify else "not read back"
    print(f"{destination}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB, {checked}.")
