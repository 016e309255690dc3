import shutil
import types
from pathlib import Path

import pytest

from simreg.evaluation import harness
from simreg.evaluation.scoring import Scorer
from simreg.recipe.errors import UserError
from tests.evaluation import items

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

NAMES = tuple(name for name in dict.fromkeys(harness.PAPER + harness.SMALL) if name != "blimp")
BLIMP = tuple(f"blimp_{paradigm}" for paradigm in items.PARADIGMS)
HUB = {
    "allenai/ai2_arc": {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"},
    "Rowan/hellaswag": "hellaswag",
    "baber/piqa": "piqa",
    "allenai/winogrande": "winogrande",
    "allenai/openbookqa": "openbookqa",
    "aps/super_glue": "boolq",
    "allenai/sciq": "sciq",
    "EleutherAI/lambada_openai": "lambada_openai",
    "nyu-mll/blimp": "blimp",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, items.write(folder)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture(scope="module")
def theirs(data, model, loaded):
    """The harness's own evaluation: its tasks and its model, on a stand-in for the Hub."""

    def load_dataset(path, name=None, **kwargs):
        task = HUB[path]
        task = task[name] if isinstance(task, dict) else task
        rows = data[1][task]
        if task == "blimp":
            rows = [row for row in rows if row["UID"] == name]
        other = datasets.Dataset.from_list(rows[::-1])
        split = "train" if task == "blimp" else None
        own = datasets.Dataset.from_list(rows)
        test = task in ("arc_easy", "arc_challenge", "openbookqa", "sciq", "lambada_openai")
        splits = {"train": other, "validation": other if test else own, "test": own}
        return {split: own} if split else splits

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = {harness._FOLDERS.get(name, name) for name in (*NAMES, "blimp")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=loaded[0].model, tokenizer=loaded[1], batch_size=3),
            tasks=[*NAMES, *BLIMP],
            task_manager=TaskManager(
                include_defaults=False, include_path=[str(root / folder) for folder in folders]
            ),
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def ours(data, loaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("network"))
        found = {}
        for task in harness.load([*NAMES, *BLIMP], data[0], None):
            found[task.name] = task.run(loaded[0], loaded[1], lambda count: None)
        return found


@pytest.mark.parametrize("name", [*NAMES, *BLIMP])
def test_local_files_give_the_accuracies_of_the_harness(name, ours, theirs):
    outcome, expected = ours[name], theirs["results"][name]
    assert outcome.score == expected["acc,none"]
    if "acc_norm,none" in expected:
        normalised = outcome.summary()["normalised"]
        assert normalised == expected["acc_norm,none"]
    else:
        assert outcome.normalised is None
    if name == "lambada_openai":
        assert outcome.extra["perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-4)
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    assert outcome.values == [float(sample["acc"]) for sample in samples]


def test_the_accuracies_tell_tasks_apart(ours):
    """Else equal accuracies would prove little."""
    values = [score for name in NAMES[:-1] for score in ours[name].values]
    assert 0.15 < sum(values) / len(values) < 0.85


def requests(name, data, count=None):
    [benchmark] = harness.load([name], data[0], count)
    [task] = benchmark.tasks.values()
    task.build_all_requests(limit=count)
    return [instance.args for instance in task.instances]


def test_prompts_by_hand(data, no_network):
    made = data[1]
    doc = made["arc_easy"][1]
    asked = [
        ("Question: " + doc["question"] + "\nAnswer:", f" {c}") for c in doc["choices"]["text"]
    ]
    first = len(made["arc_easy"][0]["choices"]["text"])
    assert requests("arc_easy", data)[first : first + len(asked)] == asked
    doc = made["piqa"][0]
    context = f"Question: {doc['goal']}\nAnswer:"
    assert requests("piqa", data)[:2] == [
        (context, f" {doc['sol1']}"),
        (context, f" {doc['sol2']}"),
    ]
    doc = made["boolq"][0]
    context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
    assert requests("boolq", data)[:2] == [(context, " no"), (context, " yes")]
    doc = made["winogrande"][0]
    before, after = doc["sentence"].split(" _ ")
    asked = [(f"{before} {doc[option]}", f" {after}") for option in ("option1", "option2")]
    assert requests("winogrande", data)[:2] == asked
    before, _, last = made["lambada_openai"][0]["text"].rpartition(" ")
    assert requests("lambada_openai", data)[0] == (before, f" {last}")
    doc = next(d for d in made["blimp"] if d["UID"] == "wh_island")
    asked = [("", f" {doc['sentence_good']}"), ("", f" {doc['sentence_bad']}")]
    assert requests("blimp_wh_island", data)[:2] == asked


def test_a_limit_takes_the_first_items(data, ours, loaded, no_network):
    [task] = harness.load(["hellaswag"], data[0], 4)
    values = task.run(loaded[0], loaded[1], lambda count: None).values
    assert values == ours["hellaswag"].values[:4]


def test_a_group_is_scored_as_one(data, loaded, ours, monkeypatch, no_network):
    two = {"group": "blimp", "task": list(BLIMP)}
    manager = harness._manager(["blimp"])
    manager.task_index["blimp"].cfg = two
    monkeypatch.setattr(harness, "_manager", lambda names: manager)
    [task] = harness.load(["blimp"], data[0], None)
    outcome = task.run(loaded[0], loaded[1], lambda count: None)
    assert outcome.values == [value for name in sorted(BLIMP) for value in ours[name].values]
    assert task.source == "blimp.jsonl" or task.source == "blimp.jsonl.xz"


def test_another_split_is_noted(tmp_path, data, no_network):
    shutil.copy(next(data[0].glob("arc_easy.jsonl*")), tmp_path / "arc_easy_validation.jsonl.xz")
    shutil.copy(next(data[0].glob("piqa_validation.jsonl*")), tmp_path)
    easy, piqa = harness.load(["arc_easy", "piqa"], tmp_path, None)
    assert easy.note == "validation split (the harness evaluates test)"
    assert piqa.note == ""


def test_keys_follow_the_items(tmp_path, data, no_network):
    [whole] = harness.load(["boolq"], data[0], None)
    [again] = harness.load(["boolq"], data[0], None)
    [part] = harness.load(["boolq"], data[0], 3)
    assert whole.key() == again.key()
    assert whole.key()["items"] != part.key()["items"]
    assert whole.key()["lm_eval"] == harness.version("lm-eval")


def test_items_are_listed_once_for_all_models(data, no_network, monkeypatch):
    [benchmark] = harness.load(["boolq"], data[0], 3)
    key = benchmark.key()
    monkeypatch.setattr(harness.hashlib, "blake2b", None)
    assert benchmark.key() == key


def test_missing_files_are_all_named(tmp_path):
    items.write(tmp_path, leave_out=("hellaswag", "boolq"))
    with pytest.raises(UserError) as error:
        harness.load(harness.PAPER, tmp_path, None)
    assert str(error.value).startswith("no hellaswag.jsonl, boolq.jsonl (or .xz, .gz, .zst) in")
    assert "--tasks" in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"target": "x"}', "piqa.jsonl does not fit the harness's task piqa: 'goal' is undefined"),
        ("[1]", "piqa.jsonl:1: expected an object, not list"),
        ("{", "piqa.jsonl:1: not a JSON object"),
        ("", "piqa.jsonl holds no item of the task piqa"),
    ],
)
def test_files_that_do_not_fit(tmp_path, line, says):
    (tmp_path / "piqa.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        harness.load(["piqa"], tmp_path, None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="--data-dir: there is no folder"):
        harness.load(["piqa"], tmp_path / "absent", None)


def test_an_unknown_task(monkeypatch):
    index = types.SimpleNamespace(task_index={"hellaswag": None}, all_tasks=["hellaswag", "piqa"])
    monkeypatch.setattr(harness, "_manager", lambda names: index)
    with pytest.raises(UserError, match=r"has no task helaswag; did you mean hellaswag\?"):
        harness.load(["helaswag"], None, None)


def test_no_network(no_network):
    with pytest.raises(UserError) as error:
        harness.load(["piqa"], None, None)
    assert "cannot load the data of task piqa: the network was asked" in str(error.value)
    assert "--data-dir" in str(error.value)


def test_a_truncated_context_is_the_harness_own(data, model, no_network):
    """A model of 16 positions: the harness cuts contexts from the left, and so do we."""
    from lm_eval.models.huggingface import HFLM

    from simreg.evaluation import scoring

    loaded = scoring.load(model, None, bf16=False)
    scorer = Scorer(loaded[0].model, max_length=16)
    mine = harness._language_model(scorer, loaded[1], lambda count: None)
    other = HFLM(pretrained=loaded[0].model, tokenizer=loaded[1], max_length=16, batch_size=2)
    instances = [types.SimpleNamespace(args=args) for args in requests("boolq", data)]
    expected = other.loglikelihood(instances, disable_tqdm=True)
    for answer, (log_likelihood, is_greedy) in zip(
        mine.loglikelihood(instances, disable_tqdm=True), expected, strict=True
    ):
        assert answer[0] == pytest.approx(log_likelihood, abs=1e-4)
        assert answer[1] == is_greedy


@pytest.mark.parametrize("disabled", [False, True])
def test_bars_are_as_they_were_afterwards(disabled):
    before = datasets.are_progress_bars_disabled()
    switch = {True: datasets.disable_progress_bars, False: datasets.enable_progress_bars}
    switch[disabled]()
    try:
        with harness._silence():
            assert datasets.are_progress_bars_disabled()
        assert datasets.are_progress_bars_disabled() == disabled
    finally:
        switch[before]()
