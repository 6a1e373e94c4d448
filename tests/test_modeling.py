"""The model against a plain implementation on PyTorch's own functions, in the reference's names."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from small import NORMS, batch, random_state, small_config, small_model
from torch import nn

from models.configs import vit_config
from models.modeling import VisionTransformer

PATCH, DIM, DEPTH, HEADS, SIDE = 4, 24, 3, 3, 16
TOKENS = (SIDE // PATCH) ** 2 + 1


def random_model(norm_type, count=8, **kwargs):
    """A model and the random state dict that was loaded into it."""
    model = small_model(norm_type, side=SIDE, patch=PATCH, dim=DIM, depth=DEPTH, **kwargs)
    state = random_state(model, count)
    model.load_state_dict(state)
    return model, state


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
    """Logits and attention weights; every token through every block.

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


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
def test_forward_is_the_plain_one(norm_type, vis):
    """Truth: `plain_forward` in float64; logits, and with `vis` the attention weights."""
    model, state = random_model(norm_type, vis=vis)
    images, _ = batch()
    with torch.no_grad():
        logits, weights = model.eval()(images)
    expected, expected_weights = plain_forward(doubles(state), images.double(), norm_type)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)
    assert isinstance(weights, list) and len(weights) == (DEPTH if vis else 0)
    for got, truth in zip(weights, expected_weights):
        assert got.shape == (len(images), HEADS, TOKENS, TOKENS)
        torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize(
    ("norm_type", "count"),
    [("LN", 8), ("BN", 8), ("GN", 8), ("Rescale", 0), ("Rescale", 3), ("Rescale", 8)],
)
def test_gradients_are_the_plain_ones(norm_type, count, vis):
    """Truth: autograd through `plain_forward`, which computes the last block for every token."""
    model, state = random_model(norm_type, count, vis=vis)
    images, labels = batch()
    loss = model.train()(images, labels)
    loss.backward()

    state = doubles(state)
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    logits, _ = plain_forward(state, images.double(), norm_type, training=True)
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, p in model.named_parameters():
        truth = state[name].grad.float()
        atol = 1e-5 * max(1, truth.abs().max().item())
        torch.testing.assert_close(p.grad, truth, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("norm_type", NORMS)
def test_dropouts_stand_where_the_reference_has_them(norm_type, monkeypatch):
    """Truth: `plain_forward` with x * (1 + rate) in place of each dropout of the reference."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * (1 + self.p))
    rates = {"other": 0.1, "attention": 0.25}
    model, state = random_model(norm_type, vis=True, dropout=0.1, attention_dropout=0.25)
    images, _ = batch()
    with torch.no_grad():
        logits, _ = model.eval()(images)
    expected, _ = plain_forward(
        doubles(state), images.double(), norm_type, drop=lambda x, rate: x * (1 + rates[rate])
    )
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)


def test_dropout_of_attention_weights(monkeypatch):
    """Truth: the rate that PyTorch's fused attention is given: 0 in evaluation."""
    rates = []

    def attention(q, k, v, dropout_p):
        rates.append(dropout_p)
        return v[:, :, : q.shape[2]]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model = small_model(depth=1, attention_dropout=0.25)
    model.train()(*batch())
    model.eval()(*batch())
    assert rates == [0.25, 0.0]


@pytest.mark.parametrize("norm_type", NORMS)
def test_loss_is_the_cross_entropy_of_the_logits(norm_type):
    """Truth: F.cross_entropy on the logits of the same model, in fp32 for bf16 weights too."""
    images, labels = batch()
    model = small_model(norm_type).eval()
    assert torch.equal(model(images, labels), F.cross_entropy(model(images)[0], labels))
    model.bfloat16()
    logits, _ = model(images.bfloat16())
    assert logits.dtype == model(images.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm_type": "XN"}, "'XN'.*LN.*BN.*GN.*Rescale"),
        ({"img_size": 18}, "18.*patch size 8"),
    ],
)
def test_bad_arguments(kwargs, message):
    """Truth: the documented ValueErrors, which name the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        VisionTransformer(small_config(), **{"img_size": 16} | kwargs)


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
        model = VisionTransformer(small_config(depth=12), 16, norm_type, 10)
    names, expected = list(model.state_dict()), reference_names(norm_type, 12)
    assert len(names) == len(expected) == count
    assert sorted(names) == sorted(expected)
    if norm_type == "LN":
        assert names == expected


@pytest.mark.parametrize("norm_type", NORMS)
def test_state_dict_round_trip(norm_type):
    """Truth: the random state dict that was loaded, bit for bit; loading leaves it as it was."""
    model = small_model(norm_type)
    state = random_state(model)
    given = copy.deepcopy(state)
    assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
    saved = model.state_dict()
    assert saved.keys() == given.keys() == state.keys()
    for name in state:
        assert torch.equal(saved[name], state[name]), name
        assert torch.equal(given[name], state[name]), name
        assert saved[name].dtype == state[name].dtype, name


# ---------------------------------------------------------------- initialization


def same_distribution(tensor, distribution):
    """The p-value of the values being drawn from the distribution (Kolmogorov-Smirnov)."""
    return stats.kstest(tensor.detach().double().flatten().numpy(), distribution.cdf).pvalue


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
            assert same_distribution(linear.weight, stats.uniform(-xavier, 2 * xavier)) > 1e-3
            assert same_distribution(linear.bias, stats.norm(0, 1e-6)) > 1e-3
        attn = block.attn
        linears += [(linear, D) for linear in (attn.query, attn.key, attn.value, attn.out)]
        for norm in (block.attention_norm, block.ffn_norm):
            assert torch.equal(norm.weight, torch.ones(D)) and not norm.bias.any()
    for linear, fan_in in linears:
        bound = fan_in**-0.5
        for p in (linear.weight, linear.bias):
            assert p.abs().max() <= bound
            assert same_distribution(p, stats.uniform(-bound, 2 * bound)) > 1e-3


def test_initialization_of_rescale():
    """Truth: the reference: `_scale` one scalar 1 of shape [1], biases and means zero."""
    for name, tensor in small_model("Rescale").state_dict().items():
        if name.endswith("_scale"):
            assert torch.equal(tensor, torch.ones(1))
        elif "addbias" in name:
            assert not tensor.any()
            assert tensor.shape == (() if name.endswith("count") else (1, 1, DIM))
