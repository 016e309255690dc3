"""Tables of evaluations, analyses and benchmarks, on small records written by hand."""

import json

import pytest

from simreg.recipe.errors import UserError
from simreg.study.tables import document


def draw(folder, kind, record, options=""):
    (folder / "r.json").write_text(json.dumps(record))
    return document.draw(f"{kind} r.json {options}", folder)


def gap(mean, low, high, seeds=5):
    return {
        "score": {"mean": mean, "low": low, "high": high, "seeds": seeds, "items": 9},
        "normalised": None,
    }


def scores(schema=2, seeds=5):
    acc, bits = {"metric": "acc", "n": 1234}, {"metric": "bits_per_byte", "n": 7}
    average = {"normalised": 0.5, "tasks": 2}
    return {
        "schema": schema,
        "suite": "small",
        "tasks": {"piqa": {"note": ""}, "bits": {"note": "validation split"}},
        "reference": "base",
        "arms": {
            "base": {
                "tasks": {"piqa": {**acc, "score": 0.5}, "bits": {**bits, "score": 1.25}},
                "average": {**average, "score": 0.5},
            },
            "new": {
                "tasks": {"piqa": {**acc, "score": 0.4877}, "bits": {**bits, "score": 1.2}},
                "average": {**average, "score": 0.51},
            },
        },
        "differences": {
            "new": {
                "piqa": gap(-0.0123, -0.02, 0.0051, seeds),
                "bits": gap(-0.05, -0.06, -0.04, seeds),
                "average": gap(0.01, None, None, seeds),
            }
        },
    }


def test_zero_shot_scores_and_differences(tmp_path):
    assert draw(tmp_path, "zero-shot", scores()) == (
        "| task | items | base | new | new minus base |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| piqa | 1,234 | 50.0 | 48.8 | −1.2 [−2.0, +0.5] |\n"
        "| bits (bits per byte) | 7 | 1.2500 | 1.2000 | −0.0500 [−0.0600, −0.0400] |\n"
        "| average |  | 50.0 | 51.0 | +1.0 |\n"
        "\n"
        "Accuracies in per cent; seeds: 5; brackets: 95 % Student-t intervals over seeds and "
        "items. bits: validation split."
    )


def test_zero_shot_intervals_are_called_what_they_are(tmp_path):
    assert "brackets: 95 % bootstrap intervals" in draw(tmp_path, "zero-shot", scores(schema=1))
    assert "one seed says nothing of others" in draw(tmp_path, "zero-shot", scores(seeds=1))


def test_zero_shot_average_of_one_task_is_left_out(tmp_path):
    record = scores()
    for arm in record["arms"].values():
        arm["average"]["tasks"] = 1
    assert "average" not in draw(tmp_path, "zero-shot", record)
    for arm in record["arms"].values():
        arm["average"] = None
    assert "average" not in draw(tmp_path, "zero-shot", record)


def analysis(low=-0.0409, high=-0.0231):
    def entry(mean, low=None, high=None):
        return {"mean": mean, "low": low, "high": high, "n": 5}

    def group(loss, rank):
        return {"loss": entry(loss), "effective_rank": entry(rank), "nc1": entry(None)}

    return {
        "means": {
            "base": {"all": group(4.5, 57.29), "decile-10": group(6, 20)},
            "new": {"all": group(4.468, 54.6), "decile-10": group(5.9, 19)},
        },
        "minus_reference": {
            "new": {
                "all": {
                    "loss": entry(-0.032, low, high),
                    "effective_rank": entry(-2.69, -5, -0.4),
                },
                "decile-10": {"loss": entry(-0.1, -0.2, 0.1)},
            }
        },
        "reference": "base",
        "text": {"tokens": 30090, "split": "validation"},
        "models": [{"compared": True}] * 10 + [{"compared": False}],
        "settings": {"least": 5},
    }


def test_geometry(tmp_path):
    table, below = draw(tmp_path, "geometry", analysis()).split("\n\n")
    assert table == (
        "| metric | base | new | new minus base |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| loss (nats) | 4.5000 | 4.4680 | −0.0320 [−0.0409, −0.0231] |\n"
        "| effective rank | 57.29 | 54.60 | −2.69 [−5.00, −0.40] |"
    )
    assert below.startswith("10 trained models on the same 30,090 tokens of validation text")


def test_geometry_of_chosen_metrics_and_groups(tmp_path):
    drawn = draw(
        tmp_path, "geometry", analysis(), "metrics=effective_rank,loss groups=all,decile-10"
    )
    assert [line.split(" | ")[:2] for line in drawn.split("\n\n")[0].splitlines()[2:]] == [
        ["| effective rank", "all"],
        ["| effective rank", "decile-10"],
        ["| loss (nats)", "all"],
        ["| loss (nats)", "decile-10"],
    ]
    assert "| effective rank | decile-10 | 20.00 | 19.00 | – |" in drawn
    with pytest.raises(UserError, match="none of these metrics and groups was measured"):
        draw(tmp_path, "geometry", analysis(), "metrics=nc1")
    with pytest.raises(UserError, match="groups: unknown 'torso'"):
        draw(tmp_path, "geometry", analysis(), "groups=torso")


def test_geometry_of_one_seed_has_its_intervals_over_tokens(tmp_path):
    record = analysis(None, None)
    over = {"loss": {"mean": -0.032, "low": -0.05, "high": -0.01}}
    drawn = draw(tmp_path, "geometry", record | {"over_tokens": {"new": {"all": over}}})
    assert "−0.0320 [−0.0500, −0.0100]" in drawn
    assert "of new, with one seed, over tokens by row" in drawn


def contender(name, length, variant="out", median=0.5, ratio=1.5, peak=2**21, skipped=None):
    shape = {"batch": 4, "length": length, "dim": 64, "dtype": "float32", "chunk": None}
    found = {"median_s": median, "over_bare": ratio, "peak_extra_bytes": peak}
    return {**shape, "name": name, "variant": variant, **found, "skipped": skipped}


def test_loss(tmp_path):
    record = {
        "what": "forward + backward",
        "records": [
            contender("a", 8),
            contender("a", 8, "in", 0.25, 0.987, None),
            contender("gpu", 8, skipped="runs on CUDA only"),
            contender("gpu", 8, "in", skipped="runs on CUDA only"),
            contender("a", 16, median=1.25, ratio=None, peak=3_000_000_000),
        ],
        "memory": {"length": 16384, "dim": 512, "name": "a", "peak_extra_bytes": 98 * 2**20},
        "machine": {"device": "cpu", "cpu": "A", "threads": 2},
    }
    assert draw(tmp_path, "loss", record) == (
        "| forward + backward | 4 × 8, d = 64, float32 | 4 × 16, d = 64, float32 |\n"
        "| --- | ---: | ---: |\n"
        "| a | 500.0 ms, × 1.50, 2 MiB | 1250.0 ms, –, 2,861 MiB |\n"
        "| a (in) | 250.0 ms, × 0.99, – | – |\n"
        "\n"
        "Milliseconds, over bare matrix products of the textbook count, MiB beyond the inputs "
        "(gradient included); A, 2 threads. At L = 16,384, d = 512, a takes 98 MiB. Not run: gpu, "
        "gpu (in): runs on CUDA only."
    )
    found = {key: record[key] for key in ("what", "records")}
    drawn = draw(tmp_path, "loss", found | {"machine": {"device": "NVIDIA H200", "threads": 1}})
    assert "(gradient included); NVIDIA H200. Not run: gpu" in drawn
