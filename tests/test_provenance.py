"""``environment.json``: what a start records, that it identifies content and not paths, and that nothing in it ends a run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from r1mega import __version__, api, provenance
from r1mega.config.compose import preset
from r1mega.config.data import PrepareConfig, ProblemSourceConfig
from r1mega.config.rl import EvalConfig, ExportConfig, ProblemDataConfig, RewardConfig, RlConfig, RolloutConfig
from r1mega.config.train import SftConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def token_file(tmp_path) -> Path:
    """NAME of a token file with its record."""
    for suffix, content in (("bin", b"\1\0\2\0"), ("idx", b"\0" * 16), ("json", b'{"num_tokens": 2, "tokenizer_hash": "abc"}')):
        (tmp_path / f"text.{suffix}").write_bytes(content)
    return tmp_path / "text"


def write_checkpoint(folder: Path, step: int, tensors: str) -> Path:
    place = folder / "checkpoints" / f"step-{step:08d}"
    place.mkdir(parents=True)
    files = {"weights/__0_0.distcp": tensors, "weights/.metadata": "index", "state.json": "s"}
    (place / "manifest.json").write_text(json.dumps({"files": {name: {"sha256": text} for name, text in files.items()}}))
    state = {"step": step, "degrees": {"data": 1}, "model": dataclasses.asdict(preset("model", "tiny"))}
    (place / "state.json").write_text(json.dumps(state))
    return folder


def test_a_start_records_code_machine_packages_and_ranks(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    made = provenance.describe(PrepareConfig(out=str(tmp_path)), "prepare", ["name=a b", "seed=2"])
    assert made["command_line"] == "r1mega prepare 'name=a b' seed=2" and made["ranks"] == 3
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["time"])
    assert made["code"]["version"] == __version__ and re.fullmatch(r"[0-9a-f]{64}", made["code"]["source"])
    assert {"processor", "cores", "memory_gib", "gpus", "python", "platform"} <= made["machine"].keys()
    assert made["packages"]["omegaconf"] and "no-such" not in made["packages"]
    assert provenance.describe(PrepareConfig(), "prepare", None)["command_line"] == "api.prepare(PrepareConfig)"
    json.dumps(made)


def test_starts_are_kept_newest_last_and_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "MOST_STARTS", 3)
    for seed in range(5):
        provenance.record(PrepareConfig(), tmp_path / "run", "prepare", [f"seed={seed}"])
    lines = [start["command_line"] for start in provenance.starts(tmp_path / "run")]
    assert lines == [f"r1mega prepare seed={seed}" for seed in (2, 3, 4)]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["environment.json"]


@pytest.mark.parametrize("content", ["", "{half", "[]", '{"starts": 3}', '{"starts": [1, null]}'])
def test_a_damaged_record_is_started_anew(content, tmp_path) -> None:
    (tmp_path / "environment.json").write_text(content)
    assert provenance.starts(tmp_path) == []
    provenance.record(PrepareConfig(), tmp_path, "prepare", [])
    assert len(provenance.starts(tmp_path)) == 1


def test_a_record_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    provenance.record(PrepareConfig(), tmp_path / "file" / "run", "prepare", [])
    said = capsys.readouterr().err
    assert "environment.json: not written" in said and said.count("\n") == 1


def test_the_source_hash_knows_the_files_and_not_the_place(tmp_path, monkeypatch) -> None:
    def place(name: str, text: str) -> str:
        package, configs = tmp_path / name / "r1mega", tmp_path / name / "configs"
        package.mkdir(parents=True)
        configs.mkdir()
        (package / "provenance.py").write_text(text)
        (configs / "a.yaml").write_text("a: 1")
        monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
        monkeypatch.setattr("r1mega.config.compose.config_dir", lambda: configs)
        return provenance.source_hash()

    first = place("one", "x = 1")
    assert place("two", "x = 1") == first and place("three", "x = 2") != first
    assert provenance.code()["commit"] is None and provenance.code()["dirty"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_commit_is_the_checkouts_own(tmp_path, monkeypatch) -> None:
    package = tmp_path / "r1mega"
    package.mkdir()
    (package / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    for line in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *line], cwd=tmp_path, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "notes.txt").write_text("outside the package")
    assert (provenance.code()["commit"], provenance.code()["dirty"]) == (head, False)
    (package / "new.py").write_text("")
    assert provenance.code()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert provenance.code()["commit"] is None


def test_variables_are_chosen_by_name_and_never_a_secret() -> None:
    given = {
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCH_LOGS": "x",
        "TORCH_API_KEY": "hidden",
        "NCCL_AUTH_TOKEN": "hidden",
        "WANDB_API_KEY": "hidden",
        "HOME": "/home/someone",
        "HOSTNAME": "host",
        "MY_OMP_X": "no",
    }
    assert sorted(provenance.variables(given)) == ["CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "TORCH_LOGS"]


def test_gpus_come_from_nvidia_smi_where_the_driver_lists_none(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(provenance, "_text", lambda path: "")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert provenance.gpus() == ["NVIDIA H100 80GB HBM3"] * 2
    program.write_text("#!/bin/sh\nsleep 30\n")
    monkeypatch.setattr(provenance, "SMI_SECONDS", 0.1)
    assert provenance.gpus() == []


def test_inputs_by_key_and_content(token_file, tmp_path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("one\n")
    config = PrepareConfig(text=[str(problems), "stdlib"], problems={"mine": ProblemSourceConfig(path=str(problems))})
    found = provenance.inputs(config)
    assert list(found) == ["text", "problems.mine.path"] and found["text"]["stdlib"] == {"kind": "no local file"}
    plain = provenance.hashlib.sha256(b"one\n").hexdigest()
    assert found["text"][str(problems)] == {"kind": "files", "sha256": plain, "how": "whole", "bytes": 4, "num_files": 1}
    config = SftConfig(init=str(tmp_path / "none"))
    config.data.train = {str(token_file): 1.0}
    record = provenance.inputs(config)["data.train"][str(token_file)]
    assert list(record["files"]) == [".bin", ".idx", ".json"] and record["meta"]["num_tokens"] == 2
    assert record["bytes"] == 4 + 16 + len('{"num_tokens": 2, "tokenizer_hash": "abc"}')
    assert "out" not in provenance.inputs(ExportConfig(checkpoint=str(tmp_path)))


def test_the_same_content_elsewhere_is_the_same(token_file, tmp_path) -> None:
    first = provenance.identity(str(token_file))
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"other.{suffix}").write_bytes(token_file.with_suffix(f".{suffix}").read_bytes())
    assert provenance.identity(str(tmp_path / "other"))["sha256"] == first["sha256"]
    (tmp_path / "other.idx").write_bytes(b"\1" * 16)
    other = provenance.identity(str(tmp_path / "other"))
    assert other["sha256"] != first["sha256"] and other["files"][".bin"] == first["files"][".bin"]


def test_a_large_input_is_sampled_to_its_end_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(provenance, "SAMPLE_BYTES", 10)
    path = tmp_path / "big.jsonl"
    path.write_bytes(bytes(100_000))
    first = provenance.identity(str(path))
    assert first["how"] == "sampled"
    for position in (0, 99_999):
        content = bytearray(100_000)
        content[position] = 1
        path.write_bytes(content)
        assert provenance.identity(str(path))["sha256"] != first["sha256"]
    path.write_bytes(bytes(100_001))
    assert provenance.identity(str(path))["sha256"] != first["sha256"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(600):
        (folder / f"{index}.txt").write_bytes(bytes(10))
    many = provenance.identity(str(folder))
    assert (many["how"], many["num_files"], many["bytes"]) == ("sampled", 600, 6000) and "files" not in many


def test_a_checkpoint_is_its_newest_manifest(tmp_path) -> None:
    run = write_checkpoint(write_checkpoint(tmp_path / "run", 9, "nine"), 10, "ten")
    found = provenance.identity(str(run))
    assert (found["kind"], found["name"], found["step"]) == ("checkpoint", "step-00000010", 10)
    assert found["weights"] == {"weights/__0_0.distcp": "ten"} and found["degrees"] == {"data": 1}
    one = run / "checkpoints" / "step-00000009"
    assert provenance.identity(str(one))["weights"] == {"weights/__0_0.distcp": "nine"}
    assert provenance.identity(str(run / "checkpoints"))["sha256"] == found["sha256"]
    from r1mega.train import manifest

    assert manifest.digest(run) == found["sha256"]


def test_what_cannot_be_read_is_recorded_as_such(token_file, tmp_path, monkeypatch) -> None:
    token_file.with_suffix(".json").write_text("no json")
    config = SftConfig(init=str(tmp_path / "none"))
    config.data.train = {str(token_file): 1.0}
    made = provenance.describe(config, "sft", [])
    assert "JSONDecodeError" in made["inputs"]["data.train"][str(token_file)]["unreadable"]
    assert made["inputs"]["init"] == {str(tmp_path / "none"): {"kind": "no local file"}}
    monkeypatch.setattr(provenance, "machine", lambda: 1 / 0)
    assert provenance.describe(config, "sft", [])["machine"] == {"unreadable": "ZeroDivisionError: division by zero"}


def test_choices_and_rewards_from_outside_are_code_too(tmp_path, monkeypatch) -> None:
    for name in ("mine", "ours"):
        (tmp_path / f"{name}.py").write_text(f"# {name}")
        module = types.ModuleType(name)
        module.__file__ = str(tmp_path / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, module)
    choice = dataclasses.make_dataclass("Mine", [("x", int, 1)])()
    type(choice).__module__ = "mine"
    config = RlConfig(init="a", data=ProblemDataConfig("p"), rl=RolloutConfig(1), advantage=choice)
    config.reward = RewardConfig(weights={"accuracy": 1.0}, by_source={"sums": {"ours.Short": 0.5}})
    assert list(provenance.own_modules(config)) == ["mine", "ours"]
    assert provenance.own_modules(EvalConfig(checkpoint="c", data=ProblemDataConfig("p"))) == {}


def test_a_command_records_its_start_on_the_first_rank_alone(tmp_path, monkeypatch) -> None:
    module = types.ModuleType("r1mega_stub")
    module.act = lambda config: None
    monkeypatch.setitem(sys.modules, "r1mega_stub", module)
    entry = api.COMMANDS["export"]
    monkeypatch.setitem(api.COMMANDS, "export", dataclasses.replace(entry, target="r1mega_stub:act"))
    write_checkpoint(tmp_path / "base", 1, "one")
    arguments = [f"checkpoint={tmp_path}/base", f"out={tmp_path}/out"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    api.export(*arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    api.export(*arguments)
    (start,) = provenance.starts(tmp_path / "out")
    assert start["inputs"]["checkpoint"][f"{tmp_path}/base"]["step"] == 1 and start["command_line"].endswith(f"out={tmp_path}/out")


def test_recording_imports_nothing_heavy() -> None:
    code = (
        "import sys; from r1mega import provenance; from r1mega.config.data import PrepareConfig; "
        "provenance.describe(PrepareConfig(), 'prepare', []); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]
