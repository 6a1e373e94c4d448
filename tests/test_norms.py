"""Norm types against PyTorch's modules, and Rescale against its formula written out."""

import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from small import NoSynchronization, batch, random_state, small_config, small_model
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from models import norms
from models.fast_cpu import accelerate
from models.modeling import Attention, Mlp
from models.norms import ALL, MEASURING_STEPS, NORM_TYPES, AddBias, Block, NormType, PreNorm
from train import make_optimizer
from utils.precision import Precision

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
    ours = NORM_TYPES[norm_type].norm(dim)
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
    ours = NORM_TYPES["BN"].norm(DIM)
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
    y = NORM_TYPES["GN"].norm(DIM)(tokens()).unflatten(-1, (4, DIM // 4))
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
    config = small_config(dim=DIM)
    for index in range(depth):
        attn, ffn = Attention(config), Mlp(config)
        block = norms.Rescale(attn, ffn, AddBias, DIM, index, depth).eval()
        assert block._scale.shape == (1,) and block._scale.item() == 1
        with torch.no_grad():
            for p in (*attn.parameters(), *ffn.parameters()):
                p.zero_()
            attn.out.bias.fill_(3)  # the attention branch is 3, the MLP branch 5
            ffn.fc2.bias.fill_(5)
            block._scale.fill_(0.7)
            y = block(tokens())
        k = index + 1
        expected = math.sqrt(k / (k + 1)) * (tokens() + 3) + 0.7 * depth**-0.5 * 5
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_rescale_has_no_final_norm():
    """Truth: the reference: what the last block returns goes to the head as it is."""
    norm = small_model("Rescale").transformer.encoder.encoder_norm
    assert not list(norm.parameters()) and torch.equal(norm(tokens()), tokens())


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_no_synchronization(norm_type):
    """Truth: no operation of a forward or backward pass hands a value to the host, any batch."""
    model = small_model(norm_type, dropout=0.1)
    with NoSynchronization():
        for i in range(10):
            model.train()(*batch(i)).backward()
            model.eval()(*batch(i))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronization():
        torch.ones(()).item()  # the net catches what it is there for


def assert_same_model(model, expected, exact=False):
    """Gradients and state of two models."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, q.grad, **tolerance, msg=name)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **tolerance, msg=name)


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

    As in train.py nothing is compiled before the measuring steps are done.
    """
    model = small_model(norm_type, dropout=0.1)
    accelerate(model, compiled=True)
    counts = {"graphs": 0, "runs": 0}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting_backend(counts), dynamic=False)
    for i in range(MEASURING_STEPS + 4):
        forward = model if i < MEASURING_STEPS else compiled
        model.train()
        forward(*batch(i)).backward()
        model.eval()
        with torch.inference_mode():
            forward(batch(i)[0])
    assert counts == {"graphs": 2, "runs": 2 * 4}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compiled_by_inductor():
    """Truth: the eager model in loss, gradients and buffers; compiled as train.py does it.

    The dropout masks of a seed are the same.
    """
    eager = small_model("Rescale", dropout=0.1, depth=1)
    accelerate(eager, compiled=True)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    for i in range(10):
        torch.manual_seed(i)
        expected = eager(*batch(i))
        torch.manual_seed(i)
        loss = (model if i < MEASURING_STEPS else compiled)(*batch(i))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        expected.backward()
        loss.backward()
    assert_same_model(model, eager)


# ---------------------------------------------------------------- gradient checkpointing


def trained(model, steps, backend=None):
    """`model` after some steps, measuring steps included, with the last one's gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend) if backend else model
    for i in range(steps):
        torch.manual_seed(i)
        model.zero_grad()
        (model if i < MEASURING_STEPS else compiled)(*batch(i)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return model


def checkpointing(model):
    model.transformer.encoder.grad_checkpointing = True
    return model


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_checkpointing_changes_nothing(norm_type):
    """Truth: the same batches without it, to the bit: gradients, weights, statistics, counts."""
    model = checkpointing(small_model(norm_type, dropout=0.1))
    expected = small_model(norm_type, dropout=0.1)
    assert_same_model(trained(model, 11), trained(expected, 11), exact=True)


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
def test_checkpointing_under_compile(norm_type):
    """Truth: the same, eager and without it."""
    model = trained(checkpointing(small_model(norm_type)), 10, "aot_eager")
    assert_same_model(model, trained(small_model(norm_type), 10))


# ---------------------------------------------------------------- new norm types

# As a user adds them: each is a block, a norm layer, or both.


class PostNorm(Block):
    def add_norms(self, norm, dim):
        self.attention_norm = norm(dim)
        self.ffn_norm = norm(dim)
        self.per_token = True

    def forward(self, x, tokens=ALL):
        x = self.attention_norm(x[:, tokens] + self.attn(x, tokens))
        return self.ffn_norm(x + self.ffn(x))


class Sandwich(PreNorm):
    def add_norms(self, norm, dim):
        super().add_norms(norm, dim)
        self.attention_norm_2 = norm(dim)
        self.ffn_norm_2 = norm(dim)

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attention_norm_2(self.attn(self.attention_norm(x), tokens))
        return x + self.ffn_norm_2(self.ffn(self.ffn_norm(x)))


class QueryKeyNorm(PreNorm):
    def __init__(self, attn, ffn, norm, dim, index, depth):
        super().__init__(attn, ffn, norm, dim, index, depth)
        attn.query_norm = nn.RMSNorm(dim // attn.num_heads)
        attn.key_norm = nn.RMSNorm(dim // attn.num_heads)


class Spectral(PreNorm):
    def __init__(self, attn, ffn, *args):
        super().__init__(attn, ffn, *args)
        for layer in (attn.query, attn.key, attn.value, attn.out, ffn.fc1, ffn.fc2):
            spectral_norm(layer)


class DeepNorm(PostNorm):
    def __init__(self, attn, ffn, norm, dim, index, depth):
        super().__init__(attn, ffn, norm, dim, index, depth)
        self.alpha = (2 * depth) ** 0.25
        with torch.no_grad():
            for layer in (attn.value, attn.out, ffn.fc1, ffn.fc2):
                layer.weight.mul_((8 * depth) ** -0.25)

    def forward(self, x, tokens=ALL):
        x = self.attention_norm(self.alpha * x[:, tokens] + self.attn(x, tokens))
        return self.ffn_norm(self.alpha * x + self.ffn(x))


class AllTokens(PreNorm):
    per_token = False

    def forward(self, x):
        x = x + self.attn(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


def double_head(model):
    with torch.no_grad():
        model.head.weight.mul_(2)


LAYERNORM, GROUPNORM = NORM_TYPES["LN"].norm, NORM_TYPES["GN"].norm
NEW_TYPES = {
    "post-norm": NormType(PostNorm, LAYERNORM, nn.Identity),
    "sandwich": NormType(Sandwich, LAYERNORM),
    "query-key-norm": NormType(QueryKeyNorm, LAYERNORM),
    "spectral": NormType(Spectral, nn.Identity, LAYERNORM),
    "deepnorm": NormType(DeepNorm, LAYERNORM, nn.Identity),
    "all-tokens": NormType(AllTokens, LAYERNORM),
    "final-groupnorm": NormType(PreNorm, LAYERNORM, GROUPNORM),  # whose statistics need all tokens
    "double-head": NormType(PreNorm, LAYERNORM, prepare=double_head),
}


@pytest.fixture(params=NEW_TYPES)
def new_type(request, monkeypatch):
    monkeypatch.setitem(NORM_TYPES, request.param, NEW_TYPES[request.param])
    return request.param


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_new_type_trains(new_type, level, fast):
    """Truth: the loss of one batch falls; at O0 as in PyTorch's layers, in half nearly so."""
    model, plain = small_model(new_type), small_model(new_type)
    precision = Precision(model, level, torch.bfloat16)
    precision.attach(make_optimizer(SimpleNamespace(weight_decay=0.0), precision.masters))
    if fast:
        accelerate(model)
    images, labels = batch()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02, momentum=0.9)
    expected = []
    for _ in range(3):
        with precision.autocast():
            loss = model(images.to(precision.input_dtype), labels)
        precision.backward(loss)
        precision.clip(100.0)
        precision.update(0.02)
        optimizer.zero_grad()
        loss = plain(images, labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    losses = [record.loss for record in precision.read()]
    assert losses == pytest.approx(expected, rel=1e-4 if level == "O0" else 0.05)
    assert losses[0] > losses[1] > losses[2]


def test_prepare_is_called_with_the_whole_model(monkeypatch):
    """Truth: the same model without `prepare`."""
    monkeypatch.setitem(NORM_TYPES, "double-head", NEW_TYPES["double-head"])
    doubled, plain = small_model("double-head").head.weight, small_model("LN").head.weight
    assert torch.equal(doubled, 2 * plain)


@pytest.mark.parametrize("fast", [False, True])
def test_checkpointing_of_a_new_type(new_type, fast):
    """Truth: the same without it, to the bit: gradients, weights, buffers."""
    models = small_model(new_type, dropout=0.1), small_model(new_type, dropout=0.1)
    if fast:
        for model in models:
            accelerate(model)
    assert_same_model(trained(checkpointing(models[0]), 2), trained(models[1], 2), exact=True)


@pytest.mark.parametrize("fast", [False, True])
def test_class_token_of_a_new_type(new_type, fast):
    """Truth: the computation with all tokens, as `vis` needs it."""
    model, complete = small_model(new_type), small_model(new_type, vis=True)
    state = random_state(model)
    for m in (model, complete):
        m.load_state_dict(state)
        m.eval()
    if fast:
        accelerate(model)
    images, _ = batch()
    shapes = []
    model.transformer.encoder.register_forward_hook(lambda m, args, y: shapes.append(y.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], complete(images)[0], rtol=1e-5, atol=1e-5)
    assert shapes == [5 if new_type in ("all-tokens", "final-groupnorm") else 1]
