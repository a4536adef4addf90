"""Entry point: runs a command and turns errors into one line and an exit code."""

from __future__ import annotations

import json
import os
import sys

from gossamer.cli._commands import app
from gossamer.errors import GossamerError


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0 (done), 1 (budget or parity missed) or 2 (usage or bad input)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(arguments, prog_name="gossamer")
    except GossamerError as e:
        message = " ".join(str(e).split())
        if "--json" in arguments:
            print(json.dumps({"error": message, "kind": type(e).__name__}))
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        who = f"gossamer, process {os.environ.get('RANK', '0')} of {processes}" if processes > 1 else "gossamer"
        print(f"{who}: {message}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("gossamer: interrupted; a compress or train run continues with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
