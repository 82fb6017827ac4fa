"""`python -m jaxprune.checkpoints_convert SRC DST`: short for `jaxprune convert`."""

import sys

from jaxprune.cli import main

sys.argv.insert(1, "convert")
main()
