"""Ranks on this machine: their environment, whose output is seen, whose failure counts, and that none is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega import api
from r1mega.config.compose import preset
from r1mega.launch.local import LaunchError, free_port, rank_env, start_ranks

ROOT = Path(__file__).resolve().parents[2]


def script(folder: Path, body: str) -> list[str]:
    """Arguments of python for a rank that runs ``body`` with ``rank``, ``folder`` and the usual modules at hand."""
    path = folder / "rank.py"
    path.write_text(
        f"import json, os, signal, sys, time, pathlib\nfolder = pathlib.Path({str(folder)!r})\nrank = int(os.environ['RANK'])\n{body}\n"
    )
    return [str(path)]


def alive(pid: int) -> bool:
    """True for a process that runs; an ended one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid*")) if path.read_text()]


def test_every_rank_gets_its_place(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keep = "[name for name in os.environ if name.endswith('RANK') or 'WORLD' in name or 'MASTER' in name or name in ('EXTRA', 'OMP_NUM_THREADS')]"
    start_ranks(
        script(tmp_path, f"(folder / f'{{rank}}.json').write_text(json.dumps({{n: os.environ[n] for n in {keep}}}))"),
        3,
        env={"EXTRA": "x"},
    )
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    cores = len(os.sched_getaffinity(0))
    for rank, variables in enumerate(seen):
        assert variables == {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": seen[0]["MASTER_PORT"], "OMP_NUM_THREADS": str(max(1, cores // 3)), "EXTRA": "x",
        }  # fmt: skip
    assert 1024 <= int(seen[0]["MASTER_PORT"]) < 65536


def test_the_users_number_of_threads_stands(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_env(0, 2, 1)["OMP_NUM_THREADS"] == "5"
    assert free_port() != 0


def test_only_the_first_rank_is_heard(tmp_path, capfd) -> None:
    start_ranks(script(tmp_path, "print(f'out {rank}'); print(f'err {rank}', file=sys.stderr)"), 3)
    shown = capfd.readouterr()
    assert shown.out == "out 0\n" and shown.err == "err 0\n"


def test_the_failing_rank_is_shown_and_the_others_are_ended(tmp_path, capfd) -> None:
    body = (
        "(folder / f'pid{rank}').write_text(str(os.getpid()))\n"
        "if rank == 1:\n"
        "    while len(list(folder.glob('pid*'))) < 3: time.sleep(0.01)\n"
        "    print('the cause', file=sys.stderr); sys.exit(7)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        start_ranks(script(tmp_path, body), 3, grace_seconds=0.2)
    assert (caught.value.rank, caught.value.status) == (1, 7) and "got 7 from rank 1 of 3" in str(caught.value)
    assert "--- rank 1, status 7 ---\nthe cause\n" in capfd.readouterr().err
    assert time.monotonic() - start < 20 and len(pids(tmp_path)) == 3 and not any(map(alive, pids(tmp_path)))


def test_a_rank_that_fails_because_of_another_does_not_hide_the_cause(tmp_path, capfd) -> None:
    body = (
        "if rank == 0: sys.exit(1)\n"
        "time.sleep(0.3)\n"
        "print('the true cause', file=sys.stderr); sys.exit(2)"
    )  # fmt: skip
    with pytest.raises(LaunchError) as caught:
        start_ranks(script(tmp_path, body), 2, grace_seconds=10)
    assert caught.value.status == 1 and "the true cause" in capfd.readouterr().err


def test_a_rank_that_ignores_the_polite_signal_is_killed(tmp_path) -> None:
    body = (
        "(folder / f'pid{rank}').write_text(str(os.getpid()))\n"
        "if rank == 0:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / 'deaf').write_text(''); time.sleep(60)\n"
        "while not (folder / 'deaf').exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(LaunchError) as caught:
        start_ranks(script(tmp_path, body), 2, grace_seconds=0.1, end_seconds=0.3)
    assert caught.value.status == 128 + signal.SIGKILL and not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_rank_outlives_the_launcher(tmp_path, number, status) -> None:
    arguments = script(tmp_path, "(folder / f'pid{rank}').write_text(str(os.getpid())); time.sleep(60)")
    parent = (  # a background job of a shell starts with SIGINT ignored, and its children with it
        "import signal, sys\nfrom r1mega.launch.local import start_ranks\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try: start_ranks({arguments!r}, 2)\nexcept KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, start_new_session=True)
    try:
        assert wait_for(lambda: len(pids(tmp_path)) == 2)
        started = pids(tmp_path)
        process.send_signal(number)
        assert process.wait(15) == status
        assert wait_for(lambda: not any(map(alive, started)))
    finally:
        process.kill()
        process.wait()


def test_a_command_with_processes_returns_the_first_ranks_result(tmp_path, monkeypatch) -> None:
    """``launch.processes=2`` from Python: the same arguments once a rank, the result back, one config saved."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "manifest.json").write_text("{}")
    (tmp_path / "given" / "state.json").write_text(json.dumps({"model": dataclasses.asdict(preset("model", "tiny"))}))
    # A stub command reaches the ranks through sitecustomize, which python imports by itself.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types, os\n"
        "if 'r1mega' in sys.orig_argv:\n"
        "    module = types.ModuleType('r1mega_stub')\n"
        "    module.act = lambda config: {'rank': os.environ['RANK'], 'world': os.environ['WORLD_SIZE'], 'dtype': config.dtype}\n"
        "    sys.modules['r1mega_stub'] = module\n"
        "    from r1mega import api\n"
        "    api.COMMANDS['export'] = api.Command('r1mega_stub:act', 'a stub')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    result = api.export("checkpoint=given", "launch.processes=2", "dtype=bf16", "name=pair")
    assert result == {"rank": "0", "world": "2", "dtype": "bf16"}
    assert (tmp_path / "runs" / "pair" / "config.yaml").is_file()


def test_ranks_that_stop_may_take_their_time(tmp_path, capfd) -> None:
    """Status 75 of one rank is no failure that ends the others: they save too, and their words are not shown as an error."""
    body = (
        "print(f'stopped {rank}', file=sys.stderr)\n"
        "if rank == 0: time.sleep(1.0); (folder / 'saved').write_text('')\n"
        "sys.exit(75)"
    )  # fmt: skip
    with pytest.raises(LaunchError) as caught:
        start_ranks(script(tmp_path, body), 2, grace_seconds=0.1, end_seconds=0.1)
    assert caught.value.status == 75 and (tmp_path / "saved").exists()
    assert capfd.readouterr().err == "stopped 0\n"


def test_a_signal_while_ranks_are_started_reaches_all_of_them(tmp_path, monkeypatch) -> None:
    """It comes when the first of three ranks is there."""
    real, started = subprocess.Popen, []

    def popen(*args, **kwargs):
        process = real(*args, **kwargs)
        started.append(process)
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr("r1mega.launch.local.subprocess.Popen", popen)
    body = (
        "def note(*_): sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, note)\n"
        "(folder / f'pid{rank}').write_text('1')\n"
        "time.sleep(60)"
    )  # fmt: skip
    begin = time.monotonic()
    with pytest.raises((LaunchError, SystemExit)):
        start_ranks(script(tmp_path, body), 3, grace_seconds=0.2)
    assert len(started) == 3 and time.monotonic() - begin < 30 and not any(process.poll() is None for process in started)
