"""What pip is to install for r1mega, as the project file says it, or in an installed package its metadata.

In: nothing. Out: :class:`Requirement` objects of the project itself and of its extras. Imports the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

_FORM = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*([^;]*)(?:;.*\bextra\s*==\s*[\"']([^\"']+)[\"'])?")
_COMPARISONS = {
    ">=": lambda left, right: left >= right,
    "<=": lambda left, right: left <= right,
    "==": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
}


@dataclass(frozen=True)
class Requirement:
    """One package. ``text``: as pip takes it; ``limits``: ``>=5.17,<5.24``; ``extra``: which extra asks for it, "" the project."""

    text: str
    name: str
    limits: str
    extra: str = ""

    def admits(self, version: str) -> bool:
        """Is the release ``version`` within the limits? Its local part (``+cpu``) and marks such as ``rc1`` do not count."""
        given = _release(version)
        for limit in filter(None, self.limits.split(",")):
            sign = re.match(r"[<>=!]=?", limit.strip())
            if sign is None or given is None:
                continue
            bound = _release(limit.strip()[sign.end() :])
            if bound is not None and not _COMPARISONS[sign.group()](*_padded(given, bound)):
                return False
        return True


def is_checkout() -> bool:
    """True where the package lies in its repository, with the Makefile."""
    return (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "Makefile").is_file()


def requirements() -> list[Requirement]:
    """All of them, the project's own first. Empty where neither a project file nor metadata is found."""
    if is_checkout():
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lists = {"": project["dependencies"], **project.get("optional-dependencies", {})}
        return [parse(text, extra) for extra, texts in lists.items() for text in texts]
    try:
        return [parse(text) for text in importlib.metadata.requires("r1mega") or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def parse(text: str, extra: str = "") -> Requirement:
    """``transformers>=5.17,<5.24`` or ``ray>=2; extra == "ray"``."""
    name, options, limits, marked = _FORM.match(text.strip()).groups()
    limits = limits.replace(" ", "").strip("()")
    return Requirement(f"{name}{options or ''}{limits}", name.lower().replace("_", "-"), limits, extra or marked or "")


def _release(version: str) -> tuple[int, ...] | None:
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, found.group(1).split("."))) if found else None


def _padded(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    size = max(len(left), len(right))
    return left + (0,) * (size - len(left)), right + (0,) * (size - len(right))
