"""`jaxprune methods`."""

import json

from rich.table import Table

from jaxprune.cli.options import JsonOption
from jaxprune.cli.output import print_wide
from jaxprune.methods import METHODS, describe


def methods(as_json: JsonOption = False) -> None:
    """List the pruning methods with paper, family and options."""
    rows = [describe(cls) for cls in METHODS.values()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "family", "what it does", "options", "paper")
    for row in rows:
        table.add_row(
            row["name"], row["family"], row["summary"], ", ".join(row["options"]), row["paper"]
        )
    print_wide(table)
