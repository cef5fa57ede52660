"""The command line: one module per command, and one place where errors become sentences."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point of ``invdiff``."""
    from invdiff.cli.app import app

    app(prog_name="invdiff")
