"""``python -m invdiff``: the command line without its script, for launchers of processes."""

from invdiff.cli import main

main()
