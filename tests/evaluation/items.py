"""Made-up items with the field names that lm-evaluation-harness's data sets have."""

import json
import lzma
import random
from pathlib import Path
from typing import Any

from simreg.evaluation import harness
from tests.evaluation.tiny import WORDS, text

PARADIGMS = ("adjunct_island", "wh_island")
SPLITS = {"sciq": "sciq_test", "piqa": "piqa_validation"}
"""Tasks whose files say their split."""


def make(task: str, count: int = 6) -> list[dict[str, Any]]:
    rng = random.Random(task)

    def words(low: int, high: int) -> str:
        return text(rng.randrange(10**6), rng.randint(low, high))

    def item(i: int) -> dict[str, Any]:
        if task in ("arc_easy", "arc_challenge", "openbookqa"):
            labels = list("ABCDE"[: rng.choice([3, 4, 5])]) if i % 2 else list("1234")
            choices = {"text": [words(1, 6) for _ in labels], "label": labels}
            key = "question_stem" if task == "openbookqa" else "question"
            return {"id": str(i), key: words(5, 30), "choices": choices, "answerKey": labels[i % 3]}
        if task == "hellaswag":
            return {
                "ind": i,
                "activity_label": f"{words(2, 3)} [title]",
                "ctx_a": f"{words(4, 9)} [header] it.",
                "ctx_b": words(1, 3),
                "ctx": words(4, 9),
                "endings": [f"{words(3, 8)}  [step] x." for _ in range(4)],
                "label": str(i % 4),
            }
        if task == "piqa":
            return {"goal": words(3, 9), "sol1": words(4, 9), "sol2": words(4, 9), "label": i % 2}
        if task == "winogrande":
            one, two = rng.sample(WORDS, 2)
            sentence = f"{words(3, 6)} _ {words(2, 5)}."
            return {"sentence": sentence, "option1": one, "option2": two, "answer": "12"[i % 2]}
        if task == "boolq":
            return {"question": words(4, 8), "passage": words(20, 90), "idx": i, "label": i % 2}
        if task == "sciq":
            wrong = {f"distractor{k}": words(1, 3) for k in (1, 2, 3)}
            support = " " + words(9, 30) if i % 2 else ""
            return {
                "question": words(4, 8),
                **wrong,
                "correct_answer": words(1, 3),
                "support": support,
            }
        if task == "blimp":
            good, bad = words(4, 8), words(4, 8)
            return {"sentence_good": good, "sentence_bad": bad, "UID": PARADIGMS[i % 2]}
        assert task == "lambada_openai"
        return {"text": words(20, 60)}

    return [item(i) for i in range(count)]


def write(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, list[dict[str, Any]]]:
    """A file for each task of both suites, every other one compressed; returns the items."""
    made = {task: make(task) for task in dict.fromkeys(harness.PAPER + harness.SMALL)}
    for i, (task, items) in enumerate(made.items()):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        name = f"{SPLITS.get(task, task)}.jsonl"
        if task in leave_out:
            continue
        if i % 2:
            (folder / name).write_text(lines)
        else:
            (folder / f"{name}.xz").write_bytes(lzma.compress(lines.encode()))
    return made
