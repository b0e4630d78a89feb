"""``r1mega why``: a rollout, a sample and the lineage of ledgers made by hand, each as text and as JSON, and the faults it tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.errors import UserError
from r1mega.data.tokenizer import train_tokenizer
from r1mega.report.samples import DROPPED, USED, VOID, WAITING, newest, seen, slowest
from r1mega.rl.ledger import History, Ledger, read
from tests.rl.ledgers import CLOCK, PROMPT, ROUTING, write_drop, write_run, write_samples, write_use


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks, two rollouts. Rollout 2 trained on question 2, begun two updates ago and ended under newer weights, and question 3
    with a failed reward; question 4 was dropped, 5 waits."""
    run = tmp_path / "run"
    ledgers = [Ledger(run / "ledger", 1, rank, 0, 0) for rank in (0, 1)]
    first = [write_samples(ledgers[rank], [rank], 0) for rank in (0, 1)]
    for rank in (0, 1):
        write_use(ledgers[rank], 1, [rank], first[rank])
    spans = ((0, 0, 2), (1, 2, 5))
    second = write_samples(ledgers[0], [2], 0, tokens=[9, 8, 7, 6, 5], versions=spans, own=[True, True, False, True, True], turns=2)
    third = write_samples(ledgers[1], [3], 2, failure="ran into its limit", seconds=5.0, routing=ROUTING, reason="length")
    write_samples(ledgers[0], [4], 2)
    write_use(ledgers[0], 2, [2], second, advantages=[0.5, -0.5], consumed=5)
    write_use(ledgers[1], 2, [3], third, consumed=5)
    write_drop(ledgers[0], 2, [4])
    write_samples(ledgers[0], [5], 4, note="test 3: wrong")
    return run


def test_a_rollout(run: Path, capsys) -> None:
    told = api.why(f"run={run}", "step=2")
    said = capsys.readouterr().out
    assert (told["rollout"], told["update"], told["updates"], told["questions"]) == (2, 4, [3, 4], 2)
    assert (
        told["staleness_tokens"] == {"0": 4 + 5, "1": 2 * 3, "2": 2 * 2}
        and told["tokens"] == 10 + 9
        and told["prompt_tokens"] == 12
    )
    assert told["sources"] == {
        "source0": {"samples": 2, "questions": 1, "tokens": 10, "reward": 0.5},
        "source1": {"samples": 2, "questions": 1, "tokens": 9, "reward": 0.5},
    }
    assert told["dropped"] == {"rl.dynamic_sampling": {"questions": 1, "samples": 2}} and told["faults"] == []
    assert told["failures"] == {"accuracy: ran into its limit": 2} and told["finish_reasons"] == {"stop": 2, "length": 2}
    assert [row["sample"] for row in told["samples"]] == ["1.0.4", "1.0.5", "1.1.4", "1.1.5"]
    row = told["samples"][1]
    assert (row["item"], row["member"], row["problem"], row["source"]) == (2, 1, "p2", "source0")
    assert (row["advantage"], row["update"], row["reward"], row["turns"]) == (-0.5, 4, 1.0, 2)
    assert row["versions"] == [[0, 0, 2], [1, 2, 5]] and row["prompt_tokens"] == len(PROMPT) and row["tokens"] == 5
    assert row["logprobs"] == {"count": 4, "mean": (-0.5 - 1.0 - 2.0 - 2.5) / 4, "min": -2.5, "min_place": 4}, (
        "the policy's own alone"
    )
    assert (row["began"], row["used"]) == (CLOCK + 2, CLOCK + 20) and row["routing_sha256"] is None
    assert len(told["samples"][2]["routing_sha256"]) == 16
    assert f"rollout 2 of {run}: updates 3 to 4, 4 samples of 2 questions, 12 prompt and 19 response tokens, trained on " in said
    assert (
        "\nupdates behind   0: 9 tokens, 1: 6 tokens, 2: 4 tokens\n" in said and "\nended by         stop: 2, length: 2\n" in said
    )
    assert "\ndropped          1 question with 2 samples (rl.dynamic_sampling)\n" in said
    assert "\nfailed rewards   accuracy: ran into its limit (2)\n" in said and "seconds          rollout 5, train 3, push 1" in said
    (line,) = [line for line in said.splitlines() if line.startswith("1.0.5 ")]
    assert (
        line.split()[1:5] == ["2.1", "p2", "source0", row["prompt_sha256"]] and "0:0-2 1:2-5" in line and "1 = accuracy 1" in line
    )
    (line,) = [line for line in said.splitlines() if line.startswith("1.1.5 ")]
    assert "1 = accuracy 1 (ran into its limit)" in line and line.endswith(told["samples"][3]["routing_sha256"])


def test_json_is_the_same(run: Path, capsys) -> None:
    for words in (["step=1"], ["sample=1.0.4"], []):
        told = api.why(f"run={run}", "json=true", *words)
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told)) and told["faults"] == []


def test_the_lineage(run: Path, capsys) -> None:
    told = api.why(f"run={run}")
    said = capsys.readouterr().out
    assert told["samples"] == {USED: 8, DROPPED: 2, WAITING: 2, VOID: 0} and told["dropped"] == {"rl.dynamic_sampling": 2}
    assert [(one["rollout"], one["update"], one["questions"], one["samples"]) for one in told["rollouts"]] == [
        (1, 2, 2, 4),
        (2, 4, 2, 4),
    ]
    assert [one["dropped_questions"] for one in told["rollouts"]] == [0, 1]
    (start,) = told["starts"]
    assert (start["ranks"], start["samples"], start["cut_bytes"], start["returns"]) == (2, 12, 0, [])
    assert said.endswith("samples: 8 used, 2 dropped (rl.dynamic_sampling: 2), 2 waiting, 0 void\nexactly once: holds\n")

    path = sorted((run / "ledger").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-7])
    again = Ledger(run / "ledger", 2, 0, 1, 2)
    write_use(again, 2, [2, 3], write_samples(again, [2, 3], 2))
    again.write("back", {"rollout": 1, "update": 2})
    again.close()
    told = api.why(f"run={run}")
    said = capsys.readouterr().out
    assert "to rollout 1" in said and "rollout 1, update 2" in said and said.endswith("exactly once: holds\n")
    assert [one["returns"] for one in told["starts"]] == [[], [1]] and told["starts"][0]["cut_bytes"] > 7
    assert [one["rollout"] for one in told["rollouts"]] == [1]
    assert told["samples"] == {USED: 4, DROPPED: 0, WAITING: 6, VOID: 5}, "void: 5, and 2 and 3, which were made again"


def test_what_became_of_each_sample(run: Path) -> None:
    samples = seen(History(run / "ledger"))
    assert [(one.values["item"], one.fate, one.rollout) for one in samples if one.values["member"] == 0] == [
        (0, USED, 1), (2, USED, 2), (4, DROPPED, 2), (5, WAITING, None), (1, USED, 1), (3, USED, 2),
    ]  # fmt: skip
    assert {one.values["item"] for one in newest(samples, 1)} == {2, 3, 4, 5} and len(newest(samples, 0)) == 12
    first, *_ = slow = slowest(samples, 3)
    assert [call.seconds for call in slow] == [5.0, 5.0, 0.25]
    assert (first.reward, first.problem, first.sample, first.rollout, first.said) == (
        "accuracy",
        "p3",
        "1.1.4",
        2,
        "ran into its limit",
    )


def test_a_sample_with_its_text(run: Path, tmp_path, capsys) -> None:
    told = api.why(f"run={run}", "sample=1.1.4")
    said = capsys.readouterr().out
    assert (
        said.startswith("sample    1.1.4: used by rollout 2, update 3, advantage +1\n")
        and "routing   " + told["routing_sha256"] in said
    )
    assert told["response"] is None and "response: [13, 13, 13, 13]" in said and "token ids, since" in said and told["faults"] == []
    held = run / "checkpoints/step-00000002"
    held.mkdir(parents=True)
    (held / "state.json").write_text("{}")
    tokenizer = train_tokenizer(["one two three four"] * 4, held / "tokenizer", vocab_size=272)
    told = api.why(f"run={run}", "sample=1.1.4")
    assert told["prompt"] == tokenizer.decode(PROMPT, skip_special=False) and told["token_ids"] == [13] * 4
    assert told["response"] == tokenizer.decode([13] * 4, skip_special=False) and told["token_logprobs"] == [-0.5, -1.0, -1.5, -2.0]
    assert capsys.readouterr().out.endswith(f"\n\nresponse\n{told['response']}\n")
    assert api.why(f"run={run}", "sample=1.0.7")["fate"] == DROPPED and api.why(f"run={run}", "sample=1.0.11")["fate"] == WAITING
    said = capsys.readouterr().out
    assert "dropped in rollout 2 (rl.dynamic_sampling)" in said and "rewards   1 = accuracy 1 (test 3: wrong)" in said


def test_faults_are_told_last_and_end_with_status_1(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    ids = write_run(run / "ledger")
    write_use(Ledger(run / "ledger", 2, 0, 2, 4), 3, [4], [ids[0][0], "1.0.99"])
    assert main(["why", f"run={run}"]) == 1
    said = capsys.readouterr()
    assert "exactly once: does not hold (2 faults)" in said.out
    assert said.err == (
        f"{run / 'ledger'}: rollout 3 used item 0 member 0 again, after rollout 1\n"
        f"{run / 'ledger'}: rollout 3 used sample 1.0.99, which is not in the ledger\n"
    )
    assert main(["why", f"run={run}", "step=3"]) == 1
    assert "rollout 3 used sample 1.0.99, which is not in the ledger" in capsys.readouterr().err
    frame = next(frame for frame in read(run / "ledger") if frame.id == ids[1][2])
    data = bytearray(frame.path.read_bytes())
    data[frame.offset] ^= 1
    frame.path.write_bytes(data)
    assert main(["why", f"run={run}", "step=2"]) == 1
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith(ids[1][2] + " ")]
    assert "damaged" in line and f"got another checksum in {ids[1][2]}; the file is damaged" in said.err
    assert main(["why", f"run={run}", f"sample={ids[1][2]}"]) == 1 and "damaged: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["step=3"], "step: a rollout that {run} was trained on; got 3; use step=1 to 2"),
        (["step=0"], "step: at least 1; got 0; "),
        (
            ["sample=9.9.9"],
            "sample: the id of a sample in {run}/ledger; got '9.9.9'; step=N lists them, for example 1.1.2, 1.1.4, 1.1.5",
        ),
    ],
)
def test_what_is_not_there(run: Path, words, told) -> None:
    with pytest.raises(UserError) as error:
        api.why(f"run={run}", *words)
    assert str(error.value).startswith(told.format(run=run))


def test_another_folder_is_refused(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="a run of r1mega rl has a ledger; got none; give run=DIR of such a run"):
        api.why(f"run={tmp_path}")
    with pytest.raises(UserError, match="run: a run's folder; got no such path"):
        api.why(f"run={tmp_path / 'none'}")
