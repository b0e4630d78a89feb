import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.config.data import RecipeConfig
from r1mega.config.errors import UserError
from r1mega.recipe.graph import Stage
from r1mega.recipe.run import Crew, compute_overrides, recipe, run_stages


@dataclasses.dataclass
class Config:
    """What the fake composer makes of overrides."""

    command: str
    name: str
    out: str
    seed: int
    values: dict


class Lab:
    """A fake composer and runner that remember what ran. ``fail``: stage that breaks once after writing a file."""

    def __init__(self, folder):
        self.folder, self.ran, self.said, self.fail, self.lr, self.composed = folder, [], [], None, "1", {}

    def stages(self):
        return [
            Stage("data", "prepare"),
            Stage("pretrain", "pretrain", ("data",), ("text={data}/text",)),
            Stage("cold_start", "sft", ("pretrain",), ("init={pretrain}/ckpt", f"lr={self.lr}")),
            Stage("eval_cold_start", "eval", ("cold_start",), ("checkpoint={cold_start}",)),
            Stage("eval_pretrain", "eval", ("pretrain",), ("checkpoint={pretrain}",)),
            Stage("export", "export", ("cold_start",), ("checkpoint={cold_start}",), "export"),
            Stage("page", "report", (), ("run={recipe}",)),
        ]

    def composer(self, command, overrides):
        values = dict(override.split("=", 1) for override in overrides)
        config = Config(command, values.pop("name"), values.pop("out"), int(values.pop("seed")), values)
        self.composed[config.name] = config
        return config

    def runner(self, command, config):
        self.ran.append(config.name)
        home = Path(config.out)
        (home / "work.txt").open("a").write("x")
        if self.fail == config.name:
            self.fail = None
            raise RuntimeError("power cut")
        if command == "eval":
            return {"pass_at_1": 0.25, "standard_error": 0.01, "format_rate": 0.9, "tokens": 7, "examples": []}
        if command == "export":
            (home / "hf").mkdir(exist_ok=True)
            (home / "hf" / "model.txt").write_text("weights")
            return {"target": str(home / "hf")}
        if command == "report":
            page = self.folder / "report.html"
            page.write_text("page")
            return {"page": str(page)}
        return {"tokens": 100}

    def go(self, **more):
        self.ran.clear()
        self.said.clear()
        return run_stages(self.stages(), self.folder, 3, self.composer, self.runner, name="quick", say=self.said.append, **more)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "quick")


ALL = ["data", "pretrain", "cold_start", "eval_cold_start", "eval_pretrain", "export", "page"]


def test_first_run_runs_all_and_the_second_nothing(lab):
    first = lab.go()
    assert lab.ran == ALL
    before = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("*") if path.is_file()}
    second = lab.go()
    assert lab.ran == [] and sum(": kept (" in line for line in lab.said) == len(ALL)
    assert first == second and before == {path: path.stat().st_mtime_ns for path in lab.folder.rglob("*") if path.is_file()}


def test_summary_takes_the_evaluation_into_the_row_of_its_stage(lab):
    summary = lab.go()
    assert json.loads((lab.folder / "summary.json").read_text()) == summary
    assert (summary["recipe"], summary["seed"]) == ("quick", 3)
    rows = {row["name"]: row for row in summary["stages"]}
    assert list(rows) == ALL
    assert (
        rows["cold_start"]["pass_at_1"] == 0.25
        and rows["cold_start"]["standard_error"] == 0.01
        and rows["cold_start"]["tokens"] == 100
    )
    assert "pass_at_1" not in rows["export"] and "examples" not in rows["eval_pretrain"]
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in summary["stages"]), abs=1e-6)
    assert "25.0" in lab.said[-1] and lab.said[-1].splitlines()[0].split() == [
        "stage",
        "command",
        "seconds",
        "tokens",
        "pass@1",
        "%",
        "s.e.",
        "format",
        "%",
        "length",
    ]


def test_a_changed_stage_reruns_what_depends_on_it(lab):
    lab.go()
    lab.lr = "2"
    lab.go()
    assert lab.ran == ["cold_start", "eval_cold_start", "export", "page"]
    assert (lab.folder / "stages" / "cold_start" / "work.txt").read_text() == "x"
    assert (lab.folder / "replaced" / "cold_start" / "stage.json").exists()


def test_a_changed_seed_or_version_reruns_all(lab):
    lab.go()
    lab.go(version="next")
    assert lab.ran == ALL


def test_a_result_made_anew_is_read_anew(lab):
    lab.go()
    (lab.folder / "stages" / "cold_start" / "stage.json").unlink()
    lab.go()
    assert lab.ran == ["cold_start", "eval_cold_start", "export", "page"]


def test_an_interrupted_stage_goes_on_in_its_folder(lab):
    lab.fail = "cold_start"
    with pytest.raises(RuntimeError, match="power cut"):
        lab.go()
    assert lab.ran == ["data", "pretrain", "cold_start"]
    lab.go()
    assert lab.ran == ALL[2:]
    assert (lab.folder / "stages" / "cold_start" / "work.txt").read_text() == "xx"
    assert any("cold_start: sft goes on" in line for line in lab.said)


def test_an_interrupted_stage_with_another_config_starts_afresh(lab):
    lab.fail = "cold_start"
    with pytest.raises(RuntimeError):
        lab.go()
    lab.lr = "2"
    lab.go()
    assert (lab.folder / "stages" / "cold_start" / "work.txt").read_text() == "x"


def test_a_damaged_record_counts_as_not_done(lab):
    lab.go()
    (lab.folder / "stages" / "export" / "stage.json").write_text('{"key": "')
    lab.go()
    assert lab.ran == ["export", "page"]


def test_only_runs_what_it_needs_and_the_summary_keeps_the_rest(lab):
    lab.go()
    summary = lab.go(only=["eval_pretrain"])
    assert lab.ran == [] and [row["name"] for row in summary["stages"]] == ALL
    lab.lr = "2"
    rows = [row["name"] for row in lab.go(only=["eval_pretrain"])["stages"]]
    assert rows == ["data", "pretrain", "eval_pretrain"]  # results of another key are not this recipe's


def test_the_result_is_placed_at_copy_to_and_again_when_it_is_gone(lab):
    lab.go()
    copy = lab.folder / "export"
    assert [path.name for path in copy.iterdir()] == ["model.txt"] and copy.joinpath("model.txt").stat().st_nlink == 2
    copy.joinpath("model.txt").unlink()
    copy.rmdir()
    lab.go()
    assert lab.ran == [] and copy.joinpath("model.txt").read_text() == "weights"


def test_a_deleted_page_is_written_again(lab):
    lab.go()
    (lab.folder / "report.html").unlink()
    lab.go()
    assert lab.ran == ["page"]


def test_a_moved_run_keeps_its_results(lab, tmp_path):
    lab.go()
    lab.folder = lab.folder.rename(tmp_path / "moved")
    lab.go(only=["export"])
    assert lab.ran == []


def test_stages_get_the_recipes_own_device_and_keep_their_choice(lab):
    cfg = RecipeConfig()
    cfg.device.kind = "cuda"
    stages = [
        Stage("a", "pretrain"),
        Stage("b", "pretrain", (), ("device.kind=cpu",)),
        Stage("c", "pretrain", (), ("precision=bf16",)),
        Stage("d", "prepare"),
    ]
    run_stages(stages, lab.folder, 3, lab.composer, lab.runner, compute=compute_overrides(cfg), say=lab.said.append)
    values = {name: config.values for name, config in lab.composed.items()}
    assert (
        values["a"]["device.kind"] == "cuda" and values["a"]["precision.dtype"] == "fp32" and values["a"]["launch.processes"] == "1"
    )
    assert values["b"]["device.kind"] == "cpu" and "precision.dtype" not in values["c"] and values["d"] == {}


def test_wrong_stages_stop_before_anything_runs(lab):
    def composer(command, overrides):
        if command == "export":
            raise UserError("export.dtype: no such; got x; use fp32")
        return lab.composer(command, overrides)

    with pytest.raises(UserError, match="export.dtype"):
        run_stages(lab.stages(), lab.folder, 3, composer, lab.runner)
    assert lab.ran == [] and not lab.folder.exists()
    with pytest.raises(UserError, match="out: a recipe's folder"):
        run_stages(lab.stages(), Path("my runs"), 3, lab.composer, lab.runner)


class Wire:
    """Broadcast between two ranks that take turns: rank 0 first leaves its values, then rank 1 reads them in order."""

    def __init__(self):
        self.values = []
        self.read = 0

    def send(self, value):
        self.values.append(value)
        return value

    def receive(self, value):
        self.read += 1
        return self.values[self.read - 1]


def test_other_ranks_follow_rank_0_and_do_not_touch_files(lab, tmp_path):
    wire = Wire()
    summary = lab.go(crew=Crew(True, wire.send))
    other = Lab(lab.folder)
    before = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("*") if path.is_file() and path.name != "work.txt"}
    assert other.go(crew=Crew(False, wire.receive)) == summary
    assert other.ran == ["pretrain", "cold_start", "eval_cold_start", "eval_pretrain"] and other.said == []
    assert wire.read == len(wire.values)
    after = {
        path: path.stat().st_mtime_ns
        for path in lab.folder.rglob("*")
        if path.is_file() and path.name not in ("work.txt", "model.txt")
    }
    assert after == {path: time for path, time in before.items() if path.name != "model.txt"}


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [(UserError("a: b; got c; d"), UserError, "^a: b; got c; d$"), (OSError("disk"), RuntimeError, "^rank 0: disk$")],
)
def test_what_fails_on_rank_0_fails_everywhere(error, kind, says):
    wire = Wire()

    def action():
        raise error

    with pytest.raises(type(error)):
        Crew(True, wire.send).first(action)
    with pytest.raises(kind, match=says):
        Crew(False, wire.receive).first(action)


def test_recipe_reads_its_section_and_runs_in_out(lab, monkeypatch, capsys):
    monkeypatch.setattr("r1mega.config.compose.compose", lab.composer)
    section = {"description": "one", "stages": {"train": {"command": "pretrain", "overrides": ["steps={seed}"]}}}
    summary = recipe(RecipeConfig(name="q", out=str(lab.folder), seed=4, recipe=section), lab.runner)
    assert lab.ran == ["train"] and lab.composed["train"].values["steps"] == "4" and summary["recipe"] == "q"
    assert (lab.folder / "stages" / "train" / "stage.json").exists() and "[1/1] train: done in" in capsys.readouterr().out


def test_recipe_without_stages_or_with_an_unknown_one_is_a_user_error(lab):
    with pytest.raises(UserError, match="recipe=quickstart"):
        recipe(RecipeConfig(out=str(lab.folder)), lab.runner)
    section = {"stages": {"train": {"command": "pretrain"}}}
    with pytest.raises(UserError, match=r"only: .* did you mean train\?"):
        recipe(RecipeConfig(out=str(lab.folder), recipe=section, only=["trian"]), lab.runner)


def test_recipe_and_report_are_light():
    code = "import sys, r1mega.recipe.run, r1mega.report.page; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
