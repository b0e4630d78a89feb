"""The rows of :mod:`tests.e2e.wrong_inputs`, through the function of the command line: one line, status 2, no traceback, no torch.

Rows run one after another in two fresh processes (this file as a script), so that what a call imports is seen. What a row names
lies in one folder, F in its arguments and lines.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import io
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.wrong_inputs import ROWS

HEAVY = ("torch", "transformers", "megatron")
LINE = re.compile(r"[^:]+: .+; got .+; .+")
"""The grammar of errors."""

PROCESSES = 2
ROOT = Path(__file__).resolve().parents[2]


def tokens(path: Path, kind: str = "text") -> None:
    """A token file of 20 documents; 1,220 tokens."""
    from r1mega.data.tokenfile import TokenFileWriter

    with TokenFileWriter(path, vocab_size=512, eos_id=1, tokenizer_hash="0" * 64, kind=kind) as writer:
        for _ in range(20):
            writer.add(list(range(2, 63 if kind == "samples" else 62)), [0] * 30 + [1] * 31 if kind == "samples" else None)


def make(folder: Path) -> None:
    """The files that the rows name."""
    from r1mega.config.compose import preset

    for name in ("text", "cut_bin", "empty_bin", "no_bin", "cut_idx", "half_json", "odd_kind"):
        tokens(folder / name)
    for name in ("samples", "cut_mask"):
        tokens(folder / name, "samples")
    for name, size in (("cut_bin.bin", 10), ("empty_bin.bin", 0), ("cut_idx.idx", 5), ("cut_mask.mask", 7), ("half_json.json", 9)):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
    (folder / "no_bin.bin").unlink()
    (folder / "odd_kind.json").write_text((folder / "odd_kind.json").read_text().replace('"text"', '"pictures"'))
    good = {"question": "What is 1 plus 1?", "answer": "2"}
    model = dataclasses.asdict(preset("model", "tiny"))
    state = json.dumps({"command": "sft", "model": model})
    states = {"checkpoint": state, "half_state": state[:40], "other_version": json.dumps({"model": {**model, "hyper": 1}})}
    states["run/checkpoints/step-00000001"] = json.dumps({"command": "pretrain", "model": {**model, "num_experts": 32}})
    packed = gzip.compress((json.dumps(good) + "\n").encode() * 500)
    stage = "a: {command: prepare, overrides: ['text=[stdlib]']"
    files: dict[str, str | bytes] = {
        "good.jsonl": json.dumps(good),
        "not_json.jsonl": json.dumps(good) + "\n{half",
        "array.jsonl": "[1, 2]",
        "deep.jsonl": "[" * 100_000,
        "latin.jsonl": '{"question": "ä"}'.encode("latin-1"),
        "no_answer.jsonl": json.dumps(good) + "\n" + json.dumps({"question": "And now?"}),
        "no_question.jsonl": json.dumps({"answer": "2"}),
        "ünï cödé.jsonl": json.dumps({"answer": "2"}),
        "empty.jsonl": "",
        "blank.jsonl": "\n \n",
        "cut.jsonl.gz": packed[:-9],
        "plain.jsonl.gz": json.dumps(good),
        "x.parquet.gz": packed,
        "x.parquet": "PAR1",
        "latin.txt": "Käse".encode("latin-1"),
        "words.txt": "words",
        "file": "x",
        "folder/thesis.txt": "all of it",
        "pictures/a.png": b"\x89PNG\xff\xfe",
        "run/metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
        "tok_half/tokenizer.json": "{half",
        "tok_big/tokenizer.json": json.dumps({"model": {"vocab": {f"t{i}": i for i in range(600)}}}),
        "here/with_syntax_fault.py": "def f(:",
        "here/that_raises.py": "raise RuntimeError('boom')",
        "mine/recipe/fine.yaml": f"stages:\n  {stage}}}",
        "mine/recipe/cycle.yaml": "stages:\n  a: {command: prepare, needs: [b]}\n  b: {command: prepare, needs: [a]}",
        "mine/recipe/unknown_need.yaml": "stages:\n  data: {command: prepare}\n  b: {command: pretrain, needs: [dat]}",
        "mine/recipe/unknown_command.yaml": "stages:\n  a: {command: pretrane}",
        "mine/recipe/unknown_place.yaml": f"stages:\n  {stage}}}\n  b: {{command: report, overrides: ['run={{dat}}']}}",
        "mine/recipe/unknown_key.yaml": "stages:\n  a: {comand: prepare}",
        "mine/recipe/no_stages.yaml": "description: x",
        "mine/recipe/as_list.yaml": "stages: [a]",
        "mine/recipe/needs_text.yaml": "stages:\n  a: {command: prepare, needs: b}",
        "mine/recipe/copy_number.yaml": f"stages:\n  {stage}, copy_to: 3}}",
        "mine/recipe/copy_twice.yaml": f"stages:\n  {stage}, copy_to: x}}\n  b: {{command: prepare, copy_to: x}}",
        "mine/recipe/bad_stage.yaml": "stages:\n  a: {command: prepare, overrides: ['txt=[stdlib]']}",
        "mine/recipe/tab.yaml": "stages:\n\ta: 1",
        "mine/model/broken.yaml": "name: [x\n",
        "mine/model/binary.yaml": b"\xff\xfe\x00",
        "mine/model/unknown.yaml": "num_expert: 4",
        "mine/model/typed.yaml": "num_experts: many",
        "mine/model/as_list.yaml": "- 1",
        "mine/model/bad_default.yaml": "defaults: [gone]",
        "mine/reward/odd.yaml": "weights: {acuracy: 1}",
        **{f"{name}/state.json": text for name, text in states.items()},
        **{f"{name}/manifest.json": '{"files": {}}' for name in states},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "nothing_in_it").mkdir()


def called(arguments: list[str]) -> tuple[Any, str]:
    """Exit status, or the text of an exception; stderr."""
    from r1mega import cli

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            status: Any = cli.main(arguments)
        except BaseException:  # noqa: BLE001 - a defect, for the test to show
            status = traceback.format_exc()
    return status, told.getvalue()


def proposals(line: str) -> list[tuple[str, str]]:
    """Keys and values that a line proposes as ``use KEY=VALUE or VALUE, or KEY=VALUE``, ``for example KEY=VALUE``."""
    found = re.search(r"; (?:use|for example) ([a-z_.]+=[^;]+)$", line)
    pairs = [part.strip("'").partition("=") for part in re.split(r", (?:or|and) ", found[1]) if "=" in part] if found else []
    return [(key, value) for key, _, values in pairs for value in re.split(r", | or ", values) if " " not in value]


def unmended(arguments: list[str], text: str, config: Any) -> list[str]:
    """Proposals that leave the fault where it is. ``config``: what was checked, None where it could not be composed."""
    from r1mega import api, registry
    from r1mega.config import paths, rules
    from r1mega.config.errors import UserError

    left = []
    if {"-m", "--cfg", "--help", "--config-dir"} & set(arguments):
        return left
    for line in text.splitlines():
        for key, value in proposals(line):
            try:
                if config is None:
                    api.checked(
                        arguments[0], [*(word for word in arguments[1:] if word.partition("=")[0] != key), f"{key}={value}"]
                    )
                else:  # saves Hydra, which takes most of the time here
                    mended = copy.deepcopy(config)
                    *sections, name = key.split(".")
                    holder = functools.reduce(
                        lambda node, part: node[part] if isinstance(node, dict) else getattr(node, part), sections, mended
                    )
                    assert hasattr(holder, name), key
                    if sections and sections[-1] in registry.KINDS:  # a choice is frozen
                        setattr(mended, sections[-1], dataclasses.replace(holder, **{name: yaml.safe_load(value)}))
                    else:
                        setattr(holder, name, registry.lookup(key, value)() if key in registry.KINDS else yaml.safe_load(value))
                    rules.check(mended)
                    paths.check_paths(mended)
            except UserError as error:
                if any(other.partition(";")[0] == line.partition(";")[0] for other in str(error).splitlines()):
                    left.append(f"{key}={value}: {error}")
    return left


def serve(folder: Path, part: int) -> None:
    """This process's rows, those last that need torch; prints what came of each."""
    from r1mega.config import rules

    gc.set_threshold(200_000, 50, 50)  # Hydra copies much and keeps nothing
    make(folder)
    os.chdir(folder / "here")
    seen: list[Any] = []
    check = rules.check
    rules.check = lambda config: [seen.append(config), check(config)]
    came: dict[int, Any] = {}
    for index, one in sorted([*enumerate(ROWS)][part::PROCESSES], key=lambda item: item[1].heavy):
        arguments, given = one.arguments(str(folder)), dict(os.environ)
        os.environ.update({name: re.sub(r"^F(?=/)", lambda _: str(folder), value) for name, value in one.env.items()})
        seen.clear()
        status, text = called(arguments)
        heavy = [name for name in HEAVY if name in sys.modules]
        left = [] if one.heavy else unmended(arguments, text, seen[0] if seen else None)
        os.environ.clear()
        os.environ.update(given)
        came[index] = [status, text.replace(str(folder), "F"), heavy, left]
    print(json.dumps(came))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NO_SUCH")
    env = {name: value for name, value in os.environ.items() if name not in ranks} | {"PYTHONPATH": str(ROOT)}
    found: dict[str, Any] = {}
    started = []
    for part in range(PROCESSES):
        command = [sys.executable, "-m", "tests.e2e.test_wrong_inputs", str(tmp_path_factory.mktemp("wrong")), str(part)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT))
    for process in started:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        found |= json.loads(out)
    return found


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[one.lines.partition(";")[0][:60] for one in ROWS])
def test_a_wrong_input_is_answered_by_one_line(answers: dict[str, Any], index: int) -> None:
    one = ROWS[index]
    status, text, heavy, left = answers[str(index)]
    assert status == 2, status
    assert "Traceback" not in text and all(LINE.fullmatch(line) or "://" in line for line in text.splitlines()), text
    assert re.fullmatch(re.escape(one.lines).replace(r"\.\.\.", ".*").replace("\\\n", "\n"), text.removesuffix("\n")), text
    assert one.heavy or not heavy, "told before torch is imported"
    assert not left, "what the line proposes mends it"


def test_there_are_many_and_of_every_command() -> None:
    from r1mega.api import COMMANDS

    assert len({(one.words, one.extra, tuple(one.env.items())) for one in ROWS}) == len(ROWS) >= 60
    assert {word for one in ROWS for word in one.words.split()} >= {*COMMANDS, "-m"}
    assert sum(len(proposals(line)) for one in ROWS for line in one.lines.splitlines()) >= 50


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
