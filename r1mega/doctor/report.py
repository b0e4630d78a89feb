"""``r1mega doctor``: the checks as a table or as JSON, and the exit status. Works where Hydra, YAML or torch is missing or broken.

In: :class:`~r1mega.config.tools.DoctorConfig`. Out: ``{"r1mega", "usable", "checks"}``; ``usable``: every required check is ok.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.errors import UserError
from r1mega.config.tools import DoctorConfig
from r1mega.doctor.checks import PIP, Check, checks, examine_all

WIDTH = 110
MARKS = {"ok": "ok", "missing": "-", "fault": "FAULT"}


def main(overrides: Sequence[str]) -> int:
    """Run doctor with ``overrides`` and return its exit status: 0 usable, 1 not. Raises UserError for a wrong override."""
    return 0 if doctor(_config(overrides))["usable"] else 1


def doctor(cfg: DoctorConfig) -> dict[str, Any]:
    """Run all checks, print them, and return them."""
    if not hasattr(cfg.engine, "urls"):
        raise UserError("engine: doctor looks at SGLang servers; got another engine; write engine=sglang engine.url=URL")
    if cfg.engine.urls():
        return servers(cfg)
    found = checks(Path(cfg.out))
    results = []
    say = (lambda text: None) if cfg.json else (lambda text: print(text, flush=True))
    say(f"r1mega {__version__} at {Path(__file__).resolve().parents[1]}")
    for check, result in zip(found, examine_all(found, cfg.timeout_seconds), strict=True):
        if not results or results[-1]["required"] != check.required:
            say("\nneeded by make quickstart and make test" if check.required else "\noptional")
        say(row(result, found))
        results.append(result)
    whole = {"r1mega": __version__, "usable": all(one["state"] == "ok" for one in results if one["required"]), "checks": results}
    say(f"\n{verdict(results)}")
    if cfg.json:
        print(json.dumps(whole, indent=2, ensure_ascii=False))
    return whole


def servers(cfg: DoctorConfig) -> dict[str, Any]:
    """Look at the servers of ``cfg.engine``, print, and return as :func:`doctor` does; usable: nothing is at fault."""
    from r1mega.doctor import engine

    wide, results = [Check(name, True, "", "") for name in engine.names()], []
    for result in engine.examine_servers(cfg.engine):
        if not cfg.json:
            print(row(result | {"required": False}, wide), flush=True)
        results.append(result)
    faults = [one["name"] for one in results if one["state"] == "fault"]
    whole = {"r1mega": __version__, "usable": not faults, "checks": results}
    if cfg.json:
        print(json.dumps(whole, indent=2, ensure_ascii=False))
    else:
        print(f"\nverdict: {'not fit for engine=sglang: ' + ', '.join(faults) if faults else 'fit for engine=sglang'}")
    return whole


def row(result: dict[str, Any], found: Iterable[Check]) -> str:
    """One check as text: state, name, version, detail; where it is not well also what is off and what adds it."""
    wide = max(len(check.name) for check in found)
    mark = "MISSING" if result["required"] and result["state"] == "missing" else MARKS[result["state"]]
    head = f"  {mark:<7}  {result['name']:<{wide}}  "
    text = "  ".join(
        filter(None, [f"{result['found']:<16}".rstrip() if not result["detail"] else f"{result['found']:<16}", result["detail"]])
    )
    lines = textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * (len(head) + 18), break_long_words=False)
    lines = lines or [head.rstrip()]
    for name in ("off", "add"):
        if result[name]:
            lines += textwrap.wrap(
                result[name],
                WIDTH,
                initial_indent=f"{'':11}{name}: ",
                subsequent_indent=" " * 16,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines)


def verdict(results: Sequence[dict[str, Any]]) -> str:
    """One line: ready, or what stands in the way."""
    bad = [one for one in results if one["required"] and one["state"] != "ok"]
    if bad:
        ways = [one["add"].partition(PIP) for one in bad]
        one_way = f"{ways[0][0]}{PIP}{' '.join(wanted for _, _, wanted in ways)}"
        how = one_way if all(pip for _, pip, _ in ways) else "the lines above say what adds it"
        return f"verdict: not ready for make quickstart and make test: {', '.join(one['name'] for one in bad)}; {how}"
    broken = [one["name"] for one in results if one["state"] == "fault"]
    rest = f"; optional and not well: {', '.join(broken)}" if broken else ""
    device = "the GPU and the CPU" if any(one["name"] == "GPU" and one["state"] == "ok" for one in results) else "the CPU"
    return f"verdict: ready for make quickstart and make test, on {device}{rest}"


def _config(overrides: Sequence[str]) -> DoctorConfig:
    try:
        from r1mega.config.compose import compose
    except Exception as error:  # noqa: BLE001 - Hydra, OmegaConf or YAML is missing or broken, which is what doctor is there to say
        print(f"doctor: overrides are read without Hydra, which does not import ({type(error).__name__}: {error})", file=sys.stderr)
        return _plain(overrides)
    return compose("doctor", overrides)


def _plain(overrides: Sequence[str]) -> DoctorConfig:
    """The config where Hydra cannot compose it."""
    config = DoctorConfig(out="runs/run")
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "json" and value in ("true", "false"):
            config.json = value == "true"
        elif name == "timeout_seconds" and value.isdecimal() and int(value) >= 1:
            config.timeout_seconds = float(value)
        elif name != "debug":
            raise UserError(f"{name}: without Hydra doctor takes json and timeout_seconds; got {override!r}; write json=true")
    return config
