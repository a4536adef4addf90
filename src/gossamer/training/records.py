"""log.jsonl: one line of JSON for each epoch, none twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.errors import RunFolderError
from gossamer.run_folder import write_bytes


def size_of(path: str | Path) -> int:
    """Bytes that the log holds; 0 where it does not exist yet."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else 0


def append_record(path: str | Path, record: dict[str, Any]) -> None:
    """Add one line; RunFolderError where the file cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise RunFolderError(f"cannot write {path}: {e.strerror}") from None


def rewrite_records(path: str | Path, start: int | None, records: Sequence[dict[str, Any]]) -> int:
    """Make the log hold what it held before this training began, and one line for each record.

    Args:
        path: the log.
        start: its size before this training began; None: all that is there now is from before.
        records: one for each epoch that is done.

    Returns:
        The size before this training began.
    """
    path = Path(path)
    before = path.read_bytes()[:start] if path.is_file() else b""
    write_bytes(path, before + "".join(json.dumps(r) + "\n" for r in records).encode())
    return len(before)
