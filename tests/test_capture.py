import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from simreg.capture import attach
from simreg.loss import SimRegLoss
from tests.processes import leave, spawn

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = SMALL | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**MOE, num_local_experts=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**MOE, num_experts=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4),
    "neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "opt": lambda: transformers.OPTConfig(**SMALL, word_embed_proj_dim=8, ffn_dim=24),
}


def build(name="llama", seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for module in model.modules():  # no dropout: two passes must agree
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(rows=2, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, 7] = -100
    return ids, labels


class HeadCrossEntropy:
    """Cross-entropy of what it is handed: the model's own loss, if tap and shift are right."""

    def __init__(self, head):
        self.head, self.seen = head, []

    def __call__(self, hidden, labels, segments=None, *, num_items=None):
        self.seen.append((hidden, labels, segments, num_items))
        logits = self.head(hidden).flatten(0, 1).float()
        total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        loss = total / (labels.ne(-100).sum() if num_items is None else num_items)
        return loss, {"loss": loss}


class Pull:
    """Brute force: mean over tokens of the cosine distances to later tokens of the same label."""

    def __call__(self, hidden, labels, segments=None, *, num_items=None):
        total = hidden.sum() * 0
        for b in range(labels.shape[0]):
            for i in range(labels.shape[1]):
                for j in range(i + 1, labels.shape[1]):
                    alike = labels[b, i] == labels[b, j] and labels[b, i] >= 0
                    if alike and (segments is None or segments[b, i] == segments[b, j]):
                        total = (
                            total
                            + 1
                            - nn.functional.cosine_similarity(hidden[b, i], hidden[b, j], 0)
                        )
        return total / (labels.ge(0).sum() if num_items is None else num_items), {}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name, **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_tap_is_the_input_of_the_head_and_labels_shift_as_in_the_model(name):
    model, (ids, labels) = build(name), batch()
    entering = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: entering.append(args[0])
    )
    objective = HeadCrossEntropy(model.get_output_embeddings())
    reg = attach(model, objective)
    out = model(ids, labels=labels, output_hidden_states=True)
    hook.remove()
    loss = reg(labels)
    assert loss.requires_grad
    assert not reg.metrics["loss"].requires_grad
    hidden = objective.seen[0][0]
    torch.testing.assert_close(hidden, entering[0], rtol=0, atol=0)
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=0)
    if name != "opt":  # its hidden_states are taken before the output projection
        torch.testing.assert_close(hidden, out.hidden_states[-1], rtol=0, atol=0)


def test_labels_shift_and_segments_stay():
    model, (ids, labels) = build(), batch()
    segments = torch.arange(12).expand(2, 12) // 5
    objective = HeadCrossEntropy(model.lm_head)
    reg = attach(model, objective)
    model(ids)
    reg(labels, segments, num_items=7)
    model(ids)
    reg(labels, shift=False)
    (_, shifted, same, items), (_, unshifted, none, no_items) = objective.seen
    assert shifted.tolist() == [[*row[1:], -100] for row in labels.tolist()]
    assert torch.equal(same, segments)
    assert items == 7
    assert torch.equal(unshifted, labels)
    assert none is None
    assert no_items is None


def test_the_end_of_a_row_is_ignored_by_the_objectives_own_mark():
    model, (ids, labels) = build(), batch()
    objective = HeadCrossEntropy(model.lm_head)
    objective.ignore_index = 0
    reg = attach(model, objective)
    model(ids)
    labels[labels == -100] = 0
    reg(labels)
    assert objective.seen[0][1][:, -1].tolist() == [0, 0]


def test_gradients_reach_the_model_as_from_output_hidden_states():
    model, (ids, labels) = build(), batch()
    labels = labels % 4  # so that labels repeat
    segments = torch.arange(12).expand(2, 12) // 6
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    Pull()(hidden, shifted, segments)[0].backward()
    expected = gradients(model)
    model.zero_grad()
    reg = attach(model, Pull())
    out = model(ids, labels=labels)
    (out.loss * 0 + reg(labels, segments)).backward()
    actual = {name: value for name, value in gradients(model).items() if name in expected}
    assert expected["model.embed_tokens.weight"].abs().sum() > 0
    assert_same(actual, expected)


def test_the_two_line_use_with_simreg():
    model, (ids, labels) = build(), batch()
    with attach(model, SimRegLoss()) as reg:
        assert reg.metrics == {}
        model(ids)
        loss = reg(labels)
        assert set(reg.metrics) >= {"loss", "pos_cos", "neg_cos", "pos_fraction"}
        torch.testing.assert_close(loss, 0.3 * reg.metrics["loss"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    ids, labels = batch()
    results = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        reg = attach(model, SimRegLoss(weight=1.0))
        fired = []
        model.get_decoder().register_forward_hook(lambda *_, fired=fired: fired.append(1))
        out = model(ids, labels=labels)
        (out.loss + reg(labels % 4)).backward()
        assert len(fired) == 1
        with pytest.raises(RuntimeError, match="no hidden states"):
            reg(labels)  # recomputation left nothing behind
        results.append(gradients(model))
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-9)


class Squares(nn.Module):
    """An objective that keeps what it was given."""

    def forward(self, hidden, labels, segments=None, *, num_items=None):
        self.hidden = hidden
        return hidden.float().square().mean(), {}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_autocast_to_bfloat16_hands_on_what_the_head_reads(dtype, compiled):
    model, (ids, labels) = build(), batch()
    read = []
    model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    objective = Squares()
    reg = attach(model, objective)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        forward(ids, labels=labels)
    reg(labels).backward()
    assert read[0].dtype == torch.float32  # as the norm returns it
    rounded = dtype == torch.bfloat16  # float16 would need loss scaling
    assert objective.hidden.dtype == (torch.bfloat16 if rounded else torch.float32)
    assert torch.equal(objective.hidden, read[0].to(objective.hidden.dtype))
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_device_that_has_no_autocast():
    model = nn.Linear(4, 4, device="meta")
    reg = attach(model, Squares(), module=model)
    model(torch.randn(2, 3, 4, device="meta"))
    reg(torch.zeros(2, 3, dtype=torch.long, device="meta")).backward()
    assert model.weight.grad.shape == (4, 4)


@pytest.mark.parametrize(("name", "in_place"), [("llama", False), ("mixtral", True)])
def test_compiled_whole(name, in_place):
    torch._dynamo.reset()
    ids, labels = batch()
    labels = labels % 4
    eager = build(name)
    reg = attach(eager, SimRegLoss(weight=1.0))
    (eager(ids, labels=labels).loss + reg(labels)).backward()
    model = build(name)
    if in_place:
        model.compile(fullgraph=True, backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    reg = attach(compiled, SimRegLoss(weight=1.0))
    for _ in range(2):  # the second pass runs what the first compiled
        model.zero_grad()
        loss = compiled(ids, labels=labels).loss + reg(labels)
        loss.backward()
    assert_same(gradients(model), gradients(eager), rtol=1e-4, atol=1e-6)
    reg.detach()
    compiled(ids, labels=labels)
    assert reg._hidden is None
    late = attach(compiled, SimRegLoss())
    compiled(ids, labels=labels)
    with pytest.raises(RuntimeError, match="attached before its first call"):
        late(labels)


def test_heads_that_bypass_lm_head():
    class Fused(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels):  # as fused linear cross-entropy does
            hidden = self.model(input_ids)[0][:, :-1]
            logits = hidden @ self.lm_head.weight.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    torch.manual_seed(0)
    model, (ids, labels) = Fused(CONFIGS["llama"]()), batch()
    reg = attach(model, HeadCrossEntropy(model.lm_head))
    torch.testing.assert_close(model(ids, labels), reg(labels))
    model, objective = build(), HeadCrossEntropy(nn.Linear(16, 40))
    reg = attach(model, objective)
    model(ids, logits_to_keep=1)
    reg(labels)
    assert objective.seen[0][0].shape == (2, 12, 16)


def test_copies_of_the_model_are_free_of_the_handle():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(ids)
        (hook,) = twin.get_decoder()._forward_hooks.values()
        assert hook.__self__ is not reg
        assert hook.__self__._hidden is None
    assert reg(labels).requires_grad


def test_misfits():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    with pytest.raises(ValueError, match=r"segments: expected shape \[2, 12\]"):
        reg(labels, labels[:, 1:])
    model(ids)
    with pytest.raises(ValueError, match=r"labels: expected device cpu.* got meta"):
        reg(labels.to("meta"))


def test_detach():
    model, (ids, labels) = build(), batch()
    reg = attach(model, SimRegLoss())
    model(ids)
    reg.detach()
    reg.detach()
    assert not model.get_decoder()._forward_hooks
    with pytest.raises(RuntimeError, match="detached"):
        reg(labels)
    with attach(model, SimRegLoss()) as reg:
        pass
    model(ids)
    with pytest.raises(RuntimeError, match="detached"):
        reg(labels)


def test_two_handles_of_one_objective_are_independent():
    model, (ids, labels) = build(), batch()
    objective = SimRegLoss()
    first, second = attach(model, objective), attach(model, objective)
    model(ids)
    loss = first(labels)
    first.detach()
    torch.testing.assert_close(second(labels), loss)


def test_an_exported_pass_is_none_to_regularize():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16))
    ids, labels = batch()
    reg = attach(model, SimRegLoss(), module=model[1])
    torch.export.export(model, (ids,))
    with pytest.raises(RuntimeError, match="no hidden states"):
        reg(labels)
    model(ids)
    assert reg(labels).requires_grad


def _parallel_worker(rank, port, expected):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ids, labels = batch(rows=4)
    labels, items = labels % 4, 44
    mine = slice(2 * rank, 2 * rank + 2)
    for wrap in ("ddp", "fsdp", "compiled ddp"):
        model = build()
        wrapped = model
        if wrap == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        elif wrap == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
        reg = attach(wrapped, SimRegLoss(weight=1.0))
        # Gradients are averaged over the two ranks.
        out = wrapped(ids[mine], labels=labels[mine], num_items_in_batch=items / 2)
        (out.loss + reg(labels[mine], num_items=items / 2)).backward()
        actual = gradients(model)
        if wrap == "fsdp":
            actual = {name: value.full_tensor() for name, value in actual.items()}
        assert_same(actual, expected, rtol=1e-4, atol=1e-6)
    leave()


def test_data_parallel_gradients_equal_one_process(free_port):
    model, (ids, labels) = build(), batch(rows=4)
    labels = labels % 4
    reg = attach(model, SimRegLoss(weight=1.0))
    out = model(ids, labels=labels, num_items_in_batch=44)
    (out.loss + reg(labels, num_items=44)).backward()
    spawn(_parallel_worker, (free_port, gradients(model)))


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
