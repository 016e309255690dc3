"""What the figure shows of the records."""

import pytest
from matplotlib.figure import Figure

from simreg.bench import plots
from simreg.bench.contenders import BARE


def record(name, length, seconds, *, dim=8, chunk=None, variant="out", peak=2**20, skipped=None):
    return {
        **{"name": name, "length": length, "dim": dim, "chunk": chunk, "dtype": "float32"},
        **{"batch": 4096 // length, "variant": None if name == BARE else variant},
        **{"median_s": seconds, "peak_extra_bytes": peak, "skipped": skipped},
    }


FOUND = [
    *(record(BARE, n, n / 1e6) for n in (256, 1024, 4096)),
    *(record("naive", n, n / 2e5, peak=n**2) for n in (1024, 256)),
    record("naive", 4096, None, peak=None, skipped="out of memory"),
    *(record("naive", n, n / 1e5, variant="in") for n in (256, 1024)),
]


def lines(ax):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_time_and_memory_against_length():
    figure = plots.figure(FOUND)
    time, memory = figure.axes
    assert lines(time) == [
        ([256, 1024, 4096], pytest.approx([0.256, 1.024, 4.096])),
        ([256, 1024], pytest.approx([1.28, 5.12])),  # ends where it did not fit
        ([256, 1024], pytest.approx([2.56, 10.24])),
    ]
    assert lines(memory)[1] == ([256, 1024], pytest.approx([2**-4, 1.0]))
    assert [ax.get_ylabel() for ax in (time, memory)] == [
        "forward + backward (ms per batch)",
        "peak memory beyond the inputs (MiB)",
    ]
    assert {ax.get_xscale() for ax in figure.axes} == {ax.get_yscale() for ax in figure.axes}
    assert time.get_xscale() == "log"
    assert time.get_title(loc="left") == "d = 8, float32, 4,096 tokens a batch"
    assert texts(figure) == [BARE, "naive", "naive (in)"]
    assert time.get_lines()[0].get_linestyle() == "--"
    assert time.get_lines()[1].get_color() == time.get_lines()[2].get_color()
    assert time.get_lines()[1].get_linestyle() != time.get_lines()[2].get_linestyle()


def test_a_line_of_panels_for_each_width_and_chunk_with_several_lengths():
    wide = [record("naive", n, 1.0, dim=64) for n in (256, 1024)]
    chunked = [record("naive", n, 1.0, chunk=64) for n in (256, 1024)]
    single = [record("naive", 256, 1.0, dim=99)]
    figure = plots.figure([*FOUND, *wide, *chunked, *single])
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [t for t in titles if t] == [
        "d = 8, float32, 4,096 tokens a batch",
        "d = 64, float32, 4,096 tokens a batch",
        "d = 8, float32, chunks of 64, 4,096 tokens a batch",
    ]
    assert len(plots.figure(single).axes) == 2


def test_without_memory_there_is_one_panel_and_without_times_none():
    assert len(plots.figure([{**r, "peak_extra_bytes": None} for r in FOUND]).axes) == 1
    assert plots.figure([{**r, "peak_extra_bytes": None, "median_s": None} for r in FOUND]) is None
    assert plots.figure([]) is None


def test_colours_do_not_depend_on_who_was_skipped():
    names = [BARE, "naive", "compiled", "chunked", "metric", "blockwise", "triton"]
    every = [record(name, n, 1.0) for name in names for n in (256, 1024)]
    colours = [line.get_color() for line in plots.figure(every).axes[0].get_lines()]
    assert len(set(colours)) == len(names)
    some = [{**r, "median_s": None} if r["name"] == "naive" else r for r in every]
    assert texts(plots.figure(some)) == [name for name in names if name != "naive"]
    assert [c for c in colours if c != colours[1]] == [
        line.get_color() for line in plots.figure(some).axes[0].get_lines()
    ]
