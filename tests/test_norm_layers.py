"""Norm layers and query-key norms against the formulas of formulas.py."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from formulas import (
    DIM,
    EPS,
    LAYERS,
    assert_formula,
    made,
    randomized,
    tokens,
    written,
)
from small import small_config
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from models.modeling import Attention
from models.norm_layers import (
    ISRU,
    AddBias,
    BatchNorm,
    Derf,
    DyT,
    GainOnlyLayerNorm,
    GroupNorm,
    LayerNorm,
    RepBN,
    RMSNorm,
    SpectralScale,
    UnitVariance,
)
from models.norms import NORM_TYPES, QK_NORMS


def test_every_layer_has_a_formula():
    """A layer of NORM_TYPES or QK_NORMS must be added to formulas.py, written by hand."""
    used = {t.norm for t in NORM_TYPES.values()} | {t.final_norm for t in NORM_TYPES.values()}
    assert (used | set(QK_NORMS.values())) - {None} <= set(LAYERS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_their_formulas(layer, training):
    """Truth: `LAYERS` in double precision; forward, and autograd for the input and parameters."""
    ours = randomized(made(layer)).double().train(training)
    # ISRU computes in fp32
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if layer is ISRU else {}
    assert_formula(ours, written, tokens().double(), **tolerance)


@pytest.mark.parametrize("layer", [LayerNorm, GainOnlyLayerNorm, RMSNorm, BatchNorm, GroupNorm])
def test_norms_are_pytorchs(layer):
    """Truth: torch.nn.functional's norms, those over channels on (B, D, N); fp32."""
    ours = randomized(layer(DIM))
    n, x = getattr(ours, "layer", ours), tokens()
    expected = {
        LayerNorm: lambda: F.layer_norm(x, (DIM,), n.weight, n.bias, EPS),
        GainOnlyLayerNorm: lambda: F.layer_norm(x, (DIM,), n.weight, None, EPS),
        RMSNorm: lambda: F.rms_norm(x, (DIM,), n.weight, EPS),
        BatchNorm: lambda: F.batch_norm(x.mT, None, None, n.weight, n.bias, True, eps=EPS).mT,
        GroupNorm: lambda: F.group_norm(x.mT, 4, n.weight, n.bias, EPS).mT,
    }[layer]()
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_half_precision(layer, dtype):
    """Truth: the formula in double precision; bf16 has 8 bits, fp16 11, and results reach 10."""
    ours = randomized(made(layer))
    if layer not in (BatchNorm, RepBN):  # whose weights stay fp32
        for p in ours.parameters():  # and so do buffers
            p.data = p.data.to(dtype)
    x = tokens().to(dtype)
    got = ours(x)
    assert got.dtype == dtype or layer is RepBN  # whose fp32 scalar makes the sum fp32
    expected = written(copy.deepcopy(ours).double(), x.double()).float()
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.004
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=1.5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [DyT, Derf, ISRU])
def test_bounded_layers_saturate(layer, dtype):
    """Truth: b +- |g| wherever u is large, up to 60000; the formula elsewhere; finite gradients."""
    ours = layer(DIM)
    for p in (ours.weight, ours.bias):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(3))
    ours.to(dtype)
    x = torch.tensor([0.0, 1e-3, 0.1, 1, 3, 500, 3e3, 6e4])
    x = torch.cat([x, -x]).to(dtype)[None, :, None].expand(1, 16, DIM).contiguous()
    x.requires_grad_()
    y = ours(x)
    y.float().sum().backward()
    double = copy.deepcopy(ours).double()
    expected = written(double, x.detach().double()).float()
    precision = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.float(), expected, rtol=precision, atol=precision)
    signs = x.detach().float().sign()
    large = x.detach().float().abs() > 400
    ends = double.weight.float() * signs + double.bias.float()
    assert large.any() and (y.float() - ends)[large].abs().max() < 2 * precision
    for grad in (x.grad, *(p.grad for p in ours.parameters())):
        assert grad.isfinite().all()
    assert x.grad[large].abs().max() < 1e-3  # nothing comes back from the ends


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("layer", [DyT, Derf, ISRU])
def test_bounded_layers_near_zero(layer):
    """Truth: odd around their shift 0 and bias 0, and a line of the function's slope at small a."""
    norm, x = layer(DIM), tokens()
    slope = 2 / math.sqrt(math.pi) if layer is Derf else 1
    with torch.no_grad():
        torch.testing.assert_close(norm(-x), -norm(x))
        norm.alpha.fill_(1e-5)
        torch.testing.assert_close(norm(x), slope * 1e-5 * x, rtol=1e-5, atol=0)


def test_batchnorm_statistics():
    """Truth: running = 0.9 old + 0.1 new, mean and unbiased variance over batch and tokens."""
    ours = BatchNorm(DIM)
    mean, var = torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)
    for i in range(4):
        x = tokens(i)
        ours(x)
        rows = x.double().reshape(-1, DIM)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0)
    torch.testing.assert_close(ours.layer.running_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.layer.running_var, var.float(), rtol=1e-5, atol=1e-6)
    assert ours.layer.num_batches_tracked == 4


def test_repbn_folds_into_an_affine_map():
    """Truth: x (g / sqrt(v + eps) + a) + b - g m / sqrt(v + eps), in evaluation."""
    ours = randomized(RepBN(DIM)).eval()
    n, x = ours.layer, tokens()
    gain = n.weight / (n.running_var + EPS).sqrt()
    expected = x * (gain + ours.alpha) + n.bias - gain * n.running_mean
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


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
        assert addbias.measuring == (i < 7)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_variance_divides_by_the_rms_of_8_batches(dtype):
    """Truth: s x / sqrt(mean of the mean squares so far), a constant to autograd; then kept."""
    layer = UnitVariance()
    nn.init.constant_(layer._scale, 1.5)
    squares = []
    for i in range(12):
        x = (tokens(i) * (i + 1)).to(dtype).requires_grad_()
        if i < 8:
            squares.append(x.detach().double().square().mean())
        factor = 1.5 / (sum(squares) / len(squares)).sqrt()
        y = layer.train()(x)
        y.sum().backward()
        close = partial(torch.testing.assert_close, rtol=0.02 if dtype != torch.float32 else 1e-5)
        close(y.double(), factor * x.detach().double(), atol=1e-5)
        close(x.grad.double(), factor.expand(x.shape), atol=1e-5)
        before = layer.mean_square.clone()
        close(layer.eval()(100 * x).double(), 100 * factor * x.detach().double(), atol=1e-3)
        assert torch.equal(layer.mean_square, before) and layer.count == min(i + 1, 8)


@pytest.mark.parametrize("layer", [AddBias, UnitVariance])
@pytest.mark.parametrize("count", [0, 5, 8])
def test_measuring_continues_where_the_state_dict_was(layer, count):
    """Truth: the module that was saved: it and the one that loads do the same afterwards."""
    saved, loading = made(layer), made(layer)
    for i in range(count):
        saved(tokens(i))
    loading.load_state_dict(copy.deepcopy(saved.state_dict()))
    copied = copy.deepcopy(saved)
    for i in range(9):
        y = saved(tokens(50 + i))
        assert torch.equal(loading(tokens(50 + i)), y)
        assert torch.equal(copied(tokens(50 + i)), y)
    assert loading.count == 8 and not loading.measuring
    for name, buffer in saved.named_buffers():
        assert torch.equal(loading.get_buffer(name), buffer), name


# ---------------------------------------------------------------- weights over their largest


def spectral(passes=0):
    """A linear and a convolutional layer with `SpectralScale`, and g = 1.7."""
    torch.manual_seed(0)
    for layer in (nn.Linear(DIM, 40), nn.Conv2d(3, 10, 4, 4)):
        register_parametrization(layer, "weight", SpectralScale(layer.weight))
        nn.init.constant_(layer.parametrizations.weight[0].gamma, 1.7)
        for _ in range(passes):
            layer.weight.detach()  # each look is one power iteration
        yield layer, layer.parametrizations.weight.original, layer.parametrizations.weight[0]


def test_spectral_scale_is_its_formula():
    """Truth: g W / (largest singular value, by PyTorch's SVD in double), and its gradients."""
    for layer, weight, scale in spectral(passes=300):
        upstream = tokens(1, 1, 1, weight.numel()).view_as(weight)
        layer.weight.backward(upstream)
        double = weight.detach().double().requires_grad_()
        gamma = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
        expected = gamma / torch.linalg.matrix_norm(double.flatten(1), 2) * double
        expected.backward(upstream.double())
        for got, truth in (
            (layer.weight, expected),
            (weight.grad, double.grad),
            (scale.gamma.grad, gamma.grad),
        ):
            torch.testing.assert_close(got, truth.float(), rtol=1e-4, atol=1e-5)
        along = (weight.grad * weight).sum() / weight.grad.norm() / weight.norm()
        assert abs(along) < 1e-6  # the length of W has no gradient


def test_spectral_scale_ignores_the_length_of_weights():
    """Truth: the weight before; only `original` is 3 times as long."""
    for layer, weight, _ in spectral(passes=1):
        before = layer.weight.clone()
        with torch.no_grad():
            weight.mul_(3)
        torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-6)


def test_spectral_scale_takes_one_step_in_training_alone():
    """Truth: u <- W' W u, normalized, in NumPy's double precision; in evaluation u stays."""
    for layer, weight, scale in spectral():
        nn.init.normal_(scale.u)
        u, matrix = scale.u.double().numpy(), weight.detach().double().flatten(1).numpy()
        layer.eval()
        evaluated = layer.weight
        assert (scale.u.double().numpy() == u).all()
        assert torch.equal(layer.weight, evaluated)
        step = matrix.T @ (matrix @ u)
        layer.train()
        assert torch.equal(layer.weight, evaluated)  # which uses the step's u and v too
        expected = torch.from_numpy(step / (step @ step) ** 0.5).float()
        torch.testing.assert_close(scale.u, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- query-key norms


def attention(qk_norm, vis=False, length=1.0):
    """Attention with random weights, those of queries and keys `length` times as long."""
    attn = randomized(Attention(small_config(dim=DIM), vis, qk_norm)).double().eval()
    for linear in (attn.query, attn.key):
        linear.weight.data *= length
    return attn


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_query_key_norm_is_its_formula(qk_norm, vis):
    """Truth: softmax(n(q) n'(k)^T / sqrt(d)) v for each head, n and n' over its d channels."""

    def formula(attn, x):
        heads = []
        for i in range(3):
            q, k, v = (f(x)[..., 8 * i : 8 * (i + 1)] for f in (attn.query, attn.key, attn.value))
            q, k = written(attn.query_norm, q), written(attn.key_norm, k)
            heads.append((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
        return attn.out(torch.cat(heads, dim=-1))

    assert_formula(attention(qk_norm, vis), formula, tokens().double())


@pytest.mark.parametrize("qk_norm", ["rms", "ln"])
def test_query_key_norm_bounds_the_logits(qk_norm):
    """Truth: |n(q) n(k)| / sqrt(d) <= sqrt(d) at unit weights, by Cauchy-Schwarz."""
    seen = {}
    for kind in (qk_norm, "none"):
        attn = attention(kind, length=100)
        for norm in (attn.query_norm, attn.key_norm):
            for name, p in norm.named_parameters():
                nn.init.constant_(p, float(name == "weight"))
            norm.register_forward_hook(lambda m, args, y, kind=kind: seen.update({(kind, m): y}))
        attn(tokens().double())
        q, k = seen[kind, attn.query_norm], seen[kind, attn.key_norm]
        largest = (q @ k.mT / math.sqrt(8)).abs().max().item()
        assert (largest <= math.sqrt(8)) == (kind == qk_norm)
        attn.key.load_state_dict(attn.query.state_dict())
        attn(tokens().double())
        q, k = seen[kind, attn.query_norm], seen[kind, attn.key_norm]
        if kind == qk_norm:  # of a query that is its own key, the bound itself
            diagonal = (q * k).sum(-1) / math.sqrt(8)
            torch.testing.assert_close(diagonal, torch.full_like(diagonal, math.sqrt(8)))


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_query_key_norm_ignores_the_length_of_weights(qk_norm):
    """Truth: the output before; without biases only the queries' weights are 5 times as long."""
    attn = attention(qk_norm, length=10)
    nn.init.zeros_(attn.query.bias)
    before = attn(tokens().double())
    attn.query.weight.data *= 5
    same = torch.allclose(attn(tokens().double()), before, rtol=1e-4, atol=1e-5)
    assert same == (qk_norm != "none")


def test_no_query_key_norm_is_pytorchs_attention():
    """Truth: F.scaled_dot_product_attention on the linear layers' outputs, to the bit."""
    attn = randomized(Attention(small_config(dim=DIM)))
    x = tokens()
    q, k, v = (
        f(x).unflatten(-1, (3, 8)).transpose(1, 2) for f in (attn.query, attn.key, attn.value)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(attn(x), attn.out(y))
