import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from simreg import cli
from simreg.evaluation import offline, run, scoring
from simreg.evaluation.options import EvalOptions
from simreg.evaluation.outcome import Outcome
from simreg.evaluation.scoring import Scorer, prefix_token
from simreg.recipe import config as recipe
from simreg.recipe import trained
from simreg.recipe.data import prepare
from simreg.recipe.sources import HubDataset
from simreg.recipe.tokenizer import Encoder
from tests.evaluation import tiny
from tests.recipe.tiny import PRESETS  # noqa: F401  the runs' presets


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run `simreg eval`; returns (status, results or None, standard output, standard error)."""

    def run(*arguments):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        flags = ["--out", str(out), "--cache-dir", str(tmp_path / "cache")]
        status = cli.main(["eval", *map(str, arguments), *flags])
        path = out / "results.json"
        results = json.loads(path.read_text()) if path.exists() else None
        printed = capsys.readouterr()
        return status, results, printed.out, printed.err

    return run


def test_a_folder_of_runs_offline(runs, evaluate):
    status, results, printed, _ = evaluate(runs, "--limit", 40)
    assert status == 0
    assert list(results["tasks"]) == ["heldout-cloze", "heldout-bits"]
    arms = ["plain", "simreg"]
    assert list(results["arms"]) == arms
    assert results["reference"] == arms[0]
    assert [model["seed"] for model in results["models"]] == [1, 2, 1, 2]
    by_name = {model["name"]: model["tasks"] for model in results["models"]}
    cloze = [tasks["heldout-cloze"] for tasks in by_name.values()]
    assert all(task["n"] == 40 and 0 <= task["score"] <= 1 for task in cloze)
    gap = results["differences"][arms[1]]["heldout-cloze"]["score"]
    scores = [task["score"] for task in cloze]
    assert gap["mean"] == pytest.approx(sum(scores[2:]) / 2 - sum(scores[:2]) / 2)
    assert (gap["seeds"], gap["items"]) == (2, 40)
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert gap["low"] <= gap["bootstrap"][0] <= gap["bootstrap"][1] <= gap["high"]
    [task] = offline.load(["heldout-cloze"], trained.find([str(runs)]), [], 40)
    assert gap["clusters"] == len({item.document for item in task.items}) < 40
    assert results["schema"] == 2
    assert f"{arms[1]} on heldout-cloze: accuracy" in printed
    assert "±: standard deviation over seeds; brackets: 95 % intervals" in " ".join(printed.split())
    assert results["versions"]["torch"] == torch.__version__


def test_bits_per_byte_against_brute_force(runs, evaluate):
    path = runs / "simreg" / "seed-1"
    _, results, _, _ = evaluate(path, "--tasks", "heldout-bits", "--limit", 3)
    scorer, tokenizer = scoring.load(path / "model", 32, bf16=False)
    [task] = offline.load(["heldout-bits"], trained.find([str(path)]), [], 3)
    model, nats = scorer.model.double(), 0.0
    for text in task.texts:
        ids = [prefix_token(tokenizer), *tokenizer(text)["input_ids"]]
        for at in range(1, len(ids)):
            # windows of 32: all that stands before in the window, the last one filled up
            window = (at - 1) // 32 * 32
            begin = min(window, max(0, len(ids) - 1 - 32))
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:at]])).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[ids[at]])
    size = sum(len(text.encode()) for text in task.texts)
    found = results["models"][0]["tasks"]["heldout-bits"]
    assert found["score"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert sum(map(len, task.texts)) == 3 * 500


def test_bits_are_of_the_tokens_that_training_would_see(runs):
    path = runs / "simreg" / "seed-1"
    scorer, tokenizer = scoring.load(path / "model", 32, bf16=False)
    text, seen = f"hello {tokenizer.eos_token} world", []

    def score(pairs, advance):
        seen.extend(token for _, targets in pairs for token in targets)
        return [(0.0, False)] * len(pairs)

    score.max_length = scorer.max_length
    offline.Bits([text], "").run(score, tokenizer, lambda n: None)
    assert seen == Encoder(tokenizer)([text])[0][:-1].tolist()
    assert tokenizer.eos_token_id not in seen


def test_held_out_documents_are_those_of_the_run(runs):
    subject = trained.find([str(runs / "plain" / "seed-1")])[0]
    [task] = offline.load(["heldout-bits"], [subject], [], None)
    corpus = [json.loads(line)["text"] for line in (runs / "text.jsonl").open()]
    whole = [text for text in corpus if any(text.startswith(part) for part in task.texts)]
    assert len(whole) == len(task.texts) < 0.2 * len(corpus)
    held_out = offline.data._held_out(0.05, 0)
    assert sorted(whole) == sorted(text for text in corpus if held_out(text))


def test_results_are_cached_by_model_and_task(runs, evaluate, tmp_path, monkeypatch):
    path = tmp_path / "seed-1"
    shutil.copytree(runs / "plain" / "seed-1", path)
    _, first, _, _ = evaluate(path, "--limit", 2)
    calls, score = [], Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda *a: calls.append(len(a[1])) or score(*a))
    _, again, _, _ = evaluate(path, "--limit", 2)
    assert calls == []
    assert again["models"] == first["models"]
    evaluate(path, "--limit", 3)
    assert len(calls) == 2
    weights = path / "model" / "model.safetensors"
    weights.write_bytes((runs / "plain" / "seed-2" / "model" / weights.name).read_bytes())
    _, other, _, _ = evaluate(path, "--limit", 2)
    assert len(calls) == 4
    assert other["models"][0]["fingerprint"] != first["models"][0]["fingerprint"]


def test_a_model_needs_text_and_takes_it(model, evaluate, tmp_path):
    status, _, _, error = evaluate(model)
    assert status == 2
    assert "is no run of `simreg train`" in error
    assert error.count("\n") == 1
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(tiny.text(i, 100))
    status, results, _, _ = evaluate(model, "--text", tmp_path / "*.txt", "--limit", 12)
    assert status == 0
    assert results["models"][0]["tasks"]["heldout-cloze"]["n"] == 12
    assert results["differences"] == {}


def test_a_run_and_a_model_share_no_seed(model, runs, evaluate, tmp_path):
    run = change(runs / "plain" / "seed-1", tmp_path, train={"seed": 0})
    status, results, printed, _ = evaluate(run, model, "--limit", 5)
    assert status == 0
    assert results["differences"][model.name]["heldout-cloze"]["score"] is None
    assert "shares no seed" in printed


def test_models_pair_with_each_other(model, evaluate, tmp_path):
    other = tiny.save(tmp_path / "other", seed=1)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(tiny.text(i, 100))
    _, results, printed, _ = evaluate(model, other, "--text", tmp_path / "*.txt", "--limit", 12)
    assert "±: standard error over items; brackets: 95 % intervals" in " ".join(printed.split())
    gap = results["differences"][other.name]["heldout-cloze"]["normalised"]
    one, two = (m["tasks"]["heldout-cloze"]["normalised"] for m in results["models"])
    assert gap["mean"] == pytest.approx(two - one)
    assert results["arms"][other.name]["tasks"]["heldout-cloze"]["seeds"] == []


def change(run, tmp_path, **values):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = recipe.with_overrides(recipe.load(copy / "config.yaml"), values)
    (copy / "config.yaml").write_text(recipe.to_yaml(config))
    return copy


def recorded(run, fingerprint):
    """The run, as if it had been trained on the text of that fingerprint."""
    result = json.loads((run / "result.json").read_text())
    result["corpus"]["fingerprint"] = fingerprint
    (run / "result.json").write_text(json.dumps(result))
    return run


def with_other_corpus(run):
    return recorded(run, "0" * 32)


def test_runs_of_other_text_are_refused(runs, evaluate, tmp_path):
    run = runs / "plain" / "seed-1"
    fraction = {"validation_fraction": 0.2}
    other = with_other_corpus(change(run, tmp_path, data=fraction | {"seq_len": 8}))
    status, _, _, error = evaluate(run, other)
    assert status == 2
    assert "were trained on different text" in error


def test_runs_of_the_same_text_in_other_files_are_compared(runs, evaluate, tmp_path):
    run = runs / "plain" / "seed-1"
    moved = tmp_path / "moved.jsonl"
    shutil.copy(runs / "text.jsonl", moved)
    status, _, _, error = evaluate(run, change(run, tmp_path, data={"source": str(moved)}))
    assert status == 0, error


def test_runs_of_other_rows_share_their_text(runs, evaluate, tmp_path):
    run = runs / "plain" / "seed-1"
    other = change(run, tmp_path, data={"seq_len": 8, "tokenizer": "bpe:280"})
    recorded(other, prepare(recipe.load(other / "config.yaml").data, progress=False).fingerprint)
    status, _, _, error = evaluate(run, other)
    assert status == 0, error
    recorded(other, "0" * 32)  # it was trained when the files held other text
    for order in ((run, other), (other, run)):
        status, _, _, error = evaluate(*order)
        assert status == 2
        assert f"the text of {other} has changed since it was trained" in error


def test_a_later_run_of_other_content_is_refused(runs, evaluate, tmp_path):
    run = runs / "plain" / "seed-1"
    other = with_other_corpus(change(run, tmp_path))
    status, _, _, error = evaluate(run, other)
    assert status == 2
    assert "were trained on different text" in error


def test_changed_or_missing_text_is_refused(runs, evaluate, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = (runs / "text.jsonl").read_text().splitlines(keepends=True)
    text.write_text("".join(lines[:-1]))
    run = change(runs / "plain" / "seed-1", tmp_path, data={"source": str(text)})
    status, _, _, error = evaluate(run)
    assert status == 2
    assert "has changed since it was trained" in error
    text.unlink()
    status, _, _, error = evaluate(run)
    assert status == 2
    assert f"there is no file {str(text)!r}" in error
    assert "--text FILES" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a model"),
        (["/absent/folder"], "there is no folder /absent/folder"),
        (["EMPTY"], "and has no runs below it"),
        (["UNFINISHED"], "has no trained model: finish it"),
        (["BROKEN"], "cannot load the tokenizer in"),
        (["RUN", "--limit", "0"], "--limit must be 1 or more"),
        (["RUN", "--text", "absent.txt"], "there is no file 'absent.txt'"),
        (["RUN", "--text", "BLANK"], "--text: no text in it"),
    ],
)
def test_mistakes_are_one_line(runs, model, evaluate, tmp_path, arguments, says):
    for name in ("empty", "unfinished", "broken"):
        (tmp_path / name).mkdir()
    run = runs / "plain" / "seed-1"
    shutil.copy(run / "config.yaml", tmp_path / "unfinished")
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "t.txt").write_text(tiny.text(0, 100))
    (tmp_path / "blank.txt").write_text(" \n\n")
    places = {"RUN": run, "BLANK": tmp_path / "blank.txt"} | {
        n.upper(): tmp_path / n for n in ("empty", "unfinished", "broken")
    }
    extra = ["--text", tmp_path / "t.txt", runs / "text.jsonl"] if "BROKEN" in arguments else []
    status, results, _, error = evaluate(*(places.get(a, a) for a in arguments), *extra)
    assert status == 2
    assert results is None
    assert says in error
    assert error.startswith("simreg: error: ")
    assert error.count("\n") == 1


def test_a_run_of_before_the_depths_had_none(runs, tmp_path):
    run = shutil.copytree(runs / "plain" / "seed-1", tmp_path / "old")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  depths.*:.*\n(  +- .*\n)*", "", text))
    assert "depths" not in (run / "config.yaml").read_text()
    simreg = trained.find([str(run)])[0].config.simreg
    assert (simreg.depths, simreg.depths_offset) == ([], 0)


def test_brackets_in_names_are_shown(runs, evaluate, tmp_path):
    folder = tmp_path / "a[b" / "[" / "c]"  # to rich the path would end a style
    shutil.copytree(runs / "plain" / "seed-1", folder / "old[bold]" / "seed-1")
    shutil.copytree(runs / "simreg" / "seed-1", folder / "new[bold]" / "seed-1")
    status, results, printed, _ = evaluate(folder, "--limit", 2)
    assert status == 0
    assert list(results["arms"]) == ["new[bold]", "old[bold]"]
    assert "old[bold]" in printed


def test_text_that_a_run_was_trained_on_is_refused(runs, evaluate, tmp_path):
    source = trained.find([str(runs / "plain" / "seed-1")])[0].config.data.source
    copied = tmp_path / f"copied{Path(source).suffix}"
    copied.write_bytes(Path(source).read_bytes())
    status, _, _, error = evaluate(runs / "plain" / "seed-1", "--text", copied, "--limit", 2)
    assert status == 2
    assert f"seed-1 was trained on {copied}: name text that no model has seen" in error
    copied.write_bytes(Path(source).read_bytes().replace(b"a", b"b"))  # of the same size and time
    shutil.copystat(source, copied)
    assert evaluate(runs / "plain" / "seed-1", "--text", copied, "--limit", 2)[0] == 0


def test_text_of_a_run_that_is_not_here_cannot_be_told(runs, evaluate, tmp_path):
    (tmp_path / "t.txt").write_text(tiny.text(0, 20))
    run = change(runs / "plain" / "seed-1", tmp_path, data={"source": "gone/*.jsonl"})
    status, _, _, error = evaluate(run, "--text", tmp_path / "t.txt", "--limit", 2)
    assert status == 0
    assert re.search(r"'gone/\*.jsonl' names no file here, so \S+ may have been trained", error)
    several = [str(tmp_path / "other.txt"), "gone/*.jsonl"]
    (tmp_path / "other.txt").write_text(tiny.text(0, 3))
    partly = change(runs / "plain" / "seed-1", tmp_path / "c", data={"source": several})
    assert (
        "'gone/*.jsonl' names no file here"
        in evaluate(partly, "--text", tmp_path / "t.txt", "--limit", 2)[3]
    )
    hub = change(runs / "plain" / "seed-1", tmp_path / "b", data={"source": "hf:a/b"})
    assert "names no file" not in evaluate(hub, "--text", tmp_path / "t.txt", "--limit", 2)[3]


def test_a_dataset_of_the_hub_that_a_run_was_trained_on_is_refused(
    runs, evaluate, tmp_path, monkeypatch
):
    monkeypatch.setattr(HubDataset, "revision", "of today")
    run = change(runs / "plain" / "seed-1", tmp_path, data={"source": ["x.txt", "hf:a/b:en"]})
    status, _, _, error = evaluate(run, "--text", "hf:a/b:en", "--limit", 2)
    assert status == 2
    assert "was trained on hf:a/b:en:train: name text that no model has seen" in error
    read = []  # another config is other text, which is read
    monkeypatch.setattr(
        HubDataset, "read", lambda self: iter(read.append(self.title) or [tiny.text(0, 20)])
    )
    monkeypatch.setattr(HubDataset, "weight", 1)
    assert evaluate(run, "--text", "hf:a/b:de", "--limit", 2)[0] == 0
    assert read == ["hf:a/b:de:train"]


def test_text_that_is_too_little_for_cloze_items_has_bits(runs, evaluate, tmp_path):
    (tmp_path / "t.txt").write_text(tiny.text(0, 20))
    arguments = runs / "plain" / "seed-1", "--text", tmp_path / "t.txt"
    status, results, _, error = evaluate(*arguments)
    assert (status, list(results["tasks"])) == (0, ["heldout-bits"])
    assert "two held-out documents or more" in error
    assert "; left out" in error
    assert evaluate(*arguments, "--tasks", "heldout-cloze")[0] == 2


def test_another_command_line_has_another_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for limit, name in (("3", "eval"), ("2", "eval-2"), ("3", "eval")):
        command = ["eval", str(runs / "plain" / "seed-1"), "--limit", limit, "--cache-dir", "cache"]
        monkeypatch.setattr("sys.argv", ["simreg", *command])
        assert cli.main(command) == 0
        assert f"results runs/{name}/results.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/eval/results.json").read_text())["limit"] == 3


def test_a_model_without_its_head_is_refused(model, runs, evaluate, tmp_path):
    """transformers would draw the missing weights at random."""
    headless = shutil.copytree(model, tmp_path / "headless")
    AutoModelForCausalLM.from_pretrained(model).get_decoder().save_pretrained(headless)
    status, results, _, error = evaluate(headless, "--text", runs / "text.jsonl")
    assert (status, results) == (2, None)
    assert "lacks weights: lm_head.weight" in error


def test_a_folder_of_the_home_directory(runs, tmp_path, monkeypatch, capsys):
    """After `--out=` a shell leaves the ~ to us."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = str(runs / "plain" / "seed-1")
    flags = ["--out=~/results", "--cache-dir=~/cache", "--limit", "3"]
    assert cli.main(["eval", run, *flags]) == 0
    capsys.readouterr()
    assert (tmp_path / "results" / "results.json").is_file()
    assert (tmp_path / "cache" / "eval").is_dir()


def test_results_of_others_are_kept(runs, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"study": {}}', "[1]", "mine"):
        (out / "results.json").write_text(text)
        assert cli.main(["eval", str(runs), "--out", str(out)]) == 2
        assert "that `simreg eval` did not write and would replace" in capsys.readouterr().err
        assert (out / "results.json").read_text() == text
    assert cli.main(["eval", str(runs), "--out", str(out / "results.json" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_run_uses_the_positions_it_was_trained_with(runs, model):
    longest = []
    for name in (runs / "plain" / "seed-1", model):
        [found] = trained.find([str(name)])
        longest.append(run._Model(found).loaded()[0].max_length)
    assert longest == [32, 64]
    assert scoring.load(model, 100, bf16=False)[0].max_length == 64  # no more than it has


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_the_hub_in_either_format(weights, model, tmp_path, monkeypatch):
    hub, here = tmp_path / "hub", tmp_path / "here"
    shutil.copytree(model, hub)
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(state, hub / "pytorch_model.bin")
    torch.save({}, hub / "training_args.bin")
    if weights.endswith("bin"):
        (hub / "model.safetensors").unlink()

    def download(name, allow_patterns):
        ignored = shutil.ignore_patterns(*allow_patterns)
        wanted = ignored(hub, [path.name for path in hub.iterdir()])
        here.mkdir(exist_ok=True)
        for file in wanted:
            shutil.copy(hub / file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    [found] = trained.find(["someone/model"])
    assert [p.name for p in here.iterdir() if p.suffix in (".bin", ".safetensors")] == [weights]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = scoring.load(found.model, None, bf16=False)[0].model(ids).logits
        expected = scoring.load(model, None, bf16=False)[0].model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_a_cached_score_is_of_the_positions_and_precision_it_was_made_with(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    plain = trained.Trained("m", tmp_path)
    models = [
        run._Model(plain),
        run._Model(replace(plain, config=recipe.RunConfig())),
        run._Model(plain),
    ]
    models[-1].bf16 = not models[-1].bf16
    keys = [model.key() for model in models]
    assert all(keys.count(key) == 1 for key in keys)


def test_the_record_says_how_it_was_made(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    model, asked = trained.Trained("m", tmp_path, "m"), []

    def load(names, *rest):
        asked.append(names)
        return [SimpleNamespace(name=name, source=f"of {name}", note="") for name in names]

    monkeypatch.setattr(run, "load", load)
    monkeypatch.setattr(run, "_cached", lambda *args: Outcome("bits_per_byte", [1.0]))
    for tasks, suite in ((["heldout-bits"] * 2, "tasks"), ([], "offline")):
        options = EvalOptions([], tasks=tasks, limit=7)
        found = run.evaluate([model], options, Console(quiet=True), command="typed")
        assert (found["suite"], found["limit"], found["command"]) == (suite, 7, "typed")
        assert found["tasks"]["heldout-bits"] == {"source": "of heldout-bits", "note": ""}
        assert found["models"][0]["fingerprint"] == model.fingerprint()
    assert asked == [["heldout-bits"], ["heldout-cloze", "heldout-bits"]]


def test_tasks_come_in_the_order_asked_for_with_what_each_kind_needs(tmp_path, monkeypatch):
    def made(kind):
        def load(names, *rest, **more):
            asked[kind] = (*rest, more)
            return [SimpleNamespace(name=name) for name in names[::-1]]

        return load

    asked = {}
    monkeypatch.setattr(run.harness, "load", made("harness"))
    monkeypatch.setattr(run.offline, "load", made("offline"))
    names = ["piqa", "heldout-bits", "sciq", "heldout-cloze"]
    options = EvalOptions([], data_dir=tmp_path, text=["t.txt"], limit=3)
    assert [task.name for task in run.load(names, ["model"], options, "corpus")] == names
    assert asked["harness"] == (tmp_path, 3, {})
    assert asked["offline"] == (["model"], ["t.txt"], 3, {"corpus": "corpus"})
