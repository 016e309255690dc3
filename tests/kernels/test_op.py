"""The operator, whichever kernel stands behind it: compile, autocast, checkpoints, refusals."""

import logging
import shutil
import threading
import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import simreg
from simreg import SimRegLoss, simreg_loss
from simreg.kernels import op, precision
from tests.kernels.problems import (
    each_backend,
    each_device,
    each_variant,
    problem,
    quiet,
    small_tiles,
)
from tests.test_loss import per_token, value_and_grad

pytestmark = quiet


@pytest.fixture(autouse=True)
def _small(request):
    if request.node.get_closest_marker("gpu"):  # where tiles are what they are
        yield
        return
    with small_tiles("blockwise"), small_tiles("triton"):
        yield


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def both_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_device
@each_backend
@each_variant
def test_custom_op_is_well_formed(backend, variant, device):
    hidden = torch.randn(2, 20, 4, device=device, requires_grad=True)
    labels, ids = torch.arange(20).expand(2, 20) % 3, torch.arange(20).expand(2, 20) // 10
    # Every token has positives and negatives: opcheck takes NaN (a mean of none) for a difference.
    labels, ids = on(device, labels.contiguous(), ids.contiguous())
    # Triton's interpreter is slow, and with a push its kernels do all that they do without.
    for push in (3.0,) if backend == "triton" and device == "cpu" else (0.0, 3.0):
        options = (0.1, variant, push, 0.5, backend)
        torch.library.opcheck(op.loss, (hidden, labels, ids, *options))
        saved = [value.detach() for value in op.loss(hidden, labels, ids, *options)[3:]]
        grad = torch.randn(labels.shape, device=device)
        backward = (grad, hidden.detach(), labels, ids, *saved, *options)
        torch.library.opcheck(op.loss_backward, backward)
    # Batches that were laid out sequence first
    turned = (x.mT.contiguous().mT for x in (labels, ids))
    torch.library.opcheck(op.loss, (hidden, *turned, 0.1, variant, 3.0, 0.5, backend))


@each_backend
@each_variant
def test_storage_saved_for_backward_is_linear(backend, variant):
    batch, length, dim = 1, 48, 64
    hidden, labels, ids = problem(batch, length, dim, 30, 2, dtype=torch.float32)
    hidden.requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = per_token(hidden, labels, segments=ids, variant=variant, backend=backend)
    loss.sum().backward()
    tokens = batch * length
    # hidden itself, labels, segments, the permutation (int64), and a few floats a token
    assert sum(saved.values()) <= tokens * (4 * dim + 3 * 8 + 8 * 4)
    assert sum(saved.values()) >= tokens * 4 * dim  # the hook does see what is saved


@each_backend
def test_strided_labels_and_hidden(backend):
    hidden, labels, _ = problem(3, 40, 8, 5, dtype=torch.float32)
    labels = labels.clamp_min(-1)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1), labels.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in strided)
    plain, other = (
        op.loss(h, y, None, 0.1, "out", 0.0, 0.5, backend) for h, y in ((hidden, labels), strided)
    )
    torch.testing.assert_close(other[0], plain[0])


@each_backend
@pytest.mark.parametrize("chunk", [24, 20])
def test_chunks_copy_nothing(backend, chunk):
    hidden, labels, _ = problem(1, 48, 8, 5, dtype=torch.float32)
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        simreg_loss(hidden.requires_grad_(), labels, chunk_size=chunk, backend=backend)
    assert hidden.untyped_storage().data_ptr() in saved


@each_device
@each_backend
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed-chunks"])
def test_compiles_once_for_all_lengths(packed, backend, device):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(per_token, fullgraph=True, backend=count, dynamic=True)
    for length in (20, 28, 33):
        hidden, labels, segments = on(device, *problem(2, length, 8, 5, 3, torch.float32))
        options = {"segments": segments, "chunk_size": 16} if packed else {}
        ours = value_and_grad(compiled, hidden, labels, backend=backend, **options)
        plain = value_and_grad(per_token, hidden, labels, backend=backend, **options)
        assert both_equal(ours, plain)
    assert len(graphs) == 1


@each_device
@each_backend
def test_inductor_leaves_gradients_as_they_are(backend, device):
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    hidden, labels = on(device, *problem(2, 20, 8, 5, dtype=torch.float32)[:2])
    compiled = torch.compile(simreg_loss, fullgraph=True)
    grads = []
    for loss in (simreg_loss, compiled):
        leaf = hidden.clone().requires_grad_()
        loss(leaf, labels, backend=backend).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dynamic", [None, True])
def test_module_compiles_while_its_weight_is_scheduled(dynamic):
    hidden, labels, _ = problem(2, 40, 8, 5, dtype=torch.float32)
    module = SimRegLoss()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for weight in (0.1, 0.2, 0.3, 0.0):
        module.weight = weight
        (ours, metrics), (plain, expected) = compiled(hidden, labels), module(hidden, labels)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(metrics, expected)


@each_device
@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast_and_checkpointing_change_nothing(backend, reentrant, device):
    hidden, labels = on(device, *problem(2, 20, 8, 5, dtype=torch.float32)[:2])

    def loss(h, y):
        return per_token(h, y, backend=backend)

    def under_autocast(h, y):
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss(h, y)

    def checkpointed(h, y):
        return checkpoint(loss, h, y, use_reentrant=reentrant)

    def value_and_gradient(fn):
        leaf = hidden.clone().requires_grad_()
        value = fn(leaf, labels)
        value.sum().backward()
        return value.detach(), leaf.grad

    plain = value_and_gradient(loss)
    for changed in (under_autocast, checkpointed):
        assert both_equal(value_and_gradient(changed), plain)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_precision_of_products_is_not_for_the_loss(backend, dtype, monkeypatch):
    """TF32 and the like, which a program may have allowed for its model; it stays allowed."""
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    seen = []
    kernel = op._kernel

    def watched(name):
        def call(function):
            def with_a_look(*args):
                seen.extend(switch.fp32_precision for switch in switches)
                return function(*args)

            return with_a_look

        found = kernel(name)
        return types.SimpleNamespace(forward=call(found.forward), backward=call(found.backward))

    monkeypatch.setattr(op, "_kernel", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        before = [switch.fp32_precision for switch in switches]
        assert "ieee" not in before
        hidden, labels, _ = problem(1, 9, 4, 3, dtype=dtype)
        value_and_grad(per_token, hidden, labels, backend=backend)
        assert seen == ["ieee"] * 4  # forward and backward
        assert [switch.fp32_precision for switch in switches] == before
        monkeypatch.setattr(op, "_kernel", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            simreg_loss(hidden, labels, backend=backend)
        assert [switch.fp32_precision for switch in switches] == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_precision_that_a_program_inherits_stays_inherited():
    hidden, labels, _ = problem(1, 9, 4, 3)
    backends = torch.backends
    switches = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        simreg_loss(hidden, labels)
        assert [switch.fp32_precision for switch in switches] == ["tf32"] * 2
        backends.fp32_precision = "ieee"
        assert [switch.fp32_precision for switch in switches] == ["ieee"] * 2
    finally:
        backends.fp32_precision = "none"
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def test_precision_is_whole_until_the_last_thread_has_left():
    matmul, whole = torch.backends.cuda.matmul, precision.whole_products
    torch.set_float32_matmul_precision("high")
    try:
        assert matmul.fp32_precision == "tf32"
        inside, leave = threading.Event(), threading.Event()

        def other():
            with whole:
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=other)
        with whole:
            thread.start()
            assert inside.wait(60)
        assert matmul.fp32_precision == "ieee"  # of the thread that is still there
        leave.set()
        thread.join()
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("temperature", [1e-6, 1e-10, 1e-30])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_tiny_temperatures_leave_gradients_finite(temperature, variant):
    """Roundings of similarities, divided by them, would otherwise be exponents above 0."""
    pytest.importorskip("triton")
    hidden, labels, _ = problem(2, 70, 20, 9, dtype=torch.float32)
    options = {"temperature": temperature, "variant": variant}
    exact = value_and_grad(per_token, hidden.double(), labels, backend="reference", **options)
    for backend in ("triton", "blockwise"):
        loss, grad = value_and_grad(per_token, hidden, labels, backend=backend, **options)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-3, atol=0)
        assert grad.isfinite().all()
        assert grad.abs().max() < 10 * exact[1].abs().max()


@each_backend
def test_differentiable_once(backend):
    hidden, labels, _ = problem(1, 9, 4, 3, dtype=torch.float32)
    hidden.requires_grad_()
    loss = simreg_loss(hidden, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_transforms_of_torch_func_are_refused():
    hidden, labels, _ = problem(1, 9, 4, 3)

    def loss(h):
        return simreg_loss(h, labels)

    with pytest.raises(RuntimeError, match="simreg_loss: forward-mode"):
        torch.func.jvp(loss, (hidden,), (hidden,))
    for transform in (torch.func.grad, torch.func.vmap, torch.func.hessian):
        with pytest.raises(RuntimeError, match=r"simreg_loss: (not supported under|forward-mode)"):
            transform(loss)(hidden if transform is not torch.func.vmap else hidden[None])
    for over in (
        lambda y: simreg_loss(hidden, y),
        lambda y: simreg_loss(hidden, labels, segments=y),
    ):
        with pytest.raises(RuntimeError, match="simreg_loss: not supported under"):
            torch.func.vmap(over)(labels[None])


def test_dtensors_are_refused():
    hidden, labels, _ = problem(1, 9, 4, 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded, sharded_labels = (distribute_tensor(x, mesh, [Shard(1)]) for x in (hidden, labels))
        with pytest.raises(ValueError, match="hidden: expected a plain tensor, got a DTensor"):
            simreg_loss(sharded, sharded_labels)
        with pytest.raises(ValueError, match="labels: expected a plain tensor, got a DTensor"):
            simreg_loss(hidden, sharded_labels)
        local = simreg_loss(sharded.to_local(), sharded_labels.to_local())
        assert torch.equal(local, simreg_loss(hidden, labels))
    finally:
        dist.destroy_process_group()


@each_device
@each_backend
def test_two_runs_are_bitwise_equal(backend, device):
    hidden, labels = on(device, *problem(2, 60, 33, 20, dtype=torch.float32)[:2])
    first, second = (value_and_grad(per_token, hidden, labels, backend=backend) for _ in range(2))
    assert both_equal(first, second)


def test_explain(caplog):
    hidden, labels, _ = problem(1, 9, 4, 3, dtype=torch.float32)
    assert simreg.explain(hidden) == "blockwise: not triton: the device is cpu"
    assert simreg.explain(hidden, backend="reference") == "reference: asked for"
    with pytest.raises(ValueError, match="backend: expected one of"):
        simreg.explain(hidden, backend="cuda")
    with pytest.raises(ValueError, match="backend: 'triton' can't be used: it has no float64"):
        simreg.explain(hidden.double(), backend="triton")
    with caplog.at_level(logging.DEBUG, "simreg"):
        simreg_loss(hidden, labels)
    assert "backend blockwise (not triton: the device is cpu) for [1, 9, 4]" in caplog.text


def test_triton_without_a_gpu_is_refused(monkeypatch):
    pytest.importorskip("triton")
    from simreg.kernels import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    hidden, labels, _ = problem(1, 9, 4, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="backend: 'triton' can't be used: it needs an NVIDIA GPU"):
        simreg_loss(hidden, labels, backend="triton")
    monkeypatch.setattr(triton, "capability", lambda device: (7, 5))
    assert triton.obstacle(torch.device("cuda")) == "it needs compute capability 8.0, not 7.5"


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_gives_gradients_in_the_dtype_of_the_states(backend, dtype):
    hidden, labels, _ = problem(1, 9, 4, 3, dtype=dtype)
    options = (0.1, "out", 3.0, 0.5, backend)
    saved = op.loss(hidden, labels, None, *options)[3:]
    grad = torch.ones(labels.shape)
    assert op.loss_backward(grad, hidden, labels, None, *saved, *options).dtype == dtype
