"""`python -m jaxprune`: the command line."""

from jaxprune.cli import main

main()
