"""What every rival keeps, whatever it computes."""

import copy
import re
from pathlib import Path

import pytest
import torch

from simreg.baselines import registry
from simreg.capture import attach
from simreg.loss import SimRegLoss
from simreg.objectives import Sum, by_rows
from tests.baselines.problems import call, changed, gradients, leaves, make, problem, read

DOCS = Path(__file__).parents[2] / "docs/rivals.md"
every = pytest.mark.parametrize("name", registry.OBJECTIVES)


def result(objective, p, num_items=None, autocast=False):
    """The loss and the gradients of what it read; of the same state and random numbers always."""
    torch.manual_seed(0)
    p, inputs = leaves(p)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = call(copy.deepcopy(objective), p, num_items)
    return loss.detach(), gradients(loss, inputs)


def rows(p, chosen):
    cut = changed(p, lambda x: x[chosen])
    segments = None if p["segments"] is None else p["segments"][chosen]
    return cut | {"labels": p["labels"][chosen], "segments": segments}


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    for a, e in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@every
@pytest.mark.parametrize("documents", [0, 3])
def test_halves_of_a_batch_add_up(name, documents):
    p = problem(batch=4, documents=documents)
    p["labels"][0, :5] = -100  # halves of unlike size
    objective = make(name, p).eval()  # dropout differs from call to call, centres move
    halves = [result(objective, rows(p, half), 20.0) for half in (slice(0, 2), slice(2, 4))]
    total = halves[0][0] + halves[1][0]
    grads = [torch.cat(pair) for pair in zip(halves[0][1], halves[1][1], strict=True)]
    assert_close((total, grads), result(objective, p, 20.0), rtol=1e-12, atol=1e-14)
    count = (p["labels"] >= 0).sum()
    assert_close(result(objective, p), result(objective, p, count), rtol=0, atol=0)


VARIANTS = (
    {"batch": True},
    {"centre": "row"},
    {"centre": "batch"},
    {"shuffle": True},
    {"offset": -1},
    {"unlabelled": True},
    {"pull": 0.0},
)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in registry.OBJECTIVES] + [("simreg-variant", o) for o in VARIANTS],
)
def test_whether_rows_are_independent_in_training_is_declared(name, options):
    """The sum over micro-batches is the batch's, exactly for those objectives that say so."""
    p = problem(batch=4, length=12)
    objective = make(name, p, **options)

    def total(*parts):
        torch.manual_seed(0)
        copied = copy.deepcopy(objective)
        return sum(call(copied, rows(p, part), 20.0)[0] for part in parts)

    whole, halves = total(slice(0, 4)), total(slice(0, 2), slice(2, 4))
    assert by_rows(objective) == torch.allclose(whole, halves, rtol=1e-9)
    assert by_rows(Sum(None, objective)) == by_rows(objective)
    assert by_rows(Sum(SimRegLoss(), objective)) == by_rows(objective)


@every
def test_ignored_positions_are_never_read(name):
    p = problem(length=12, documents=2)
    ignored = (p["labels"] < 0).unsqueeze(-1)
    spoilt = changed(p, lambda x: x.masked_fill(ignored, torch.nan))
    objective = make(name, p)
    actual, expected = result(objective, spoilt), result(objective, p)
    assert expected[0] != 0
    assert_close(actual, expected, rtol=0, atol=0)
    for grad in actual[1]:
        assert (grad.masked_select(ignored) == 0).all()
    if name == "center":
        call(objective, spoilt)
        assert objective.centers.isfinite().all()


@every
@pytest.mark.parametrize("length", [1, 7])
def test_each_token_has_its_loss(name, length):
    p = problem(length=length, documents=2)
    objective = make(name, p)
    losses = objective.losses(p["hidden"], p["labels"], p["segments"], **read(objective, p))
    assert losses.shape == p["labels"].shape
    assert (losses[p["labels"] < 0] == 0).all()


@every
def test_nan_in_nan_out(name):
    p = problem(ignored=0)
    spoilt = changed(p, lambda x: torch.where(torch.arange(7)[:, None] == 2, torch.nan, x))
    assert result(make(name, p), spoilt)[0].isnan()


@every
def test_without_labels_it_is_zero(name):
    p = problem(ignored=1)
    for num_items in (None, 5.0):
        loss, grads = result(make(name, p), p, num_items)
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


@every
@pytest.mark.parametrize(("rows", "length"), [(2, 0), (0, 3)])
def test_without_tokens_it_is_zero(name, rows, length):
    p = problem(batch=rows, length=length)
    loss, grads = result(make(name, p), p)
    assert loss == 0
    assert grads[0].shape == p["hidden"].shape


@every
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", ["zeros", "same", "opposite", "tiny"])
def test_degenerate_inputs_have_finite_gradients(name, length, dtype, value):
    p = problem(length=length, ignored=0)
    change = {
        "zeros": torch.zeros_like,
        "same": lambda x: x[:, :1].expand_as(x),
        "opposite": lambda x: x[:, :1] * (-1.0) ** torch.arange(length)[:, None],
        "tiny": lambda x: x * 1e-20,
    }[value]
    objective = make(name, p).float()
    loss, grads = result(objective, changed(p, lambda x: change(x).to(dtype)))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    state = objective.state_dict()
    assert all(x.isfinite().all() for x in state.values())


@every
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_computed_in_float32(name, autocast):
    p = problem(seed=2, length=24, dim=32, vocab=40, documents=2)
    rounded = changed(p, lambda x: x.bfloat16())
    options = {"temperature": 1.0} if name == "contraclm" else {}  # undropped, others don't matter
    objective = make(name, p, **options).eval()
    expected = result(objective, changed(rounded, lambda x: x.double()))
    loss, grads = result(objective.float(), rounded, autocast=autocast)
    assert loss.dtype == torch.float32
    # A projector takes the dtype of autocast, as the model's layers do, and the LM head that of
    # the states.
    loose = name == "deep-supervision" or (autocast and name == "nitp")
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-2 if loose else 1e-5, atol=1e-7)
    for a, e in zip(grads, expected[1], strict=True):
        error = (a.double() - e).abs()
        tolerance = 0.1 * e.abs().max() if loose else 2**-8 * e.abs() + 1e-6 * e.abs().max()
        assert (error <= tolerance).all()


@pytest.mark.parametrize("name", [n for n in registry.OBJECTIVES if n != "reweighting"])
def test_packed_rows_equal_separate_rows(name):
    p = problem(batch=2, length=6, ignored=0.2)
    p["labels"][:, -2:] = 1  # packed, the last label of the first is a token of the second
    packed = changed(p, lambda x: x.reshape(1, 12, -1))
    packed["labels"] = p["labels"].view(1, 12)
    packed["segments"] = torch.tensor([[4] * 6 + [1] * 6])
    objective = make(name, p).eval()
    actual, expected = result(objective, packed), result(objective, p)
    shaped = [a.view_as(e) for a, e in zip(actual[1], expected[1], strict=True)]
    assert_close((actual[0], shaped), expected, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_segments_of_any_integer_dtype(name, kind):
    p = problem(documents=2)
    p["segments"] = p["segments"] % 2
    expected = result(make(name, p), p)
    actual = result(make(name, p), p | {"segments": p["segments"].to(kind)})
    assert_close(actual, expected, rtol=0, atol=0)


@every
def test_rows_without_a_batch_are_refused(name):
    p = problem()
    with pytest.raises(ValueError, match=r"hidden: expected \[B, L, d\], got"):
        make(name, p)(p["hidden"][0], p["labels"][0])


@every
def test_options(name):
    p = problem()
    known = registry.options(name)
    assert next(iter(known)) == "weight"
    assert not {"hidden_size", "vocab_size"} & known.keys()
    assert make(name, p, **known).weight == known["weight"]  # the defaults can be given
    with pytest.raises(ValueError, match=rf"{name} has no option nonsense; it has weight"):
        make(name, p, nonsense=1)
    for option in known:
        for bad in (-1, float("nan"), "much", True):
            if (bad is True and isinstance(known[option], bool)) or (option, bad) == ("offset", -1):
                continue
            with pytest.raises(ValueError, match=f"^{option}: expected .*, got {bad!r}"):
                make(name, p, **{option: bad})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("label-smoothing", "weight", 1.01),
        ("simctg", "margin", 2.1),
        ("contraclm", "dropout", 1.0),
        ("contraclm", "temperature", 0),
        ("dispersion", "temperature", 0.0),
        ("dispersion", "depths", [0.5, 1.5]),
        ("dispersion", "depths", [0]),
        ("simctg", "depths", [1.5]),
        ("nitp", "depth", 0),
        ("nitp", "expansion", 1.5),
        ("mtp", "horizon", 1),
        ("reweighting", "strategy", "lower"),
        ("reweighting", "unit", "row"),
        ("center", "alpha", 1.1),
    ],
)
def test_values_out_of_range(name, option, value):
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        make(name, problem(), **{option: value})


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no objective 'zloss'; there are .*z-loss"):
        registry.options("zloss")


def test_the_documentation_names_every_option_and_default():
    rows = re.findall(r"^\| `([a-z-]+)` \|[^|]*\|([^|]*)\|", DOCS.read_text(), re.M)
    assert [name for name, _ in rows] == list(registry.OBJECTIVES)
    for name, told in rows:
        found = re.findall(r"`(\w+)` ([^\s,]+)", told)
        known = {
            k: f"{v:g}" if isinstance(v, float) else str(v)
            for k, v in registry.options(name).items()
        }
        known = {k: "1e-4" if v == "0.0001" else v for k, v in known.items()}
        assert dict(found) == known


@every
def test_on_a_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )
    objective = registry.build(name, {}, hidden_size=16, vocab_size=40)
    reg = attach(model, Sum(None, objective))
    ids = torch.randint(0, 40, (2, 9))
    losses = []
    for _ in range(2):  # the centres of the first call are at 0
        model.zero_grad()
        model(ids)
        loss = reg(ids)
        loss.backward()
        losses.append(loss.item())
    assert all(value != 0 for value in losses)
    assert reg.metrics["auxiliary"].isfinite()
    trained = 2 if name == "deep-supervision" else 3  # it reads the second layer alone
    for layer in model.model.layers[:trained]:
        assert layer.mlp.down_proj.weight.grad.abs().sum() > 0
    assert all(w.grad.abs().sum() > 0 for w in objective.parameters())


@every
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_rows_have_a_gradient(name, length):
    p, inputs = leaves(problem(batch=2, length=length))
    loss, _ = call(make(name, p), p)
    assert loss.requires_grad
    loss.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in inputs)


@every
def test_on_meta_tensors(name):
    """As counters of operations run a model."""
    p = problem()
    objective = make(name, p).to("meta")
    p = changed(p, lambda x: x.to("meta"))
    p |= {"labels": p["labels"].to("meta"), "head": p["head"].to("meta"), "segments": None}
    loss, _ = call(objective, p)
    assert (loss.shape, loss.device.type) == (torch.Size(), "meta")


@every
@pytest.mark.parametrize("weight", [float("nan"), -1.0, None])
def test_a_weight_that_a_schedule_sets_is_checked(name, weight):
    p = problem()
    objective = make(name, p)
    objective.weight = weight
    with pytest.raises(ValueError, match="weight: expected a finite number"):
        call(objective, p)


@every
def test_labels_of_another_dtype_are_refused(name):
    p = problem()
    p["labels"] = p["labels"].int()
    with pytest.raises(ValueError, match=r"labels: expected .* in torch.int64"):
        call(make(name, p), p)


def test_objectives_of_tokens_over_processes_do_not_add():
    part = SimRegLoss()
    part.group = None
    for pair in ((part, registry.build("cosine", {}, hidden_size=4, vocab_size=6)), (None, part)):
        with pytest.raises(ValueError, match="spread over processes do not add"):
            Sum(*pair)
