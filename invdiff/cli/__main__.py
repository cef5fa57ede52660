"""``python -m invdiff.cli``: the command line without its script."""

from invdiff.cli import main

main()
