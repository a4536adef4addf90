"""The command line: thin commands over the public API. `main` is the entry point."""

from gossamer.cli._main import main

__all__ = ["main"]
