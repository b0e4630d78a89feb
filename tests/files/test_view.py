"""A command's config with local paths: every path knob, inputs and outputs, errors and results in the user's spelling."""

from __future__ import annotations

import dataclasses
import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from r1mega import api
from r1mega.config.compose import composition
from r1mega.config.errors import UserError
from r1mega.config.knob import knob
from r1mega.config.schema import SCHEMAS
from r1mega.files import View, hub, published, remote, view


def config(command: str, *overrides: str):
    return composition(command, map(remote.quoted, overrides)).config


def put(memory, **files: str) -> None:
    for name, text in files.items():
        memory.pipe_file("/" + name.replace("__", "/").replace("_dot_", "."), text.encode())


def test_a_config_without_urls_stays_as_it_is(cache: Path) -> None:
    given = config("prepare", "text=[stdlib,x.txt]", "problems.a.path=p.jsonl")
    seen = View(given)
    assert seen.config is given and seen.env == {} and seen.finish({"a": 1}) == {"a": 1} and not list(cache.iterdir())


def test_every_input_knob_takes_a_url(memory) -> None:
    put(
        memory,
        b__a_dot_txt="a",
        b__p_dot_jsonl="p",
        b__tok__tokenizer_dot_json="{}",
        b__t_dot_json="j",
        b__t_dot_bin="b",
        r__manifest_dot_json="{}",
    )
    seen = View(config(
        "prepare", "text=[stdlib,memory://b/a.txt]", "problems={m: {kind: file, path: memory://b/p.jsonl}}", "tokenizer.path=memory://b/tok",
        "sft_from=memory://b/p.jsonl",
    )).config  # fmt: skip
    assert seen.text[0] == "stdlib" and Path(seen.text[1]).read_text() == "a" and Path(seen.problems["m"].path).read_text() == "p"
    assert Path(seen.tokenizer.path, "tokenizer.json").is_file() and seen.sft_from == seen.problems["m"].path
    seen = View(
        config(
            "pretrain", "data.train={memory://b/t: 2, local: 1}", "init=memory://r", "tokenizer=memory://b/tok", "trainer.steps=1"
        )
    ).config
    (name, weight), other = seen.data.train.items()
    assert (
        Path(f"{name}.bin").read_text() == "b"
        and weight == 2
        and other == ("local", 1)
        and Path(seen.init, "manifest.json").is_file()
    )


def test_knobs_that_nobody_thought_of_take_a_url(memory) -> None:
    @dataclass(frozen=True)
    class Choice:
        """A registered choice of somebody's own."""

        lexicon: str = knob("memory://b/words.txt", "words", "path")

    @dataclass
    class Config:
        """A command's config with a choice in it."""

        engine: Choice = knob(Choice, "who generates", "choice")
        extra: dict = knob({"memory://b/words.txt": 0.5}, "more", "path: 1")

    put(memory, b__words_dot_txt="w")
    seen = View(Config()).config
    assert Path(seen.engine.lexicon).read_text() == "w" and Path(next(iter(seen.extra))).read_text() == "w"


def test_the_tables_name_knobs_that_exist() -> None:
    every = {field.name for cls in SCHEMAS.values() for field in dataclasses.fields(cls)} | {
        "tokenizer.path",
        "data.train",
        "data.valid",
    }
    assert set(view._KINDS) <= every and set(view.WRITTEN) <= every


def test_faults_come_together_a_line_each(memory) -> None:
    with pytest.raises(UserError) as caught:
        View(config("prepare", "text=[memory://b/none.txt,hf:gsm8k]", "problems.m.path=s4://b/x", "out=hf:o/n"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["out", "text", "text", "problems.m.path"]
    assert (
        str(caught.value).splitlines()[0]
        == "out: a path or a URL to write to; got hf:o/n; use a path, out=FOLDER, and copy it when it is done"
    )
    with pytest.raises(UserError, match="^out: a recipe's folder is on this machine; got memory://r; use a path, out=FOLDER"):
        View(config("recipe", "recipe=quickstart", "out=memory://r"))


def test_errors_speak_of_the_url(memory) -> None:
    put(memory, b__p_dot_jsonl='{"question": "q"}')
    with pytest.raises(UserError) as caught:
        api.prepare("text=[memory://b/p.jsonl]", "out=memory://b/out")
    assert str(caught.value).startswith("memory://b/p.jsonl line 1: the column text holds text; got columns question; ")


def test_ranks_take_over_what_the_first_process_did(memory, monkeypatch) -> None:
    put(memory, b__a_dot_txt="a")
    given = config("prepare", "text=[memory://b/a.txt]", "out=memory://b/out")
    first = View(given)
    first.begin()
    monkeypatch.setenv(view.VARIABLE, first.env[view.VARIABLE])
    memory.store.clear()  # in another process there is nothing in memory
    second = View(given)
    second.begin()
    assert second.config == first.config and view.VARIABLE not in __import__("os").environ


def test_prepare_to_a_url_and_eval_from_there(memory, cache: Path) -> None:
    put(memory, d__text_dot_txt="What is one and one? It is two. " * 40)
    memory.pipe_file(
        "/d/p.jsonl.gz", gzip.compress(b"".join(b'{"question": "%d + 1", "answer": "%d"}\n' % (n, n + 1) for n in range(20)))
    )
    result = api.prepare(
        "out=memory://d/data", "text=[memory://d/text.txt]", "problems={mine: {kind: file, path: memory://d/p.jsonl.gz, num_train: -1, num_test: 5}}",
        "tokenizer.vocab_size=300", "valid_share=0",
    )  # fmt: skip
    assert result["problems"] == {"train": 15, "valid": 0, "test": 5} and result["text"]["path"] == "memory://d/data/text"
    assert {"text.bin", "text.idx", "text.json", "config.yaml", "tokenizer/tokenizer.json", "problems/test.jsonl"} <= {
        path.removeprefix("/d/data/") for path in memory.find("/d/data")
    }
    saved = yaml.safe_load(memory.cat_file("/d/data/config.yaml"))
    assert saved["config"]["out"] == "memory://d/data" and saved["config"]["text"] == ["memory://d/text.txt"]
    assert str(cache) not in json.dumps(saved)


def test_a_page_of_a_remote_run_lies_beside_it(memory) -> None:
    put(memory, r__metrics_dot_jsonl='{"step": 1, "loss": 2.0}\n', r__checkpoints__big="x")
    result = api.report("run=memory://r")
    page = memory.cat_file("/r/report.html").decode()
    assert result["page"] == "memory://r/report.html" and 'href="metrics.jsonl"' in page
    assert sorted(memory.find("/r")) == ["/r/checkpoints/big", "/r/metrics.jsonl", "/r/report.html"]


def test_published_finds_the_run_of_a_folder(memory, monkeypatch) -> None:
    seen = View(config("pretrain", "out=memory://b/run", "trainer.steps=1"))
    seen.begin()
    folder = Path(seen.config.out, "checkpoints", "step-00000001")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert published(folder) == "" and len(memory.find("/b/run")) == 1, "nobody listens outside the context"
    with seen:
        assert published(folder.parent.parent.parent / "elsewhere") == "" and len(memory.find("/b/run")) == 1
        assert published(folder) == ""
        assert "/b/run/checkpoints/step-00000001/manifest.json" in memory.find("/b/run")
        (folder / "manifest.json").write_text("{} ")
        monkeypatch.setattr(
            type(memory), "put_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert published(folder).startswith(
            "out: what is finished goes to its URL; got memory://b/run (OSError: [Errno 28] No space left"
        )


def test_an_hf_name_is_fetched_by_kind(monkeypatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda text, where, kind: (asked.append((where, text, kind)), (tmp_path / kind, tmp_path))[1])
    View(config("rl", "init=hf:o/m", "data.problems=hf:o/n@v1:main/test", "rl.rollouts=1"))
    View(config("prepare", "text=[hf:o/t]", "tokenizer.path=hf:o/m", "problems.mine.path=hf:o/n"))
    assert sorted(asked) == sorted([
        ("init", "hf:o/m", "checkpoint"), ("data.problems", "hf:o/n@v1:main/test", "data"), ("text", "hf:o/t", "data"),
        ("tokenizer.path", "hf:o/m", "tokenizer"), ("problems.mine.path", "hf:o/n", "data"),
    ])  # fmt: skip


def test_a_run_goes_on_on_another_machine_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    """Machine A is gone in its fourth step; B, from what A sent when it saved, ends with what one machine alone ends with."""
    import torch

    from r1mega.train import fit
    from tests.train.cases import lines, pretrain_config, stored, write_data

    data = write_data(tmp_path / "data")
    whole = pretrain_config(data, tmp_path / "straight", 4, save_every=2, async_save=False)
    whole.data.valid = None
    api.pretrain(whole)
    url = f"file://{tmp_path}/remote/run"

    def gone(optim, now, steps, rate=fit.learning_rate):
        if now == 3:
            raise InterruptedError("the machine is gone")
        return rate(optim, now, steps)

    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "a"))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(fit, "learning_rate", gone)
        api.pretrain(replace(whole, out=url))
    assert [path.name for path in (tmp_path / "remote/run/checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "b"))
    result = api.pretrain(replace(whole, out=url))
    assert (result["checkpoint"], result["steps"]) == (f"{url}/checkpoints/step-00000004", 4)
    sent, straight = tmp_path / "remote" / "run", tmp_path / "straight"
    ours, theirs = (stored(run / "checkpoints/step-00000004") for run in (sent, straight))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)] for run in (sent, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert sorted(path.name for path in (sent / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert yaml.safe_load((sent / "config.yaml").read_text())["config"]["out"] == url
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "c"))
    exported = api.export(f"checkpoint={url}", f"out=file://{tmp_path}/remote/export")
    assert exported["target"] == f"file://{tmp_path}/remote/export/hf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "remote/export/hf").iterdir()
    }
