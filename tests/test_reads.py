"""What an objective reads besides the final hidden states: logits and earlier layers."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from simreg.baselines import registry
from simreg.capture import attach
from simreg.decoders import find_layers
from simreg.loss import SimRegLoss
from simreg.objectives import Reads, Sum, layer_at, reads
from tests.test_capture import CONFIGS, SMALL, batch, build

transformers = pytest.importorskip("transformers")


class Keeps(nn.Module):
    """An objective that keeps what it was given; its loss has a gradient to all of it."""

    def __init__(self, **declared):
        super().__init__()
        self.reads = Reads(**declared)
        self.seen = {}

    def forward(self, hidden, labels, segments=None, *, num_items=None, **read):
        self.seen = {"hidden": hidden, **read}
        tensors = [hidden, *read.get("earlier", ())]
        if "logits" in read:
            tensors.append(read["logits"])
        loss = sum(t.square().mean() for t in tensors)
        return loss, {"loss": loss.detach()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, objective):
    """Gradients of the objective alone."""
    ids, labels = batch()[:2]
    with attach(model, objective) as reg:
        model(input_ids=ids, labels=labels)
        reg(labels).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def test_earlier_states_are_rounded_under_autocast_as_the_final_ones():
    model, keeps = build(), Keeps(depths=(0.5,))
    ids, labels = batch()[:2]
    with attach(model, keeps) as reg, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=labels)
        reg(labels).backward()
    dtypes = {state.dtype for state in (keeps.seen["hidden"], *keeps.seen["earlier"])}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2", "neox", "opt"])
def test_they_are_what_the_model_says(name):
    model, keeps = build(name), Keeps(logits=True, depths=(0.5, 1.0, 0.2))
    ids, labels = batch()[:2]
    with attach(model, keeps) as reg:
        out = model(input_ids=ids, labels=labels, output_hidden_states=True)
        reg(labels)
    assert keeps.seen["logits"] is out.logits
    half, whole, fifth = keeps.seen["earlier"]
    # hidden_states: the embeddings, then each layer; the last is after the final norm.
    torch.testing.assert_close(half, out.hidden_states[1], rtol=0, atol=0)
    torch.testing.assert_close(fifth, out.hidden_states[1], rtol=0, atol=0)
    assert whole.shape == half.shape
    assert not torch.equal(whole, half)


SCALED = {
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=0.05, query_pre_attn_scalar=8
    ),
}


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", SCALED)
def test_logits_are_those_of_cross_entropy(name, return_dict):
    """Scaled or capped after the head, as the model's own loss sees them."""
    torch.manual_seed(0)
    model, keeps = transformers.AutoModelForCausalLM.from_config(SCALED[name]()), Keeps(logits=True)
    raw = []
    model.get_output_embeddings().register_forward_hook(lambda m, x, out: raw.append(out))
    ids, labels = batch()[:2]
    with attach(model, keeps) as reg:
        out = model(input_ids=ids, labels=labels, return_dict=return_dict)
        reg(labels)
    loss, logits = (out.loss, out.logits) if return_dict else out[:2]
    assert keeps.seen["logits"] is logits
    assert (raw[0] - logits).abs().max() > 1e-3
    mean = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(mean, loss)


def test_the_head_is_that_of_the_model_now():
    model, keeps = build(), Keeps(head=True)
    ids, labels = batch()[:2]
    with attach(torch.compile(model, backend="eager"), keeps) as reg:
        model(input_ids=ids)
        assert reg._logits is None  # nobody asked for them
        model.set_output_embeddings(nn.Linear(4, 4))
        reg(labels)
    assert keeps.seen["head"] is model.get_output_embeddings()


def test_a_model_may_return_bare_logits():
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids):
            return super().forward(input_ids).logits * 2

    torch.manual_seed(0)
    model, keeps = Bare(CONFIGS["llama"]()), Keeps(logits=True)
    reg = attach(model, keeps)
    ids, labels = batch()[:2]
    out = model(ids)
    reg(labels)
    assert keeps.seen["logits"] is out


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "compiled", "in place"])
def test_logits_of_a_wrapped_model(wrap, tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SCALED["granite"]())
    wrapped, keeps = model, Keeps(logits=True)
    ids = batch()[0]
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        if wrap == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif wrap == "fsdp":
            fully_shard(model)
        elif wrap == "compiled":
            wrapped = torch.compile(model, fullgraph=True, backend="aot_eager")
        else:
            model.compile(fullgraph=True, backend="aot_eager")
        reg = attach(wrapped, keeps)
        out = wrapped(input_ids=ids)
        reg(ids).backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(keeps.seen["logits"], out.logits)
    assert model.lm_head.weight.grad is not None


def test_the_layer_of_a_depth_is_counted_upwards():
    model, keeps = build(), Keeps(depths=(0.01, 0.04, 0.28, 0.281))
    layers = model.get_decoder().layers
    for _ in range(23):
        layers.append(copy.deepcopy(layers[0]))
    model.config.num_hidden_layers = 25
    given = {}
    for i, layer in enumerate(layers, start=1):
        layer.register_forward_hook(lambda m, x, out, i=i: given.update({i: out}))
    ids, labels = batch()[:2]
    reg = attach(model, keeps)
    model(input_ids=ids, use_cache=False)
    reg(labels)
    for found, layer in zip(keeps.seen["earlier"], (1, 1, 7, 8), strict=True):
        assert found is given[layer]
    assert [layer_at(depth, 4) for depth in (1e-9, 0.25, 0.26, 1.0)] == [1, 1, 2, 4]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain = step(build(), Keeps(depths=(0.5,), logits=True))
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = step(model, Keeps(depths=(0.5,), logits=True))
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():  # up to the order in which gradients are added
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7)


class Tower(nn.Module):
    """A model whose hooks run again in the backward pass: it checkpoints the whole layer."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.reentrant = reentrant

    def get_decoder(self):
        return self

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def test_what_runs_again_in_backward_is_not_kept():
    labels, x = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, 4, requires_grad=True)
    model = Tower(reentrant=False)
    reg = attach(model, Keeps(depths=(0.5,)))
    with set_checkpoint_early_stop(False):  # else it ends before the hooks
        model(x)
    reg(labels).backward()
    assert reg._earlier == {}
    assert model.layers[0].weight.grad is not None


def test_layers_hidden_by_reentrant_checkpointing_are_an_error():
    labels, x = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, 4, requires_grad=True)
    model = Tower(reentrant=True)
    reg = attach(model, Keeps(depths=(0.5,)))
    model(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False does not"):
        reg(labels)


def test_compile():
    plain = step(build(), Keeps(depths=(0.5,), logits=True))
    model, keeps = build(), Keeps(depths=(0.5,), logits=True)
    ids, labels = batch()[:2]
    reg = attach(model, keeps)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        compiled(input_ids=ids, labels=labels)
        reg(labels).backward()
    found = gradients(model)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value)


def test_a_model_that_skips_logits_is_an_error():
    model = build()
    ids, labels = batch()[:2]
    reg = attach(model, Keeps(logits=True))
    model(input_ids=ids, logits_to_keep=1)
    with pytest.raises(RuntimeError, match="logits of every position"):
        reg(labels)
    model(input_ids=ids)
    model.get_decoder()(input_ids=ids)  # those of the pass before are not of this one
    with pytest.raises(RuntimeError, match="logits of every position"):
        reg(labels)


def test_what_a_model_lacks_is_named():
    model = build()
    with pytest.raises(ValueError, match=r"leave module out"):
        attach(model, Keeps(logits=True), module=model.get_decoder())
    wrong = Keeps()
    wrong.reads = {"logits": True}
    with pytest.raises(ValueError, match=r"objective.reads: expected a simreg.Reads, got {"):
        attach(model, wrong)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 1.5"):
        attach(model, Keeps(depths=(1.5,)))
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\) on LlamaForCausalLM"):
        attach(model, Keeps(logits=True))
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\) on LlamaForCausalLM"):
        attach(model, Keeps(head=True))
    model.get_decoder = lambda: nn.Linear(2, 2)
    with pytest.raises(ValueError, match="list of layers in Linear"):
        attach(model, Keeps(depths=(0.5,)))


def test_a_copy_of_the_model_keeps_nothing():
    model, keeps = build(), Keeps(depths=(0.5,), logits=True)
    reg = attach(model, keeps)
    ids, labels = batch()[:2]
    model(input_ids=ids)
    twin = copy.deepcopy(model)
    twin(input_ids=ids)
    assert copy.copy(reg)._causal is None
    reg(labels)
    reg.detach()
    model(input_ids=ids)
    assert reg._hidden is None
    assert reg._earlier == {}


@pytest.mark.parametrize("declared", [{"head": True}, {"logits": True}, {"depths": (0.5,)}])
def test_a_handle_keeps_no_model(declared):
    model = build()
    attach(model, Keeps(**declared))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()  # what no reference holds is gone at once
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_sum_gives_each_what_it_asked_for():
    one, other = Keeps(depths=(1.0, 0.5), head=True), Keeps(depths=(0.5,), logits=True)
    both = Sum(one, other)
    assert reads(both) == Reads(logits=True, depths=(1.0, 0.5), head=True)
    assert reads(Sum(other, one)).head
    model = build()
    ids, labels = batch()[:2]
    reg = attach(model, both)
    out = model(input_ids=ids)
    loss = reg(labels)
    assert one.seen.keys() == {"hidden", "earlier", "head"}
    assert one.seen["head"] is model.lm_head
    assert other.seen.keys() == {"hidden", "earlier", "logits"}
    assert len(one.seen["earlier"]) == 2
    assert other.seen["logits"] is out.logits
    assert other.seen["earlier"][0] is one.seen["earlier"][1]
    assert reg.metrics.keys() == {"loss", "auxiliary"}
    torch.testing.assert_close(loss, reg.metrics["loss"] + reg.metrics["auxiliary"])
    alone, ones = Sum(None, other), torch.ones(1, 2, 3)
    _, metrics = alone(ones, torch.zeros(1, 2), logits=ones, earlier=(ones,))
    assert metrics.keys() == {"auxiliary"}


def test_what_simreg_ignores_the_other_does_too():
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 30, 6), torch.randint(0, 4, (2, 30))
    other = registry.build("simctg", {}, hidden_size=6, vocab_size=4)
    both = Sum(SimRegLoss(ignore_index=0), other)
    loss, metrics = both(hidden, labels)
    left = hidden, labels.masked_fill(labels == 0, -100)
    torch.testing.assert_close(loss, SimRegLoss()(*left)[0] + other(*left)[0])
    assert metrics["auxiliary"] == other(*left)[1]["loss"]
    assert both(hidden, labels)[0] != Sum(SimRegLoss(), other)(hidden, labels)[0]


def test_sum_asks_both_about_layers_and_leaves_out_a_simreg_that_is_off():
    other = registry.build("cosine", {}, hidden_size=4, vocab_size=6)
    hidden, labels = torch.randn(2, 5, 4), torch.randint(0, 6, (2, 5))
    _, metrics = Sum(SimRegLoss(weight=0.0), other)(hidden, labels)
    assert metrics.keys() == {"auxiliary"}

    def refuse(layers):
        raise ValueError(f"{layers} will not do")

    other.check_layers = refuse
    with pytest.raises(ValueError, match="3 will not do"):
        Sum(SimRegLoss(), other).check_layers(3)


def test_the_layers_of_a_decoder_are_its_longest_list():
    decoder = nn.Module()
    decoder.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    decoder.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert find_layers(decoder) is decoder.layers
