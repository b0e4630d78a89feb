"""Completion: what is offered where, how each shell is answered, and a real bash with the script."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.completion import SCRIPTS, answer, candidates
from r1mega.config.schema import SCHEMAS
from r1mega.config.tools import CompletionConfig

ROOT = Path(__file__).resolve().parents[2]
BREAKS = " \t\n\"'><=;|&(:"  # bash's own COMP_WORDBREAKS


def words(line: str) -> list[str]:
    """Candidates at the end of ``line``, which begins behind ``r1mega``."""
    *before, current = line.split(" ")
    return [word for word, _ in candidates(before, current)]


def test_first_come_commands_then_flags() -> None:
    assert words("") == list(SCHEMAS) and words("pre") == ["prepare", "pretrain"]
    assert words("-") == ["--help", "--version", "--config-dir", "--cfg", "-m"]
    assert words("pretrain --c") == ["--config-dir", "--cfg"] and words("--cfg ") == ["job"]
    assert words("no_such ") == [] and words("pretrain -m --cfg job mod") == ["model=", "model."]
    assert dict(candidates([], "evl"[:2], {"eval": "pass@1"})) == {"eval": "pass@1"}


def test_keys_come_a_section_at_a_time() -> None:
    top = words("pretrain ")
    assert {"model=", "optim=", "seed=", "optim.", "trainer.", "tokenizer="} <= set(top) and len(top) == len(set(top))
    assert not any(word.startswith("optim.") and word != "optim." for word in top)
    assert "optim.warmup_steps=" in words("pretrain optim.") and words("pretrain optim.war") == ["optim.warmup_steps="]
    assert words("rl rl.sampling.t") == ["rl.sampling.temperature="] and "rl.sampling." in words("rl rl.")
    assert "seed=" not in words("pretrain seed=3 ") and "model=" not in words("pretrain model=tiny ")
    docs = dict(candidates(["rl"], "optim.lr"))
    assert docs["optim.lr="] == "peak learning rate (above 0) [1], default 3e-06"


def test_values_are_options_names_booleans_and_defaults() -> None:
    assert words("pretrain model=") == [
        f"model={name}" for name in ("deepseek_v2_lite", "deepseek_v3", "deepseek_v3_slice", "moonlight_16b", "small", "tiny")
    ]
    assert words("rl adv") == ["advantage=", "advantage."] and words("rl advantage=g") == ["advantage=grpo"]
    assert words("recipe recipe=q") == ["recipe=quickstart"]
    assert words("pretrain optim.decay=") == ["optim.decay=constant", "optim.decay=cosine"]
    assert words("pretrain debug=") == ["debug=true", "debug=false"] and words("pretrain debug=f") == ["debug=false"]
    assert words("pretrain seed=") == ["seed=1"] and words("rl optim.lr=") == ["optim.lr=3e-06"]
    assert words("completion shell=") == ["shell=bash", "shell=zsh", "shell=fish"]
    assert words("pretrain trainer.steps=") == [] and words("pretrain no.such=") == []


def test_registered_choices_offer_their_knobs(tmp_path, monkeypatch) -> None:
    assert "advantage.scale_by_std=" in words("rl advantage.")
    assert {"reward.weights.accuracy=", "reward.weights.format="} <= set(words("rl reward.weights."))
    assert words("rl reward.options.acc") == ["reward.options.accuracy."] and words("rl reward.options.accuracy.")
    (tmp_path / "beside_completion.py").write_text(
        "from dataclasses import dataclass\nfrom r1mega.config.knob import knob\n"
        "@dataclass(frozen=True)\nclass Adv:\n    power: float = knob(2.0, 'an exponent', '1')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert words("rl advantage=beside_completion.Adv advantage.") == ["advantage.power="]
    assert words("rl advantage=beside_completion.Nothing advantage.") == []


def test_names_of_the_users_keep_their_place() -> None:
    assert "problems." in words("prepare prob")
    assert "problems.mine.question_column=" in words("prepare problems.mine.") and words("prepare problems.") == []
    assert words("prepare problems.mine.kind=j") == ["problems.mine.kind=jsonl"]
    assert "model.seq_aux_loss_coef=" in words("sft model.")


def test_path_knobs_take_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for name in ("run.jsonl", ".hidden", "with space.jsonl", "a=b"):
        (tmp_path / name).touch()
    assert words("rl init=r") == ["init=run.jsonl", "init=runs/"] and words("rl init=runs/") == ["init=runs/base/"]
    assert words("rl data.problems=") == ["data.problems=run.jsonl", "data.problems=runs/"]  # no name that needs quotes
    assert words("rl init=.") == ["init=.hidden"] and words("rl init=no/such/") == []
    assert words(f"rl init={tmp_path}/ru") == [f"init={tmp_path}/run.jsonl", f"init={tmp_path}/runs/"]
    assert words("rl --config-dir r") == ["runs/"]


def test_choices_of_a_folder_of_ones_own_are_offered(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\n")
    assert "model=mine" in words(f"pretrain --config-dir {tmp_path} model=") and "model=mine" not in words("pretrain model=")
    assert "model=mine" in words(f"pretrain --config-dir={tmp_path} model=")


def test_a_sweep_goes_on_behind_the_comma() -> None:
    assert words("pretrain -m model=tiny,sm") == ["model=tiny,small"] and words("pretrain model=tiny,sm") == []
    assert words("pretrain -m optim.decay=constant,") == ["optim.decay=constant,constant", "optim.decay=constant,cosine"]
    assert words("pretrain -m data.train={a:1,") == []


def test_bash_gets_what_stands_behind_its_last_word_break() -> None:
    def bash(line: str) -> list[str]:
        return answer("bash", ["bin/r1mega", line, BREAKS], {}).splitlines()

    assert bash("bin/r1mega pretrain model=sm") == ["small "] and bash("bin/r1mega pretrain optim.war") == ["optim.warmup_steps="]
    assert bash("bin/r1mega pretrain opt") == ["optim=", "optim."] and bash("bin/r1mega pret") == ["pretrain "]
    assert bash("bin/r1mega pretrain 'data.train={a: 1, b: 2}' seed=") == ["1 "]
    assert bash("bin/r1mega pretrain 'data.train={a: 1") == [] and bash("bin/r1mega pretrain 'model=sm'") == []
    assert bash("X=1 bin/r1mega pretrain model=sm") == ["small "]


def test_the_others_get_doc_strings() -> None:
    assert answer("zsh", ["pret"], {"pretrain": "training"}) == "pretrain\ttraining\n"
    assert answer("fish", ["pretrain", "debug="], {}) == "debug=true\t\ndebug=false\t\n"


def test_the_command_prints_the_script_and_a_bad_line_is_silent(monkeypatch, capsys) -> None:
    for shell in SCRIPTS:
        assert main(["completion", f"shell={shell}"]) == 0
        assert capsys.readouterr().out == SCRIPTS[shell]
    assert api.completion(CompletionConfig(shell="fish")) == {"script": SCRIPTS["fish"]}
    capsys.readouterr()
    monkeypatch.setenv("R1MEGA_COMPLETE", "bash")
    assert main(["only one word"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["completion", "shell=tcsh"], "shell: one of bash, zsh, fish; got tcsh; use shell=bash"),
        (["completion", "bash"], "arguments: group=choice or key=value, nothing positional; got 'bash'"),
        (["completion", "shel=zsh"], "shel: no such key of completion; got 'shel=zsh'; did you mean shell?"),
        (["completion", "-m", "shell=bash,zsh"], "-m: a command whose runs have a folder; got completion"),
    ],
)
def test_wrong_input_is_one_line(arguments, line, capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(line) and shown.err.count("\n") == 1


def test_an_answer_needs_neither_hydra_nor_torch() -> None:
    code = (
        "import sys; from r1mega.cli import main; status = main(['rl', 'advantage.']); "
        "print('HEAVY', *[name for name in ('hydra', 'omegaconf', 'antlr4', 'torch', 'numpy') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "R1MEGA_COMPLETE": "zsh"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY" and "advantage.scale_by_std=\t" in done.stdout


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder with ``r1mega`` on it, for a shell's PATH."""
    path = tmp_path / "bin" / "r1mega"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m r1mega "$@"\n')
    path.chmod(0o755)
    return path.parent


def shell_env(program: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(program), "TERM": "dumb"}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_real_bash_completes(program, tmp_path) -> None:
    """The function as bash calls it, and a line typed with tabs on a terminal."""
    env = shell_env(program)
    script = tmp_path / "script"
    script.write_text(SCRIPTS["bash"])
    code = f"""source {script}; complete -p r1mega
        COMP_LINE='r1mega pretrain model=s'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(r1mega pretrain model = s); COMP_CWORD=4
        _r1mega_complete r1mega s =; printf '<%s>' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["complete -o nospace -F _r1mega_complete r1mega", "<small >"] and done.stderr == ""

    path = program / "r1mega"
    path.write_text(path.read_text().replace("exec", '[ -n "$R1MEGA_COMPLETE" ] || { echo "GIVEN: $*"; exit; }\nexec'))
    terminal, inside = pty.openpty()
    bash = subprocess.Popen(["bash", "--norc", "-i"], env=env, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    os.write(terminal, f"source {script}\nr1mega pret\toptim.war\t5 mod\t=ti\tseed=\t; exit\n".encode())
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    assert bash.wait(30) == 0 and b"GIVEN: pretrain optim.warmup_steps=5 model=tiny seed=1" in shown, shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_takes_the_script(tmp_path) -> None:
    (tmp_path / "script").write_text(SCRIPTS["zsh"])
    assert subprocess.run(["zsh", "-n", str(tmp_path / "script")], capture_output=True).returncode == 0


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
def test_fish_completes(program) -> None:
    code = SCRIPTS["fish"] + "complete -C 'r1mega pretrain model=s'"
    done = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, env=shell_env(program), check=True)
    assert done.stdout.split() == ["model=small"]
