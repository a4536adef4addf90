"""Specifications as text: ``name?option=value&...``, and ``package.module:factory`` or ``path/file.py:factory``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.errors import GossamerError, SourceError, near


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Take the options off a name; numbers and true/false are read as such.

    Examples:
        >>> parse_options("mobilenet_v2?width_mult=0.5&small=true")
        ('mobilenet_v2', {'width_mult': 0.5, 'small': True})

    Args:
        text: ``NAME`` or ``NAME?KEY=VALUE&KEY=VALUE``.

    Returns:
        The name and the options.

    Raises:
        SourceError: an option without a value.
    """
    name, question, tail = text.partition("?")
    options: dict[str, Any] = {}
    for item in tail.split("&") if question else ():
        key, equals, value = item.partition("=")
        if not key or not equals or not value:
            raise SourceError(f"{text!r}: cannot read option {item!r}; write NAME?KEY=VALUE&KEY=VALUE")
        options[key] = _value(value)
    return name, options


def format_options(name: str, options: dict[str, Any]) -> str:
    """The inverse of `parse_options`.

    Examples:
        >>> format_options("resnet8", {"width": 8, "small": True})
        'resnet8?width=8&small=true'
    """
    items = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items()]
    return name + ("?" + "&".join(items) if items else "")


def call_factory(spec: str, **options: Any) -> Any:
    """Import and call what ``package.module:factory`` or ``path/file.py:factory`` names.

    Examples:
        >>> call_factory("torch.nn:Linear", in_features=2, out_features=1)
        Linear(in_features=2, out_features=1, bias=True)

    Args:
        spec: module or file, a colon, and the name of a callable in it. Modules are also looked for in the current folder.
        **options: passed to the callable.

    Returns:
        What the callable returns.

    Raises:
        SourceError: there is no such module, file or callable (near names are listed), or it fails.
    """
    home, _, name = spec.rpartition(":")
    if not home or not name:
        raise SourceError(f"{spec!r} is not a specification: write package.module:factory or path/file.py:factory")
    module = _module_of_file(Path(home), spec) if home.endswith(".py") else _module(home, spec)
    factory = getattr(module, name, None)
    if factory is None or not callable(factory):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        problem = "is not callable" if hasattr(module, name) else "does not exist"
        raise SourceError(f"{spec}: {name!r} {problem} in {home}{near(name, known)}")
    try:
        return factory(**options)
    except GossamerError:
        raise
    except Exception as e:
        raise SourceError(f"{spec}: the factory failed with {type(e).__name__}: {_one_line(e)}") from e


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300]


@contextmanager
def _search(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported inside this block."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _module(name: str, spec: str) -> ModuleType:
    try:
        with _search(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(e.name + ".")):
            hint = near(name, ["torchvision", "timm", "gossamer"]) or "; write package.module:factory or path/file.py:factory"
            raise SourceError(f"{spec}: there is no module {e.name!r}{hint}") from None
        raise SourceError(f"{spec}: importing {name} failed: {_one_line(e)}") from e
    except Exception as e:
        raise SourceError(f"{spec}: importing {name} failed with {type(e).__name__}: {_one_line(e)}") from e


def _module_of_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise SourceError(f"{spec}: there is no file {path}{near(str(path), siblings)}")
    resolved = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, resolved)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        with _search(resolved.parent):
            found.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise SourceError(f"{spec}: {path} failed with {type(e).__name__}: {_one_line(e)}") from e
    return module
