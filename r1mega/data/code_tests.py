"""Tests of programming problems: the columns of published sets, and one form of them. In: a record's values; out: plain values.

The form, which a problem's ``metadata`` holds, is APPS's and TACO's::

    {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}                       standard input and output
    {"inputs": [[1, 2], ...], "outputs": [3, ...], "fn_name": "add"}            arguments and results of a function

Read as well: the same as a JSON text in ``input_output`` (APPS, TACO), ``tests``, ``test_cases`` or ``reward_model.ground_truth``
(verl's kin); ``public_tests``, ``private_tests`` and ``generated_tests`` of ``{"input": [...], "output": [...]}`` (CodeContests);
lists of ``{"input": ..., "output": ...}`` as object or JSON text (LiveCodeBench's ``public_test_cases``, where the function's name
is in ``metadata.func_name`` and arguments stand one JSON value a line).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

COLUMNS = ("input_output", "tests", "test_cases", "public_tests", "private_tests", "generated_tests", "public_test_cases")
INNER = ("ground_truth",)
"""Columns of the object ``reward_model``."""


def find_tests(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tests of a record in the form of this module; None where it has none."""
    found: dict[str, Any] = {"inputs": [], "outputs": []}
    inner = record.get("reward_model")
    cells = [record] if "inputs" in record and "outputs" in record else []
    cells += [record.get(name) for name in COLUMNS]
    cells += [inner.get(name) for name in INNER] if isinstance(inner, dict) else []
    for cell in cells:
        for inputs, outputs, name in _tests(cell):
            found["inputs"] += inputs
            found["outputs"] += outputs
            if name:
                found["fn_name"] = name
    extra = _decoded(record.get("metadata"))
    if isinstance(extra, dict) and isinstance(extra.get("func_name"), str) and "fn_name" not in found:
        found["fn_name"] = extra["func_name"]
        found["inputs"] = [_lines_of_json(each) for each in found["inputs"]]
        found["outputs"] = [_value(each) for each in found["outputs"]]
    return found if found["inputs"] else None


def read_tests(metadata: dict[str, Any]) -> tuple[list[Any], list[Any], str | None]:
    """(inputs, outputs, function's name or None for standard input and output) of a problem's metadata.

    Texts for standard input and output, an argument list and a result for a function. Raises ValueError for what is no such tests.
    """
    if "inputs" not in metadata:
        metadata = find_tests(metadata) or {}
    inputs, outputs, name = metadata.get("inputs"), metadata.get("outputs"), metadata.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError("metadata has inputs and outputs of one length, at least one")
    if name is None:
        return [_text(each) for each in inputs], [_text(each) for each in outputs], None
    if not isinstance(name, str) or not name.rpartition(".")[2].isidentifier():
        raise ValueError(f"fn_name is a function's name; got {name!r}")
    if not all(isinstance(each, list) for each in inputs):
        raise ValueError("inputs of a function are argument lists")
    return inputs, outputs, name.rpartition(".")[2]


def _tests(cell: Any) -> Iterator[tuple[list, list, str | None]]:
    """(inputs, outputs, function's name) of one column."""
    cell = _decoded(cell)
    if isinstance(cell, dict):
        inputs = cell.get("inputs", cell.get("input"))
        outputs = cell.get("outputs", cell.get("output"))
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            yield inputs, outputs, cell.get("fn_name")
    elif isinstance(cell, list) and all(isinstance(each, dict) and "input" in each and "output" in each for each in cell):
        yield [each["input"] for each in cell], [each["output"] for each in cell], None


def _decoded(cell: Any) -> Any:
    """What a JSON text that is an object or a list says; anything else as it is."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _lines_of_json(text: Any) -> Any:
    return [_value(line) for line in text.splitlines() if line.strip()] if isinstance(text, str) else text


def _value(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _text(value: Any) -> str:
    """Standard input or output: a text, or a list of lines as some sets have it."""
    if isinstance(value, list):
        return "\n".join(str(line) for line in value)
    return str(value)
