import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from simreg.evaluation.scoring import Scorer, encode_pair, prefix_token
from simreg.recipe.errors import UserError

rng = torch.Generator().manual_seed(0)


def ids(count):
    return torch.randint(0, 300, (count,), generator=rng).tolist()


PAIRS = [
    (ids(c), ids(k)) for c, k in [(1, 1), (5, 3), (40, 7), (63, 1), (90, 20), (3, 64), (64, 5)]
]
PAIRS += [(PAIRS[2][0], [*PAIRS[2][1][:-1], last]) for last in (7, 8, 9)]  # share an input
PAIRS += [([*PAIRS[1][0], *PAIRS[1][1][:2]], [PAIRS[1][1][2]])]  # the same tokens, cut elsewhere


def truth(model, pair, max_length=64):
    """One sequence at a time, all logits, in float64."""
    context, continuation = pair
    tokens = torch.tensor([(context + continuation)[-(max_length + 1) :]])
    with torch.no_grad():
        logits = model.double()(tokens[:, :-1]).logits[0]
    logits = logits[-len(continuation) :]
    targets = torch.tensor(continuation)
    chosen = logits.log_softmax(-1)[range(len(continuation)), targets].sum()
    model.float()
    return float(chosen), bool((logits.argmax(-1) == targets).all())


def greedy(model, context, count):
    for _ in range(count):
        context = [*context, int(model(torch.tensor([context])).logits[0, -1].argmax())]
    return context[-count:]


@pytest.mark.parametrize("tokens", [1, 130, 100_000])
def test_equals_one_at_a_time_in_float64(loaded, tokens):
    model = loaded[0].model
    likely = greedy(model, PAIRS[1][0], 4)
    pairs = [(PAIRS[1][0], [*likely[:3], 299 - likely[3]]), *PAIRS[::-1], (PAIRS[1][0], likely)]
    scorer = Scorer(model, max_length=64)
    scorer.tokens = tokens
    done = []
    answers = scorer(pairs, done.append)
    assert sum(done) == len(pairs)
    for answer, pair in zip(answers, pairs, strict=True):
        expected = truth(model, pair)
        assert answer[0] == pytest.approx(expected[0], abs=2e-4)
        assert answer[1] == expected[1]
    assert answers[-1][1]
    assert not answers[0][1]


def test_an_answer_longer_than_the_model_is_scored_in_parts(loaded):
    model, context, answer = loaded[0].model, ids(5), ids(150)
    scorer, done = Scorer(model, max_length=64), []
    (found,) = scorer([(context, answer)], done.append)
    parts = [(context, answer[:64]), (answer[:64], answer[64:128]), (answer[:128], answer[128:])]
    assert found[0] == pytest.approx(sum(truth(model, part)[0] for part in parts), abs=1e-3)
    assert sum(done) == 1
    likely = greedy(model, context[-1:], 64)  # as far as the model sees
    assert scorer([(context, [*likely, *answer])])[0][1] is False


def test_a_model_that_cannot_select_logits():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    scorer = Scorer(model, max_length=64)
    scorer._may_select = False
    for answer, pair in zip(scorer(PAIRS), PAIRS, strict=True):
        assert answer[0] == pytest.approx(truth(model, pair)[0], abs=2e-4)


def test_pairs_that_share_an_input_share_a_forward_pass(loaded, monkeypatch):
    scorer, rows = Scorer(loaded[0].model, max_length=64), []
    forward = scorer.model.forward
    monkeypatch.setattr(
        scorer.model, "forward", lambda **kw: rows.append(len(kw["input_ids"])) or forward(**kw)
    )
    scorer(PAIRS)
    assert sum(rows) == len(PAIRS) - 4


def test_halves_the_batch_when_memory_runs_out(loaded, monkeypatch):
    scorer = Scorer(loaded[0].model, max_length=64)
    expected, batch, sizes = scorer(PAIRS), scorer._batch, []

    def small(rows, wanted):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return batch(rows, wanted)

    monkeypatch.setattr(scorer, "_batch", small)
    answers = scorer(PAIRS)
    assert [a[0] for a in answers] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert sizes[0] > 2
    assert sizes[-1] <= 2


def test_logits_of_a_batch_are_bounded(loaded, monkeypatch):
    from simreg.evaluation import scoring

    monkeypatch.setattr(scoring, "_LOGITS", 300 * 70)
    scorer, sizes = Scorer(loaded[0].model, max_length=64), []
    batch = scorer._batch

    def watched(rows, wanted):
        start = min(len(ids) - wanted[ids] for ids in rows)
        sizes.append((len(rows), len(rows) * (len(rows[0]) - start)))
        return batch(rows, wanted)

    monkeypatch.setattr(scorer, "_batch", watched)
    scorer(PAIRS)
    assert all(rows == 1 or size <= 70 for rows, size in sizes)
    assert any(rows > 1 for rows, _ in sizes)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_refuses_what_cannot_be_scored(loaded, pair):
    with pytest.raises(ValueError, match="expected 1 or more"):
        Scorer(loaded[0].model, max_length=64)([pair])


def test_encode_pair_moves_white_space_to_the_continuation(loaded):
    tokenizer = loaded[1]
    context, continuation = encode_pair(tokenizer, "the river ", "ran over")
    assert tokenizer.decode(context) == "the river"
    assert tokenizer.decode(continuation) == " ran over"
    assert encode_pair(tokenizer, "the river", " ran over") == (context, continuation)


def test_bf16_is_close(loaded):
    model = loaded[0].model
    exact, rounded = (Scorer(model, max_length=64, bf16=bf16)(PAIRS) for bf16 in (False, True))
    gaps = [
        abs(a[0] - b[0]) / len(pair[1]) for a, b, pair in zip(exact, rounded, PAIRS, strict=True)
    ]
    assert 0 < max(gaps) < 0.1


@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>")]
)
def test_encode_pair_where_texts_are_marked(loaded, before, after):
    tokenizer = copy.deepcopy(loaded[1])
    context, continuation = encode_pair(tokenizer, "the river ", "ran over")
    tokenizer.add_tokens(["<s>", "</s>"], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=list(ids.items())
    )
    found = encode_pair(tokenizer, "the river ", "ran over")
    assert found == ([*([ids[before]] if before else []), *context], continuation)
    marks = [ids[mark] for mark in (before, after) if mark]
    assert encode_pair(tokenizer, " ", "ran") == (marks[:1], encode_pair(tokenizer, "x", " ran")[1])


def test_a_model_that_gives_nan_has_no_scores(loaded):
    model = copy.deepcopy(loaded[0].model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="log-likelihoods are NaN"):
        Scorer(model, max_length=64)(PAIRS)


def test_tokens_that_the_model_has_not_are_named(loaded):
    with pytest.raises(UserError, match="has token 300, its vocabulary only 300"):
        Scorer(loaded[0].model, max_length=64)([([1, 2], [300])])


def test_a_model_of_several_modalities():
    text = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    assert len(Scorer(model, max_length=64)(PAIRS)) == len(PAIRS)


def test_the_name_of_a_special_token_is_text(loaded):
    tokenizer = loaded[1]
    context, continuation = encode_pair(tokenizer, f"the {tokenizer.eos_token} river ", "ran")
    assert tokenizer.eos_token_id not in [*context, *continuation]


def test_a_text_begins_with_bos_before_eos():
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=2)
    assert prefix_token(tokenizer) == 0
    tokenizer.bos_token_id = None
    assert prefix_token(tokenizer) == 2
