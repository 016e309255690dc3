"""SimReg at layers within the model."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simreg import AtDepths, SimRegLoss, attach
from simreg.capture import shift_left
from simreg.depths import DEPTHS, default_depths, offsets_at
from simreg.objectives import Reads, Sum, labels_at, reads
from simreg.parallel import ShardedSimRegLoss
from simreg.recipe.config import SimRegConfig
from tests.test_capture import batch, build
from tests.test_reads import Keeps


def test_losses_at_depths_add():
    own = SimRegLoss(weight=0.3)
    at = AtDepths(own, [0.5, 0.25], offset=0)
    assert reads(at) == Reads(depths=(0.5, 0.25))
    assert repr(at).startswith("AtDepths(\n  depths=[0.5, 0.25], offset=0\n")
    labels = torch.tensor([[1, 2, 1, 2, 3, -100]])
    states = [torch.randn(1, 6, 4, requires_grad=True) for _ in range(3)]
    loss, metrics = at(states[0], labels, None, num_items=7, earlier=states[1:])
    apart = [own(h, labels, num_items=7) for h in states]
    torch.testing.assert_close(loss, sum(each for each, _ in apart))
    grads = torch.autograd.grad(loss, states)
    for grad, h, (each, _) in zip(grads, states, apart, strict=True):
        torch.testing.assert_close(grad, *torch.autograd.grad(each, h), rtol=0, atol=0)
    (_, final), *others = apart
    below = torch.stack([found["loss"] for _, found in others]).mean()
    assert metrics == {**final, "earlier": below}
    for wrong in ([], states[1:2], states):
        with pytest.raises(
            ValueError, match=r"^earlier: expected hidden states at depths \[0.5, 0.25\], got \d "
        ):
            at(states[0], labels, earlier=wrong)


def test_by_default_it_is_what_the_recipe_trains_with():
    at, recipe = AtDepths(SimRegLoss()), SimRegConfig()
    offsets = offsets_at(recipe.depths, recipe.depths_offset)
    assert (list(at.reads.depths), at.offsets) == (recipe.depths, offsets)


def test_the_labels_by_default():
    """The token before up to a quarter of the depth, the one after the next beyond."""
    at = AtDepths(SimRegLoss(), [0.5, 0.25, 0.2501, 0.1, 0.9])
    assert at.offsets == (1, -2, 1, -2, 1)
    assert default_depths(1) == []
    assert default_depths(2) == [0.5]
    for layers in (3, 4, 5, 12, 80):
        assert default_depths(layers) == list(DEPTHS)
        AtDepths(SimRegLoss()).check_layers(layers)
    with pytest.raises(ValueError, match=r"are layers \[1, 1\] of 2, .*: give \[0\.5\]$"):
        AtDepths(SimRegLoss()).check_layers(2)


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("offset", [-30, -2, -1, 0, 1, 3, 11, 30])
def test_labels_of_another_position(offset, documents, ignore_index):
    """Against a loop; they are in no other document, and none where a token's own is ignored."""
    torch.manual_seed(0)
    labels = torch.randint(-1, 4, (3, 12))
    segments = torch.randint(0, 2, (3, 12)) if documents else None
    known = (labels >= 0) & (labels != ignore_index)
    expected = torch.full_like(labels, -7)
    for row, here in known.nonzero().tolist():
        there = here + offset
        if not 0 <= there < 12 or not known[row, there]:
            continue
        if segments is None or segments[row, here] == segments[row, there]:
            expected[row, here] = labels[row, there]
    before = labels.clone()
    found = labels_at(labels, segments, offset, ignore_index)
    found = found.masked_fill((found < 0) | (found == ignore_index), -7)
    assert torch.equal(found, expected)
    assert torch.equal(labels, before)


@pytest.mark.parametrize("segments", [None, torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])])
def test_within_they_are_compared_by_a_later_label(segments):
    own = SimRegLoss(weight=0.3, ignore_index=0)
    labels = torch.tensor([[1, 2, 1, 2, 3, 3, 1, 2, 0, 3]])
    later = torch.tensor([[2, 1, 2, 3, 3, 1, 2, 0, 0, 0]])
    if segments is not None:
        later[0, 4] = 0
    states = [torch.randn(1, 10, 4) for _ in range(2)]
    at = AtDepths(own, [0.5], offset=1)
    loss, metrics = at(states[0], labels, segments, earlier=states[1:], num_items=5.0)
    final, _ = own(states[0], labels, segments, num_items=5.0)
    within, found = own(states[1], later, segments, num_items=5.0)
    torch.testing.assert_close(loss, final + within, rtol=0, atol=0)
    valid = 8 if segments is None else 7
    torch.testing.assert_close(metrics["earlier"], found["loss"] * (valid - 1) / 9)
    # A divisor that nobody gives is that of the final hidden states.
    counted, expected = (
        at(states[0], labels, segments, earlier=states[1:], num_items=n)[0] for n in (None, 9)
    )
    torch.testing.assert_close(counted, expected)
    nothing, metrics = at(states[0], labels.fill_(0), earlier=states[1:])
    assert nothing == metrics["earlier"] == 0


def test_layers_may_be_on_several_devices():
    class Total(SimRegLoss):
        def forward(self, hidden, labels, segments=None, *, num_items=None):
            assert {hidden.device} == {x.device for x in (labels, segments, num_items)}
            return hidden.sum() / num_items, {"loss": hidden.sum()}

    with FakeTensorMode():
        first, last = torch.device("cuda:0"), torch.device("cpu")
        states = [torch.empty(2, 8, 4, device=device) for device in (last, first)]
        labels = torch.zeros(2, 8, dtype=torch.int64, device=last)
        items = torch.tensor(14, device=last)
        for offset in (0, 1):
            at = AtDepths(Total(), [0.5], offset=offset)
            loss, metrics = at(states[0], labels, labels, num_items=items, earlier=states[1:])
            assert loss.device == metrics["earlier"].device == last


@pytest.mark.parametrize("offset", [0.5, True, "1", {1}, [0.5], [True], [None]])
def test_an_offset_is_a_whole_number(offset):
    with pytest.raises(ValueError, match=r"^offset: expected (a )?whole number"):
        AtDepths(SimRegLoss(), [0.5], offset=offset)


@pytest.mark.parametrize("offset", [[], [1], [1, 0, 1]])
def test_offsets_are_as_many_as_depths(offset):
    with pytest.raises(ValueError, match=rf"^offset: {len(offset)} for 2 of depths: "):
        AtDepths(SimRegLoss(), [0.25, 0.5], offset=offset)


@pytest.mark.parametrize("num_items", [None, 5.0])
@pytest.mark.parametrize("offsets", [(-2, 1), (1, 0), (0, -1)])
def test_each_depth_may_have_a_label_of_its_own(offsets, num_items):
    torch.manual_seed(0)
    own = SimRegLoss(weight=0.3)
    labels = torch.randint(-1, 4, (2, 12))
    segments = torch.arange(12).expand(2, 12) // 7
    states = [torch.randn(2, 12, 4, requires_grad=True) for _ in range(3)]
    at = AtDepths(own, [0.5, 0.25], offset=offsets)
    assert f"offset={list(offsets)}" in repr(at)
    loss, metrics = at(states[0], labels, segments, num_items=num_items, earlier=states[1:])
    items = num_items or int((labels >= 0).sum())
    below = total = 0
    for h, offset in zip(states, (0, *offsets), strict=True):
        ids = labels_at(labels, segments, offset)
        part, found = own(h, ids, segments, num_items=items)
        total = total + part
        below = below + found["loss"] * (ids >= 0).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss, total)
    _, final = own(states[0], labels, segments)
    torch.testing.assert_close(metrics["earlier"], (below - final["loss"]) / 2)
    expected = torch.autograd.grad(total, states)
    torch.testing.assert_close(torch.autograd.grad(loss, states), expected)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("depths", [[0.5, 0.4], [0.9]], ids=["one layer twice", "the last"])
def test_each_depth_is_a_layer_of_its_own(depths, beside):
    model, at = build(), AtDepths(SimRegLoss(), depths)
    assert len(model.get_decoder().layers) == 2
    with pytest.raises(ValueError, match=r"depths: .* are layers .* of 2, each may come once"):
        attach(model, Sum(at, Keeps(depths=(1.0,))) if beside else at)
    assert not model.get_decoder()._forward_hooks
    attach(model, Keeps(depths=(0.5, 0.4, 1.0)))  # another objective may read what it likes


def test_at_depths_has_the_weight_of_its_loss():
    own = SimRegLoss(weight=0.3)
    at = AtDepths(own, [0.5])
    at.weight = 0.1
    assert own.weight == 0.1
    own.weight = 0.0
    assert at.weight == 0
    other = Keeps()
    both, states = Sum(own, other), torch.ones(1, 2, 3)
    _, metrics = both(states, torch.zeros(1, 2, dtype=torch.long))
    assert metrics.keys() == {"auxiliary"}  # nothing was computed for a λ of 0


@pytest.mark.parametrize("segments", [None, "documents"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_of_a_model_the_middle_layer_is_regularized_too(beside, segments):
    model, own, other = build(), SimRegLoss(), Keeps(depths=(1.0,))
    ids, labels = batch()[:2]
    segments = segments and (torch.arange(ids.shape[1]) // 5).expand_as(ids)
    at = AtDepths(own, [0.5], offset=0)
    reg = attach(model, Sum(at, other) if beside else at)
    model(input_ids=ids)
    loss = reg(labels, segments=segments)
    if beside:
        loss = loss - reg.metrics["auxiliary"]
    reg.detach()
    states = model.get_decoder()(input_ids=ids, output_hidden_states=True)
    both = states.last_hidden_state, states.hidden_states[len(model.get_decoder().layers) // 2]
    torch.testing.assert_close(loss, sum(own(h, shift_left(labels), segments)[0] for h in both))


@pytest.mark.parametrize(
    "depths",
    [
        *(None, 0.5, "0.5", torch.tensor([0.5]), {0.5, 0.25}),
        *([], [0], [1.0], [1.5], [float("nan")], ["0.5"], [True], [0.5, 0.5]),
    ],
    ids=str,
)
def test_depths_that_are_none_are_refused(depths):
    with pytest.raises(ValueError, match="depths: "):
        AtDepths(SimRegLoss(), depths)


@pytest.mark.parametrize(
    "objective",
    [None, SimRegLoss, Keeps(), AtDepths(SimRegLoss(), [0.5]), ShardedSimRegLoss()],
    ids=lambda objective: type(objective).__name__,
)
def test_at_depths_is_of_a_loss_of_whole_sequences(objective):
    with pytest.raises(ValueError, match="simreg: expected a SimRegLoss"):
        AtDepths(objective, [0.5])
    AtDepths(torch.compile(SimRegLoss()), [0.5])


class Own(nn.Module):
    """Of several blocks, and a norm before the head."""

    def __init__(self, blocks):
        super().__init__()
        self.embed, self.norm = nn.Embedding(32, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x if isinstance(x, torch.Tensor) else x["x"])


def test_a_layer_that_runs_several_times_is_refused():
    looped = Own([nn.Linear(8, 8)] * 4)
    with pytest.raises(ValueError, match="layers: one module stands at several depths"):
        attach(looped, AtDepths(SimRegLoss(), [0.25]), module=looped.norm, layers=looped.blocks)
    ends = [nn.Linear(8, 8) for _ in range(2)]
    once = Own([ends[0], nn.Linear(8, 8), *ends])
    attach(once, AtDepths(SimRegLoss(), [0.5]), module=once.norm, layers=once.blocks)


class Loops(Own):
    def forward(self, ids):
        x = self.embed(ids)
        for block in [*self.blocks] * 2:
            x = block(x)
        return self.norm(x)


def test_layers_in_a_loop_are_refused():
    model = Loops([nn.Linear(8, 8) for _ in range(2)])
    at = attach(model, AtDepths(SimRegLoss(), [0.5]), module=model.norm, layers=model.blocks)
    ids = torch.tensor([[1, 2, 1, 2]])
    with pytest.raises(RuntimeError, match="layers: Linear ran twice in one forward pass"):
        model(ids)
    with torch.no_grad():
        model(ids)
    at.detach()
    model(ids)


def test_after_a_pass_that_failed_a_layer_alone_is_in_none():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    model = Own([nn.Linear(8, 8), Fails()])
    at = attach(model, AtDepths(SimRegLoss(), [0.5]), module=model.norm, layers=model.blocks)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.tensor([[1, 2, 1, 2]]))
    assert at._earlier  # and with it the graph, whoever caught the error
    at.forget()
    for _ in range(2):
        model.blocks[0](torch.ones(1, 4, 8))
    assert not at._earlier


@pytest.mark.parametrize("layers", [5, [], "layers", [None]])
def test_what_is_no_list_of_layers_is_refused(layers):
    model = Own([nn.Linear(8, 8) for _ in range(2)])
    with pytest.raises(ValueError, match="so it needs all its layers in their order"):
        attach(model, AtDepths(SimRegLoss(), [0.5]), module=model.norm, layers=layers)


class Returning(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: {"x": x["x"] if isinstance(x, dict) else x}, "got dict"),
        (lambda x: x[:, :, None] if x.dim() == 3 else x[:, :, 0], r"\[1, 6, 1, 8\]"),
    ],
)
def test_layers_that_return_no_hidden_states_are_named(output, got):
    model = Own(Returning(output) for _ in range(3))
    attach(model, AtDepths(SimRegLoss(), [0.3]), module=model.norm, layers=model.blocks)
    with pytest.raises(TypeError, match=f"layers: expected an output that is.*{got}"):
        model(torch.arange(6)[None])


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_metrics_are_exact_where_the_default_dtype_is_half(default):
    """As Lightning sets it for models in half precision; float16 ends at 65,504."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(70, 1000, 4), torch.randint(0, 999, (70, 1000))
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            found.append(AtDepths(SimRegLoss())(hidden, labels, earlier=2 * (hidden,))[1])
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]
    assert all(value.dtype == torch.float32 for value in found[1].values())
