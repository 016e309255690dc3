"""`simreg plan`: what it says, what it advises, what it refuses, and the table of the docs."""

import re
from pathlib import Path

import pytest

from simreg import cli
from simreg.plan.advice import options, within
from simreg.plan.costs import Job, Setting, shares
from simreg.plan.models import find
from simreg.plan.table import count, name, percent, si, size

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"
RATE = {"tflops": 400.0, "link": 50.0}


def printed(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["plan", *arguments.split()]) == 0
    return capsys.readouterr().out


def test_the_table_of_the_docs_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = printed("--table", capsys)
    assert table in DOCS.read_text()
    assert table.count("\n") == 2 + 25


def test_a_model_by_its_numbers_costs_what_the_preset_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spread = " --seq 131072 --gpus 64 --cp 16"
    numbers = "--params 8030261248 --active-params 7504924672 --hidden 4096 --layers 32"
    preset = printed("--model llama-8b" + spread, capsys).partition("\n")[2]
    own, shared = (printed(numbers + keys + spread, capsys) for keys in ("", " --kv-width 1024"))
    assert shared.partition("\n")[2] == preset
    assert own.partition("\n")[2] != preset


def test_a_setting_at_the_bound_is_within_it() -> None:
    every = options(Job(find("llama-130m"), length=1024), "out", **RATE)
    assert within(every, every[0].shares.time) is every[0]


def test_the_example_of_the_docs_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = re.search(r"    \$ simreg plan (.*)\n((?:    .*\n|\n)+)", DOCS.read_text())
    assert example is not None
    shown = "".join(line[4:] or "\n" for line in example[2].splitlines(keepends=True))
    report = printed(example[1], capsys)
    assert report.startswith(shown.rstrip().removesuffix("..."))
    assert len(shown.splitlines()) > 12


@pytest.mark.parametrize("variant", ["out", "decoupled"])
@pytest.mark.parametrize("tp", [1, 4])
def test_advice_is_the_widest_span_within_the_bound(variant: str, tp: int) -> None:
    job = Job(find("llama-130m"), length=65_536, gpus=4 * tp, tp=tp, cp=4)
    every = options(job, variant, **RATE)
    # Chunks below 2,048 are no cheaper to share over ranks that have no row each.
    assert len(every) == (9 if tp == 1 else 9 + 6) * (2 if variant == "decoupled" else 1)
    for bound in (0.01, 0.02, 0.04, 1.0):
        best = within(every, bound)
        assert best is not None
        assert best.shares.time <= bound
        for other in every:
            wider = other.setting.span(job) > best.setting.span(job)
            same = other.setting.span(job) == best.setting.span(job)
            asked = other.setting.variant == variant
            alike = other.setting.variant == best.setting.variant
            assert not (wider and other.shares.time <= bound)
            assert not (same and alike and other.shares.time < best.shares.time)
            if best.setting.variant != variant:
                assert not (same and asked and other.shares.time <= bound)
    assert within(every, 1e-9) is None


def test_the_variant_asked_for_is_advised_where_it_is_within_the_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = "--model llama-8b --variant decoupled --tp 2 --gpus 2 --depths"
    advice = "of the step's time: decoupled, whole rows, repeated by TP\n"
    assert advice in printed(asked, capsys)
    between = printed(f"{asked} --bound 0.00655", capsys)  # of 0.65 % and 0.66 %
    assert "time: out, whole rows, repeated by TP; decoupled is not at that span\n" in between


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--model llama-8b --seq 32768 --gpus 64 --cp 4 --depths", capsys)
    assert "64 GPUs = data 16 × tp 1 × cp 4 × pp 1" in text
    flops = re.search(r"FLOPs +(\S+) T +(\S+) T +(\S+) %", text)
    assert flops is not None
    loss, model, share = map(float, flops.groups())
    assert loss == pytest.approx(6 * 8192 * 32_768 * 4096 / 1e12, rel=0.01)
    assert share == pytest.approx(100 * loss / model, rel=0.06)
    assert "within 1.0 % of the step's time: out, chunks of 8,192" in text
    assert len(re.findall(r"^\*", text, re.M)) == 1
    assert "out, whole rows" in printed("--model llama-8b --bound 0.02 --seq 32768", capsys)


def test_every_option_reaches_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"rows": 3, "gpus": 8, "tp": 2, "cp": 2, "document": 5000}
    flags = " ".join(f"--{name} {value}" for name, value in layout.items())
    costs = "--variant decoupled --chunk 3072 --tflops 100 --link 5"  # chunks that shards cut
    text = printed(f"--model llama-8b --seq 8192 --depths {flags} {costs}", capsys)
    job = Job(find("llama-8b"), length=8192, **layout)
    share = shares(job, Setting("decoupled", 3072), tflops=100, link=5)
    for line, value in (("FLOPs", share.flops), ("memory", share.memory), ("time", share.time)):
        assert re.search(rf"^{line}.* {re.escape(percent(value))}$", text, re.M), line
    assert "3 × 8,192 tokens (documents of 5,000) for 4 ranks" in text
    assert "SimReg: decoupled, chunks of 3,072, shared by TP; receives" in text
    assert "within 5.0 % of time |" in printed("--table --bound 0.05", capsys)


def test_one_is_not_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-130m"]) == 0
    text = capsys.readouterr().out
    assert "1 GPU = data" in text
    assert "for 1 rank in" in text


def test_report_where_nothing_is_within_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--model llama-8b --bound 1e-7 --depths", capsys)
    assert "no setting is within < 0.01 %" in text
    assert "out, chunks of 256: 0.01 %" in text
    assert not re.findall(r"^\*", text, re.M)


def test_chunks_that_hold_whole_documents_are_no_other_settings() -> None:
    job = Job(find("llama-130m"), length=8192, document=1000)
    assert [each.setting.chunk for each in options(job, "out", **RATE)] == [None, 512, 256]


def test_a_model_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--params 47e9 --active-params 13e9 --hidden 4096 --layers 32 --depths", capsys)
    assert "47 G parameters, 13 G multiplied" in text
    share = float(re.search(r"FLOPs.* (\S+) %", text)[1])  # type: ignore[index]
    model = 6 * 13e9 + 6 * 32 * 4096 * 8192
    assert share == pytest.approx(100 * 5 * 8192 * 4096 / model, rel=0.03)


def test_layers_within_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = "--model llama-130m"
    alone, three = (printed(f"{model} --depths {where}", capsys) for where in ("", "0.25 0.5"))
    assert printed(model, capsys) == three  # as `simreg train` has it
    other_names = printed(f"{model} --seq-len 4096 --chunk-size 512", capsys)
    assert other_names == printed(f"{model} --seq 4096 --chunk 512", capsys)
    assert "in 1 layer within" in printed(f"{model} --depths 0.5", capsys)
    assert "within the model" not in printed(f"{model} --gpus 2 --pp 2", capsys)
    one = printed("--params 1e9 --hidden 4096 --layers 1", capsys)
    assert "within the model" not in one
    assert "SimReg: out, whole rows; receives" in alone
    assert "SimReg: out, whole rows, and in 2 layers within the model; receives" in three
    times = [float(re.search(r"^time.* (\S+) %", text, re.M)[1]) for text in (alone, three)]  # type: ignore[index]
    assert times[1] == pytest.approx(3 * times[0], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "give --model"),
        ("--model llama-8b --depths 0.5 --gpus 2 --pp 2", "--depths: layers within the model have"),
        ("--model llama-8b --depths 1", "--depths: expected fractions between 0 and 1, got [1.0]"),
        ("--model llama-8b --depths nan", "--depths: expected fractions between 0 and 1"),
        ("--model llama-8b --depths 0.5 0.5", "--depths: [0.5, 0.5] are layers [16, 16] of 32"),
        ("--params 1e9 --hidden 64", "give --model"),
        ("--model gpt-9", "--model: no model 'gpt-9'; there are llama-tiny"),
        ("--model llama-8b --layers 3", "--model: give a preset, or"),
        ("--params 1e9 --active-params 2e9 --hidden 64 --layers 2", "--active-params: expected"),
        (
            "--params -1 --hidden 64 --layers 2",
            "--params: expected a positive, finite number, got -1",
        ),
        ("--model llama-8b --gpus 12 --tp 8", "--gpus: 12 is not a multiple of tp × cp × pp = 8"),
        ("--model llama-8b --gpus 3 --cp 3", "--seq: 8192 is not a multiple of --cp 3"),
        ("--model llama-8b --chunk 0", "--chunk: expected a positive, finite number, got 0"),
        ("--model llama-8b --bound nan", "--bound: expected a positive, finite number, got nan"),
        ("--model llama-8b --tflops inf", "--tflops: expected a positive, finite number, got inf"),
        ("--params inf --hidden 64 --layers 2", "--params: expected a positive, finite number"),
        ("--model llama-8b --kv-width 1024", "--model: give a preset, or"),
        ("--params 1e9 --hidden 64 --layers 2 --kv-width 0", "--kv-width: expected from 1 to --h"),
        (
            "--params 1e9 --hidden 64 --layers 2 --kv-width 65",
            "--kv-width: expected from 1 to --hidden, 64; got 65",
        ),
        ("--params 0.5 --hidden 64 --layers 2", "--params: expected a number of parameters"),
        ("--params 1e3 --hidden 4096 --layers 32", "--params: 1000 are too few for 32 layers of w"),
        ("--model llama-8b --chunk 1", "--chunk: expected 2 or more"),
        ("--model llama-8b --gpus 64 --pp 64", "--pp: 64 stages are more than the 32 layers"),
        ("--table --chunk 512", "--chunk: the table of --table"),
        ("--table --link 0", "--link: expected a positive, finite number, got 0"),
        *(
            (f"--model llama-8b --{flag} 0", f"--{flag}: expected a positive, finite number, got 0")
            for flag in ("seq", "rows", "document", "gpus", "tp", "cp", "pp")
        ),
        *(
            (f"--params 1e9 --hidden 64 --layers 2 --{flag} 0", f"--{flag}: expected a positive,")
            for flag in ("active-params", "hidden", "layers")
        ),
        (
            "--params 1e9 --active-params 1e3 --hidden 4096 --layers 2",
            "--active-params: 1000 are too few for 2 layers of width 4096",
        ),
    ],
)
def test_what_is_refused(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"simreg: error: {says}")
    assert error.count("\n") == 1


def test_names() -> None:
    job = Job(find("llama-8b"), length=4096, gpus=2, tp=2)
    assert name(job, Setting()) == "out, whole rows, shared by TP"
    assert name(job, Setting("in", 512, False)) == "in, chunks of 512, repeated by TP"
    packed = Job(find("llama-8b"), length=4096, document=1000)
    assert name(packed, Setting(chunk=2048)) == "out, whole documents"


def test_units() -> None:
    values = (0, 0.00001, 0.000123, 0.00996, 0.0123, 0.0995, 0.123, 12.3)
    texts = ["0", "< 0.01", "0.01", "1.0", "1.2", "10", "12", "1,230"]
    assert [percent(value) for value in values] == [f"{text} %" for text in texts]
    assert [si(v) for v in (7, 999, 1234, 8.03e9, 4.2e20, 4.2e22)] == [
        "7", "999", "1.23 k", "8.03 G", "420 E", "42,000 E",
    ]  # fmt: skip
    assert [size(v) for v in (5, 2048, 96 * 2**20, 999.7 * 2**20, 2**41, 2**50, 2**63)] == [
        "5 B", "2 KiB", "96 MiB", "0.976 GiB", "2 TiB", "1 PiB", "8,192 PiB",
    ]  # fmt: skip
    assert [count(v) for v in (2048, 131_072, 2**20)] == ["2k", "128k", "1M"]
