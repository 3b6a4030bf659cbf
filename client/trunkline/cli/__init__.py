"""The command line. Loads nothing of the worker: its commands join through an entry point."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from trunkline.cli.app import app

    app(prog_name="trunkline")
