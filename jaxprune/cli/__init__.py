"""The command line: `jaxprune generate | show | cost | bench | calibrate | methods | convert`.

    options.py    options that several commands share, and what is read from their text
    output.py     stdout, stderr and new files

Every other file is a command: it reads its options, calls a function of the library and
prints. The result alone goes to stdout; progress, notes and errors go to stderr. A user's
mistake ends with exit code 2 and no traceback.
"""

import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from jaxprune.cli.bench import bench
from jaxprune.cli.calibrate import calibrate
from jaxprune.cli.convert import convert
from jaxprune.cli.cost import cost
from jaxprune.cli.generate import generate
from jaxprune.cli.methods import methods
from jaxprune.cli.output import note, stderr
from jaxprune.cli.show import show
from jaxprune.errors import UserError

app = typer.Typer(
    help="Run LLaVA-family models in JAX, faster by pruning visual tokens.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (generate, show, cost, bench, calibrate, methods, convert):
    app.command()(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, turning a user's mistake into one line and exit code 2.

    Args:
        argv: the command and its options; None for those of the process.

    Raises:
        SystemExit: at the end, with the exit code.
    """
    try:
        app(argv)
    except UserError as error:
        stderr.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        note("Interrupted.")
        sys.exit(130)
