import math
import random
import re
from dataclasses import replace

import pytest

from simreg.evaluation import excerpts, offline
from simreg.evaluation.scoring import encode_pair
from simreg.recipe.errors import UserError
from tests.evaluation import tiny

DOCUMENTS = [f"start{i} " + tiny.text(i, 150) + f" end{i}" for i in range(12)]


def test_the_gold_choice_follows_the_context_and_the_others_come_from_elsewhere():
    for item in excerpts.cloze(DOCUMENTS, 200):
        whole = item.context + item.choices[item.gold]
        [home] = [doc for doc in DOCUMENTS if whole in doc]
        assert DOCUMENTS[item.document] == home
        for choice in item.choices:
            assert any(choice in doc for doc in DOCUMENTS if doc != home) or choice in whole
            assert len(choice) == len(item.choices[item.gold])
            assert re.match(r"\s\S", choice)
        assert len(set(item.choices)) == 4
        assert 40 <= len(item.context) <= 240
        assert not item.context[-1].isspace()
        after = home[home.index(whole) + len(whole) :]
        assert after == "" or after[0] == " "  # ends with a whole word
        before = home[: home.index(whole)]
        assert before == "" or before[-1] == " "


def test_a_seed_fixes_the_items_and_few_begin_many():
    many = excerpts.cloze(DOCUMENTS, 100, seed=3)
    assert excerpts.cloze(list(DOCUMENTS), 100, seed=3) == many
    assert excerpts.cloze(DOCUMENTS, 30, seed=3) == many[:30]
    assert excerpts.cloze(DOCUMENTS, 100, seed=4) != many
    assert many[0] == excerpts.cloze([*DOCUMENTS, DOCUMENTS[2]], 1, seed=3)[0]  # copies count once


def test_the_place_of_the_gold_choice_is_even_and_no_item_comes_twice():
    items = excerpts.cloze(DOCUMENTS, 1000)
    assert len({(item.context, item.choices[item.gold]) for item in items}) == len(items)
    for place in range(4):
        share = sum(item.gold == place for item in items) / len(items)
        assert share == pytest.approx(0.25, abs=0.05)


def test_scripts_without_spaces_are_cut_anywhere():
    rng = random.Random(0)
    documents = ["".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(400)) for _ in range(5)]
    items = excerpts.cloze(documents, 20)
    assert len(items) == 20
    for item in items:
        assert {len(choice) for choice in item.choices} == {40}
        assert any(item.context + item.choices[item.gold] in doc for doc in documents)


def test_blanks_of_a_wide_table_are_neither_context_nor_continuation():
    rows = [f"row{i}" + "\n".join(f"{i}{j}" + " " * 290 for j in range(12)) for i in range(9)]
    for documents in (rows, [row.replace("row", "") for row in rows] + DOCUMENTS[:1]):
        for item in excerpts.cloze(documents, 200):
            assert item.context.strip()
            assert item.choices[item.gold].strip()


@pytest.mark.parametrize("documents", [[], DOCUMENTS[:1], ["short"] * 50, [DOCUMENTS[0]] * 3])
def test_too_little_text(documents):
    with pytest.raises(UserError, match="name more text with --text"):
        excerpts.cloze(documents, 10)


def test_documents_that_are_all_alike():
    same = "word " * 100
    with pytest.raises(UserError, match="too much alike"):
        excerpts.cloze([same, same + "word"], 3)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_predict_every_token_once_as_the_harness_does(length):
    tokens = list(range(100, 100 + length))
    pairs = excerpts.windows(tokens, 5, 8)
    assert [token for _, part in pairs for token in part] == tokens
    stream = [5, *tokens]
    for context, part in pairs:
        assert len(context) >= 1
        assert len(context) + len(part) <= 9
        at = stream.index(part[0])
        assert stream[at - len(context) : at] == context
    utils = pytest.importorskip("lm_eval.utils")
    theirs = utils.get_rolling_token_windows(tokens, 5, 8, 1)
    assert pairs == [utils.make_disjoint_window(pair) for pair in theirs]


def test_bits_of_a_quarter():
    assert excerpts.bits(-1.3862943611198906) == pytest.approx(2.0)


def test_normalised_subtracts_what_a_continuation_scores_alone(loaded):
    """A scorer made by hand: choice 0 is likely anywhere, the true one is what the context adds."""
    [item] = excerpts.cloze(DOCUMENTS, 1)
    wrong = (item.gold + 1) % 4
    given, alone = [-9.0] * 4, [-9.0] * 4
    given[wrong], alone[wrong] = -1.0, -1.0
    given[item.gold], alone[item.gold] = -2.0, -8.0
    asked = []

    def scorer(pairs, advance):
        asked.extend(pairs)
        return [(x, False) for x in (*given, *alone)]

    outcome = offline.Cloze([item], "made up").run(scorer, loaded[1], None)
    pairs = [encode_pair(loaded[1], item.context, choice) for choice in item.choices]
    before = [loaded[1].eos_token_id]  # there is no bos
    assert asked == [*pairs, *((before, continuation) for _, continuation in pairs)]
    assert (outcome.values, outcome.normalised) == ([0.0], [1.0])
    assert outcome.clusters == [item.document]


def test_of_equal_scores_the_first_is_chosen():
    items = excerpts.cloze(DOCUMENTS, 12)
    hits = offline.Cloze(items, "made up")._hits([-1.0] * 4 * len(items))
    assert hits == [float(item.gold == 0) for item in items]
    assert 0 < sum(hits) < len(hits)


def test_scores_cached_without_documents_are_not_those_of_these_items():
    item, same = excerpts.cloze(DOCUMENTS, 2)
    assert item.document != same.document
    keys = [
        offline.Cloze([replace(item, document=document)], "made up").key() for document in (0, 1)
    ]
    assert keys[0] != keys[1]


def test_several_texts_stay_whole_and_a_single_one_is_many_documents(tmp_path):
    texts = [tiny.text(i, 1000) + "\n\n" + tiny.text(i + 9, 1000) for i in range(2)]
    paths = [tmp_path / f"{i}.txt" for i in range(2)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    assert sorted(offline._from_text(list(map(str, paths)))[0]) == sorted(texts)
    assert len(offline._from_text([str(paths[0])])[0]) > 1


class Letters:
    """A tokenizer of a token a letter."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


def test_bits_are_per_byte_of_utf8_not_per_letter():
    def scorer(pairs, advance):
        return [(-float(len(continuation)), False) for _, continuation in pairs]

    scorer.max_length = 4
    texts = ["aé€", "ab", "of several windows"]
    found = offline.Bits(texts, "").run(scorer, Letters(), lambda count: None)
    assert found.weights == [6.0, 2.0, 18.0]
    assert found.values == pytest.approx([letters / math.log(2) for letters in (3, 2, 18)])
    assert offline.Bits(texts[:2], "").key() != offline.Bits(texts[1:], "").key()
