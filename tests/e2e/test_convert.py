"""Conversion by the command line, as a user meets it: kills, lineage over all formats, exports of a run, the tool without installing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import api
from tests.train.cases import lines, pretrain_config, sft_config, write_data
from tests.train.convert.cases import V3, publish, read, run, same

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*words: str, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=300)
    assert done.returncode == status, done.stderr[-2000:]
    return done


KILLED = """
import os, sys
from r1mega.cli import main
from r1mega.train.convert.native import NativeFile
add, calls = NativeFile.add, []
def cut(self, key, start, tensor):
    calls.append(key)
    if len(calls) == 90:
        os.kill(os.getpid(), 9)
    return add(self, key, start, tensor)
NativeFile.add = cut
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_conversion_goes_on_by_the_same_command(tmp_path: Path) -> None:
    tensors = publish(tmp_path / "hf", V3, files=3)
    words = [f"source={tmp_path / 'hf'}", f"target={tmp_path / 'native'}", "shard_bytes=60000", "convert.workers=1"]
    command("-c", KILLED, "convert", *words, status=-9)
    assert not (tmp_path / "native").exists() and list(tmp_path.glob(".native.partial/weights/.*.part")), "in the middle of a file"
    said = command("tools/convert.py", *words, "convert.verify=true", "convert.probe_bytes=0").stdout
    assert "written in" in said and "verified" in said and not list(tmp_path.glob(".native*"))
    run(tmp_path / "native", tmp_path / "back")
    same(tensors, read(tmp_path / "back"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A published model, converted; pretraining goes on from it and exports as it goes; an export is fine-tuned."""
    from r1mega.train.export import export_checkpoint
    from tests.train.cases import MODEL

    folder = tmp_path_factory.mktemp("chain")
    data = write_data(folder / "data")
    publish(folder / "hf", MODEL)
    run(folder / "hf", folder / "native")
    config = pretrain_config(data, folder / "runs/more", 4, save_every=2, export_every=2, export_dtype="bf16", keep_last=5)
    config.init = str(folder / "native")
    api.pretrain(config)
    exports = folder / "runs/more/exports"
    run(exports / "step-00000004", folder / "again", verify=True)
    api.sft(sft_config(data, folder / "again", folder / "runs/tuned", 2))
    export_checkpoint(folder / "runs/tuned", folder / "final", "bf16")
    return folder


def test_a_runs_intermediate_models_have_a_card(chain: Path) -> None:
    exports = chain / "runs/more/exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step-00000002", "step-00000004"]
    card = (exports / "step-00000004/README.md").read_text()
    loss = next(line["lm_loss"] for line in lines(chain / "runs/more") if line["step"] == 4)
    for part in (
        "# more, step 4",
        "DeepseekV3ForCausalLM",
        "## Lineage",
        "published",
        "## Data",
        "text",
        "## Metrics",
        f"{loss:.6g}",
        "## Config",
    ):
        assert part in card, part
    assert card.startswith("---\nlibrary_name: transformers")


def test_lineage_goes_from_the_last_export_to_the_published_model(chain: Path) -> None:
    from r1mega.train.manifest import digest, published_digest

    said = json.loads(command("-m", "r1mega", "lineage", f"checkpoint={chain / 'final'}", "json=true").stdout)
    links = said["chain"] if isinstance(said, dict) else said
    kinds = [link["command"] for link in links]
    assert kinds[0] == "export" and kinds[-1] == "published" and kinds.count("convert") == 2
    assert [kind for kind in kinds if kind in ("sft", "pretrain")][0] == "sft"
    assert all(link["status"] == "verified" for link in links), links
    assert links[-1]["digest"] == published_digest(chain / "hf")
    assert digest(chain / "native") in [link["digest"] for link in links]


def test_a_changed_ancestor_is_named(chain: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(chain, tmp_path / "moved")
    path = tmp_path / "moved/native/state.json"
    path.write_text(path.read_text().replace('"step": 0', '"step": 1'))
    done = command("-m", "r1mega", "lineage", f"checkpoint={tmp_path / 'moved/final'}", status=2)
    assert "changed" in done.stdout and "native" in done.stderr


def test_a_change_of_dtype_keeps_the_chain(chain: Path) -> None:
    run(chain / "final", chain / "fp8", format="hf", dtype="fp8")
    run(chain / "fp8", chain / "back")
    for place in ("fp8", "back"):
        said = json.loads(command("-m", "r1mega", "lineage", f"checkpoint={chain / place}", "json=true").stdout)["chain"]
        kinds = [link["command"] for link in said]
        assert "sft" in kinds and "pretrain" in kinds and kinds[-1] == "published", kinds
        assert all(link["status"] == "verified" for link in said), said
