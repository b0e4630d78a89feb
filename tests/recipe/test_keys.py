import dataclasses
import os

from r1mega.config.data import PrepareConfig, ProblemSourceConfig
from r1mega.config.train import SftConfig
from r1mega.recipe.graph import Stage
from r1mega.recipe.keys import fingerprint, normalise, outside_inputs, plain, stage_key

STAGE = Stage("s", "sft", ("a",))


def key_of(config, folder, needs=None, version="1"):
    return stage_key(STAGE, normalise(plain(config), folder), needs or {"a": "k"}, version)


def test_key_is_a_hash_of_what_matters(tmp_path):
    base = SftConfig(init=str(tmp_path / "stages" / "a"), out=str(tmp_path / "stages" / "s"))
    key = key_of(base, tmp_path)
    assert len(key) == 64 and int(key, 16) >= 0
    assert key == key_of(dataclasses.replace(base), tmp_path)
    other = dataclasses.replace(base, optim=dataclasses.replace(base.optim, lr=1e-5))
    assert key != key_of(other, tmp_path)
    assert key != key_of(base, tmp_path, {"a": "other"})
    assert key != key_of(base, tmp_path, version="2")
    assert key != key_of(dataclasses.replace(base, seed=2), tmp_path)


def test_key_does_not_know_where_the_run_is_or_who_starts_it(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    keys = set()
    for folder, processes in ((first, 1), (second, 4)):
        config = SftConfig(name=folder.name, init=f"{folder}/stages/a", out=f"{folder}/stages/s", debug=processes == 4)
        config.launch.processes = config.device.threads = processes
        config.data.train = {f"{folder}/stages/a/sft": 1.0}
        keys.add(key_of(config, folder))
    assert len(keys) == 1


def test_normalise_replaces_whole_path_parts_only(tmp_path):
    folder = tmp_path / "run"
    config = {
        "a": f"{folder}/x",
        "b": f"{folder}x",
        "c": str(folder),
        "name": "n",
        "model": {"name": "kept"},
        "launch": {"processes": 2},
    }
    assert normalise(config, folder) == {"a": "{recipe}/x", "b": f"{folder}x", "c": "{recipe}", "model": {"name": "kept"}}


def test_choices_with_equal_knobs_differ():
    one = dataclasses.make_dataclass("One", [("x", int, 1)])()
    two = dataclasses.make_dataclass("Two", [("x", int, 1)])()
    assert plain(one) != plain(two) and plain({"p": (1, None)}) == {"p": [1, None]}


def test_outside_files_count_by_content(tmp_path):
    folder = tmp_path / "run"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / "inside.jsonl").write_text("{}")
    outside = tmp_path / "problems.jsonl"
    outside.write_text("one")
    config = PrepareConfig(text=[str(outside), str(folder / "stages" / "inside.jsonl"), "stdlib"], out=str(tmp_path / "written"))
    (tmp_path / "written").mkdir()
    config.problems = {"p": ProblemSourceConfig(kind="jsonl", path=str(outside))}
    first = outside_inputs(config, folder)
    assert list(first) == [str(outside)]
    os.utime(outside, (1, 1))
    assert outside_inputs(config, folder) == first
    outside.write_text("two")
    assert outside_inputs(config, folder) != first


def test_a_name_without_suffix_stands_for_its_files(tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"text.{suffix}").write_text(suffix)
    config = SftConfig(init="none")
    config.data.train = {str(tmp_path / "text"): 1.0}
    assert [path.rpartition("/")[2] for path in outside_inputs(config, tmp_path / "run")] == ["text.bin", "text.idx"]


def test_fingerprint_of_a_folder_knows_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    first = fingerprint(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("byte code")
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert fingerprint(tmp_path) != first
