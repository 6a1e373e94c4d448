"""The faster CPU layers against PyTorch's own, on processors with and without bf16 units."""

import copy
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import randomized
from scipy import stats
from small import NORMS, batch, random_state, small_model
from torch import nn

from models import fast_cpu
from models.fast_cpu import (
    Bf16Attention,
    FastDropout,
    ImageGroupNorm,
    OneDnnLinear,
    OneDnnMlp,
    PatchConv,
    accelerate,
    capability,
    fixed_weights,
    has_bf16_units,
)
from models.modeling import Attention, Mlp
from models.norm_layers import GroupNorm

FP32, BF16 = torch.float32, torch.bfloat16
ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
NEEDS_BF16_UNITS = pytest.mark.skipif(not has_bf16_units(), reason="no bf16 units")


@pytest.fixture(params=[False, True], ids=["without-units", "with-units"])
def units(request, monkeypatch):
    """Whether the processor is said to have bf16 units."""
    monkeypatch.setattr(fast_cpu, "has_bf16_units", lambda: request.param)
    return request.param


def types_of(model):
    return {type(module) for module in model.modules()}


# ---------------------------------------------------------------- what is chosen


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or any(name in os.environ for name in ISA_VARIABLES),
    reason="needs Linux, and no limit on the instructions",
)
def test_capability():
    """Truth: the kernel's list of the processor's instructions."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    avx512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags
    assert has_bf16_units() == (avx512 and "avx512_bf16" in flags)
    assert ("AVX512" in capability()) == avx512
    assert capability().endswith("with bf16") == has_bf16_units()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_chosen(units, compiled, monkeypatch):
    """Truth: the module's description; no clock is read, so that each start chooses alike."""

    def clock():
        raise AssertionError("a clock was read")

    for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "process_time"):
        monkeypatch.setattr(time, name, clock)
    model = small_model(dropout=0.1)
    words = accelerate(model, compiled)
    plain, by_onednn = {nn.Linear, Mlp, Attention}, {OneDnnLinear, OneDnnMlp, Bf16Attention}
    found = types_of(model) & {nn.Dropout, FastDropout, *plain, *by_onednn}
    assert found == {FastDropout} | (by_onednn if units and not compiled else plain)
    assert "fast dropout" in words and capability() in words
    assert ("linears by oneDNN" in words) == (units and not compiled)
    assert accelerate(model, compiled) == words  # a second time changes nothing


def test_other_devices_are_left_alone(units):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    assert accelerate(model) == "PyTorch's layers on meta"
    assert types_of(model) == {nn.Sequential, nn.Linear, nn.Dropout}


ON_AVX2 = """
import copy, json, sys
import torch
sys.path.insert(0, "tests")
from small import NORMS, batch, small_model
from models.fast_cpu import OneDnnLinear, accelerate, capability
model = small_model("GN")
plain = copy.deepcopy(model)
words = accelerate(model)
results = []
for m in (model, plain):
    loss = m(*batch())
    loss.backward()
    results.append([loss.item(), *(p.grad.norm().item() for p in m.parameters())])
kinds = [type(m) is OneDnnLinear for m in model.modules()]
print(json.dumps([capability(), words, any(kinds), results]))
"""


def test_on_avx2():
    """Truth: what the environment allows: AVX2 is chosen for, and the plain model's numbers."""
    limits = dict(zip(ISA_VARIABLES, ("avx2", "AVX2", "AVX2")))
    done = subprocess.run(
        [sys.executable, "-c", ON_AVX2],
        cwd=Path(__file__).parent.parent,
        env=os.environ | limits,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kind, words, any_onednn, (got, expected) = json.loads(done.stdout)
    assert kind == "AVX2" and words == "fast dropout (AVX2)" and not any_onednn
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
def test_accelerated_model(norm_type, vis, units):
    """Truth: PyTorch's layers in float64: logits and attention weights, loss and gradients."""
    model = small_model(norm_type, vis=vis, patch=4)
    model.load_state_dict(random_state(model))
    exact = copy.deepcopy(model).double()
    images, labels = batch()
    accelerate(model)
    with torch.no_grad():
        with fixed_weights(model):
            logits, weights = model.eval()(images)
        expected, expected_weights = exact.eval()(images.double())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for got, truth in zip(weights, expected_weights):
        torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-6)

    loss, expected = model.train()(images, labels), exact.train()(images.double(), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        truth = q.grad.float()
        atol = 1e-5 * max(1, truth.abs().max().item())
        torch.testing.assert_close(p.grad, truth, rtol=1e-4, atol=atol, msg=name)


@NEEDS_BF16_UNITS
@pytest.mark.parametrize("side", [16, 68])  # 17 tokens; and 290, too many for two products
@pytest.mark.parametrize("norm_type", NORMS)
def test_accelerated_model_in_bf16(norm_type, side):
    """Truth: float64; logits and gradients are as close to it as those of PyTorch's layers."""
    plain = small_model(norm_type, side, patch=4)
    plain.load_state_dict(random_state(plain))
    exact = copy.deepcopy(plain).double()
    fast = copy.deepcopy(plain.bfloat16())
    accelerate(fast)
    images, labels = batch(size=3, side=side)
    results = []
    for model in (fast, plain, exact):
        x = images.to(model.head.weight.dtype)
        with torch.no_grad():
            with fixed_weights(model):
                logits = model.eval()(x)[0]
        model.train()(x, labels).backward()
        grads = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        results.append((logits.double(), grads))
    for got, theirs, truth in zip(*results):
        error, their_error = (torch.linalg.vector_norm(t - truth) for t in (got, theirs))
        assert 0 < error < 1.5 * their_error


def test_parameters_names_and_hooks_stay(units):
    """Truth: the model before; hooks on every layer are called and see what they saw."""

    def watched(model):
        seen = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
        return seen

    model = small_model(dropout=0.1)
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    seen, seen_plain = watched(model), watched(plain)
    accelerate(model)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    for name, p in model.named_parameters():
        assert p is parameters.pop(name)
    assert not parameters and model.state_dict().keys() == plain.state_dict().keys()

    with torch.no_grad():
        for m in (model, plain):
            m.eval()(*batch())
    assert "transformer.embeddings.patch_embeddings" in seen
    assert "transformer.encoder.layer.1.ffn.fc1" in seen and seen.keys() == seen_plain.keys()
    for name, y in seen.items():
        torch.testing.assert_close(y, seen_plain[name], rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------- linear


def linear(dtype=FP32, bias=True):
    """A OneDnnLinear from 24 to 40."""
    torch.manual_seed(3)
    layer = nn.Linear(24, 40, bias, dtype=dtype)
    layer.__class__ = OneDnnLinear
    return layer


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (5, 17, 24)])
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=NEEDS_BF16_UNITS)])
def test_linear(dtype, shape, bias, gelu):
    """Truth: `F.linear` and `F.gelu` in float64: with gradients and without, and the gradients."""
    layer = linear(dtype, bias)
    exact = [p.detach().double().requires_grad_() for p in layer.parameters()]
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = F.linear(exact_x, *exact)
    expected = F.gelu(expected) if gelu else expected
    y = layer(x, gelu=gelu)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    expected.backward(upstream.double())
    with torch.no_grad():
        pairs = [(y, expected), (layer(x, gelu=gelu), expected), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact)]
    relative = 1e-6 if dtype == FP32 else 8e-3  # two roundings to half an eps each
    for found, truth in pairs:
        error = torch.linalg.vector_norm(found.double() - truth)
        assert found.dtype == dtype and found.shape == truth.shape
        assert error < relative * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fixed_weights_of_other_types(dtype):
    """Truth: PyTorch's own layer, to the bit: oneDNN has these not everywhere, or not at all."""
    layer, x = linear(dtype), torch.randn(5, 24).to(dtype)
    with torch.no_grad(), fixed_weights(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=NEEDS_BF16_UNITS)])
def test_fixed_weights(dtype, gelu):
    """Truth: `F.linear` in float64 on the weights as they are, within and afterwards."""
    layer, x = linear(dtype), torch.randn(5, 17, 24).to(dtype)
    with torch.inference_mode():
        for _ in range(2):
            with fixed_weights(layer):
                assert layer.packed is not None
                within = layer(x, gelu=gelu)
            assert layer.packed is None
            expected = F.linear(x.double(), *(p.double() for p in layer.parameters()))
            expected = F.gelu(expected) if gelu else expected
            for found in (within, layer(x, gelu=gelu)):
                error = torch.linalg.vector_norm(found.double() - expected)
                assert error < (1e-6 if dtype == FP32 else 8e-3) * expected.norm()
            layer.weight.mul_(2)


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=NEEDS_BF16_UNITS)])
def test_patches(dtype):
    """Truth: `F.conv2d` in float64: with gradients, without, with fixed weights; the gradients."""
    torch.manual_seed(3)
    layer = nn.Conv2d(3, 40, 8, stride=8, dtype=dtype)
    layer.__class__ = PatchConv
    exact = [p.detach().double().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 3, 24, 32).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = F.conv2d(exact_x, *exact, stride=8)
    y = layer(x)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    expected.backward(upstream.double())
    with torch.no_grad(), fixed_weights(layer):
        fixed = layer(x)
    with torch.no_grad():
        pairs = [(y, expected), (layer(x), expected), (fixed, expected), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact)]
    for found, truth in pairs:
        error = torch.linalg.vector_norm(found.double() - truth)
        assert found.dtype == dtype and found.shape == truth.shape
        assert error < (1e-6 if dtype == FP32 else 8e-3) * torch.linalg.vector_norm(truth)


def test_other_convolutions_stay():
    """Truth: PyTorch's own, to the bit, for windows that overlap or have gaps, and for groups."""
    for stride, padding, dilation, groups in (
        *((2, 1, 1, 1), (3, 1, 1, 1), (5, 0, 1, 1)),
        *((3, 0, 2, 1), (3, 0, 1, 3)),
    ):
        layer = nn.Conv2d(3, 6, 3, stride, padding, dilation, groups)
        x = torch.randn(2, 3, 12, 12)
        expected = layer(x)
        layer.__class__ = PatchConv
        assert torch.equal(layer(x), expected)


def test_accelerated_model_can_be_copied_and_saved(units):
    """Truth: the model itself, after an evaluation."""
    model = small_model()
    accelerate(model)
    images, _ = batch()
    file = io.BytesIO()
    with torch.no_grad():
        expected = model.eval()(images)[0]
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(images)[0], expected)


def test_autocast_is_left_alone(units):
    """Truth: autocast's own result on PyTorch's layers, to the bit."""
    plain = small_model(vis=True).eval()  # with `vis` the attention is the same too
    fast = copy.deepcopy(plain)
    accelerate(fast)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert torch.equal(fast(batch()[0])[0], plain(batch()[0])[0])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen):
    """Truth: `F.linear` with the same one frozen."""
    layer, x = linear(), torch.randn(3, 24, requires_grad=True)
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias}
    inputs[frozen].requires_grad_(False)
    wanted = [t for name, t in inputs.items() if name != frozen]
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.autograd.grad(F.linear(*inputs.values()).square().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_group_norm(dtype):
    """Truth: `F.group_norm` over (B, D, N), and its gradients, in float64."""
    torch.manual_seed(4)
    layer = randomized(GroupNorm(24)).to(dtype)
    accelerate(nn.Sequential(layer))
    assert type(layer) is ImageGroupNorm
    exact = [p.detach().double().requires_grad_() for p in layer.parameters()]
    x = torch.randn(3, 10, 24).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    upstream = torch.randn(3, 10, 24).to(dtype)
    y, expected = layer(x), F.group_norm(exact_x.mT, 4, *exact, 1e-6).mT
    y.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(y, expected), (x.grad, exact_x.grad)]
    for found, truth in pairs + [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact)]:
        error = torch.linalg.vector_norm(found.double() - truth)
        assert error < (1e-6 if dtype == FP32 else 1e-2) * torch.linalg.vector_norm(truth)


# ---------------------------------------------------------------- second derivatives


def test_linear_derivatives():
    """Truth: finite differences, for first and second derivatives."""
    shapes = [(2, 4), (3, 4), (3,)]  # x, weight, bias
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(fast_cpu._OneDnnLinear.apply, inputs)
    assert torch.autograd.gradgradcheck(fast_cpu._OneDnnLinear.apply, inputs)


def hessian_product(model):
    """The Hessian of the loss times a fixed vector, with respect to all parameters, as one."""
    parameters = list(model.parameters())
    images, labels = batch()
    loss = model(images.to(parameters[0].dtype), labels)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    vector = [torch.linspace(-1, 1, p.numel()).view_as(p).to(p.dtype) for p in parameters]
    return torch.cat([h.flatten() for h in torch.autograd.grad(grads, parameters, vector)])


@pytest.mark.parametrize("norm_type", ["LN", "GN"])
def test_hessian_products(norm_type, units):
    """Truth: the difference of gradients along the vector, on PyTorch's layers in float64.

    With `vis`: PyTorch's fused attention has no second derivatives on a CPU, and says so.
    """
    model = small_model(norm_type, vis=True)
    fast = copy.deepcopy(model)
    accelerate(fast)
    exact = model.double()
    step, gradients = 3e-4, []
    for sign in (1, -1):
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for p in moved.parameters():
                p += sign * step * torch.linspace(-1, 1, p.numel()).view_as(p)
        images, labels = batch()
        moved(images.double(), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in moved.parameters()]))
    expected = (gradients[0] - gradients[1]) / (2 * step)
    norm = torch.linalg.vector_norm(expected)
    for tested in (exact, fast):
        assert torch.linalg.vector_norm(hessian_product(tested) - expected) < 1e-3 * norm


def test_hessian_products_through_fused_attention(units):
    """Truth: PyTorch's error; a result must not be silently wrong."""
    model = small_model()
    accelerate(model)
    with pytest.raises(RuntimeError, match="derivative .* is not implemented"):
        hessian_product(model)


# ---------------------------------------------------------------- dropout

ELEMENTS = 10_000_003  # not a multiple of 8: eight elements share one random number


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.75])
def test_dropout_is_a_fair_coin_per_element(p):
    """Truth: independent Bernoulli(p): counts in all and per place, pairs of neighbours."""
    torch.manual_seed(4)
    dropped = (FastDropout(p)(torch.ones(ELEMENTS)) == 0).numpy()

    def deviation(hits, n, chance):
        """In standard deviations of the binomial law."""
        return abs(hits - n * chance) / math.sqrt(n * chance * (1 - chance))

    assert deviation(dropped.sum(), ELEMENTS, p) < 4.5
    for place in range(8):
        part = dropped[place::8]
        assert deviation(part.sum(), len(part), p) < 4.5, place
    for lag in (1, 2, 3, 4, 5, 8, 64, 192, 768):
        first, second = dropped[:-lag], dropped[lag:]
        both, one = (first & second).sum(), first.sum()
        other, n = second.sum(), len(first)
        table = np.array([[both, one - both], [other - both, n - one - other + both]])
        assert stats.chi2_contingency(table).pvalue > 1e-4, lag


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_values(p, dtype):
    """Truth: survivors x / (1 - p); backward the same mask."""
    torch.manual_seed(5)
    x = (torch.rand(301, 7) + 0.5).to(dtype).requires_grad_()
    y = FastDropout(p)(x)
    kept = y != 0
    assert 0.5 * (1 - p) < kept.float().mean() < min(1, 1.5 * (1 - p))
    expected = (x.detach().float() / (1 - p)).to(dtype)
    torch.testing.assert_close(y[kept], expected[kept], rtol=1e-6, atol=0)
    assert y.dtype == dtype
    upstream = (torch.rand(301, 7) + 0.5).to(dtype)
    y.backward(upstream)
    expected = (upstream.float() / (1 - p)).to(dtype) * kept
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


def test_dropout_masks_come_from_the_seed():
    """Truth: the same seed gives the same mask; the next call and another seed give others."""
    x = torch.ones(64, 65)
    drop = FastDropout(0.5)
    torch.manual_seed(7)
    first, second = drop(x), drop(x)
    torch.manual_seed(7)
    assert torch.equal(drop(x), first)
    torch.manual_seed(8)
    for other in (second, drop(x)):
        agreeing = (other == first).float().mean().item()
        assert agreeing == pytest.approx(0.5, abs=0.05)  # independent masks agree half the time


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_is_pytorchs_where_nothing_is_drawn(dtype):
    """Truth: x itself in evaluation and for p = 0, zeros for p = 1."""
    x = torch.randn(40, 30).to(dtype)
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)
    assert not FastDropout(1.0)(x).any()


def test_dropout_of_a_strided_tensor():
    """Truth: each element is dropped in its own place."""
    x = torch.randn(40, 30)
    y = FastDropout(0.5)(x.t())
    torch.testing.assert_close(y, torch.where(y == 0, 0, 2 * x.t()), rtol=0, atol=0)
