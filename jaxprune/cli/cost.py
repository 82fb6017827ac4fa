"""`jaxprune cost`."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
from jaxprune.engine.cost import FORMULA, Cost, estimate, most_tokens
from jaxprune.methods.written import parse_method
from jaxprune.model import read_config
from jaxprune.ops.tiles import VisualSize


def cost(
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or preset; without it, the small model that ships."),
    ] = None,
    method: MethodOption = "none",
    keep: KeepOption = None,
    save: SaveOption = None,
    keep_rate: KeepRateOption = None,
    option: ExtraOption = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 64,
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Visual tokens that enter the decoder; for what depends on the image."),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels, for models whose images differ in tokens."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the caches.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Count tokens, FLOPs and cache bytes of a prompt, without running or loading anything."""
    config, size = read_config(model, dtype), parse_size(image_size)
    found = estimate(
        config,
        parse_method(method),
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
        image_size=size,
        **method_options(option, estimate, keep=keep, save=save, keep_rate=keep_rate),
    )
    if as_json:
        print(json.dumps({"model": model or "small_llava", "method": method, **found.as_dict()}))
    else:
        _print(found)
        most, side = most_tokens(config), config.tower.tile_size
        fewer = config.tiling(VisualSize(side, side)).num_tokens
        if size is None and visual_tokens is None and fewer < most:
            print(
                f"Of the image with the most visual tokens, {most}; one of {side} x {side} pixels "
                f"has {fewer}. --image-size tells another."
            )


def _print(found: Cost) -> None:
    Console().print(_table(found))
    saved = {name: f"{100 * share:.1f} %" for name, share in found.saved.items()}
    print(
        f"Saved against no pruning: {saved['visual_macs']} of the visual tokens' "
        f"FLOPs, {saved['macs']} of all, {saved['cache_bytes']} of the cache.\n"
        f"Counted: {FORMULA}.\n"
        f"Apart: ranking {found.score_macs / 1e9:.3f} GMAC, "
        f"logits of one token {found.lm_head_macs / 1e9:.3f} GMAC."
    )


def _table(found: Cost) -> Table:
    table = Table("layer", "text", "visual in", "visual out", "GMAC", "visual GMAC", "cache MB")
    for column in table.columns:
        column.justify = "right"
    for row in found.layers:
        sizes = (f"{n / 1e9:.3f}" for n in (row.macs, row.visual_macs))
        counts = map(str, (row.layer, row.text_tokens, row.visual_in, row.visual_out))
        table.add_row(*counts, *sizes, f"{row.cache_bytes / 1e6:.3f}")
    table.add_section()
    totals = (f"{n / 1e9:.1f}" for n in (found.macs, found.visual_macs))
    table.add_row(
        "all",
        "",
        f"mean {found.visual_per_layer:.1f}",
        "",
        *totals,
        f"{found.cache_bytes / 1e6:.1f}",
    )
    return table
