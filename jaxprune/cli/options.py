"""Options that several commands share, and what is read from their text."""

import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from jaxprune.errors import UserError
from jaxprune.methods.written import parse_option

NO_VALUE = " "  # what --help shows beside a flag, instead of its type

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Model directory; without it, the small model that ships."),
]
TowerOption = Annotated[
    pathlib.Path | None,
    typer.Option("--vision-tower", help="The CLIP tower's directory, for original-format models."),
]
TextTowerOption = Annotated[
    pathlib.Path | None,
    typer.Option("--text-tower", help="cdpruner: the CLIP's directory that has the text tower."),
]
AdapterOption = Annotated[
    pathlib.Path | None,
    typer.Option("--adapter", help="A LoRA adapter's directory, to be merged into the model."),
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download",
        metavar=NO_VALUE,
        help="Fetch a model owner/name that is not in the Hub's cache.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16, or int8 (weights).")
]
MethodOption = Annotated[
    str,
    typer.Option(help="Pruning method, a recipe's path, or a pair with a comma between."),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="A method, with its options after a colon and semicolons between them, e.g. "
        "prumerge_plus:keep=64;order=raster; keep=64,32 is two. Repeat it to compare several; the "
        "first is what the others are compared with.",
    ),
]
COMPARED = ("none", "prumerge", "prumerge_plus", "vtw")  # where none is named
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
JsonOption = Annotated[
    bool, typer.Option("--json", metavar=NO_VALUE, help="Print one JSON object.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """The text of --image-size: width and height."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not width.isdecimal() or not height.isdecimal() or not int(width) * int(height):
        raise UserError(f"--image-size is {text!r}; expected pixels, e.g. 672x672.")
    return int(width), int(height)


def method_options(
    extra: Sequence[str] | None,
    function: Callable[..., Any] | None = None,
    **named: float | None,
) -> dict[str, Any]:
    """A method's options.

    Args:
        extra: the texts of --option, name=value; values are read as JSON where they are.
        function: what the command passes them to; its parameters are none of a method's.
        **named: those that the command has an option of its own for.

    Raises:
        UserError: for a text without a value, or the name of what a method does not decide.
    """
    options: dict[str, Any] = dict(named)
    taken = _taken(function) if extra else frozenset()
    for text in extra or ():
        name, value = parse_option(text)
        if name in taken:
            raise UserError(
                f"--option sets options of a method, and {name} is none; see `jaxprune methods` "
                "for those, and --help for the command's own."
            )
        options[name] = value
    return options


def _taken(function: Callable[..., Any] | None) -> frozenset[str]:
    """Names of parameters that stand beside a method's options, in `function` and `generate`."""
    import jaxprune

    # `generate` hands its seed on to the method "random", which has an option of that name.
    of_methods = {name for cls in jaxprune.METHODS.values() for name in _parameters(cls)}
    taken = _parameters(jaxprune.generate) - of_methods
    return taken if function is None else taken | _parameters(function)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
