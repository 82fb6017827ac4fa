"""`jaxprune show`."""

import pathlib
from typing import Annotated

import typer
from PIL import Image

import jaxprune
from jaxprune.cli.options import (
    AdapterOption,
    DownloadOption,
    DtypeOption,
    ExtraOption,
    KeepOption,
    KeepRateOption,
    MethodOption,
    ModelOption,
    SaveOption,
    TextTowerOption,
    TowerOption,
    method_options,
)
from jaxprune.cli.output import note, refuse_existing
from jaxprune.errors import UserError
from jaxprune.files import whole_file
from jaxprune.inputs.images import picture_of
from jaxprune.methods.resolve import check_names
from jaxprune.methods.written import parse_method
from jaxprune.reports.kept_patches import kept_over_depth


def show(
    image: Annotated[pathlib.Path, typer.Option(help="An image file.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    out: Annotated[pathlib.Path, typer.Option(help="The picture to write, e.g. kept.png.")],
    method: MethodOption,
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to show, from 0, e.g. 2,8,16.")
    ] = None,
    model: ModelOption = None,
    keep: KeepOption = None,
    save: SaveOption = None,
    keep_rate: KeepRateOption = None,
    option: ExtraOption = None,
    vision_tower: TowerOption = None,
    text_tower: TextTowerOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "auto",
    download: DownloadOption = False,
) -> None:
    """Draw the patches that survive, before the decoder and after some of its layers."""
    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out is {out}; expected a picture's name, e.g. kept.png.")
    refuse_existing(out)
    chosen, drawn = _parse_layers(layers), picture_of(image)
    pruning = {
        "method": parse_method(method),
        **method_options(option, kept_over_depth, keep=keep, save=save, keep_rate=keep_rate),
    }
    check_names(**pruning)
    params = jaxprune.load(
        model,
        dtype=dtype,
        vision_tower=vision_tower,
        text_tower=text_tower,
        adapter=adapter,
        download=download,
    )
    picture = kept_over_depth(params, drawn, prompt, layers=chosen, **pruning)
    _write(picture, out)
    note(f"{out}: {picture.width} x {picture.height} pixels.")


def _parse_layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers is {text!r}; expected numbers, e.g. 2,8,16.") from None


def _write(picture: Image.Image, out: pathlib.Path) -> None:
    try:
        with whole_file(out) as file:
            picture.save(file)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Cannot write {out} ({error}).") from None
