"""The text that models are looked at on: whose it is, and into which tokens it is cut."""

import json
import shutil
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from simreg.analysis import text
from simreg.analysis.options import AnalyzeOptions
from simreg.geometry import groups
from simreg.recipe import config as recipe
from simreg.recipe import trained
from simreg.recipe.data import prepare
from simreg.recipe.errors import UserError
from simreg.recipe.trained import Trained
from tests.analysis.running import analyze


def test_positive_rates_are_shares_and_grow(analysed):
    whole = [r for r in analysed["positive_rate"] if r["chunk"] is None]
    assert whole[0]["length"] == 64
    assert all(r["chunk"] is None or r["chunk"] < r["length"] for r in analysed["positive_rate"])
    assert all(a["all"] < b["all"] for a, b in pairwise(whole))
    assert all(r["head"] >= r["tail"] for r in whole)


def test_other_text_is_cut_into_the_models_tokens(study, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"abc {i} dcba lk " * 60}) + "\n" for i in range(40))
    )
    run_folder = str(study / "simreg" / "1" / "seed-1")
    found = trained.find([run_folder])
    data = text.data_of(found, {"source": str(other), "validation_fraction": 0.5})
    corpus = prepare(data)
    text.check_tokenizers(found, corpus)
    assert data.tokenizer == str(found[0].model)
    assert text.data_of(found, {"validation": str(other)}).tokenizer == str(found[0].model)
    assert text.data_of(found, {}).tokenizer == found[0].config.data.tokenizer
    with pytest.raises(UserError, match="another vocabulary"):
        text.check_tokenizers(found, prepare(recipe.DataConfig(
            source=str(other), tokenizer="bpe:270", seq_len=32, cache_dir=str(tmp_path),
            validation_fraction=0.5,
        )))  # fmt: skip


def test_of_other_text_nothing_is_taken_for_what_it_was_of_the_runs(study):
    [run] = trained.find([str(study / "simreg" / "1" / "seed-1")])
    own = {"text_field": "content", "validation": "held.txt", "max_tokens": 9, "seq_len": 24}
    config = recipe.with_overrides(run.config, {"data": {**own, "validation_fraction": 0.5}})
    data = text.data_of([replace(run, config=config)], {"source": "other.jsonl"})
    known = {"tokenizer": str(run.model), "seq_len": 24, "cache_dir": run.config.data.cache_dir}
    assert data == recipe.DataConfig(source="other.jsonl", **known)


@pytest.mark.parametrize("files", [["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_tokenizers_are_compared_wherever_they_come_from(study, tmp_path, monkeypatch, files):
    """A slow tokenizer's files, a fast one's."""
    run_folder = Path(study / "simreg" / "1" / "seed-1")
    found = trained.find([str(run_folder)])
    corpus = prepare(found[0].config.data)
    other = tmp_path / "other"
    other.mkdir()
    for name in files:
        (other / name).write_text("{}")
    load = text.hub.AutoTokenizer.from_pretrained
    vocabulary = {"a": 0}

    def from_pretrained(path, **settings):
        fake = types.SimpleNamespace(get_vocab=lambda: vocabulary)
        return fake if path == other else load(path, **settings)

    monkeypatch.setattr(text.hub.AutoTokenizer, "from_pretrained", from_pretrained)
    both = [*found, Trained("other", other)]
    with pytest.raises(UserError, match="another vocabulary"):
        text.check_tokenizers(both, corpus)
    vocabulary = corpus.tokenizer.get_vocab()
    text.check_tokenizers(both, corpus)

    def missing(path, **settings):
        raise OSError("no such file")

    monkeypatch.setattr(text.hub.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(UserError, match="cannot load the tokenizer in"):
        text.check_tokenizers(both, corpus)


def test_a_model_of_no_run_needs_text(study):
    model = str(study / "simreg" / "1" / "seed-1" / "model")
    with pytest.raises(UserError, match=r"model is no run of .*: name some with --source"):
        analyze(AnalyzeOptions([model]))


def test_text_that_runs_may_have_been_trained_on_is_refused(study, tmp_path):
    def edit(run, **data):
        config = run / "config.yaml"
        changed = recipe.with_overrides(recipe.load(config), {"data": data})
        config.write_text(recipe.to_yaml(changed))
        return str(run)

    def ask(*names, **options):
        cache = str(study.parent / "cache")
        chosen = AnalyzeOptions([*names], tokens=200, least=2, cache_dir=cache, **options)
        return analyze(chosen)

    first = study / "baseline" / "1" / "seed-1"

    def recorded(run, fingerprint="0" * 32):
        result = json.loads((run / "result.json").read_text())
        result["corpus"]["fingerprint"] = fingerprint
        (run / "result.json").write_text(json.dumps(result))
        return run

    other = recorded(shutil.copytree(study / "simreg/1/seed-1", tmp_path / "other"))
    with pytest.raises(UserError, match=r"were trained on different text: analyze them one by"):
        ask(str(first), str(other))
    with pytest.raises(UserError, match=r"of .*/other has changed since it"):
        ask(str(other))
    given = tmp_path / "given.jsonl"
    lines = (study.parent / "text.jsonl").read_text().splitlines(keepends=True)
    given.write_text("".join(lines[:60]))
    ask(str(first), str(other), source=str(given))
    short = edit(recorded(shutil.copytree(first, tmp_path / "short")), seq_len=16)
    for asked in ((str(first), short), (short, str(first))):  # the same text in other rows?
        with pytest.raises(UserError, match=r"of .*/short has changed since it"):
            ask(*asked)
    text = recipe.load(tmp_path / "short" / "config.yaml").data
    recorded(tmp_path / "short", prepare(text).fingerprint)
    ask(str(first), short)
    elsewhere = edit(shutil.copytree(first, tmp_path / "elsewhere"), source=str(given), seq_len=16)
    with pytest.raises(UserError, match="were trained on different text"):
        ask(str(first), elsewhere)


def test_positive_rates_of_head_and_tail_are_those_of_the_labels():
    draw = torch.Generator().manual_seed(0)
    stream = torch.multinomial(1 / torch.arange(1.0, 60), 1100, True, generator=draw)
    frequency = torch.bincount(stream, minlength=60)
    found = text.positive_rates(text.Text(None, None, frequency, stream, None))
    assert {record["length"] for record in found} == {64, 128}
    parts = {name: set(own) for name, own in groups.PARTS.items()} | {"all": set(range(10))}
    decile = groups.deciles(stream, frequency).tolist()
    for record in found:
        length, chunk = record["length"], record["chunk"] or record["length"]
        repeated = {name: [] for name in parts}
        for start in range(0, len(stream) // length * length, length):
            row = stream[start + 1 : start + length].tolist()
            for i, label in enumerate(row):
                own = row[i // chunk * chunk : (i // chunk + 1) * chunk]
                for name, members in parts.items():
                    if decile[start + 1 + i] in members:
                        repeated[name].append(own.count(label) > 1)
        for name, each in repeated.items():
            assert record[name] == pytest.approx(sum(each) / len(each), abs=1e-6)
