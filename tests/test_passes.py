"""Which forward pass a call of the handle reads, what becomes of the others, and of copies."""

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from simreg.capture import attach
from simreg.depths import AtDepths
from simreg.loss import SimRegLoss
from tests.test_attach import Deep
from tests.test_capture import HeadCrossEntropy, batch, build


def test_hidden_states_serve_one_call():
    model, (ids, labels) = build(), batch()
    objective = HeadCrossEntropy(model.lm_head)
    reg = attach(model, objective)
    with pytest.raises(RuntimeError, match="no hidden states"):
        reg(labels)
    model(ids)
    reg(labels)
    with pytest.raises(RuntimeError, match="a call consumes them"):
        reg(labels)
    model(ids)
    model(ids[:1])  # of two passes the last one counts, and a misfit does not pass
    with pytest.raises(ValueError, match=r"labels: expected shape \[1, 12\].* got \[2, 12\]"):
        reg(labels)
    reg(labels[:1])  # what was refused consumed nothing


def test_passes_without_gradients_are_passed_by():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    expected = reg(labels)
    model(ids)
    with torch.no_grad():
        model(ids.flip(1))  # of the same shape: an evaluation between a pass and its loss
    loss = reg(labels)
    assert loss == expected
    assert loss.requires_grad
    model.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="no hidden states"):
        reg(labels)


def test_consumed_hidden_states_are_released():
    model, (ids, labels) = build(), batch()
    objective = HeadCrossEntropy(model.lm_head)
    reg = attach(model, objective)
    model(ids)
    reg(labels)
    hidden = weakref.ref(objective.seen.pop()[0])
    gc.collect()
    assert hidden() is None
    model(ids)
    hidden = weakref.ref(reg._hidden)
    reg.detach()
    gc.collect()
    assert hidden() is None


def test_layers_that_run_after_the_pass_are_not_of_it():
    """In the backward pass of cross-entropy, say, where they are checkpointed."""
    model, (ids, labels) = Deep(False), batch()
    norm, blocks = model.parts["norm"], model.parts["blocks"]
    reg = attach(model, AtDepths(SimRegLoss(), [0.5]), module=norm, layers=blocks)
    expected = [model(ids), reg(labels)][1]
    model(ids)
    blocks[1](torch.ones(2, 12, 8))
    assert reg(labels) == expected


def test_what_an_abandoned_step_left_is_not_kept_through_the_next_forward_pass():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    states, alive = [], []
    model.model.register_forward_hook(lambda *args: states.append(weakref.ref(args[-1][0])))

    def look(*_):
        gc.collect()
        alive.append([state() is not None for state in states])

    model.model.layers[0].register_forward_pre_hook(look)
    model(ids)
    look()
    model(ids)
    assert alive == [[], [True], [False]]
    with torch.no_grad():  # a pass without gradients does not touch what waits for its call
        model(ids)
    assert reg(labels).requires_grad


def heard(call, *passes):
    """The warnings of a call after these passes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for each in passes:
            each()
        call()
    return [str(each.message) for each in found]


def test_a_pass_that_no_call_followed_is_told():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    forward, call = partial(model, ids), partial(reg, labels)
    [message] = heard(call, forward, forward)
    assert message.startswith("two forward passes with gradients before a call, which reads the l")
    evaluation = torch.no_grad()(forward)
    assert not heard(call, forward, evaluation)
    assert not heard(call, forward, reg.forget, forward)

    def unheard():
        reg.listening = False
        forward()
        reg.listening = True

    assert not heard(call, unheard, forward, unheard)


def test_a_checkpointed_model_leaves_nothing_of_its_second_pass():
    model, (ids, labels) = Deep(False), batch()
    norm, blocks = model.parts["norm"], model.parts["blocks"]
    for objective, layers in ((SimRegLoss(), None), (AtDepths(SimRegLoss(), [0.5]), blocks)):
        with attach(model, objective, module=norm, layers=layers) as reg:
            out = checkpoint(model, ids, use_reentrant=False)
            (out.logsumexp(-1).sum() + reg(labels)).backward()
            assert reg._hidden is None
            assert not reg._earlier
            with pytest.raises(RuntimeError, match="no hidden states to regularize"):
                reg(labels)


def test_a_pass_without_gradients_is_not_answered_with_an_earlier_one():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    with torch.no_grad():
        model(ids.flip(0))
        with pytest.raises(RuntimeError, match="with gradients, before each call"):
            reg(labels)
    assert reg(labels) > 0  # generation may come between
    model(ids)
    with torch.no_grad():
        assert reg(labels) > 0


def test_a_compiled_pass_that_no_call_followed_is_told():
    torch._dynamo.reset()
    model, (ids, labels) = build(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    reg = attach(compiled, SimRegLoss())
    forward, call = partial(compiled, ids), partial(reg, labels)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not heard(call, forward)
        assert not heard(call, forward)
    [message] = heard(call, forward, forward)
    assert message.startswith("two forward passes with gradients before a call")
    assert not heard(call, forward)


@pytest.mark.parametrize("first", [True, False])
def test_a_norm_that_runs_twice_in_a_pass_is_refused_beside_layers(first):
    """A second head that reads it, or a look at the logits of a layer: which is the final one?"""

    class Twice(Deep):
        def forward(self, ids):
            norm, other = self.parts["norm"], self.parts["embed"](ids)
            if first:
                return self.head(norm(other)), super().forward(ids)
            return super().forward(ids), self.head(norm(other))

    model, (ids, _) = Twice(False), batch()
    blocks = model.parts["blocks"]
    reg = attach(model, AtDepths(SimRegLoss()), module=model.parts["norm"], layers=blocks)
    with pytest.raises(RuntimeError, match="module: LayerNorm ran twice in one forward pass"):
        model(ids)
    reg.forget()
    with torch.no_grad():
        model(ids)  # nothing is read


def test_a_norm_that_runs_once_more_after_the_pass_is_refused_beside_layers():
    model, (ids, labels) = Deep(False), batch()
    norm, blocks = model.parts["norm"], model.parts["blocks"]
    reg = attach(model, AtDepths(SimRegLoss()), module=norm, layers=blocks)
    expected = [model(ids), reg(labels)][1]
    model(ids)
    with torch.no_grad():
        norm(torch.ones(2, 12, 8))
    with pytest.raises(RuntimeError, match="or once more before a call"):
        norm(torch.ones(2, 12, 8))
    assert reg(labels) == expected  # of the pass
    model(ids)
    model(ids)  # a new pass is none of it
    assert heard(partial(reg, labels))[0].startswith("two forward passes")


def test_a_call_within_a_checkpoint_is_told():
    model, (ids, labels) = Deep(False), batch()
    reg = attach(model, SimRegLoss(), module=model.parts["norm"])

    def step(weight):
        return model(ids).logsumexp(-1).sum() * weight + reg(labels)

    weight = torch.ones((), requires_grad=True)
    loss = checkpoint(step, weight, use_reentrant=False)
    with pytest.raises(RuntimeError, match="call it after what is checkpointed"):
        loss.backward()
