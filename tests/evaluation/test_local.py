"""Local files for tasks of the harness, whose index is made up here."""

import json
from types import SimpleNamespace

import pytest

from simreg.evaluation.local import Local
from simreg.recipe.errors import UserError


def entry(**config):
    return SimpleNamespace(cfg=config or None, tags={"second", "first"})


ROWS = [{"text": str(i), "UID": "own" if i % 2 else "other"} for i in range(6)]
SPLITS = {"test_split": "test", "validation_split": "val"}
INDEX = {
    "first": entry(task="first", **SPLITS),
    "second": entry(task="second", validation_split="val"),
    "filtered": entry(task="filtered", process_docs=len, **SPLITS),
    "paradigm": entry(task="p", dataset_path="nyu-mll/blimp", dataset_name="own", **SPLITS),
    "absent": entry(task="a", dataset_path="nyu-mll/blimp", dataset_name="none", **SPLITS),
    "shots": entry(task="shots", num_fewshot=5, **SPLITS),
    "unsplit": entry(task="unsplit", training_split="train"),
    "tag": entry(),
    "group": entry(group="group", task=["second", "first"]),
    "nested": entry(group="nested", task=["first", {"task": "second"}]),
}


@pytest.fixture
def local(tmp_path):
    for name in ("first", "second_test", "filtered", "blimp", "shots"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Local(tmp_path, INDEX, limit=4)


def read(local, name):
    """Split and texts of the items that the harness is given."""
    [task] = local.spec(name)["task"]
    [(split, items)] = task["custom_dataset"]().items()
    return split, [item["text"] for item in items]


def test_a_limit_is_of_items_that_count(local):
    assert read(local, "first") == ("test", list("0123"))
    assert read(local, "filtered") == ("test", list("012345"))  # the harness drops some of them
    assert read(local, "paradigm") == ("test", list("135"))
    with pytest.raises(UserError, match=r"blimp.jsonl holds no item of the task absent"):
        read(local, "absent")


def test_only_the_split_that_is_evaluated_is_left(local):
    spec = local.spec("second")["task"][0]
    assert read(local, "second")[0] == spec["validation_split"] == "val"
    others = ("training_split", "test_split", "fewshot_split")
    assert [spec[split] for split in others] == [None] * 3
    assert local.note("second") == "test split (the harness evaluates val)"
    assert local.spec("first")["task"][0]["validation_split"] is None


@pytest.mark.parametrize(("name", "order"), [("tag", [0, 1]), ("group", [1, 0])])
def test_tasks_of_a_group_or_tag(local, name, order):
    tasks = [task["task"] for task in local.spec(name)["task"]]
    assert tasks == [("first", "second")[i] for i in order]
    assert local.files(name) == ["first.jsonl", "second_test.jsonl"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shots", "cannot serve the task shots, which shows the model 5 examples from another"),
        ("unsplit", "cannot serve the task unsplit, which names no split"),
        ("nested", "cannot serve the group nested: name its tasks instead"),
    ],
)
def test_what_files_cannot_serve(local, name, says):
    with pytest.raises(UserError, match=says):
        local.spec(name)
