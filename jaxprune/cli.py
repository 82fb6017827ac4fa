"""The command line: `jaxprune generate | methods | convert`.

The result alone goes to stdout; progress, notes and errors go to stderr. A user's mistake
ends with exit code 2 and no traceback.
"""

import dataclasses
import json
import pathlib
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
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="An image file; repeat it for several images in one prompt."),
    ] = None,
    model: ModelOption = None,
    method: Annotated[str, typer.Option(help="Pruning method; see `jaxprune methods`.")] = "none",
    keep: Annotated[int | None, typer.Option(help="Visual tokens to keep of each image.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest p.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about an image."""
    import jaxprune  # JAX takes a second to import, and --help should not

    images = list(image or [])
    params = jaxprune.load(model, dtype=dtype)
    answers: Any = jaxprune.generate(
        params,
        [images] if images else None,
        [prompt],
        method=method,
        keep=keep,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        chat=not raw,
        return_details=True,
    )
    answer = answers[0]
    if not as_json:
        print(answer.text)
        return
    fields = dataclasses.asdict(answer)
    fields["kept_indices"] = [kept.tolist() for kept in answer.kept_indices]
    fields["seconds"] = {stage: round(value, 6) for stage, value in answer.seconds.items()}
    print(json.dumps({"method": method, **fields}))


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
    Console().print(table)


@app.command()
def convert(
    source: Annotated[pathlib.Path, typer.Argument(help="A model directory of any spelling.")],
    destination: Annotated[pathlib.Path, typer.Argument(help="A directory to be made.")],
    dtype: Annotated[str | None, typer.Option(help="Cast to this; else keep.")] = None,
    format: Annotated[
        str, typer.Option(help="hf: what transformers loads. jaxprune: this library's layout.")
    ] = "hf",
    vision_tower: Annotated[
        pathlib.Path | None,
        typer.Option(help="The CLIP tower's directory, for original-format checkpoints."),
    ] = None,
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
