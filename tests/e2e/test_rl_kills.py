"""kill -9 of trainer, launcher, reward worker or engine at random moments of a run that runs ahead: no sample lost, none used twice."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.engine.sglang import launch
from r1mega.rl.ledger import History
from r1mega.train import checkpoint
from tests.e2e import kills
from tests.e2e.kills import Killer, start
from tests.e2e.test_kills import SMALL
from tests.train.cases import LENGTH, write_data

pytestmark = pytest.mark.slow  # fifty starts of the command

SIZES = (
    "rl.rollouts=8 rl.prompts_per_rollout=4 rl.group_size=4 rl.updates_per_rollout=2 rl.micro_batch_size=4 rl.save_every=1 "
    "rl.sampling.max_new_tokens=12 optim.lr=1e-3 optim.warmup_steps=1 launch.processes=2 rl.lag=1 rl.dynamic_sampling.by=reward rl.dynamic_sampling.oversampling=2"
)
WIDTHS = ("model.moe_ffn_size=32", "model.ffn_size=64")  # that a server on a CPU takes
KILLS = {"local": 40, "sglang": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a checkpoint to start from."""
    folder = write_data(tmp_path_factory.mktemp("rl_kills"))
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    data = [f"tokenizer={folder}/tok", f"data.train={{{folder}/text: 1}}", f"data.sequence_length={LENGTH}"]
    sizes = "trainer.steps=1 trainer.global_batch_size=8 trainer.micro_batch_size=4 optim.warmup_steps=1"
    run = start(["pretrain", f"out={folder}/seed", "model=tiny", *SMALL.split(), *WIDTHS, *data, *sizes.split()])
    told = run.communicate(timeout=300)[1]
    assert run.returncode == 0, told[-3000:]
    return folder


@pytest.mark.parametrize("engine", KILLS)
def test_every_sample_is_used_once(place: Path, tmp_path: Path, monkeypatch, engine: str) -> None:
    """Fifty kills in all; ``pytest -s`` shows what was hit, R1MEGA_KILLS=N makes so many of each engine."""
    if engine == "sglang":
        try:
            launch.interpreter(None)
        except UserError as error:
            pytest.skip(str(error))
        monkeypatch.setattr(kills, "LONGEST_SECONDS", 600.0)
    killer, number = Killer(int(os.environ.get("R1MEGA_KILLS", KILLS[engine])), random.Random(len(engine))), 0
    while killer.moments or not number:
        out = tmp_path / f"run{number}"
        number += 1
        given = ["rl", f"out={out}", f"init={place}/seed", f"data.problems={place}/problems.jsonl", f"engine={engine}"]
        killer.finish([*given, *SIZES.split()], out)
        history = History(out / "ledger")
        assert history.audit() == []
        assert sorted(history.uses()) == list(range(1, 9))
        state = checkpoint.read_state(checkpoint.resolve(out))
        done = {item for frames in history.uses().values() for frame in frames for item in frame.values["items"]}
        assert done == set(range(state["cursor"]["consumed"])) | set(state["cursor"]["done"]), (
            "the cursor says what the ledger says"
        )
        starts = {frame.start for frame in history.frames if frame.kind == "start"}
        print(f"{engine}: {len(done)} questions in 8 rollouts, {len(starts)} starts")
    for line in killer.log:
        print(f"{engine}: {line}")
