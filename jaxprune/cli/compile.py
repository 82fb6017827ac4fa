"""`jaxprune compile`."""

import json
import os
from typing import Annotated, Any

import jax
import typer
from rich.table import Table

import jaxprune
from jaxprune.cli.options import (
    ExtraOption,
    JsonOption,
    KeepOption,
    KeepRateOption,
    MethodOption,
    SaveOption,
    method_options,
    parse_size,
)
from jaxprune.cli.output import print_wide
from jaxprune.engine.programs import Sizes
from jaxprune.errors import UserError, check_choice, check_whole
from jaxprune.methods.written import parse_method
from jaxprune.ops.tiles import VisualSize
from jaxprune.reports.compiled import Compiled, compiled, largest_batch, smallest_slice


def compile(
    target: Annotated[
        str, typer.Option(help="A chip and a slice of it: v5e, v6e:2x2, v5p:2x2x1, h100, h100:4.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or preset; without it, the small model that ships."),
    ] = None,
    method: MethodOption = "none",
    keep: KeepOption = None,
    save: SaveOption = None,
    keep_rate: KeepRateOption = None,
    option: ExtraOption = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="Of a row.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Room for them.")] = 128,
    image_size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT, for models whose images differ in tokens.")
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Left of an image, for methods that decide by it.")
    ] = None,
    data: Annotated[int, typer.Option(help="Chips that rows are spread over.")] = 1,
    fit: Annotated[
        str | None, typer.Option(help="batch: find the most rows; slice: the fewest chips.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32, float16 or int8 (weights).")
    ] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Compile for a TPU or GPU, with neither at hand: what fits, what is copied, what bounds it."""
    # Only its compiler is wanted; without this JAX would look for the accelerator itself.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    for name, number in (("--batch", batch), ("--new-tokens", new_tokens), ("--data", data)):
        check_whole(name, number)
    check_whole("--text-tokens", text_tokens, least=2)
    if visual_tokens is not None:
        check_whole("--visual-tokens", visual_tokens)
    find: Any = compiled
    if fit is not None:
        check_choice("--fit", fit, ("batch", "slice"))
        find = {"batch": largest_batch, "slice": smallest_slice}[fit]
    size = parse_size(image_size)
    found = find(
        jaxprune.read_config(model, dtype),
        target,
        method=parse_method(method),
        sizes=Sizes(
            batch=batch,
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            image_size=None if size is None else VisualSize(size[1], size[0]),
            visual_tokens=visual_tokens,
        ),
        data=data,
        **method_options(option, compiled, keep=keep, save=save, keep_rate=keep_rate),
    )
    if as_json:
        fields = {"model": model or "small_llava", "method": method, **found.as_dict()}
        print(json.dumps(fields))
    else:
        _print(found)
    if not found.fits:
        raise UserError(
            f"It does not fit on {found.target}: {found.failed or 'see above'}. Try --fit batch, "
            "--fit slice, or a method that keeps less."
        )


def _print(found: Compiled) -> None:
    table = Table(
        "stage", "compile s", "arguments", "outputs", "temporary", "copied", "bound ms",
        "estimate ms", "collectives",
    )  # fmt: skip
    for column in table.columns[1:-1]:
        column.justify = "right"
    for stage in found.stages:
        estimate = stage.estimated_seconds
        moved = ", ".join(
            f"{number} {kind} {_mb(size)}" for kind, (number, size) in stage.collectives.items()
        )
        table.add_row(
            stage.stage,
            f"{stage.compile_seconds:.1f}",
            *map(_mb, (stage.argument_bytes, stage.output_bytes, stage.temporary_bytes)),
            _mb(stage.copied_bytes) if stage.copied else "0",
            f"{1e3 * stage.bound_seconds:.2f} ({stage.bound_by})" if stage.bound_by else "",
            "" if estimate is None or not stage.bound_by else f"{1e3 * estimate:.2f}",
            moved,
        )
    print_wide(table)
    data, model = found.mesh
    print(
        f"{found.target}, mesh {data} x {model} (data x model): {found.batch} rows of "
        f"{found.slots} slots and {found.new_tokens} new tokens.\n"
        f"A chip needs {found.needed_bytes / 2**30:.2f} GiB, of which weights "
        f"{found.weight_bytes / 2**30:.2f}; usable are {found.usable_bytes / 2**30:.2f}: it "
        f"{'fits' if found.fits else 'does not fit'}.\n"
        "Bytes and times are a chip's, a decode step is one token of every row. Bound: by the "
        "chip's published peaks.\nEstimate: the compiler's own, not a clock's; it leaves out "
        "waiting for memory, so a program takes the larger of the two."
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
