"""`simreg bench` from the command line, and the recorded benchmark that calls it."""

import json
import sys

import pytest
import torch
from matplotlib.image import imread

from benchmarks import loss
from simreg import cli
from simreg.bench import problem, records, run
from simreg.bench.contenders import BARE, CAPTURED, contenders

FIELDS = {
    *("length", "dim", "batch", "dtype", "chunk", "variant", "name", "median_s", "quartiles_s"),
    *("rounds", "over_bare", "peak_extra_bytes", "skipped"),
}


@pytest.fixture
def measured(monkeypatch):
    """The shapes that are measured, without a process for each memory figure."""
    monkeypatch.setattr(records, "peak_extra_bytes", lambda *args: 3 * 2**20)
    shapes, real = [], run.measure_shape

    def watch(shape, *args, **options):
        shapes.append(shape)
        return real(shape, *args, **options)

    monkeypatch.setattr(run, "measure_shape", watch)
    return shapes


def bench(*flags):
    return cli.main(["bench", "--device", "cpu", *map(str, flags)])


def test_a_run_writes_table_json_and_figure(tmp_path, capsys, measured, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/simreg", "bench", "--out", "a b"])
    out = tmp_path / "deep" / "b.json"
    grid = ["--shapes", "2x16x8", "2x32x8", "--chunks", "0", "8", "--variants", "out", "in"]
    chosen = ["--contenders", "naive", "blockwise", "--rounds", "3", "--out", out]
    assert bench(*grid, *chosen) == 0
    results = json.loads(out.read_text())
    found = results["records"]
    assert len(measured) == 4
    assert len(found) == 4 * 5
    assert all(set(record) == FIELDS for record in found)
    assert {(r["name"], r["variant"]) for r in found} == {
        *((BARE, None), ("naive", "out"), ("naive", "in")),
        *(("blockwise", "out"), ("blockwise", "in")),
    }
    for record in found:
        low, high = record["quartiles_s"]
        assert 0 < low <= record["median_s"] <= high
        assert record["rounds"] == 3
        assert record["skipped"] is None
        assert record["peak_extra_bytes"] == 3 * 2**20
    assert results["machine"]["device"] == "cpu"
    assert results["versions"]["torch"] == torch.__version__
    assert results["command"] == "simreg bench --out 'a b'"
    assert imread(out.with_suffix(".png")).shape[1] > 1000
    assert "sequence length L" in out.with_suffix(".svg").read_text()
    text = capsys.readouterr().out
    assert "batch 2, L 32, chunks of 8, d 8, float32" in text
    assert "blockwise (in)" in text
    assert str(out) in text


def test_limits_and_device_are_those_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "measure_shape", lambda *args, **options: asked.append(options) or [])
    flags = ["--shapes", "1x8x4", "--rounds", 7, "--seconds", 2.5, "--out", tmp_path / "b.json"]
    assert bench(*flags) == 0
    assert asked == [{"rounds": 7, "seconds": 2.5, "memory": True}]
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert run.find_device("auto").type == kind
    monkeypatch.setattr(run, "_machine", lambda device: {"device": "NVIDIA H200 (MIG)"})
    assert run._default_out(torch.device("cuda")).name == "bench-nvidia-h200-mig.json"


def test_memory_can_be_left_out(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(records, "peak_extra_bytes", lambda *args: pytest.fail("measured"))
    flags = ["--shapes", "1x8x4", "--contenders", "blockwise", "--rounds", "3", "--no-memory"]
    assert bench(*flags, "--out", tmp_path / "b.json") == 0
    found = json.loads((tmp_path / "b.json").read_text())["records"]
    assert [r["peak_extra_bytes"] for r in found] == [None, None]


def test_an_interruption_costs_the_shape_that_is_measured(tmp_path, capsys, monkeypatch):
    calls = []

    def stop_at_the_third(shape, *args, **options):
        calls.append(shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return records.measure_shape(shape, *args, **options)

    monkeypatch.setattr(run, "measure_shape", stop_at_the_third)
    out = tmp_path / "b.json"
    out.write_text('{"what": "before", "records": []}')
    shapes = ["1x4x4", "1x8x4", "1x16x4", "1x32x4"]
    flags = ["--contenders", "blockwise", "--rounds", 3, "--no-memory", "--out", out]
    assert bench("--shapes", *shapes, *flags) == 130
    found = json.loads(out.read_text())
    assert {record["length"] for record in found["records"]} == {4, 8}
    assert (tmp_path / "b.png").exists()  # of these
    later = problem.shapes(shapes[2:], 4, ["float32"], [None])
    assert found["left"] == [str(shape) for shape in later]


def test_without_a_figure_none_is_named(tmp_path, capsys, measured, monkeypatch):
    monkeypatch.setattr(run.plots, "figure", lambda records: None)
    flags = ["--shapes", "1x8x4", "--contenders", "blockwise", "--rounds", 3, "--no-memory"]
    assert bench(*flags, "--out", tmp_path / "b.json") == 0
    assert "figure  " not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert json.loads((tmp_path / "b.json").read_text())["left"] == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--device tpu", "--device: expected auto, cpu, cuda or mps, got 'tpu'"),
        ("--device cuda", "--device cuda: PyTorch finds no such device here"),
        ("--dtypes int8", "--dtypes: expected any of float32, bfloat16, float16, float64, got"),
        ("--shapes 8by4", "--shapes: expected LENGTHxDIM or BATCHxLENGTHxDIM"),
        ("--tokens 0", "--tokens: expected a positive number, got 0"),
        ("--chunks 1", "--chunks: expected 0 (whole rows), or 2 or more, got 1"),
        ("--chunks 7", "--chunks: 7 does not divide the length 256"),
        ("--variants up", "--variants: expected any of out, in, decoupled, got 'up'"),
        ("--contenders fast", "--contenders: expected any of 'bare matmuls', naive,"),
        ("--rounds 2", "--rounds: expected 3 or more, got 2"),
        ("--seconds -1", "--seconds: expected 0 or more, got -1"),
        ("--seconds nan", "--seconds: expected 0 or more, got nan"),
        ("--out {tmp}", "--out {tmp}: expected a file name, this is a folder"),
        ("--chunks", "--chunks: expected one or more"),
        ("--variants", "--variants: expected one or more"),
        ("--out {tmp}/b.png", "--out {tmp}/b.png: expected the name of the JSON file, not of the"),
        ("--out {tmp}/file", "there is a {tmp}/file that `simreg bench` did not write and would"),
        ("--out {tmp}/other", "there is a {tmp}/other that `simreg bench` did not write and"),
        ("--out {tmp}/file/b.json", "--out {tmp}/file/b.json: cannot write there: "),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_measured(
    flags, says, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run, "measure_shape", lambda *args, **options: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    (tmp_path / "other").write_text('{"what": 1}')
    words = flags.format(tmp=tmp_path).split()
    default = [] if "--out" in words else ["--out", str(tmp_path / "b.json")]
    assert cli.main(["bench", *default, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"simreg: error: {says.format(tmp=tmp_path)}")
    assert error.count("\n") == 1


def test_the_recorded_benchmark(tmp_path, monkeypatch, measured, capsys):
    asked = []
    monkeypatch.setattr(loss, "peak_extra_bytes", lambda *args: [asked.append(args), 5][1])
    monkeypatch.setattr(loss, "SHAPES", ["2x8x4"])
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    loss.main(loss.Options(rounds=3, seconds=1.0, out=tmp_path / "loss.json"))
    results = json.loads((tmp_path / "loss.json").read_text())
    assert results["memory"] == {
        **{"length": 16_384, "dim": 512, "batch": 1, "name": "blockwise", "peak_extra_bytes": 5}
    }
    ((contender, shape, device),) = asked
    assert (contender.title, shape.length, device.type) == ("blockwise", 16_384, "cpu")
    variants = {r["variant"] for r in results["records"] if r["name"] == "blockwise"}
    assert variants == {"out", "in", "decoupled"}
    skipped = {r["name"]: r["skipped"] for r in results["records"]}
    assert skipped["compiled naive"].startswith("ZeroDivisionError")
    assert "not run: compiled naive" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda(tmp_path, dtype):
    out = tmp_path / "b.json"
    flags = ["--device", "cuda", "--shapes", "2x512x64", "--dtypes", dtype, "--rounds", "3"]
    assert cli.main(["bench", *flags, "--out", str(out)]) == 0
    found = {r["name"]: r for r in json.loads(out.read_text())["records"]}
    missing = {c.name for c in contenders(torch.device("cuda")) if c.missing}
    assert {name for name, r in found.items() if r["skipped"]} == missing
    gradient = 2 * 512 * 64 * getattr(torch, dtype).itemsize
    for name in found.keys() - missing:
        assert found[name]["median_s"] > 0
        assert (found[name]["peak_extra_bytes"] or 0) >= (0 if name == CAPTURED else gradient)
