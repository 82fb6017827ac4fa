"""The command line: `jaxprune generate | show | methods | cost | bench | calibrate | convert`.

The result alone goes to stdout; progress, notes and errors go to stderr. A user's mistake
ends with exit code 2 and no traceback.
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxprune.errors import UserError

app = typer.Typer(
    help="Run LLaVA-family models in JAX, faster by pruning visual tokens.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_stderr = Console(stderr=True)

ModelOption = Annotated[
    pathlib.Path | None,
    typer.Option("--model", help="Model directory; without it, the small model that ships."),
]
TowerOption = Annotated[
    pathlib.Path | None,
    typer.Option("--vision-tower", help="The CLIP tower's directory, for original-format models."),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MethodOption = Annotated[
    str,
    typer.Option(help="Pruning method, a recipe's path, or a pair with a comma between."),
]
KeepOption = Annotated[int | None, typer.Option(help="Visual tokens to keep of each image.")]
SaveOption = Annotated[
    float | None, typer.Option(help="fitprune: share of the visual tokens' FLOPs to save.")
]
KeepRateOption = Annotated[
    float | None, typer.Option(help="psigmoid, fastv, pyramiddrop: share of tokens to keep.")
]
ExtraOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Any other option of the method, e.g. --option c=4.0."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _method(name: str) -> Any:
    parts = [part.strip() for part in name.split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)


# What --option cannot set: parameters of the functions behind the commands.
_TAKEN = frozenset(
    {
        *("params", "image", "prompt", "method", "max_new_tokens", "temperature", "top_k", "top_p"),
        *("stop", "chat", "return_details", "config", "processor", "buckets", "layers", "side"),
    }
)


def _options(extra: list[str] | None, *taken: str, **named: float | int | None) -> dict[str, Any]:
    """Method options from the command line; values are read as JSON where they are."""
    options: dict[str, Any] = dict(named)
    for item in extra or ():
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--option is {item!r}; expected name=value.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        name = name.strip().replace("-", "_")
        if name in _TAKEN or name in taken:
            raise UserError(
                f"--option sets options of a method, and {name} is none; see `jaxprune methods` "
                "for those, and --help for the command's own."
            )
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


@app.command()
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
    import jaxprune  # JAX takes a second to import, and --help should not

    images = list(image or [])
    params = jaxprune.load(model, dtype=dtype, vision_tower=vision_tower)
    answers: Any = jaxprune.generate(
        params,
        [images] if images else None,
        [prompt],
        method=_method(method),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        chat=not raw,
        return_details=True,
        **_options(option, "seed", keep=keep, save=save, keep_rate=keep_rate),
    )
    answer = answers[0]
    if not as_json:
        print(answer.text)
        return
    fields = dataclasses.asdict(answer)
    fields["kept_indices"] = [kept.tolist() for kept in answer.kept_indices]
    fields["kept_by_layer"] = {
        layer: [kept.tolist() for kept in images] for layer, images in answer.kept_by_layer.items()
    }
    fields["cost"] = answer.cost.as_dict()
    fields["seconds"] = {stage: round(value, 6) for stage, value in answer.seconds.items()}
    print(json.dumps({"method": method, **fields}))


@app.command()
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
    dtype: DtypeOption = "auto",
) -> None:
    """Draw the patches that survive, before the decoder and behind some of its layers."""
    import jaxprune
    from jaxprune.reports.kept_patches import kept_over_depth

    _refuse_existing(out)
    try:
        chosen = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError:
        raise UserError(f"--layers is {layers!r}; expected numbers, e.g. 2,8,16.") from None
    picture = kept_over_depth(
        jaxprune.load(model, dtype=dtype, vision_tower=vision_tower),
        image,
        prompt,
        method=_method(method),
        layers=chosen,
        **_options(option, keep=keep, save=save, keep_rate=keep_rate),
    )
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        out.unlink(missing_ok=True)
        raise UserError(f"Cannot write {out} ({error}).") from None
    _stderr.print(f"{out}: {picture.width} x {picture.height} pixels.")


@app.command()
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
    from jaxprune.engine.cost import FORMULA, prompt_cost
    from jaxprune.methods import resolve
    from jaxprune.methods.fitprune import MOST_TOKENS

    config = _config(model, dtype)
    for name, value in (("--text-tokens", text_tokens), ("--visual-tokens", visual_tokens)):
        if value is not None and not 0 <= value <= MOST_TOKENS:
            raise UserError(f"{name} is {value}; expected a number from 0 to {MOST_TOKENS:,}.")
    options = _options(option, keep=keep, save=save, keep_rate=keep_rate)
    plan = resolve(_method(method), config, **options)
    if visual_tokens is not None and keep is not None and config.one_tile:
        raise UserError("--keep says how many visual tokens are left; leave out --visual-tokens.")
    before = None
    if image_size is not None:
        before = config.tiling(*_height_and_width(image_size)).num_tokens + config.keep_cls
    if plan.vision is None and visual_tokens is not None:
        before = visual_tokens
    elif plan.vision is not None and visual_tokens is not None:
        most = config.num_image_tokens if before is None else before
        if visual_tokens > most:
            raise UserError(
                f"--visual-tokens is {visual_tokens}, but an image has {most} before pruning."
            )
    found = prompt_cost(
        config,
        plan,
        text_tokens=text_tokens,
        unpruned_visual_tokens=before,
        visual_tokens=visual_tokens,
    )
    if as_json:
        print(json.dumps({"model": model or "small_llava", "method": method, **found.as_dict()}))
        return
    table = Table("layer", "text", "visual in", "visual out", "GMAC", "visual GMAC", "cache MB")
    for column in table.columns:
        column.justify = "right"
    for row in found.layers:
        sizes = (f"{n / 1e9:.3f}" for n in (row.macs, row.visual_macs))
        counts = map(str, (row.layer, row.text_tokens, row.visual_in, row.visual_out))
        table.add_row(*counts, *sizes, f"{row.cache_bytes / 1e6:.3f}")
    mean = sum(row.visual_in for row in found.layers) / len(found.layers)
    table.add_section()
    totals = (f"{n / 1e9:.1f}" for n in (found.macs, found.visual_macs))
    table.add_row("all", "", f"mean {mean:.1f}", "", *totals, f"{found.cache_bytes / 1e6:.1f}")
    Console().print(table)
    saved = found.saved
    print(
        f"Saved against no pruning: {100 * saved['visual_macs']:.1f} % of the visual tokens' "
        f"FLOPs, {100 * saved['macs']:.1f} % of all, {100 * saved['cache_bytes']:.1f} % of the "
        f"cache.\nCounted: {FORMULA}.\nApart: ranking {found.score_macs / 1e9:.3f} GMAC, "
        f"logits of one token {found.lm_head_macs / 1e9:.3f} GMAC."
    )


def _height_and_width(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal() or not int(width) * int(height):
        raise UserError(f"--image-size is {text!r}; expected pixels, e.g. 672x672.")
    return int(height), int(width)


def _config(model: str | None, dtype: str) -> Any:
    from jaxprune.checkpoints_convert.load import DTYPES, existing_directory, read_config
    from jaxprune.model import SMALL_MODEL
    from jaxprune.models.presets import PRESETS

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of: {', '.join(DTYPES)}.")
    if model in PRESETS:
        return PRESETS[model](dtype=dtype)
    if model is not None and not pathlib.Path(model).expanduser().is_dir():
        known = ", ".join(PRESETS)
        raise UserError(f"{model!r} is neither a model's directory nor a preset; presets: {known}.")
    return read_config(existing_directory(model or SMALL_MODEL), dtype=dtype)


@app.command()
def bench(
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, with its options behind a colon and semicolons between them, e.g. "
            "prumerge_plus:keep=64;order=raster; repeat it to compare several. The first is what "
            "the others are compared with."
        ),
    ] = None,
    image: Annotated[
        pathlib.Path | None, typer.Option(help="An image file; without it, a drawn scene.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "What is in the picture?",
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Generated by every row.")] = 32,
    rounds: Annotated[int, typer.Option(help="After one that compiles.")] = 5,
    model: ModelOption = None,
    vision_tower: TowerOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time answers under several methods, beside what the hardware could do."""
    import jaxprune
    from jaxprune.reports.bench import bench as run
    from jaxprune.reports.bench import describe_machine

    if batch < 1:
        raise UserError(f"--batch is {batch}; expected 1 or more.")
    chosen = [(text, _method_with_options(text)) for text in method or _BENCHED]
    params = jaxprune.load(model, dtype=dtype, vision_tower=vision_tower)
    rows, ceilings = run(
        params,
        [image or jaxprune.DEMO_IMAGE] * batch,
        prompt,
        chosen,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    machine = {**describe_machine(), "dtype": params.config.dtype}
    if as_json:
        fields = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"machine": machine, "ceilings": ceilings, "rows": fields}))
        return
    table = Table("method", "visual", "encode", "select", "prefill", "decode", "answer")
    for name in ("prefill ceiling", "decode ceiling", "compile", "peak"):
        table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        ms = {name: f"{1e3 * seconds:.1f}" for name, seconds in row.seconds.items()}
        faster = {name: f" ({ratio:.2f}x)" for name, ratio in row.speedup.items()}
        table.add_row(
            escape(row.method),
            f"{row.visual_tokens:.1f}",
            *(ms[name] for name in ("encode", "select", "prefill")),
            ms["decode"] + faster["decode"],
            ms["all"] + faster["all"],
            f"{100 * row.prefill_of_ceiling:.0f} %",
            f"{100 * row.decode_of_ceiling:.0f} %",
            f"{row.compile_seconds:.1f} s",
            f"{row.peak_bytes / 2**30:.2f} GiB",
        )
    Console(width=max(120, Console().width)).print(table)
    print(
        "Milliseconds, medians; decode is one token of every row. (x): against the first row. "
        f"Ceilings: {2e-9 * ceilings['float32_macs']:.0f} float32 and "
        f"{2e-9 * ceilings['bfloat16_macs']:.0f} bfloat16 GFLOP/s of a matrix product, "
        f"{1e-9 * ceilings['bytes']:.1f} GB/s read.\n"
        + ", ".join(f"{name} {value}" for name, value in machine.items())
    )


_BENCHED = ("none", "prumerge", "prumerge_plus", "vtw")


def _method_with_options(text: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    return {"method": _method(name), **_options([o for o in options.split(";") if o])}


@app.command()
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
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the Bayesian searches.")] = 0,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the keep rates over depth here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a decoder-side method to a model; interrupted, the same command goes on."""
    import jaxprune
    from jaxprune.calibrate import Settings
    from jaxprune.calibrate import calibrate as run
    from jaxprune.reports.recipe_plot import figure, plot_recipe

    settings: dict[str, Any] = {
        "method": method, "save": save, "keep_rate": keep_rate, "tolerance": tolerance,
        "metric": metric, "search": search, "evaluations": evaluations,
        "first_pruned_layer": first_pruned_layer, "queries": queries, "stage2": stage2,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    Settings(**settings)  # a mistake shows before anything is loaded
    _refuse_existing(out)
    if plot is not None:
        _refuse_existing(plot)
        figure()
    params = jaxprune.load(model, dtype=dtype, vision_tower=vision_tower)
    progress = out.with_name(out.name + ".progress")

    def stop(*_: Any) -> None:
        # At once: an exception may be swallowed by JAX's callbacks, and taking a runtime down
        # in the middle of a program may crash. Every finished evaluation is on disk.
        progress.with_name(f".{progress.name}.partial").unlink(missing_ok=True)
        _stderr.print("Interrupted; the same command goes on where it was.")
        sys.stderr.flush()
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        recipe = run(params, data, progress_file=progress, **settings)
    finally:
        signal.signal(signal.SIGINT, before)
    jaxprune.save_recipe(recipe, out)
    if plot is not None:
        plot_recipe(recipe, params.config, plot)
    if as_json:
        print(json.dumps(dataclasses.asdict(recipe)))
        return
    reached = ", ".join(f"{name} {value:.4g}" for name, value in recipe.reached.items())
    print(
        f"{out}: {recipe.method}, {recipe.calibration['samples']} samples, "
        f"{recipe.calibration['seconds']:.1f} s. Reached: {reached}."
    )


def _refuse_existing(path: pathlib.Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists; name a file that does not, nothing is overwritten.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no directory; make it first.")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the pruning methods with paper, family and options."""
    from jaxprune.methods import METHODS, describe

    rows = [describe(cls) for cls in METHODS.values()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "family", "what it does", "options", "paper")
    for row in rows:
        table.add_row(
            row["name"], row["family"], row["summary"], ", ".join(row["options"]), row["paper"]
        )
    Console(width=max(120, Console().width)).print(table)


@app.command()
def convert(
    source: Annotated[pathlib.Path, typer.Argument(help="A model directory of any spelling.")],
    destination: Annotated[pathlib.Path, typer.Argument(help="A directory to be made.")],
    dtype: Annotated[str | None, typer.Option(help="Cast to this; else keep.")] = None,
    format: Annotated[
        str, typer.Option(help="hf: what transformers loads. jaxprune: this library's layout.")
    ] = "hf",
    vision_tower: TowerOption = None,
    verify: Annotated[bool, typer.Option(help="Read back and compare bit by bit.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a checkpoint as one clean directory, and check it."""
    from jaxprune import checkpoints_convert

    report = checkpoints_convert.convert(
        source,
        destination,
        dtype=dtype,
        format=format,
        verify=verify,
        vision_tower=vision_tower,
    )
    if as_json:
        print(json.dumps({"destination": str(destination), **dataclasses.asdict(report)}))
        return
    checked = f"{report.verified} read back and equal" if verify else "not read back"
    print(f"{destination}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB, {checked}.")


def main() -> None:
    """Entry point: run a command, turning a user's mistake into one line and exit code 2."""
    try:
        app()
    except UserError as error:
        _stderr.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _stderr.print("Interrupted.")
        sys.exit(130)


if __name__ == "__main__":
    main()
