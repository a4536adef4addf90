"""The model card: what ships beside the artefact, as Markdown."""

from __future__ import annotations

import re

import yaml

from gossamer.report.html import environment
from gossamer.report.schema import Report, StepReport
from gossamer.report.text import agreement, comparison, in_executorch, stored
from gossamer.report.verdict import verdict


def model_card(report: Report) -> str:
    """README.md of a run folder: figures, how to run the file in ONNX Runtime, how it was made, limits.

    Args:
        report: of a run.

    Returns:
        Markdown; its Python snippet runs as it is in the run folder.
    """
    made = environment()
    made.filters["md"] = plain
    versions = report.environment.get("versions") or {}
    text = made.get_template("card.md.j2").render(
        report=report,
        verdict=verdict(report),
        rows=comparison(report.before, report.after),
        agreement=agreement(report),
        stored=stored(report.storage) if report.storage else "",
        in_executorch=in_executorch(report.executorch) if report.executorch else "",
        options=_options,
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True) if report.recipe else "",
        versions=", ".join(f"{k} {v}" for k, v in versions.items()) or "not recorded",
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table.

    Examples:
        >>> plain("a|b_<i>")
        'a\\\\|b\\\\_&lt;i&gt;'
    """
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(str(text).split()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _options(step: StepReport) -> str:
    return ", ".join(f"{name} {value}" for name, value in step.options.items() if value is not None and value != [])
