"""`python -m blockell_kernels.env` and `python -m blockell_kernels.bench`."""

import csv
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch

from blockell_kernels import _backends, bench, env
from blockell_kernels._bench import _contenders, _peers, _report, _timing
from blockell_kernels._bench._cases import BenchCase, make_operands
from blockell_kernels._bench._ceiling import Ceiling

CASE = BenchCase(
    tokens=70, in_features=64, out_features=96, tile=16, row_group=3, density=0.5, mode="training"
)


def test_env_names_versions_devices_and_why_a_backend_is_out(monkeypatch, capsys):
    reason = "no CUDA device is visible to torch"
    monkeypatch.setattr(env, "unavailable", lambda name: reason if name == "triton" else None)
    monkeypatch.setenv("BLOCKELL_BACKEND", "dense")
    env.main()
    printed = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in printed.splitlines())
    facts = {label.strip(): value.strip() for label, value in facts.items()}
    assert facts["torch"] == torch.__version__
    assert facts["backend triton"] == f"no: {reason}"
    assert facts["backend gathered"] == "available"
    assert facts["BLOCKELL_BACKEND"] == "dense"
    assert {"python", "triton", "cpu", "cuda built for", "backend dense"} <= set(facts)


def test_env_says_when_a_package_is_missing():
    assert env.version_of("surely-not-installed-anywhere") is None


def test_env_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "blockell_kernels.env"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "backend auto" in done.stdout


def test_bench_quick_writes_a_table_and_csv(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n")
    bench.main(["--quick", "--csv", str(tmp_path / "rows.csv"), "--update", str(page)])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"nn.Linear", "masked dense", "ours (auto)"} <= {row["contender"] for row in rows}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["torch"] == torch.__version__
        assert row["device"] == env.cpu_name()
        assert row["date"]
        assert row["commit"]
        assert row["dtype"] == "float32"
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:cpu -->\n")
    assert text.endswith("<!-- /bench:cpu -->\nafter\n")
    assert "old" not in text
    assert "| 256 | 128 -> 256 | 16 | 8 | 50% | training | **1.00x**" in text
    assert text.split("bench:cpu -->\n")[1].splitlines()[0] in capsys.readouterr().out


def test_bench_figures_follow_from_times_and_ceiling(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ceiling", lambda *_: Ceiling(tflops=0.05, gb_per_s=50.0))
    bench.main(["--quick", "--modes", "training", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    x, y, weight = 256 * 128, 256 * 256, 128 * 256
    for name, share in (("nn.Linear", 1.0), ("ours (auto)", 0.5)):
        row = {key: float(value) for key, value in rows[name].items() if key[-3:] in ("_ms", "ops")}
        seconds = row["p50_ms"] / 1e3
        flops, traffic = 6 * 256 * weight * share, 4 * (3 * (x + weight * share) + 2 * y)
        assert row["tflops"] == pytest.approx(flops / seconds / 1e12, rel=1e-2)
        assert float(rows[name]["gb_per_s"]) == pytest.approx(traffic / seconds / 1e9, rel=1e-2)
        bound = max(flops / 0.05e12, traffic / 50e9)
        assert float(rows[name]["ceiling_share"]) == pytest.approx(bound / seconds, abs=6e-4)
    assert rows["nn.Linear"]["host_us"] == rows["nn.Linear"]["peak_mib"] == ""  # CPU


def test_bench_draws_every_contender_but_dense(tmp_path):
    bench.main(["--quick", "--modes", "forward", "--plot", str(tmp_path / "plot.svg")])
    plot = ElementTree.parse(tmp_path / "plot.svg")
    texts = [element.text for element in plot.iter() if element.tag.endswith("text")]
    assert {"masked dense", "torch BSR", "ours (auto)"} <= set(texts)
    assert "nn.Linear" not in texts
    assert "256 x 128 -> 256, 16x8, 50%, forward" in texts


def test_bench_names_peers_that_cannot_run(capsys):
    bench._refused.clear()
    bench.main(["--quick", "--modes", "training", "--peers", *_peers.PEERS])
    printed = capsys.readouterr()
    assert "left out: STK: the package stanford-stk is not installed" in printed.err
    assert "left out: cuSPARSE: it runs on CUDA devices in torch.float32" in printed.err
    assert "left out: torch BSR, tuned: its tuner is for its GPU kernels" in printed.err
    assert "torch BSR " not in printed.out  # it has no gradient for the weight


def test_a_peer_with_a_wrong_result_is_left_out_by_name(monkeypatch):
    def wrong(case, o):
        _peers._checked(case, o, lambda: torch.zeros_like(o.dy))

    monkeypatch.setitem(_peers.PEERS, "torch BSR", wrong)
    heard, case = [], BenchCase(**{**CASE.__dict__, "mode": "forward"})
    found = _contenders.contenders(case, make_operands(case), (), ("torch BSR",), heard.append)
    assert [contender.name for contender in found] == ["nn.Linear", "masked dense"]
    assert heard == ["torch BSR: its result is off by 1.00e+00 of the largest entry"]


@pytest.mark.slow
def test_bench_compiled_and_no_graphs_on_the_cpu(capsys):
    bench.main(["--quick", "--modes", "training", "--runs", "compile", "graph", "--peers"])
    printed = capsys.readouterr()
    assert "| training, compile | **1.00x**" in printed.out
    assert "CUDA graphs need a CUDA device" in printed.err


def test_cpu_time_is_not_wall_time():
    wall, cpu = (_timing.clock_for("cpu", cpu_time).time_ms for cpu_time in (False, True))
    assert cpu(lambda: time.sleep(0.1)) < 50 < wall(lambda: time.sleep(0.1))
    assert _report.facts("cpu", cpu_time=True).clock == "CPU time"


def test_bench_leaves_out_what_cannot_be_built(capsys):
    options = bench.parse(["--shapes", "8x64x96", "--layouts", "16x1", "64x1", "16x4"])
    layouts = {(case.tile, case.row_group) for case in bench.cases(options)}
    assert layouts == {(16, 1)}
    printed = capsys.readouterr().err
    assert "left out: 8x64x96 64x1: out_features is no multiple of the tile" in printed
    assert "16x4: the row group does not divide the block rows" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shapes", "64x96"],
            "--shapes (='64x96') must have the form NxINxOUT, as 2048x640x2560",
        ),
        (["--layouts", "16"], "--layouts (='16') must have the form TILExROWGROUP, as 16x8"),
        (["--densities", "1.5"], "--densities (=1.5) must be in (0, 1]"),
        (["--device", "cuda"], "--device (='cuda'): no CUDA device is visible to torch"),
    ],
)
def test_bench_says_what_is_wrong_with_its_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--quick", *arguments])
    assert message in capsys.readouterr().err


def test_update_needs_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="must hold the lines <!-- bench:cpu -->"):
        _report.update_section(page, "cpu", "text")
    assert page.read_text() == "nothing here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gate_passes_what_is_right(dtype):
    case = BenchCase(**{**CASE.__dict__, "dtype": dtype})
    operands = make_operands(case)
    for backend in ("auto", "gathered", "dense"):
        assert _contenders.gate(case, operands, backend) is None


@pytest.mark.parametrize(
    ("method", "name"),
    [("forward_by", "y"), ("grad_input_by", "dx"), ("grad_values", "dvalues")],
)
@pytest.mark.parametrize("fault", [float("nan"), 1.0])
def test_the_gate_stops_what_is_wrong(monkeypatch, method, name, fault):
    backend = _backends.get_backend("dense")
    right = getattr(backend, method)

    def wrong(*args):
        result = right(*args)
        result.view(-1)[-1] += fault * 10
        return result

    monkeypatch.setattr(backend, method, wrong)
    message = _contenders.gate(CASE, make_operands(CASE), "dense")
    assert message.startswith(f"{name} is off by")
    options = bench.parse(["--quick", "--backends", "dense"])
    with pytest.raises(SystemExit, match="wrong result, nothing timed"):
        bench.measure(CASE, options)


def test_steps_take_turns_until_their_budget_is_used_up():
    turns = []

    class Clock:
        def time_ms(self, step):
            step()
            return 1000.0 if turns[-1] == "slow" else 1.0

    steps = {name: lambda name=name: turns.append(name) for name in ("fast", "slow")}
    times = _timing.time_all(steps, Clock(), rounds=6, budget_s=2.0)
    assert turns == ["fast", "slow"] + ["fast", "slow"] * 3 + ["fast"] * 3
    assert times["fast"] == (1.0, 1.0, 1.0)
    assert times["slow"].p50_ms == 1000.0
