"""Every error gossamer raises on purpose.

GossamerError                      one line: what, where, the fix
+-- UsageError (ValueError)        bad input; the command line exits with 2
|   +-- SourceError                a model, weights or data specification cannot be used
|   +-- WeightsError               a state dict does not fit the network
|   +-- RecipeError                a recipe or budget is not valid
|   +-- PlanError                  a plan does not fit the network it is applied to
|   +-- SelectorError              a pattern matched nothing (near names are listed)
|   +-- RunFolderError             a run folder is missing, occupied, unwritable or incomplete
+-- NothingToDo (ValueError)       a step would change nothing: a no-op is an error; exits with 2
+-- TraceError (ValueError)        the network's forward pass fails on the example inputs; exits with 2
+-- ExportError (RuntimeError)     the network cannot be exported, or the file does not agree with it; exits with 1
+-- ProofError (RuntimeError)      a transformed network computes something else than its plan says; exits with 1
+-- BudgetError (RuntimeError)     the budget cannot be met; says the best that can; exits with 1
+-- PeerLost (RuntimeError)        another process of a parallel training died or does not answer; exits with 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GossamerError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 2


class UsageError(GossamerError, ValueError):
    """Bad input of any kind."""


class SourceError(UsageError):
    """A model, weights or data specification that cannot be used."""


class WeightsError(UsageError):
    """A state dict that does not fit the network."""


class RecipeError(UsageError):
    """A recipe or a budget that is not valid."""


class PlanError(UsageError):
    """A plan that does not fit the network it is applied to."""


class SelectorError(UsageError):
    """A selector that matches nothing."""


class RunFolderError(UsageError):
    """A run folder that is missing, occupied, unwritable or incomplete."""


class NothingToDo(GossamerError, ValueError):
    """A step that would change nothing."""


class TraceError(GossamerError, ValueError):
    """A network whose forward pass fails on the example inputs."""


class ExportError(GossamerError, RuntimeError):
    """A network that cannot be exported, or a file that does not agree with it."""

    exit_code = 1


class ProofError(GossamerError, RuntimeError):
    """A transformed network that computes something else than its plan says."""

    exit_code = 1


class BudgetError(GossamerError, RuntimeError):
    """A budget that cannot be met."""

    exit_code = 1


class PeerLost(GossamerError, RuntimeError):
    """Another process of a parallel training that died or does not answer."""

    exit_code = 1


def near(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Near names as the tail of an error message: ``"; did you mean 'conv1' or 'conv2'?"``, or ``""``.

    Examples:
        >>> near("mobilnet", ["mobilenet", "resnet"])
        "; did you mean 'mobilenet'?"
    """
    hits = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(h) for h in hits)}?" if hits else ""
