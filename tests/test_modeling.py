"""The model against a plain implementation on PyTorch's own functions, in the reference's names."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from models.configs import vit_config
from models.layers import Dropout, Linear, packed_weights
from models.modeling import VisionTransformer

NORMS = ("LN", "BN", "GN", "Rescale")
PATCH, DIM, DEPTH, HEADS, MLP, CLASSES = 4, 24, 3, 3, 40, 7
BATCH, SIDE = 5, 16


def small_config(dropout=0.0, attention_dropout=0.0):
    config = vit_config(PATCH, DIM, DEPTH, HEADS, MLP)
    config.transformer.dropout_rate = dropout
    config.transformer.attention_dropout_rate = attention_dropout
    return config


def random_state(model, count=8):
    """A state dict in the reference's names, away from every special value such as 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        value *= 0.5 * tensor[0].numel() ** -0.5 if name.endswith("weight") else 0.3
        if name.endswith(("running_var", "_scale")) or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.1 * value
        elif name.endswith(("count", "num_batches_tracked")):
            value = torch.tensor(count)
        state[name] = value
    return state


def small_model(norm_type, vis=False, side=SIDE, count=8, **kwargs):
    """A model and the state dict that was loaded into it."""
    model = VisionTransformer(small_config(**kwargs), side, norm_type, CLASSES, vis=vis)
    state = random_state(model, count)
    model.load_state_dict(state)
    return model, state


def data(side=SIDE):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def doubles(state):
    return {k: v.double() if v.is_floating_point() else v.clone() for k, v in state.items()}


def plain_norm(state, name, x, norm_type, training):
    if norm_type == "LN":
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
    weight, bias = state[f"{name}.layer.weight"], state[f"{name}.layer.bias"]
    if norm_type == "GN":
        return F.group_norm(x.transpose(1, 2), 4, weight, bias, 1e-6).transpose(1, 2)
    mean, var = state[f"{name}.layer.running_mean"], state[f"{name}.layer.running_var"]
    y = F.batch_norm(x.transpose(1, 2), mean, var, weight, bias, training, 0.1, 1e-6)
    return y.transpose(1, 2)


def plain_addbias(state, name, x, training):
    bias, mean = state[f"{name}._bias"], state[f"{name}.init_mean"]
    if state[f"{name}.count"] >= 8:
        return x + bias - mean
    if training:
        mean = mean + (x.detach().mean((0, 1), keepdim=True) - mean) / (state[f"{name}.count"] + 1)
    return x + 0.01 * bias - mean


def plain_forward(state, images, norm_type, training=False, drop=lambda x, rate: x):
    """Logits and attention weights; every token through every block, three linears a projection.

    drop(x, "attention" or "other") stands wherever the reference has a dropout.
    """
    D = state["head.weight"].shape[1]
    at = "transformer.embeddings."
    kernel, bias = state[at + "patch_embeddings.weight"], state[at + "patch_embeddings.bias"]
    x = F.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state[at + "cls_token"].expand(len(x), 1, D), x], 1)
    x = drop(x + state[at + "position_embeddings"], "other")
    all_weights = []
    for i in range(DEPTH):
        at = f"transformer.encoder.layer.{i}."

        def linear(name, x, at=at):
            return F.linear(x, state[f"{at}{name}.weight"], state[f"{at}{name}.bias"])

        def split(x):
            return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        if norm_type == "Rescale":
            y = plain_addbias(state, at + "addbias", x, training)
        else:
            y = plain_norm(state, at + "attention_norm", x, norm_type, training)
        q, k, v = (split(linear(f"attn.{name}", y)) for name in ("query", "key", "value"))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(D // HEADS)).softmax(-1)
        all_weights.append(weights)
        y = (drop(weights, "attention") @ v).transpose(1, 2).flatten(2)
        x = x + drop(linear("attn.out", y), "attention")
        if norm_type == "Rescale":
            y = plain_addbias(state, at + "ffn_addbias", x, training)
        else:
            y = plain_norm(state, at + "ffn_norm", x, norm_type, training)
        y = drop(F.gelu(linear("ffn.fc1", y)), "other")
        y = drop(linear("ffn.fc2", y), "other")
        if norm_type == "Rescale":
            x = math.sqrt((i + 1) / (i + 2)) * x + state[at + "_scale"] * DEPTH**-0.5 * y
        else:
            x = x + y
    if norm_type != "Rescale":
        x = plain_norm(state, "transformer.encoder.encoder_norm", x, norm_type, training)
    return F.linear(x[:, 0], state["head.weight"], state["head.bias"]), all_weights


def gradients(model):
    """The gradients in the reference's names."""
    grads = {}
    for name, p in model.named_parameters():
        if "qkv" in name:
            for part, grad in zip(("query", "key", "value"), p.grad.chunk(3)):
                grads[name.replace("qkv", part)] = grad
        else:
            grads[name] = p.grad
    return grads


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("side", [SIDE, 64])  # 17 tokens, and 257: the fused attention kernel
@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
def test_forward_is_the_plain_one(norm_type, vis, side):
    """Truth: `plain_forward` in float64; logits, and with `vis` the attention weights."""
    model, state = small_model(norm_type, vis, side)
    images, _ = data(side)
    with torch.no_grad():
        logits, weights = model.eval()(images)
    expected, expected_weights = plain_forward(doubles(state), images.double(), norm_type)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)
    tokens = (side // PATCH) ** 2 + 1
    assert isinstance(weights, list) and len(weights) == (DEPTH if vis else 0)
    for got, truth in zip(weights, expected_weights):
        assert got.shape == (BATCH, HEADS, tokens, tokens)
        torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [SIDE, 64])
@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize(
    ("norm_type", "count"),
    [("LN", 8), ("BN", 8), ("GN", 8), ("Rescale", 0), ("Rescale", 3), ("Rescale", 8)],
)
def test_gradients_are_the_plain_ones(norm_type, count, vis, side):
    """Truth: autograd through `plain_forward`, which computes the last block for every token."""
    model, state = small_model(norm_type, vis, side, count)
    images, labels = data(side)
    loss = model.train()(images, labels)
    loss.backward()
    grads = gradients(model)

    state = doubles(state)
    for name in grads:
        state[name].requires_grad_()
    logits, _ = plain_forward(state, images.double(), norm_type, training=True)
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, grad in grads.items():
        truth = state[name].grad.float()
        torch.testing.assert_close(
            grad, truth, rtol=1e-4, atol=1e-5 * max(1, truth.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("norm_type", NORMS)
def test_dropouts_stand_where_the_reference_has_them(norm_type, monkeypatch):
    """Truth: `plain_forward` with x * (1 + rate) in place of each dropout of the reference."""
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x * (1 + self.p))
    rates = {"other": 0.1, "attention": 0.25}
    model, state = small_model(norm_type, vis=True, dropout=0.1, attention_dropout=0.25)
    images, _ = data()
    with torch.no_grad():
        logits, _ = model.eval()(images)
    expected, _ = plain_forward(
        doubles(state), images.double(), norm_type, drop=lambda x, rate: x * (1 + rates[rate])
    )
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_type", NORMS)
def test_loss_is_the_cross_entropy_of_the_logits(norm_type):
    """Truth: F.cross_entropy on the logits of the same model, in fp32 for bf16 weights too."""
    images, labels = data()
    model, _ = small_model(norm_type)
    model.eval()
    torch.testing.assert_close(
        model(images, labels), F.cross_entropy(model(images)[0], labels), rtol=0, atol=0
    )
    model.bfloat16()
    logits, _ = model(images.bfloat16())
    assert logits.dtype == model(images.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm_type": "XN"}, "'XN'.*LN.*BN.*GN.*Rescale"),
        ({"img_size": 18}, "18.*patch size 4"),
    ],
)
def test_bad_arguments(kwargs, message):
    """Truth: the documented ValueErrors, which name the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        VisionTransformer(small_config(), **{"img_size": SIDE} | kwargs)


# ---------------------------------------------------------------- names


def reference_names(norm_type, depth):
    """Every name of the reference's state dict, in its order for LN."""

    def both(*names):
        return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]

    def norm(name):
        if norm_type == "LN":
            return both(name)
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        return both(f"{name}.layer") + [
            f"{name}.layer.{buffer}" for buffer in buffers if norm_type == "BN"
        ]

    names = ["position_embeddings", "cls_token", *both("patch_embeddings")]
    names = [f"transformer.embeddings.{name}" for name in names]
    for i in range(depth):
        if norm_type == "Rescale":
            block = ["_scale"]
            for bias in ("addbias", "ffn_addbias"):
                block += [f"{bias}.{name}" for name in ("_bias", "count", "init_mean")]
        else:
            block = norm("attention_norm") + norm("ffn_norm")
        block += both("ffn.fc1", "ffn.fc2", "attn.query", "attn.key", "attn.value", "attn.out")
        names += [f"transformer.encoder.layer.{i}.{name}" for name in block]
    if norm_type != "Rescale":
        names += norm("transformer.encoder.encoder_norm")
    return names + both("head")


@pytest.mark.parametrize(
    ("norm_type", "count"), [("LN", 200), ("BN", 275), ("GN", 200), ("Rescale", 234)]
)
def test_state_dict_names(norm_type, count):
    """Truth: the reference's checkpoints: their names, how many at 12 blocks, LN's order too."""
    with torch.device("meta"):
        model = VisionTransformer(vit_config(16, 24, 12, 3, 40), 32, norm_type, 10)
    names, expected = list(model.state_dict()), reference_names(norm_type, 12)
    assert len(names) == len(expected) == count
    assert sorted(names) == sorted(expected)
    if norm_type == "LN":
        assert names == expected


@pytest.mark.parametrize("norm_type", NORMS)
def test_state_dict_round_trip(norm_type):
    """Truth: the random state dict that was loaded, bit for bit; loading leaves it as it was."""
    model = VisionTransformer(small_config(), SIDE, norm_type, CLASSES)
    state = random_state(model)
    given = copy.deepcopy(state)
    assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
    assert given.keys() == state.keys()
    saved = model.state_dict()
    assert saved.keys() == state.keys()
    for name in state:
        assert torch.equal(saved[name], state[name]), name
        assert torch.equal(given[name], state[name]), name
        assert saved[name].dtype == state[name].dtype, name


@pytest.mark.parametrize("norm_type", NORMS)
def test_strict_loading_names_what_does_not_fit(norm_type):
    """Truth: load_state_dict's contract; every single name is needed, and no other is taken."""
    model = VisionTransformer(small_config(), SIDE, norm_type, CLASSES)
    full = model.state_dict()
    for name in full:
        if name.endswith("num_batches_tracked"):
            continue  # PyTorch itself does without it
        lacking = {key: value for key, value in full.items() if key != name}
        # Of query, key and value none can be loaded without the others.
        reported = "attn" if ".attn." in name else name
        with pytest.raises(RuntimeError, match=f"Missing key.*{reported}"):
            model.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="Unexpected key.*pre_logits.weight"):
        model.load_state_dict(full | {"pre_logits.weight": torch.zeros(1)})
    wrong = full | {"head.bias": torch.zeros(CLASSES + 1)}
    with pytest.raises(RuntimeError, match="size mismatch for head.bias"):
        model.load_state_dict(wrong)


# ---------------------------------------------------------------- initialization


def same_distribution(tensor, distribution, *args):
    """The p-value of the values being drawn from the distribution (Kolmogorov-Smirnov)."""
    return stats.kstest(tensor.detach().double().flatten().numpy(), distribution, args).pvalue


def test_initialization():
    """Truth: Xavier (Glorot & Bengio 2010) and PyTorch's default laws, written out here."""
    torch.manual_seed(3)
    D, M, P = 96, 384, 8
    model = VisionTransformer(vit_config(P, D, 2, 3, M), 32, "LN", 100)
    embeddings = model.transformer.embeddings
    assert not embeddings.cls_token.any() and not embeddings.position_embeddings.any()

    xavier = math.sqrt(6 / (D + M))
    linears = [(model.head, D), (embeddings.patch_embeddings, 3 * P * P)]
    for block in model.transformer.encoder.layer:
        for linear in (block.ffn.fc1, block.ffn.fc2):
            assert linear.weight.abs().max() <= xavier
            assert linear.weight.std().item() == pytest.approx(xavier / math.sqrt(3), rel=0.01)
            assert same_distribution(linear.weight, "uniform", -xavier, 2 * xavier) > 1e-3
            assert same_distribution(linear.bias, "norm", 0, 1e-6) > 1e-3
        linears += [(block.attn.qkv, D), (block.attn.out, D)]
        for norm in (block.attention_norm, block.ffn_norm):
            assert torch.equal(norm.weight, torch.ones(D)) and not norm.bias.any()
    for linear, fan_in in linears:
        bound = fan_in**-0.5
        for p in (linear.weight, linear.bias):
            assert p.abs().max() <= bound
            assert same_distribution(p, "uniform", -bound, 2 * bound) > 1e-3


def test_initialization_of_rescale():
    """Truth: the reference: `_scale` one scalar 1 of shape [1], biases and means zero."""
    model = VisionTransformer(small_config(), SIDE, "Rescale", CLASSES)
    for name, tensor in model.state_dict().items():
        if name.endswith("_scale"):
            assert torch.equal(tensor, torch.ones(1))
        elif "addbias" in name:
            assert not tensor.any()
            assert tensor.shape == (() if name.endswith("count") else (1, 1, DIM))


# ---------------------------------------------------------------- linear


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_its_gradients(dtype, gelu):
    """Truth: `F.linear` and `F.gelu` in float64, in value and in all three gradients."""
    torch.manual_seed(3)
    ours = Linear(24, 40).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (ours.weight, ours.bias)]
    x = torch.randn(5, 17, 24).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    upstream = torch.randn(5, 17, 40).to(dtype)
    y, expected = ours(x, gelu=gelu), F.linear(exact_x, *exact)
    expected = F.gelu(expected) if gelu else expected
    y.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(y, expected), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip((ours.weight, ours.bias), exact)]
    relative = 1e-6 if dtype == torch.float32 else 8e-3  # two roundings to half an eps each
    for found, truth in pairs:
        error = torch.linalg.vector_norm(found.double() - truth)
        assert found.dtype == dtype and error < relative * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("norm_type", NORMS)
def test_packed_weights(norm_type):
    """Truth: the model in float64; packed, the logits are as close to it as without."""
    model, _ = small_model(norm_type)
    images, _ = data()
    exact = copy.deepcopy(model).double().eval()(images.double())[0].double()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cast = copy.deepcopy(model).to(dtype).eval()
        linears = [m for m in cast.modules() if isinstance(m, Linear)]
        with torch.inference_mode():
            plain = cast(images.to(dtype))[0]
            with packed_weights(cast):
                packed = cast(images.to(dtype))[0]
                assert all(m.packed is not None for m in linears)
        assert all(m.packed is None for m in linears)
        torch.testing.assert_close(packed.double(), exact, rtol=tolerance, atol=tolerance)
        error, plain_error = (abs(y - exact).mean() for y in (packed, plain))
        assert error < 1.5 * plain_error + 1e-7
        assert len(linears) == 4 * DEPTH


def test_packed_weights_leave_autocast_alone():
    """Truth: autocast's own result, to the bit."""
    model, _ = small_model("LN")
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(data()[0])[0]
        with packed_weights(model):
            assert torch.equal(model(data()[0])[0], expected)
            assert all(m.packed is None for m in model.modules() if isinstance(m, Linear))


# ---------------------------------------------------------------- dropout

ELEMENTS = 10_000_003  # not a multiple of 8: eight elements share one random number


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.75])
def test_dropout_is_a_fair_coin_per_element(p):
    """Truth: independent Bernoulli(p): counts in all and per place, pairs of neighbours."""
    torch.manual_seed(4)
    dropped = (Dropout(p)(torch.ones(ELEMENTS)) == 0).numpy()

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_values(p, dtype):
    """Truth: survivors x / (1 - p); backward the same mask."""
    torch.manual_seed(5)
    x = (torch.rand(301, 7) + 0.5).to(dtype).requires_grad_()
    y = Dropout(p)(x)
    kept = y != 0
    assert 0.5 * (1 - p) < kept.float().mean() < min(1, 1.5 * (1 - p))
    expected = (x.detach().float() / (1 - p)).to(dtype)
    torch.testing.assert_close(y[kept], expected[kept], rtol=1e-6, atol=0)
    assert y.dtype == dtype
    upstream = (torch.rand(301, 7) + 0.5).to(dtype)
    y.backward(upstream)
    expected = (upstream.float() / (1 - p)).to(dtype) * kept
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


def test_dropout_keeps_the_mean():
    """Truth: E[dropout(x)] = x, within 4.5 standard errors over 10^7 elements."""
    torch.manual_seed(6)
    p, n = 0.1, 10**7
    mean = Dropout(p)(torch.ones(n)).double().mean().item()
    assert abs(mean - 1) < 4.5 * math.sqrt(p / (1 - p) / n)


def test_dropout_masks_come_from_the_seed():
    """Truth: the same seed gives the same mask; the next call and another seed give others."""
    x = torch.ones(64, 65)
    drop = Dropout(0.5)
    torch.manual_seed(7)
    first, second = drop(x), drop(x)
    torch.manual_seed(7)
    assert torch.equal(drop(x), first)
    torch.manual_seed(8)
    for other in (second, drop(x)):
        agreeing = (other == first).float().mean().item()
        assert agreeing == pytest.approx(0.5, abs=0.05)  # independent masks agree half the time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_the_identity_where_it_should_be(dtype):
    """Truth: x itself, in evaluation and for p = 0; a strided x is dropped in its own order."""
    x = torch.randn(40, 30).to(dtype)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert isinstance(Dropout(0.5), nn.Dropout)  # whoever looks for dropouts finds ours
    y = Dropout(0.5)(x.t())
    assert y.shape == (30, 40)
    torch.testing.assert_close(y, torch.where(y == 0, 0, 2 * x.t()), rtol=0, atol=0)
