"""``hf:`` names: the grammar, configs and splits, and the hub library's answers, with its two functions served from a folder.

Offline behaviour is the library's own: a cache laid out by hand, and its switch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from r1mega.config.errors import UserError
from r1mega.files import hub
from r1mega.files.hub import HubName, choose, layout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:o/n", HubName("o/n")),
        ("hf:o/n@v1.0", HubName("o/n", "v1.0")),
        ("hf:o/n:test", HubName("o/n", None, "test")),
        ("hf:open-r1/X.y_z@refs/convert/parquet:main/train", HubName("open-r1/X.y_z", "refs/convert/parquet", "main/train")),
        ("hf:o/n:data/x.jsonl.gz", HubName("o/n", None, "data/x.jsonl.gz")),
    ],
)
def test_the_grammar(text: str, expected: HubName) -> None:
    assert hub.is_hub(text) and hub.parse(text, "k") == expected and str(expected) == text


@pytest.mark.parametrize("text", ["hf:gsm8k", "hf:", "hf:o/n/m", "hf:o/n@", "hf:o/n:", "hf:o n/m", "hf:o/n:a:b", "hf:/n", "hf:é/n"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UserError, match=r"^text: hf:OWNER/NAME\[@REVISION\]\[:CONFIG/SPLIT\]; got .*; write text=hf:OWNER/NAME$"):
        hub.parse(text, "text")
    assert not hub.is_hub("hf://datasets/o/n") and not hub.is_hub("hfo/n")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl", "README.md", "x.py"], {"default": {"train": ["train.jsonl"], "test": ["test.jsonl"]}}),
        (
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/odd_part-00000-of-00001.parquet"],
            {"default": {"train": [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)], "odd_part": ["data/odd_part-00000-of-00001.parquet"]}},
        ),
        (
            ["main/train-00000-of-00001-a1b2.parquet", "main/dev-00000-of-00001.parquet", "socratic/eval.jsonl.gz"],
            {
                "main": {"train": ["main/train-00000-of-00001-a1b2.parquet"], "validation": ["main/dev-00000-of-00001.parquet"]},
                "socratic": {"test": ["socratic/eval.jsonl.gz"]},
            },
        ),
        (["en/train/0000.parquet", "en/train/0001.parquet"], {"en": {"train": ["en/train/0000.parquet", "en/train/0001.parquet"]}}),
        (["gsm8k_train.jsonl", "my-test-set.jsonl"], {"default": {"train": ["gsm8k_train.jsonl"], "test": ["my-test-set.jsonl"]}}),
        (["problems.jsonl"], {"default": {"train": ["problems.jsonl"]}}),
        (["book.txt", "LICENSE", "README.md"], {"default": {"train": ["book.txt"]}}),
        (["a.csv", "script.py"], {}),
    ],
)  # fmt: skip
def test_configs_and_splits_by_names(names: list[str], expected: dict) -> None:
    assert {c: {s: sorted(f) for s, f in splits.items()} for c, splits in layout(names, {}).items()} == expected


def test_configs_and_splits_by_the_card() -> None:
    names = ["a/one.parquet", "a/deep/two.parquet", "b/train.jsonl", "b/test.jsonl", "c.jsonl", "unlisted.jsonl"]
    card = {
        "configs": [
            {
                "config_name": "first",
                "data_files": [{"split": "train", "path": "a/*.parquet"}, {"split": "hard", "path": ["a/**/t?o.parquet"]}],
            },
            {"config_name": "second", "data_dir": "b"},
            {"config_name": "third", "data_files": "./c.jsonl"},
            {"config_name": "nothing", "data_files": "gone-*"},
            "broken",
        ]
    }
    assert layout(names, card) == {
        "first": {"train": ["a/one.parquet"], "hard": ["a/deep/two.parquet"]},
        "second": {"test": ["b/test.jsonl"], "train": ["b/train.jsonl"]},
        "third": {"train": ["c.jsonl"]},
    }
    assert layout(["train.jsonl"], {"configs": None}) == {"default": {"train": ["train.jsonl"]}}


FOUND = {"main": {"train": ["m/t"], "test": ["m/e"]}, "socratic": {"train": ["s/t"]}}


@pytest.mark.parametrize(
    ("found", "part", "files"),
    [
        (FOUND, "main", ["m/t"]),
        (FOUND, "main/test", ["m/e"]),
        (FOUND, "main/eval", ["m/e"]),
        ({"main": FOUND["main"]}, None, ["m/t"]),
        ({"main": FOUND["main"]}, "test", ["m/e"]),
        ({"default": {"hard": ["h"]}}, None, ["h"]),
        ({"default": {"train": ["d"]}, **FOUND}, None, ["d"]),
        ({"default": {"train": ["d"]}, **FOUND}, "train", ["d"]),
    ],
)
def test_which_files_a_part_names(found: dict, part: str | None, files: list[str]) -> None:
    assert choose(found, part, "k", HubName("o/n", None, part)) == files


@pytest.mark.parametrize(
    ("found", "part", "says"),
    [
        (FOUND, None, "k: one config of a data set; got hf:o/n, whose configs are main or socratic; use hf:o/n:main/train"),
        (FOUND, "mian/test", "k: one config of a data set; got 'mian/test' of hf:o/n, whose configs are main or socratic; did you mean main/test? use hf:o/n:main/train"),
        (FOUND, "main/tset", "k: one split of a data set; got hf:o/n:main/tset with test, train; did you mean main/test? use hf:o/n:main/train"),
        ({"default": {"a": ["a"], "b": ["b"]}}, None, "k: one split of a data set; got hf:o/n with a, b; use hf:o/n:a"),
        (
            {"default": {"train": ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"]}}, None,
            "k: all files of a split; got 2 of 3 files of hf:o/n; fetch it once with the network (HF_HUB_OFFLINE=0)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(found: dict, part: str | None, says: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(found, part, "k", HubName("o/n", None, part))
    assert str(caught.value) == says


@pytest.fixture
def served(tmp_path: Path, monkeypatch):
    """A hub of one folder, repositories below it by type; files are copied as asked for. Gives the folder and what was asked."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def repo_info(self, repo_id, *, repo_type, revision):
        folder = tmp_path / "hub" / repo_type / repo_id
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns, local_files_only=False):
        asked.append((f"{repo_id}@{revision}", tuple(allow_patterns)))
        folder, copy = tmp_path / "hub" / repo_type / repo_id, tmp_path / "copy" / repo_type / repo_id
        for name in allow_patterns:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, copy / name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def put(repo_type: str, repo: str, **files: str) -> None:
        for name, text in files.items():
            path = tmp_path / "hub" / repo_type / repo / name.replace("__", "/").replace("_dot_", ".").replace("_dash_", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return SimpleNamespace(put=put, asked=asked)


def test_a_data_set(served) -> None:
    served.put("dataset", "o/n", README_dot_md="---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: 'm/*'}\n---\n# n\n",
               m__b_dot_jsonl="b", m__a_dot_jsonl="a", other_dot_jsonl="o")  # fmt: skip
    path, root = hub.fetch("hf:o/n@v2", "text", "data")
    assert path.name == "n" and [file.read_text() for file in sorted(path.iterdir())] == ["a", "b"]
    assert served.asked == [("o/n@v2", ("README.md",)), ("o/n@v2", ("m/a.jsonl", "m/b.jsonl"))]
    again, _ = hub.fetch("hf:o/n@v2", "text", "data")
    assert again == path and len(list(path.iterdir())) == 2
    one, root = hub.fetch("hf:o/n:other.jsonl", "text", "data")
    assert one.read_text() == "o" and one.parent == root
    with pytest.raises(UserError, match=r"text: a file of hf:o/n; got 'othr.jsonl'; did you mean other.jsonl\? check the name"):
        hub.fetch("hf:o/n:othr.jsonl", "text", "data")


def test_a_data_set_of_another_format_names_the_converted_one(served) -> None:
    served.put("dataset", "o/n", train_dot_csv="a,b", README_dot_md="---\nnot: [closed\n---\n")
    with pytest.raises(UserError, match="got hf:o/n with .csv, .md; use hf:o/n@refs/convert/parquet, where the hub may keep it"):
        hub.fetch("hf:o/n", "text", "data")


def test_a_tokenizer_without_the_model_beside_it(served) -> None:
    served.put("model", "o/m", tokenizer_dot_json="{}", tokenizer_config_dot_json="{}", model_dot_safetensors="big")
    folder, _ = hub.fetch("hf:o/m", "tokenizer", "tokenizer")
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    served.put("model", "o/x", model_dot_safetensors="big")
    with pytest.raises(UserError, match="tokenizer: a model with tokenizer.json; got hf:o/x without it"):
        hub.fetch("hf:o/x", "tokenizer", "tokenizer")
    with pytest.raises(UserError, match="got hf:o/m:train; leave out :train"):
        hub.fetch("hf:o/m:train", "tokenizer", "tokenizer")


def test_our_own_checkpoint_and_a_foreign_one(served) -> None:
    served.put(
        "model",
        "o/run",
        README_dot_md="r",
        **{f"checkpoints__step_dash_{n}__{name}": str(n) for n in (5, 20) for name in ("manifest_dot_json", "weights__w")},
    )
    path, _ = hub.fetch("hf:o/run", "init", "checkpoint")
    assert path.name == "step-20" and (path / "weights" / "w").read_text() == "20" and not (path.parent / "step-5").exists()
    served.put("model", "o/own", manifest_dot_json="{}", weights__w="w")
    path, root = hub.fetch("hf:o/own", "init", "checkpoint")
    assert path == root and (path / "weights" / "w").is_file()
    served.put("model", "o/llm", config_dot_json="{}", model_dot_safetensors="x")
    asked = len(served.asked)
    way = "run r1mega convert source=hf:o/llm target=FOLDER, and give init=FOLDER"
    with pytest.raises(UserError, match=f"init: a checkpoint that r1mega wrote; got the Hugging Face model hf:o/llm; {way}"):
        hub.fetch("hf:o/llm", "init", "checkpoint")
    assert len(served.asked) == asked, "refused before its weights are fetched"


def test_a_model_to_convert(served) -> None:
    """A published one without its weights in other formats, or a run's newest checkpoint."""
    served.put(
        "model", "o/llm", config_dot_json="{}", model_dot_safetensors="x", pytorch_model_dot_bin="y", tokenizer_dot_json="{}"
    )
    path, root = hub.fetch("hf:o/llm", "source", "model")
    assert path == root and sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    served.put("model", "o/run", checkpoints__step_dash_5__manifest_dot_json="{}", checkpoints__step_dash_5__weights__w="w")
    path, _ = hub.fetch("hf:o/run", "source", "model")
    assert path.name == "step-5"


def test_where_no_hub_name_fits() -> None:
    with pytest.raises(
        UserError, match="data.train: hf: names data sets, .*; got hf:o/n; use a path, or a URL such as hf://datasets/o/n/FILE"
    ):
        hub.fetch("hf:o/n", "data.train", "tokens")


def refusal(kind: type) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "said\nby https://somewhere")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (refusal(errors.RepositoryNotFoundError), "text: a data set on the hub; got no such hf:o/n; check the name, or set HF_TOKEN for a private one"),
        (refusal(errors.GatedRepoError), "text: a data set that you may read; got hf:o/n@v1, whose owner admits readers one by one; ask for access on its page and set HF_TOKEN"),
        (refusal(errors.RevisionNotFoundError), "text: a branch, tag or commit of hf:o/n; got no v1; check it"),
        (
            ConnectionError("Max retries exceeded with https://somewhere"),
            "text: a hub within reach, or hf:o/n@v1 in its cache; got ConnectionError; set HF_ENDPOINT to a hub that you reach, or fill HF_HOME on "
            "a machine with network, copy it here and set HF_HUB_OFFLINE=1, or give a local path",
        ),
    ],
)  # fmt: skip
def test_the_hubs_refusals(monkeypatch, tmp_path: Path, error: Exception, says: str) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError) as caught:
        hub.fetch("hf:o/n@v1", "text", "data")
    assert str(caught.value) == says


def test_offline_a_filled_cache_serves_and_an_empty_one_is_told(monkeypatch, tmp_path: Path) -> None:
    """huggingface_hub as it is: its cache's layout, its offline switch."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "datasets--o--n" / "snapshots" / commit
    (snapshot / "main").mkdir(parents=True)
    (snapshot / "main" / "train.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    (tmp_path / "datasets--o--n" / "refs").mkdir()
    (tmp_path / "datasets--o--n" / "refs" / "main").write_text(commit)
    path, root = hub.fetch("hf:o/n:main/train", "text", "data")
    assert path == snapshot / "main" / "train.jsonl" and root == snapshot
    with pytest.raises(
        UserError,
        match="^text: a hub within reach, or hf:o/other in its cache; got OfflineModeIsEnabled with HF_HUB_OFFLINE set; set HF_ENDPOINT",
    ):
        hub.fetch("hf:o/other", "text", "data")
