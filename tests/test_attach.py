"""`attach`: what it takes, where it finds the hidden states, what it refuses."""

import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from simreg.baselines import registry
from simreg.capture import attach, shift_left
from simreg.depths import AtDepths
from simreg.loss import SimRegLoss, simreg_loss
from simreg.objectives import Sum
from tests.test_capture import CONFIGS, SMALL, HeadCrossEntropy, Pull, batch, build, transformers


class Own(nn.Module):
    """Somebody's own model, whose final norm returns a tensor, a tuple or an output object."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(40, 16), nn.Module(), nn.Linear(16, 40)
        self.norm.forward = form

    def forward(self, ids):
        out = self.norm(self.embed(ids))
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        return self.head(hidden)


FORMS = {
    "tensor": lambda x: x * 2,
    "tuple": lambda x: (x * 2, None),
    "output": lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x * 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_ones_own_model(form):
    model, (ids, labels) = Own(FORMS[form]), batch()
    objective = HeadCrossEntropy(model.head)
    reg = attach(model, objective, module=model.norm)
    model(ids)
    reg(labels)
    torch.testing.assert_close(objective.seen[0][0], model.embed(ids) * 2)


class Deep(nn.Module):
    """Blocks and a norm in a container that is not called itself, as LitGPT has them."""

    def __init__(self, checkpointing):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.parts = nn.ModuleDict({"embed": nn.Embedding(40, 8), "blocks": blocks})
        self.parts["norm"], self.head = nn.LayerNorm(8), nn.Linear(8, 40)
        self.checkpointing = checkpointing

    def forward(self, ids):
        states = self.parts["embed"](ids)
        for block in self.parts["blocks"]:
            if self.checkpointing:
                states = checkpoint(block, states, use_reentrant=False)
            else:
                states = block(states)
        return self.head(self.parts["norm"](states))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_of_ones_own_model(checkpointing, wrapped):
    model, (ids, labels) = Deep(checkpointing), batch()
    simreg, blocks, norm = SimRegLoss(weight=0.3), model.parts["blocks"], model.parts["norm"]
    # What is called is the model, whatever it is part of (a LightningModule, say).
    reg = attach(
        nn.Sequential(model) if wrapped else model,
        AtDepths(simreg, [0.5], offset=0),
        module=norm,
        layers=blocks,
    )
    for _ in range(2):
        model.zero_grad()
        (model(ids).sum() * 0 + reg(labels)).backward()
    assert not reg._earlier  # nor what checkpointing computed again
    found = [p.grad for p in blocks.parameters()]
    model.zero_grad()
    middle = blocks[1](blocks[0](model.parts["embed"](ids)))
    final = norm(blocks[3](blocks[2](middle)))
    targets = shift_left(labels)
    sum(simreg(states, targets)[0] for states in (middle, final)).backward()
    torch.testing.assert_close(found, [p.grad for p in blocks.parameters()])


def test_layers_that_are_none_are_refused():
    model = Deep(False)
    blocks, norm, at = model.parts["blocks"], model.parts["norm"], AtDepths(SimRegLoss(), [0.5])
    for wrong in (None, [], nn.ModuleDict({"0": blocks[0]}), [blocks[0], "h.1"]):
        with pytest.raises(
            ValueError,
            match=r"layers: AtDepths reads .* so it needs all its",
        ):
            attach(model, at, module=norm, layers=wrong)
    with pytest.raises(
        ValueError,
        match=r"layers: AtDepths reads .* so it needs all its",
    ):
        attach(build(), at, layers=[])
    with pytest.raises(ValueError, match="layers: SimRegLoss reads none within the model"):
        attach(model, SimRegLoss(), module=norm, layers=blocks)
    for here, end in ((model, norm), (build(), None)):
        with pytest.raises(ValueError, match=r"layers: .* got one that is not in it"):
            attach(here, at, module=end, layers=Deep(False).parts["blocks"])
    with pytest.raises(ValueError, match="depths: a model of one layer has none within it"):
        attach(model, at, module=norm, layers=blocks[:1])
    reg = attach(model, at, module=norm, layers=blocks)
    norm(blocks[3](blocks[1](torch.ones(1, 3, 8))))  # the model is not called
    with pytest.raises(RuntimeError, match="calling parts of the model apart"):
        reg(torch.ones(1, 3, dtype=torch.long))


def test_a_module_that_is_not_of_the_model_or_never_called_is_refused():
    model = Deep(False)
    for foreign in (nn.LayerNorm(8), "norm"):
        with pytest.raises(ValueError, match="module: expected a submodule of the model, got"):
            attach(model, SimRegLoss(), module=foreign)
    with pytest.raises(ValueError, match="module: ModuleList is never called"):
        attach(model, SimRegLoss(), module=model.parts["blocks"])
    with pytest.raises(ValueError, match="module: this is an embedding"):
        attach(model, SimRegLoss(), module=model.parts["embed"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_model_that_does_not_name_it_is_refused(tied):
    embed, square, head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
    if tied:
        head.weight = embed.weight
    model = nn.Sequential(embed, nn.Embedding(8, 8), square, head)  # of tokens and of positions
    with pytest.raises(ValueError, match="module: this is the LM head"):
        attach(model, SimRegLoss(), module=head)
    attach(model, SimRegLoss(), module=square)


def test_logits_are_refused_where_hidden_states_are_expected():
    ids, head = torch.zeros(1, 3, dtype=torch.long), nn.Sequential(nn.Linear(8, 11))
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), head)
    for wrong in (model, head):
        refused = pytest.raises(ValueError, match="as wide as the vocabulary: logits; name what")
        with attach(model, SimRegLoss(), module=wrong), refused:
            model(ids)
    body = model[:2]
    with attach(body, SimRegLoss(), module=body) as reg:  # the head is elsewhere
        body(ids)
        reg(ids)
    model = nn.ModuleList([nn.Embedding(11, 8), nn.Embedding(8, 8), nn.Linear(8, 8)])
    with attach(model, SimRegLoss(), module=model[2]) as reg:  # as wide as positions are many
        model[2](torch.ones(1, 3, 8))
        reg(ids)


def test_hidden_states_with_the_batch_second_are_told():
    model = Own(FORMS["tensor"])
    reg = attach(model, SimRegLoss(), module=model.norm)
    model(torch.zeros(5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \[5, 2\].*got \[2, 5\]: .* the batch first"):
        reg(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \[2, 4\]$"):
        reg(torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("bad", [lambda x: {"x": x}, lambda x: x[0]])
def test_output_that_is_no_hidden_state(bad):
    norm = nn.Module()
    norm.forward = bad
    attach(norm, Pull(), module=norm)
    with pytest.raises(TypeError, match=r"module: expected .*\[B, L, d\]; got"):
        norm(torch.zeros(2, 3, 4))


def test_models_without_a_decoder_are_refused():
    with pytest.raises(ValueError, match=r"no decoder in Own .by get_decoder..*; pass module="):
        attach(Own(FORMS["tensor"]), Pull())
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1)
    with pytest.raises(ValueError, match="encoder-decoder"):
        attach(transformers.T5ForConditionalGeneration(t5), Pull())


def test_other_tasks_are_refused():
    bert = transformers.BertConfig(**SMALL | {"num_hidden_layers": 1})
    for model in (
        transformers.BertForMaskedLM(bert),
        transformers.LlamaForSequenceClassification(CONFIGS["llama"]()),
    ):
        with pytest.raises(
            ValueError, match=f"predicts the next token, got {type(model).__name__}"
        ):
            attach(model, Pull())


def test_a_guess_of_transformers_that_is_the_head_or_the_model():
    """`get_decoder` finds the Linear called decoder in the one, the model itself in the other."""
    modern = transformers.ModernBertDecoderConfig(
        **SMALL | {"num_hidden_layers": 1}, cls_token_id=1, sep_token_id=2, local_attention=8
    )
    llama4 = transformers.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=8
    )
    for model, inside in (
        (transformers.ModernBertDecoderForCausalLM(modern), lambda m: m.model),
        (transformers.Llama4ForCausalLM(llama4), lambda m: m.model),
    ):
        seen = []
        inside(model).register_forward_hook(lambda m, i, o: seen.append(o[0]))  # noqa: B023
        reg = attach(model, SimRegLoss())
        ids, labels = batch()
        model(ids)
        assert reg._hidden is seen[0]
        assert reg(labels).requires_grad


def test_a_decoder_inside_of_what_has_the_head_too():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = build()
            self.get_decoder = lambda: self.inside
            self.get_output_embeddings = lambda: self.inside.lm_head

        def forward(self, ids):
            return self.inside(ids)

    model, (ids, labels) = Wrapped(), batch()
    reg = attach(model, SimRegLoss())
    assert len(model.inside.model._forward_hooks) == 1
    model(ids)
    assert reg(labels).requires_grad


def test_a_model_that_does_not_say_which_its_head_is():
    model = build()
    model.get_output_embeddings = unsaid
    reg = attach(model, SimRegLoss())
    ids, labels = batch()
    model(ids)
    assert reg(labels).requires_grad


def unsaid():
    raise NotImplementedError


def test_a_head_that_is_the_input_embedding_may_be_in_the_decoder():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Embedding(40, 16), nn.LayerNorm(16))
            self.get_decoder = lambda: self.decoder
            self.get_output_embeddings = lambda: self.decoder[0]

        def forward(self, ids):
            return self.decoder(ids) @ self.decoder[0].weight.T

    model, (ids, labels) = Tied(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    torch.testing.assert_close(reg._hidden, model.decoder(ids))
    assert reg(labels).requires_grad


def test_what_is_no_objective_is_refused_at_once():
    model, (ids, labels) = build(), batch()
    with pytest.raises(ValueError, match=r"objective: .* the class SimRegLoss: add \(\)"):
        attach(model, SimRegLoss)
    for other in (simreg_loss, 0.3, None):
        with pytest.raises(ValueError, match=r"objective: expected something like SimRegLoss\(\)"):
            attach(model, other)
    for module in ("model.norm", model.lm_head):
        with pytest.raises(ValueError, match="module: "):
            attach(model, Pull(), module=module)
    reg = attach(model, SimRegLoss())
    model(ids)
    with pytest.raises(ValueError, match="labels: expected a tensor, got NoneType"):
        reg(None)
    with pytest.raises(ValueError, match=r"num_items: .* got \[2\]"):
        reg(labels, num_items=torch.tensor([7, 8]))
    assert reg(labels).requires_grad  # what was refused consumed nothing


def test_models_that_do_not_shift_labels_are_refused():
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24
    )
    config.is_decoder, config.is_encoder_decoder = True, False
    model = transformers.BartForCausalLM(config).eval()
    ids, labels = batch()
    loss, logits = model(ids, labels=labels, use_cache=False)[:2]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.mT, labels))
    with pytest.raises(ValueError, match=r"BartForCausalLM takes labels that are aligned with its"):
        attach(model, SimRegLoss())

    class Mine(transformers.BartForCausalLM):
        pass

    with pytest.raises(ValueError, match="Mine takes labels that are aligned"):
        attach(Mine(config), SimRegLoss())


def test_what_trains_nothing_is_said():
    model, (ids, labels) = build(), batch()
    model.model.requires_grad_(False)
    objective = SimRegLoss()
    reg = attach(model, objective)
    model(ids)
    with pytest.warns(UserWarning, match="trains nothing"):
        reg(labels)
    for weight, grad in ((0.0, True), (1.0, False)):
        objective.weight = weight
        model(ids)
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("error")
            reg(labels)


def test_rows_that_are_spread_over_processes_are_not_shifted_here():
    model, (ids, labels) = build(), batch()
    objective = Placed()
    reg = attach(model, objective)
    objective.group = object()
    model(ids)
    with pytest.raises(ValueError, match="shift: the tokens of a row are spread over processes"):
        reg(labels)
    reg(labels, shift=False, positions="places")
    assert objective.positions == "places"


class Placed(Pull):
    group = positions = None

    def __call__(self, *args, positions=None, **options):
        self.positions = positions
        return super().__call__(*args, **options)


class Wrapped(nn.Module):
    """As PEFT wraps a model, whose class then does not say what it is."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def get_base_model(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def test_prompt_learning_is_refused():
    model = Wrapped(build())
    model.peft_config = {"default": types.SimpleNamespace(is_prompt_learning=False)}
    attach(model, SimRegLoss())
    model.peft_config["prompts"] = types.SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="model: PEFT's prompt learning puts tokens of its own"):
        attach(model, SimRegLoss())


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("wrap", [lambda x: x, Wrapped, checkpoint_wrapper, fully_sharded])
def test_what_a_model_is_does_not_depend_on_its_wrapper(wrap, alone):
    size = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    bart = transformers.BartForCausalLM(transformers.BartConfig(vocab_size=24, **size))
    with pytest.raises(ValueError, match="BartForCausalLM takes labels that are aligned"):
        attach(wrap(bart), SimRegLoss())
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=24, **small, intermediate_size=8)
    for kind in (transformers.BertForMaskedLM, transformers.BertForPreTraining):
        with pytest.raises(ValueError, match=f"got {kind.__name__}; if it is one, pass module="):
            attach(wrap(kind(bert)), SimRegLoss())
    model, (ids, labels) = build(), batch()
    reg = attach(wrap(model), SimRegLoss())
    model(ids)
    assert reg(labels) > 0


class Adds(nn.Module):
    """A block of a residual stream."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, states):
        added = self.inner(states.detach().clone())
        return states.add_(added) if self.in_place else states + added


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_that_are_changed_in_place_later_are_refused(in_place):
    model, (ids, labels) = Deep(False), batch()
    blocks = model.parts["blocks"] = nn.ModuleList([Adds(in_place) for _ in range(4)])
    norm = model.parts["norm"]
    reg = attach(model, AtDepths(SimRegLoss(), [0.5]), module=norm, layers=blocks)
    model(ids)
    if in_place:
        with pytest.raises(RuntimeError, match="were changed in place by what came after them"):
            reg(labels)
    else:
        reg(labels).backward()


def test_a_compiled_layer_is_read_before_it_is_changed_in_place():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        torch.compiler.reset()
        model, (ids, labels) = Deep(False), batch()
        blocks = model.parts["blocks"] = nn.ModuleList([Adds(in_place) for _ in range(4)])
        places = {"module": model.parts["norm"], "layers": blocks}
        reg = attach(model, AtDepths(SimRegLoss(), [0.5]), **places)
        torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
        reg(labels).backward()
        found.append((reg.metrics["earlier"], blocks[0].inner.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_weight_that_is_a_parameter_is_the_objectives_own():
    class Weighted(HeadCrossEntropy):
        def __init__(self, head):
            super().__init__(head)
            self.weight = nn.Parameter(torch.ones(16))

        def __call__(self, hidden, labels, segments=None, *, num_items=None):
            return super().__call__(hidden * self.weight, labels, segments, num_items=num_items)

    model, (ids, labels) = Own(FORMS["tensor"]), batch()
    objective = Weighted(model.head)
    for each in (
        objective,
        Sum(objective, registry.build("cosine", {"weight": 0}, hidden_size=16, vocab_size=40)),
    ):
        reg = attach(model, each, module=model.norm)
        model(ids)
        loss = reg(labels)
        reg.detach()
        assert loss.requires_grad
        assert loss > 0
