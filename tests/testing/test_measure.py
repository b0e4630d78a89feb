"""r1mega bench: what is timed, shares, the table, the roofline, the baseline and its check; a layer and a step of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega import api, cli
from r1mega.config.bench import BenchConfig
from r1mega.config.errors import Failed, UserError
from r1mega.config.run import DeviceConfig, PrecisionConfig
from r1mega.device import open_device
from r1mega.testing import bench as cases
from r1mega.testing.bench import Bench
from r1mega.testing.measure import ceilings, clock, model, results, run
from r1mega.testing.measure.model import even_choice
from r1mega.testing.measure.results import Row
from r1mega.testing.measure.roofline import roofline

ROW = Row("scale", "big", 100.0, 10**6, 4 * 10**6, "copy", 2e10, {"torch": 150.0, "other": "RuntimeError: no"})
TINY = ("model.num_layers=2", "model=tiny", "model.num_mtp_layers=0", "rounds=1", "warmup=0", "device.threads=1")


@pytest.fixture
def device():
    return open_device(DeviceConfig(threads=1))


@pytest.fixture
def quick(monkeypatch):
    """Ceilings without the time that they take, and one bench instead of the package's."""
    monkeypatch.setattr(ceilings, "measure", lambda device: {"copy": 1e9, "bf16": 1e12})
    doubled = Bench(
        "double", "8 numbers", lambda device: (torch.arange(8.0, device=device),), lambda x: 2 * x, 64, 8, peers={"torch": lambda x: x + x}
    )  # fmt: skip
    held = [doubled]
    monkeypatch.setattr(run, "all_benches", lambda pattern=None: [one for one in held if pattern in (None, one.op)])
    return held


def test_the_benches_of_the_package_are_found_and_each_has_its_own_name_torch_as_a_peer_and_its_work() -> None:
    found = cases.all_benches()
    assert len({(one.op, one.case) for one in found}) == len(found)
    assert cases.all_benches("no such op") == []
    for one in found:
        assert one.ceiling in ceilings.UNITS and "torch" in one.peers, f"{one.op}, {one.case}"
        assert one.num_bytes if one.ceiling == "copy" else one.flops, f"{one.op}, {one.case}: the work that its ceiling counts"


def test_inputs_rotate_through_more_than_the_cache(device) -> None:
    def make(where):
        return torch.zeros(1 << 20, dtype=torch.uint8), [torch.zeros(1 << 20, dtype=torch.uint8)], 3

    inputs = clock.rotation(make, device)
    assert len(inputs) == clock.ROTATED_BYTES_CPU >> 21
    assert len({one[0].data_ptr() for one in inputs}) == len(inputs)
    assert len(clock.rotation(lambda where: (1,), device)) == clock.MOST_COPIES


def test_calls_take_turns_on_the_same_inputs_and_one_that_fails_is_told(device) -> None:
    seen: list[tuple[str, int]] = []

    def fail(x):
        raise RuntimeError("first line\nsecond")

    calls = {"a": lambda x: seen.append(("a", x)), "b": lambda x: seen.append(("b", x)), "c": fail}
    times, faults = clock.medians(calls, [(1,), (2,)], device, rounds=3, warmup=1)
    assert set(times) == {"a", "b"} and all(took > 0 for took in times.values()) and faults == {"c": "RuntimeError: first line"}
    for name in "ab":
        assert [x for who, x in seen if who == name] == [1, 2] * 4


def test_ceilings_are_measured_on_this_device(device, monkeypatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES_CPU", 1 << 20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZE_CPU", 32)
    found = ceilings.measure(device, rounds=2)
    assert set(found) == {"copy", "bf16"} and all(rate > 0 for rate in found.values())


def test_rates_shares_and_ratios_are_what_the_table_shows() -> None:
    assert (ROW.rate, ROW.share, ROW.figure, ROW.ratios) == (1e10, 0.5, 0.5, {"torch": 1.5})
    product = replace(ROW, ceiling="bf16", limit=8e10)
    assert (product.work, product.share) == (4 * 10**6, 0.5)
    unknown = replace(ROW, num_bytes=0)  # no work: calls in the time in which the ceiling does 1 GB, 50 ms
    assert unknown.share is None and unknown.figure == pytest.approx(500)
    failed = replace(ROW, case="small", microseconds=None, fault="ValueError: no")
    assert (failed.rate, failed.figure, failed.ratios) == (None, None, {})
    lines = results.table([ROW, failed]).splitlines()
    assert lines[1].split() == ["scale", "big", "100.0", "10", "GB/s", "copy", "50%", "torch", "1.50", "other", "-"]
    assert lines[2].split()[:3] == ["scale", "small", "failed"]
    assert lines[3:] == ["scale: small: ours failed: ValueError: no"] + [
        f"scale: {case}: other failed: RuntimeError: no" for case in ("big", "small")
    ]


def test_the_roofline_has_a_point_for_each_row_below_its_roof() -> None:
    rows = [ROW, replace(ROW, case="<&>", num_bytes=10**4), replace(ROW, flops=0)]
    tree = ElementTree.fromstring(roofline(rows, {"copy": 2e10, "bf16": 1e12, "fp8": 2e12}, "a <device>"))
    titles = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "a <device>" and titles[1:] == [
        "scale: big: 100.0 us, 4 operations/byte, 0.04 TFLOP/s",
        "scale: <&>: 100.0 us, 400 operations/byte, 0.04 TFLOP/s",
    ]
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    assert roofline([replace(ROW, flops=0)], {"copy": 1e9}, "none") == ""


def test_a_figure_falls_by_more_than_the_tolerance(tmp_path) -> None:
    path = tmp_path / "new" / results.baseline_name("NVIDIA H200 (x)")
    assert path.name == "NVIDIA-H200-x.json"
    results.write_baseline(path, {"a": 0.5, "b": 0.5}, {"device": "d"})
    results.write_baseline(path, {"b": 0.8, "c": 0.25}, {"device": "e"})
    assert results.read_baseline(path) == {"a": 0.5, "b": 0.8, "c": 0.25} and json.loads(path.read_text())["device"] == "e"
    held = results.read_baseline(path)
    assert results.regressions({"a": 0.46, "b": 0.8, "d": 0.001}, held, 0.1) == []
    assert results.regressions({"a": 0.44, "b": 0.4}, held, 0.1) == [
        "a: 0.44, 12% below the baseline's 0.5",
        "b: 0.4, 50% below the baseline's 0.8",
    ]
    path.write_text("{}")
    with pytest.raises(UserError, match="baseline: a file of figures; got .* with KeyError"):
        results.read_baseline(path)


def test_two_rows_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="each case of an op has a name of its own; got 'scale: big' twice"):
        results.figures_of([ROW, ROW])


def test_the_command_measures_keeps_and_compares(quick, tmp_path, capsys) -> None:
    words = [f"out={tmp_path}/out", f"baseline={tmp_path}/base.json", "rounds=2", "warmup=1", "device.threads=1"]
    found = api.bench(*words, "write_baseline=true")
    assert found["ceilings"] == {"copy": 1e9, "bf16": 1e12} and [row["op"] for row in found["rows"]] == ["double"]
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["figures"] == found["figures"] and set(kept["rows"][0]["peers"]) == {"torch"}
    assert (tmp_path / "out" / "roofline.svg").is_file() and (tmp_path / "out" / "config.yaml").is_file()
    base = tmp_path / "base.json"
    assert set(results.read_baseline(base)) == {"double: 8 numbers"}
    base.write_text(json.dumps({"figures": {"double: 8 numbers": 1e9}}))
    capsys.readouterr()
    assert cli.main(["bench", *words, "check=true"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("double: 8 numbers: ") and "100% below the baseline's 1e+09" in said.err and "peer time" in said.out
    base.write_text(json.dumps({"figures": {"double: 8 numbers": 1e-9}}))
    assert cli.main(["bench", *words, "check=true"]) == 0
    assert "none of 1 figures has fallen by more than 10%" in capsys.readouterr().out
    base.write_text(json.dumps({"figures": {"another": 1.0}}))  # nothing to compare is no success
    assert cli.main(["bench", *words, "check=true"]) == 1
    assert capsys.readouterr().err.startswith("check: a figure that ")


def test_an_op_of_ours_that_fails_is_told_after_the_others(quick, tmp_path, capsys) -> None:
    quick.append(replace(quick[0], op="broken", run=lambda x: torch.ones(2) @ torch.ones(3)))
    with pytest.raises(Failed, match="^broken: 8 numbers: failed: RuntimeError: "):
        api.bench(f"out={tmp_path}", "rounds=1", f"baseline={tmp_path}/base.json", "write_baseline=true")
    assert "double" in capsys.readouterr().out and not (tmp_path / "base.json").exists()


def test_an_unknown_op_is_refused(quick, tmp_path) -> None:
    with pytest.raises(UserError, match="op: an op with a benchmark; got doubel; did you mean double\\? use one of double"):
        api.bench(f"out={tmp_path}", "op=doubel")


def test_a_moe_layer_and_a_step_of_a_tiny_model(quick, tmp_path, capsys) -> None:
    layer = api.bench("bench=moe", "tokens=24", *TINY, f"out={tmp_path}/moe")
    assert layer["forward_backward_ms"] > 0 and layer["tokens_per_second"] > 0 and layer["share_of_bf16_product"] > 0
    assert {"held_gib", "peak_forward_gib", "peak_backward_gib"} <= layer.keys()
    capsys.readouterr()
    step = api.bench("bench=step", "sequence_length=16", "microbatches=2", *TINY, f"out={tmp_path}/step")
    line = json.loads(capsys.readouterr().out)
    peer = {
        "layers", "experts", "precision", "forward_backward_ms", "step_ms", "tokens_per_second", "tflops_forward_backward",
        "tflops_step", "loss", "peak_gib", "peak_pass_gib", "peak_update_gib",
    }  # fmt: skip
    assert peer <= line.keys() and line["layers"] == 2 and line["step_ms"] >= line["forward_backward_ms"] > 0
    assert 5 < line["loss"] < 8 and list(step["figures"]) == ["step: tiny, 16 experts, 2 layers, 2 x 1 x 16 tokens, fp32"], (
        "a fresh model of 512 tokens is near log 512"
    )
    assert (Path(tmp_path) / "step" / "bench.json").is_file()


def test_routed_experts_alone_have_even_rows_and_no_router(quick, tmp_path, capsys) -> None:
    routed = api.bench("bench=moe", "tokens=64", "routed_only=true", *TINY, f"out={tmp_path}/routed")
    line = json.loads(capsys.readouterr().out)
    assert line["routed_only"] is True and line["forward_backward_ms"] > 0 and "peer" not in line
    assert list(routed["figures"]) == ["moe: tiny, 16 experts, 64 tokens from permute to unpermute, fp32"]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1024, 32, 8), (64, 16, 4), (40, 16, 16), (5, 8, 1)])
def test_the_even_choice_is_even_and_random(tokens: int, experts: int, top_k: int) -> None:
    chosen = even_choice(tokens, experts, top_k, seed=1)
    assert chosen.shape == (tokens, experts) and (chosen.sum(1) == top_k).all()
    rows = chosen.sum(0)
    assert rows.max() - rows.min() <= (0 if tokens % experts == 0 else experts)
    if tokens % experts == 0:
        assert (rows == tokens * top_k // experts).all()
    assert torch.equal(chosen, even_choice(tokens, experts, top_k, seed=1))
    if top_k < experts:
        assert not torch.equal(chosen, even_choice(tokens, experts, top_k, seed=2))


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there")
def test_a_peer_that_is_missing_is_told_beside_our_numbers(quick, tmp_path, capsys) -> None:
    wide = ("model.moe_ffn_size=128", "precision=fp8", "tokens=64", "peer=true")
    found = api.bench("bench=moe", *TINY, *wide, f"out={tmp_path}/moe")
    line = json.loads(capsys.readouterr().out)
    assert line["precision"] == "fp8" and line["forward_backward_ms"] > 0
    assert line["peer"].startswith("precision.products: te takes products from Transformer Engine; got ModuleNotFoundError")
    assert list(found["figures"]) == ["moe: tiny, 16 experts, 64 tokens, fp8"]


@pytest.mark.parametrize("bench", ["moe", "step"])
def test_the_peers_medians_stand_over_ours(monkeypatch, device, bench: str) -> None:
    from r1mega.model.fp8 import te

    asked = []

    def measured(config, on, rounds):
        asked.append((config.precision.products, on, rounds))
        return {"forward_backward_ms": 3.0, "step_ms": 5.0, "loss": 7.0}, 1.0

    monkeypatch.setattr(te, "require", lambda: None)
    monkeypatch.setattr(model, "moe_layer" if bench == "moe" else "training_step", measured)
    ours = {"forward_backward_ms": 2.0, "step_ms": 4.0, "loss": 6.0}
    config = BenchConfig(bench=bench, precision=PrecisionConfig(dtype="bf16", products="fp8", power_of_two_scales=True))
    found = model.with_peer(config, device, 3, ours)
    assert asked == [("te", device, 3)]
    assert (found["peer_over_ours_forward_backward"], found["peer_over_ours_step"], found["loss"]) == (1.5, 1.25, 6.0)
    assert found["peer"]["loss"] == 7.0


def test_the_preset_is_the_peers_model() -> None:
    """The shapes of the script that r1mega is compared with."""
    from r1mega.config.compose import preset

    slice_, whole = preset("model", "deepseek_v3_slice"), preset("model", "deepseek_v3")
    own = {
        "name", "vocab_size", "num_layers", "first_k_dense", "num_experts", "num_groups", "topk_groups", "seq_aux_loss_coef",
        "num_mtp_layers", "mtp_loss_coef",
    }  # fmt: skip
    changed = {name for name, value in vars(slice_).items() if value != getattr(whole, name)}
    assert changed == own and slice_.vocab_size == whole.vocab_size // 8
