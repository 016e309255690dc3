"""Fused linear cross-entropy: hidden states and the head's weight in, no logits, no head called."""

import shutil
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from simreg.capture import attach, shift_left
from simreg.loss import SimRegLoss, simreg_loss
from tests.processes import spawn
from tests.test_capture import assert_same, batch, build, gradients, transformers

NAMES = ["llama", "llama-tied", "mixtral", "gpt2"]
# Only the fused head: Triton's interpreter lacks what Liger's RMSNorm and SwiGLU need.
LIGER = {"rope": False, "rms_norm": False, "swiglu": False}
chunked = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"),
    reason="this torch has no chunked linear_cross_entropy",
)


def fuse(model, linear_cross_entropy):
    """Give `model` a head of `linear_cross_entropy(hidden, weight, labels)`, a sum over tokens."""

    def forward(self, input_ids, labels, num_items_in_batch):
        hidden = self.get_decoder()(input_ids)[0]
        total = linear_cross_entropy(hidden, self.get_output_embeddings().weight, labels)
        return transformers.modeling_outputs.CausalLMOutput(loss=total / num_items_in_batch)

    model.forward = types.MethodType(forward, model)
    return model


def by_torch(hidden, weight, labels):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None)  # 3 chunks
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of falling back to the whole logits
        return F.linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            shift_left(labels).flatten(),
            reduction="sum",
            options=options,
        )


def step(model, fused):
    """Losses of two micro-batches, gradients of their sum; the plain model's without any hook."""
    ids, labels = batch(rows=4, length=24)
    targets = shift_left(labels)
    items = targets.ne(-100).sum()
    reg = attach(model, SimRegLoss(weight=1.0, push=2)) if fused else None
    calls = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    losses = []
    for rows in (slice(2), slice(2, 4)):
        options = {} if fused else {"output_hidden_states": True}
        out = model(ids[rows], labels=labels[rows], num_items_in_batch=items, **options)
        if reg is None:
            total = simreg_loss(out.hidden_states[-1], targets[rows], push=2, reduction="sum")
            simreg = total / items
        else:
            simreg = reg(labels[rows], num_items=items)
        (out.loss + simreg).backward()
        losses += [out.loss.detach(), simreg.detach()]
    assert len(calls) == (0 if fused else 2)  # else nothing is shown
    return torch.stack(losses), gradients(model)


def assert_same_step(fused, plain):
    losses, grads = step(fused, fused=True)
    torch.testing.assert_close(losses, plain[0], rtol=1e-5, atol=1e-6)
    assert_same(grads, plain[1], rtol=1e-4, atol=2e-6)


@chunked
@pytest.mark.parametrize("name", NAMES)
def test_torch(name):
    assert_same_step(fuse(build(name), by_torch), step(build(name), fused=False))


@chunked
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
def test_cut_cross_entropy():
    cut = pytest.importorskip("cut_cross_entropy")

    def by_cut(hidden, weight, labels):
        return cut.linear_cross_entropy(
            hidden, weight, labels, shift=True, reduction="sum", impl="torch_compile"
        )

    for name in NAMES:
        assert_same_step(fuse(build(name), by_cut), step(build(name), fused=False))


@pytest.fixture
def interpreter(monkeypatch):
    """Child processes run Triton's kernels on the CPU: to be said before Triton is imported."""
    for name in ("triton", "liger_kernel"):
        pytest.importorskip(name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _liger_worker(rank):
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_mixtral

    plain = {name: step(build(name), fused=False) for name in ("llama", "llama-tied", "mixtral")}
    for name, expected in plain.items():  # instances
        model = build(name)
        apply = apply_liger_kernel_to_mixtral if name == "mixtral" else apply_liger_kernel_to_llama
        apply(model=model, fused_linear_cross_entropy=True, cross_entropy=False, **LIGER)
        assert_same_step(model, expected)
    apply_liger_kernel_to_llama(**LIGER)  # the class
    assert_same_step(build("llama"), plain["llama"])


def test_liger(interpreter):
    spawn(_liger_worker, (), processes=1, fresh=True)


def _trainer_worker(rank, folder):
    from tests.integrations import test_transformers as t

    for name in ("llama", "mixtral"):
        runs = []
        for liger in (False, True):
            model = t.build(name)
            heads = []
            model.lm_head.register_forward_pre_hook(lambda *_, heads=heads: heads.append(1))
            run = t.train(
                folder,
                model,
                objective=SimRegLoss(**t.SIMREG),
                gradient_accumulation_steps=2,
                max_steps=2,
                learning_rate=0.1,
                use_liger_kernel=liger,
                liger_kernel_config=LIGER,
            )
            assert len(heads) == (0 if liger else 4)
            steps = [
                {key: r[key] for key in ("loss", "ce", "simreg", "router_loss") if key in r}
                for r in t.records(run)
            ]
            runs.append((steps, run.evaluate(t.rows())["eval_ce"], t.weights(model)))
        assert ("router_loss" in runs[0][0][0]) == (name == "mixtral")
        torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


def test_liger_by_the_trainers_switch(interpreter, tmp_path):
    spawn(_trainer_worker, (str(tmp_path),), processes=1, fresh=True)
