"""The command line: `jaxprune generate`, `show`, `cost`, `bench`, `evaluate` and the others below.

    options.py    options that several commands share, and what is read from their text
    output.py     stdout, stderr and new files
    interrupt.py  what Ctrl-C does

Every other file is a command: it reads its options, calls a function of the library and
prints. The result alone goes to stdout; progress, notes and errors go to stderr. A user's
mistake ends with exit code 2 and no traceback.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from jaxprune.cli.bench import bench
from jaxprune.cli.calibrate import calibrate
from jaxprune.cli.compile import compile
from jaxprune.cli.convert import convert
from jaxprune.cli.cost import cost
from jaxprune.cli.evaluate import evaluate
from jaxprune.cli.generate import generate
from jaxprune.cli.interrupt import ending_at_once
from jaxprune.cli.methods import methods
from jaxprune.cli.options import NO_VALUE
from jaxprune.cli.output import note, stderr
from jaxprune.cli.show import show
from jaxprune.cli.train import train
from jaxprune.errors import UserError, UserNote
from jaxprune.version import __version__

app = typer.Typer(
    help="Run LLaVA-family models in JAX, faster by pruning visual tokens.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"jaxprune {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=NO_VALUE,
            callback=_version,
            is_eager=True,
            help="Print it and exit.",
        ),
    ] = False,
) -> None:
    del version


_COMMANDS = (generate, show, cost, bench, evaluate, compile, calibrate, train, methods, convert)
for _command in _COMMANDS:
    app.command()(_command)


def _noted(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """What a user may want to know as a line on stderr; other warnings are for programmers."""
    if issubclass(category, UserNote):
        note(f"Note: {message}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, turning a user's mistake into one line and exit code 2.

    Args:
        argv: the command and its options; None for those of the process.

    Raises:
        SystemExit: at the end, with the exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may have what its encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with ending_at_once(for_good=argv is None), warnings.catch_warnings():
            warnings.showwarning = _noted  # type: ignore[assignment]
            app(argv)
    except UserError as error:
        stderr.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:  # who reads stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
