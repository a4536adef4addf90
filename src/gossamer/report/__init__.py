"""report.json is the truth about a run; the terminal table, report.html and the model card are views of it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from gossamer.errors import RunFolderError
from gossamer.report.card import model_card
from gossamer.report.compare import compare_table
from gossamer.report.html import html_report
from gossamer.report.schema import Report
from gossamer.report.text import benchmark_table, channels_table, profile_table, result_table, run_table
from gossamer.report.verdict import verdict
from gossamer.report.warnings import warnings_for
from gossamer.run_folder import REPORT, read_json, write_text

HTML, CARD = "report.html", "README.md"
"""Names of the views in a run folder."""

__all__ = [
    "CARD",
    "HTML",
    "Report",
    "benchmark_table",
    "channels_table",
    "compare_table",
    "html_report",
    "model_card",
    "profile_table",
    "read",
    "result_table",
    "run_table",
    "verdict",
    "warnings_for",
    "write",
]


def write(report: Report, folder: str | Path) -> Path:
    """Write ``report.html``, ``README.md`` and, last, ``report.json`` into a run folder, each at once or not at all.

    Args:
        report: of a run.
        folder: made where it does not exist.

    Returns:
        The path of ``report.json``.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = Path(folder)
    page, card, data = html_report(report), model_card(report), report.model_dump_json(indent=2) + "\n"
    write_text(folder / HTML, page)
    write_text(folder / CARD, card)
    return write_text(folder / REPORT, data)


def read(folder: str | Path) -> Report:
    """The report of a run folder.

    Args:
        folder: a run folder, or the path of a ``report.json``.

    Returns:
        The `Report`.

    Raises:
        RunFolderError: there is none, or it is not valid.
    """
    path = Path(folder)
    if path.is_dir() or path.suffix != ".json":
        path = path / REPORT
    if not path.is_file():
        unfinished = " (the run is unfinished: compress again with --resume)" if (path.parent / "checkpoints").is_dir() else ""
        raise RunFolderError(f"no {REPORT} in {path.parent}{unfinished}")
    try:
        return Report.model_validate(read_json(path))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunFolderError(f"{path} is not a report of this version of gossamer: {where}: {first['msg']}") from None
