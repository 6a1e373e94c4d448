"""Norm types against PyTorch's modules, and Rescale against its formula written out."""

import copy
import math
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.configs import vit_config
from models.modeling import Block, VisionTransformer
from models.norms import NORM_TYPES, AddBias, calibrating

DIM = 24


def tokens(seed=0, batch=6, n=10, dim=DIM):
    """(B, N, D) with another mean and spread in each channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator)
    return x * torch.linspace(0.5, 2, dim) + torch.linspace(-1, 1, dim)


def as_channels(module):
    """`module` for (B, D, N), as the reference calls it, on (B, N, D)."""
    return lambda x: module(x.transpose(1, 2)).transpose(1, 2)


def pair(norm_type, dim=DIM):
    """Our norm, PyTorch's module with the same random weights, and that as a function."""
    ours = NORM_TYPES[norm_type].final_norm(dim)
    theirs = {
        "LN": lambda: nn.LayerNorm(dim, eps=1e-6),
        "BN": lambda: nn.BatchNorm1d(dim, eps=1e-6, momentum=0.1),
        "GN": lambda: nn.GroupNorm(4, dim, eps=1e-6),
    }[norm_type]()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.copy_(q.add_(0.3 * torch.randn(dim, generator=generator)))
    return ours, theirs, theirs if norm_type == "LN" else as_channels(theirs)


# ---------------------------------------------------------------- LN, BN, GN


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN"])
def test_norms_are_pytorchs(norm_type, training):
    """Truth: nn.LayerNorm; nn.BatchNorm1d, nn.GroupNorm(4) on (B, D, N); forward and backward."""
    ours, module, theirs = pair(norm_type)
    for i in range(3):  # the running statistics move; evaluation reads what training left
        ours.train(), module.train()
        torch.testing.assert_close(ours(tokens(i)), theirs(tokens(i)), rtol=1e-5, atol=1e-5)
    ours.train(training), module.train(training)
    x = tokens(5).requires_grad_()
    y = tokens(5).requires_grad_()
    got, expected = ours(x), theirs(y)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = tokens(6) / 10
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for p, q in zip(ours.parameters(), module.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    assert len(list(ours.buffers())) == len(list(module.buffers()))
    for p, q in zip(ours.buffers(), module.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_batchnorm_statistics():
    """Truth: running = 0.9 old + 0.1 new, mean and unbiased variance over batch and tokens."""
    ours = NORM_TYPES["BN"].final_norm(DIM)
    mean, var = torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)
    for i in range(4):
        x = tokens(i)
        ours(x)
        rows = x.double().reshape(-1, DIM)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0)
    torch.testing.assert_close(ours.layer.running_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.layer.running_var, var.float(), rtol=1e-5, atol=1e-6)
    assert ours.layer.num_batches_tracked == 4
    expected = (tokens(9).double() - mean) / (var + 1e-6).sqrt()
    torch.testing.assert_close(ours.eval()(tokens(9)), expected.float(), rtol=1e-5, atol=1e-5)


def test_groupnorm_groups():
    """Truth: each image's D/4 channels x N tokens have mean 0 and variance 1."""
    y = NORM_TYPES["GN"].final_norm(DIM)(tokens()).unflatten(-1, (4, DIM // 4))
    torch.testing.assert_close(y.mean(dim=(1, 3)), torch.zeros(6, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(dim=(1, 3), correction=0), torch.ones(6, 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN"])
def test_norms_in_bf16(norm_type):
    """Truth: PyTorch's modules in fp32; bf16 has 8 bits, and results reach 10."""
    ours, _, theirs = pair(norm_type)
    expected = theirs(tokens())
    if norm_type != "BN":  # whose weights stay fp32
        ours.bfloat16()
    got = ours(tokens().bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("mean", [5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groupnorm_is_as_exact_as_pytorchs(dtype, mean):
    """Truth: nn.GroupNorm in float64. Output and gradients are at most twice as far from it as
    those of nn.GroupNorm in the same type, on data whose mean exceeds its deviation, of 2."""
    ours, plain, _ = pair("GN", 64)
    x = (2 * tokens(7, n=50, dim=64) + mean).to(dtype)
    upstream = tokens(8, n=50, dim=64).to(dtype)

    def results(forward, module, dtype):
        module.zero_grad()
        y = x.detach().to(dtype).requires_grad_()
        out = forward(y)
        out.backward(upstream.to(dtype))
        return [t.double() for t in (out, y.grad, *(p.grad for p in module.parameters()))]

    ours, plain = ours.to(dtype), plain.to(dtype)
    exact = copy.deepcopy(plain).double()
    got, theirs = results(ours, ours, dtype), results(as_channels(plain), plain, dtype)
    truths = results(as_channels(exact), exact, torch.float64)
    for mine, their, truth in zip(got, theirs, truths):
        error, their_error = (torch.linalg.vector_norm(t - truth) for t in (mine, their))
        assert 0 < error <= 2 * their_error


# ---------------------------------------------------------------- Rescale


def written_formula(x, bias, init_mean, count):
    """The reference's addbias of one training batch: the output, and the two buffers after it."""
    if count < 8:
        mu = x.mean(dim=(0, 1), keepdim=True)
        init_mean = init_mean + (mu - init_mean) / (count + 1)
        count = count + 1
        return x + 0.01 * bias - init_mean, init_mean, count
    return x + bias - init_mean, init_mean, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addbias_is_the_written_formula(dtype):
    """Truth: `written_formula` in float64 over 12 training batches, evaluations in between."""
    addbias = AddBias(DIM)
    with torch.no_grad():
        addbias._bias.copy_(tokens(20, 1, 1))
    bias = addbias._bias.detach().double()
    init_mean, count = torch.zeros(1, 1, DIM, dtype=torch.float64), 0
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    for i in range(12):
        x = (tokens(i, batch=3 + i % 2) + i).to(dtype)  # changing data, changing mean
        y = addbias(x)
        expected, init_mean, count = written_formula(x.double(), bias, init_mean, count)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, **tolerance)
        assert addbias.init_mean.dtype == torch.float32
        torch.testing.assert_close(addbias.init_mean.double(), init_mean, rtol=1e-5, atol=1e-6)
        assert addbias.count == count == min(i + 1, 8)
        assert addbias.calibrating == (i < 7)

        before = copy.deepcopy(dict(addbias.named_buffers()))
        x = (tokens(100 + i) - 50).to(dtype)
        y = addbias.eval()(x)
        factor = 0.01 if count < 8 else 1
        torch.testing.assert_close(y.double(), x.double() + factor * bias - init_mean, **tolerance)
        for name, buffer in addbias.train().named_buffers():
            assert torch.equal(buffer, before[name]), name


def test_addbias_gradients():
    """Truth: the mean is a constant to autograd; the bias counts 0.01, after 8 batches 1."""
    addbias = AddBias(DIM)
    for i in range(10):
        addbias._bias.grad = None
        x = tokens(i).requires_grad_()
        upstream = tokens(30 + i)
        addbias(x).backward(upstream)
        torch.testing.assert_close(x.grad, upstream, rtol=0, atol=0)
        expected = upstream.sum((0, 1), keepdim=True) * (0.01 if i < 8 else 1)
        torch.testing.assert_close(addbias._bias.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 5, 8])
def test_addbias_continues_where_its_state_dict_was(count):
    """Truth: the module that was saved: it and the one that loads do the same afterwards."""
    saved, loading = AddBias(DIM), AddBias(DIM)
    for i in range(count):
        saved(tokens(i))
    loading.load_state_dict(copy.deepcopy(saved.state_dict()))
    copied = copy.deepcopy(saved)
    for i in range(9):
        y = saved(tokens(50 + i))
        assert torch.equal(loading(tokens(50 + i)), y)
        assert torch.equal(copied(tokens(50 + i)), y)
    assert torch.equal(saved.init_mean, loading.init_mean) and loading.count == 8


@pytest.mark.parametrize("depth", [1, 12])
def test_rescale_coefficients(depth):
    """Truth: sqrt(k/(k+1)) on the identity, _scale / sqrt(L) on the MLP branch, k = 1..L."""
    for index in range(depth):
        block = Block(vit_config(4, DIM, depth, 3, 8), "Rescale", index, vis=False).eval()
        assert block._scale.shape == (1,) and block._scale.item() == 1
        with torch.no_grad():
            for p in (*block.attn.parameters(), *block.ffn.parameters()):
                p.zero_()
            block.attn.out.bias.fill_(3)  # the attention branch is 3, the MLP branch 5
            block.ffn.fc2.bias.fill_(5)
            block._scale.fill_(0.7)
            y, _ = block(tokens())
        k = index + 1
        expected = math.sqrt(k / (k + 1)) * (tokens() + 3) + 0.7 * depth**-0.5 * 5
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_rescale_has_no_final_norm():
    """Truth: the reference: what the last block returns goes to the head as it is."""
    norm = NORM_TYPES["Rescale"].final_norm(DIM)
    assert not list(norm.parameters()) and torch.equal(norm(tokens()), tokens())


# ---------------------------------------------------------------- the whole model


def small_model(norm_type, dropout=0.0, dim=32, depth=2):
    torch.manual_seed(1)
    config = vit_config(8, dim, depth, 2, 2 * dim)
    config.transformer.dropout_rate = dropout
    return VisionTransformer(config, 32, norm_type, 10)


def batch(i):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(4, 3, 32, 32, generator=generator) + 0.1 * i
    return images, torch.randint(10, (4,), generator=generator)


def test_calibrating():
    """Truth: 8 training batches; models without AddBias never calibrate."""
    model = small_model("Rescale")
    for i in range(10):
        assert calibrating(model) == (i < 8)
        model.eval()(*batch(i))
        model.train()(*batch(i))
    assert not calibrating(small_model("LN"))


class NoSynchronization(TorchDispatchMode):
    """Raises where the host reads a tensor's value, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_no_synchronization(norm_type):
    """Truth: no operation of a forward or backward pass hands a value to the host, any batch."""
    model = small_model(norm_type, dropout=0.1)
    model.load_state_dict(model.state_dict())
    with NoSynchronization():
        for i in range(10):
            model.train()(*batch(i)).backward()
            model.eval()(*batch(i))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronization():
        torch.ones(()).item()  # the net catches what it is there for


def test_calibration_under_compile():
    """Truth: the eager model over 10 batches: losses, gradients, means and counts."""
    eager = small_model("Rescale")
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(10):
        expected, loss = eager(*batch(i)), compiled(*batch(i))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        expected.backward()
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, p), q in zip(model.named_buffers(), eager.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
        assert not name.endswith("count") or p == 8


def counting_backend(counts):
    """A torch.compile backend that counts the graphs it is given and their runs."""

    def backend(graph, inputs):
        counts["graphs"] += 1

        def run(*args):
            counts["runs"] += 1
            return graph.forward(*args)

        return run

    return backend


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_one_graph_and_no_recompilation(norm_type):
    """Truth: one graph for training and one for evaluation, made once, as fast training needs.

    As train.py: calibration runs eagerly, evaluations in between are compiled.
    """
    model = small_model(norm_type, dropout=0.1)
    counts = {"graphs": 0, "runs": 0}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting_backend(counts))
    for i in range(13):
        if i == 10:
            graphs, runs = counts["graphs"], counts["runs"]
        model.train()
        (model if calibrating(model) else compiled)(*batch(i)).backward()
        model.eval()
        with torch.inference_mode():
            compiled(batch(i)[0])
    # Rescale's evaluation has one more, from the calibration.
    assert graphs == counts["graphs"] <= (3 if norm_type == "Rescale" else 2)
    assert counts["runs"] - runs == 2 * 3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compiled_by_inductor():
    """Truth: the eager model in loss, gradients and buffers; compiled as train.py does it.

    On a CPU even the dropout masks of a seed are the same.
    """
    eager = small_model("Rescale", dropout=0.1, dim=192, depth=1)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for i in range(10):
        torch.manual_seed(i)
        expected = eager(*batch(i))
        torch.manual_seed(i)
        loss = (model if calibrating(model) else compiled)(*batch(i))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        expected.backward()
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
    for p, q in zip(model.buffers(), eager.buffers()):
        assert torch.equal(p, q)


# ---------------------------------------------------------------- gradient checkpointing


def trained(norm_type, checkpointing, compiled=False):
    """Gradients of 11 training batches, calibration included, and the state dict after them."""
    model = small_model(norm_type, dropout=0.1)
    model.transformer.encoder.grad_checkpointing = checkpointing
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager") if compiled else model
    grads = []
    for i in range(11):
        torch.manual_seed(i)
        (model if calibrating(model) else fast)(*batch(i)).backward()
        with torch.no_grad():
            for p in model.parameters():
                grads.append(p.grad)
                p -= 0.1 * p.grad
                p.grad = None
    return grads, model.state_dict()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_checkpointing_changes_nothing(norm_type):
    """Truth: the same batches without it, to the bit: gradients, weights, statistics, counts."""
    (grads, state), (expected, expected_state) = (trained(norm_type, on) for on in (True, False))
    assert all(map(torch.equal, grads, expected))
    for name, value in state.items():
        assert torch.equal(value, expected_state[name]), name


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
def test_checkpointing_under_compile(norm_type):
    """Truth: the same, compiled, without it."""
    (grads, state), (expected, expected_state) = (
        trained(norm_type, on, compiled=True) for on in (True, False)
    )
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
