"""Each norm type's block against its paper's formula, and what it promises at the start."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from formulas import DIM, assert_formula, named, randomized, tokens, variant, written
from programs import DATA, needs_cifar10
from small import batch, small_config, small_model
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from models.modeling import Attention, Mlp
from models.norm_blocks import xavier
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
)
from models.norms import NORM_TYPES

# ---------------------------------------------------------------- the blocks' formulas


class Branch:
    """Branch j = 1..2L of L blocks, the attention of one or its MLP, in block l = 1..L.

    `b.F` is the branch itself; b.norm and the like are the written formulas of the block's layers,
    and b.gain and the like its parameters, by the last part of their names.
    """

    def __init__(self, block, name, L):
        self.block, self.name, self.L, self.l = block, name, L, block.index + 1
        self.j = 2 * block.index + (1 if name == "attention" else 2)
        self.F = block.attn if name == "attention" else block.ffn

    def __getattr__(self, kind):
        names = (f"{self.name}_{kind}", kind)
        part = next(getattr(self.block, name) for name in names if hasattr(self.block, name))
        return partial(written, part) if isinstance(part, nn.Module) else part


def pre_norm(b, x):
    return x + b.F(b.norm(x))


def no_norm(b, x):
    return x + b.F(x)


def keel(b, x):
    return pre_norm(b, x) if b.j == 1 else b.out_norm(2 * b.L * x + b.F(b.norm(x)))


def rescale(b, x):
    if b.name == "attention":
        return x + b.F(b.addbias(x))
    return math.sqrt(b.l / (b.l + 1)) * x + b._scale / math.sqrt(b.L) * b.F(b.addbias(x))


def rescale_net(b, x):
    b2 = 1 / (b.j + 2 * b.L)
    return math.sqrt(1 - b2) * x + math.sqrt(b2) * b.unit(b.F(b.addbias(x)))


# What each branch does to x.
FORMULAS = {
    **dict.fromkeys(("LN", "BN", "GN", "RMS", "DyT", "Derf", "ISRU", "RepBN"), pre_norm),
    "Post": lambda b, x: b.norm(x + b.F(x)),
    "DeepNorm": lambda b, x: b.norm((2 * b.L) ** 0.25 * x + b.F(x)),
    "ResPost": lambda b, x: x + b.norm(b.F(x)),
    "Peri": lambda b, x: x + b.out_norm(b.F(b.norm(x))),
    "LNS": lambda b, x: x + b.F(b.norm(x) / math.sqrt(b.l)),
    "Keel": keel,
    "LayerScale": lambda b, x: x + b.gain * b.F(b.norm(x)),
    "ReZero": lambda b, x: x + b.resweight * b.F(x),
    "SkipInit": lambda b, x: x + b.scale * b.F(x),
    "Rescale": rescale,
    "RescaleNet": rescale_net,
    "TFixup": no_norm,
    "SigmaReparam": no_norm,
}
# Its norm layers where they are not LayerNorm.
OTHER_NORMS = {
    "BN": BatchNorm,
    "GN": GroupNorm,
    "RMS": RMSNorm,
    "DyT": DyT,
    "Derf": Derf,
    "ISRU": ISRU,
    "RepBN": RepBN,
    "Keel": GainOnlyLayerNorm,
    "Rescale": AddBias,
    "RescaleNet": AddBias,
    **dict.fromkeys(("ReZero", "SkipInit", "TFixup", "SigmaReparam"), nn.Identity),
}
NO_FINAL_NORM = {"Post", "DeepNorm", "Keel", "Rescale", "RescaleNet"}  # though they have norms


def rms(x):
    return x.square().mean().sqrt().item()


def made_block(norm_type, index, depth):
    torch.manual_seed(index)
    config = small_config(dim=DIM)
    block, norm, *_ = NORM_TYPES[norm_type]
    return block(Attention(config), Mlp(config), norm, DIM, index, depth)


def test_every_type_has_a_formula():
    """A type added to NORM_TYPES must be added to this file's table, which is written by hand."""
    assert set(FORMULAS) == set(NORM_TYPES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("index", "depth"), [(0, 1), (0, 6), (3, 6), (23, 24)])
@pytest.mark.parametrize("norm_type", FORMULAS)
def test_blocks_are_their_formulas(norm_type, index, depth, training):
    """Truth: `FORMULAS` of attention and then MLP, random weights, forward and gradients."""
    block = randomized(made_block(norm_type, index, depth)).double().train(training)

    def formula(block, x):
        for name in ("attention", "ffn"):
            x = FORMULAS[norm_type](Branch(block, name, depth), x)
        return x

    tolerance = {"rtol": 1e-4, "atol": 1e-5} if norm_type == "ISRU" else {}  # it is in fp32
    assert_formula(block, formula, tokens().double(), **tolerance)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_layers_of_the_types(norm_type):
    """Truth: the tables above; the final norm is one of the blocks' kind, or none."""
    kind = OTHER_NORMS.get(norm_type, LayerNorm)
    assert NORM_TYPES[norm_type].norm is kind
    final = small_model(norm_type).transformer.encoder.encoder_norm
    assert type(final) is (nn.Identity if norm_type in NO_FINAL_NORM else kind)


# ---------------------------------------------------------------- what they promise at the start


def blocks(model):
    return model.transformer.encoder.layer


def outputs_of(modules, function, *args):
    """What each of `modules` returns when `function` is called."""
    outputs = []
    hooks = [m.register_forward_hook(lambda m, args, y: outputs.append(y)) for m in modules]
    function(*args)
    for hook in hooks:
        hook.remove()
    return outputs


def with_weights_of(model, source):
    """`model` with all weights of `source` that it has; its others stay."""
    left = model.load_state_dict(source.state_dict(), strict=False)
    assert not left.unexpected_keys
    return model


def same_logits(*models):
    logits = [model.eval()(batch()[0])[0] for model in models]
    return torch.equal(*logits)


@pytest.mark.parametrize("norm_type", ["ReZero", "SkipInit", "ResPost"])
def test_blocks_that_start_as_the_identity(norm_type):
    """Truth: the input, to the bit; other types change it."""
    for index in (0, 5):
        assert torch.equal(made_block(norm_type, index, 6)(tokens()), tokens())
        assert not torch.equal(made_block("LayerScale", index, 6)(tokens()), tokens())


@pytest.mark.parametrize(
    ("depth", "start"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)]
)
def test_layer_scale(depth, start):
    """Truth: gains start as in CaiT, section 3; at 1 it is LN to the bit."""
    block, plain = made_block("LayerScale", 0, depth), made_block("LN", 0, depth)
    for gain in (block.attention_gain, block.ffn_gain):
        assert torch.equal(gain, torch.full((DIM,), start))
        nn.init.ones_(gain)
    with_weights_of(block, randomized(plain))
    assert torch.equal(block(tokens()), plain(tokens()))


def test_deepnorm_with_alpha_and_beta_1_is_post():
    """Truth: Post with Xavier's weights, drawn from the same seed, to the bit."""
    deep, post = small_model("DeepNorm"), randomized(small_model("Post"))
    with_weights_of(deep, post)
    assert not same_logits(deep, post)
    torch.manual_seed(1)
    for block in blocks(post):
        xavier(block, gain=1)
    torch.manual_seed(1)
    for block in blocks(deep):
        block.depth = 1 / 8  # so beta = (8L)^(-1/4) is 1
        block.initialize()
        block.alpha = 1
    assert same_logits(deep, post)


@pytest.mark.parametrize("gain", [1e-4, 0.1])
def test_layer_scale_starts_near_the_identity(gain):
    """Truth: each branch of L blocks moves x by its RMS times the gain at most."""
    model = small_model("LayerScale", depth=6)
    encoder, x = model.transformer.encoder, tokens()
    encoder.reads_class_token_alone = False
    branches = [branch for block in blocks(model) for branch in (block.attn, block.ffn)]
    for block in blocks(model):
        nn.init.constant_(block.attention_gain, gain)
        nn.init.constant_(block.ffn_gain, gain)
    with torch.no_grad():
        largest = max(rms(y) for y in outputs_of(branches, encoder, x))
        moved = rms(outputs_of([blocks(model)[-1]], encoder, x)[0] - x)
    assert 0 < moved <= 12 * gain * largest


def test_keel_moves_little():
    """Truth: x keeps unit variance, and a branch counts 1/(2L) of the stream in amplitude."""
    depth = 12
    block = made_block("Keel", 3, depth)
    x = F.layer_norm(tokens(), (DIM,))
    with torch.no_grad():
        y = block(x)
        branch = rms(outputs_of([block.attn], block, x)[0])
    assert rms(y) == pytest.approx(1, rel=1e-3)
    assert rms(y - x) < 3 * max(1, branch) / (2 * depth)


@pytest.mark.parametrize(
    ("norm_type", "depth", "alpha", "gain"),
    [
        ("DeepNorm", 12, 2.213, 0.3195),
        ("DeepNorm", 6, 1.861, 0.380),
        ("TFixup", 12, None, 0.3600),
        ("TFixup", 4, None, 0.4738),
    ],
)
def test_initial_weights(norm_type, depth, alpha, gain):
    """Truth: DeepNorm's (2L)^(1/4), (8L)^(-1/4), T-Fixup's 0.67 L^(-1/4), by hand; Xavier's law."""
    model = small_model(norm_type, dim=96, mlp_dim=384, depth=depth)
    for block in (blocks(model)[0], blocks(model)[-1]):
        assert getattr(block, "alpha", None) == pytest.approx(alpha, abs=5e-4)
        attn, ffn = block.attn, block.ffn
        for layer in (attn.query, attn.key, attn.value, attn.out, ffn.fc1, ffn.fc2):
            variance = 2 / sum(layer.weight.shape)  # Glorot & Bengio 2010, equation 12
            if layer not in (attn.query, attn.key):
                variance *= gain**2
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.04)
            assert layer.weight.abs().max().item() == pytest.approx((3 * variance) ** 0.5, rel=4e-3)


@pytest.mark.parametrize("norm_type", ["Post", "DeepNorm", "Keel"])
def test_normalized_streams(norm_type):
    """Truth: each token of each block's output has mean 0 and variance 1."""
    model = small_model(norm_type, depth=4)
    outputs = outputs_of(blocks(model), model, batch()[0])
    assert len(outputs) == 4
    for x in outputs:
        torch.testing.assert_close(x.mean(-1), torch.zeros(x.shape[:2]), rtol=0, atol=1e-5)
        ones = torch.ones(x.shape[:2])
        torch.testing.assert_close(x.var(-1, correction=0), ones, rtol=1e-4, atol=0)


def test_peri_adds_branches_of_rms_1():
    """Truth: RMS 1 of each token of what a branch adds, whatever the length of its last weights."""
    model = small_model("Peri", depth=3, vis=True).eval()
    for block in blocks(model):
        nn.init.zeros_(block.attn.out.bias), nn.init.zeros_(block.ffn.fc2.bias)
    added = [n for b in blocks(model) for n in (b.attention_out_norm, b.ffn_out_norm)]
    outputs = outputs_of(added, model, batch()[0])
    assert len(outputs) == 6
    for y in outputs:
        rms = y.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)
    before = model(batch()[0])[0]
    for block in blocks(model):
        block.attn.out.weight.data *= 4
        block.ffn.fc2.weight.data *= 7
    torch.testing.assert_close(model(batch()[0])[0], before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm_type", ["ResPost", "Peri"])
def test_streams_that_grow_linearly(norm_type):
    """Truth: mean square v + k or so after k branches of RMS 1; ResPost's norms at gain 1."""
    model = small_model(norm_type, depth=6, dim=384, mlp_dim=768)
    for block in blocks(model):
        nn.init.ones_(block.attention_norm.weight), nn.init.ones_(block.ffn_norm.weight)
    encoder, x = model.transformer.encoder, tokens(dim=384)
    squares = [y.square().mean().item() for y in outputs_of([*blocks(model)], encoder, x)]
    start = x.square().mean().item()
    for number, square in enumerate(squares, 1):
        assert square == pytest.approx(start + 2 * number, rel=0.12), squares


def test_gains_of_layer_scale_learn_from_the_first_step():
    """Truth: a gain's gradient is the branch's output times the upstream one, which is not 0."""
    model = small_model("LayerScale")
    model(*batch()).backward()
    for block in blocks(model):
        assert block.attention_gain.grad.abs().min() > 0
        assert block.ffn_gain.grad.abs().min() > 0


def test_lns_inputs():
    """Truth: block 1 is LN's to the bit; a branch's input has variance 1/l at the start."""
    plain = randomized(made_block("LN", 0, 5))
    assert torch.equal(with_weights_of(made_block("LNS", 0, 5), plain)(tokens()), plain(tokens()))
    for index in range(5):
        block = made_block("LNS", index, 5)
        inputs = [nn.Identity(), nn.Identity()]  # in front of the branches, to be watched
        block.attn.query = nn.Sequential(inputs[0], block.attn.query)
        block.ffn.fc1 = nn.Sequential(inputs[1], block.ffn.fc1)
        for y in outputs_of(inputs, block, tokens()):
            assert y.var(correction=0).item() == pytest.approx(1 / (index + 1), rel=1e-4)


def test_keel_has_one_outer_norm_less():
    """Truth: four norms a block but three in the first, gains alone."""
    model = small_model("Keel", depth=3)
    counts = [sum(isinstance(m, LayerNorm) for m in b.modules()) for b in blocks(model)]
    assert counts == [3, 4, 4]
    names = [name for name, _ in named(model) if "norm" in name]
    assert len(names) == 11 and all(name.endswith("weight") for name in names)


def stream_variance(depth, images, seed, dim=64, count=32):
    """Mean square of x after each block of a new RescaleNet that has measured 8 batches."""
    entries = {"classifier": "gap"}
    model = variant("RescaleNet", "none", seed, 32, entries=entries, dim=dim, depth=depth, heads=2)
    encoder = model.transformer.encoder
    with torch.no_grad():
        if images is None:
            x = torch.randn(8 * count, 16, dim)
        else:
            x = model.transformer.embeddings(images)
            x /= x.square().mean().sqrt()
        for batch in x.split(len(x) // 8):
            encoder(batch)
        return torch.stack([x.square().mean() for x in outputs_of(encoder.layer, encoder, x)])


@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("source", ["random", "CIFAR-10"])
def test_rescale_net_keeps_unit_variance(source, depth):
    """Truth: 1 after every block, of random tokens and of images', which are alike.

    It is the mean over random weights, here within 5 %; one model's is off by some 0.6 / sqrt(D).
    """
    images, models = None, 4
    if source == "CIFAR-10":
        needs_cifar10()
        from torchvision.datasets import CIFAR10

        images, models = torch.from_numpy(CIFAR10(DATA, train=False).data[:256]), 12
        images = images.permute(0, 3, 1, 2) / 127.5 - 1
    variances = torch.stack([stream_variance(depth, images, seed) for seed in range(models)])
    assert variances.shape == (models, depth)
    assert (variances.mean(0) - 1).abs().max() < 0.05
    assert (variances - 1).abs().max() < 0.25


@pytest.mark.parametrize("depth", [12, 24])
def test_a_wide_rescale_net_keeps_unit_variance(depth):
    """Truth: within 5 % after each block, of a single model as wide as ViT-B."""
    assert (stream_variance(depth, None, 0, 768, count=16) - 1).abs().max() < 0.05


def test_branches_of_rescale_net():
    """Truth: W AddBias(h) for each linear map of a branch, h its input, written out."""
    block = randomized(made_block("RescaleNet", 0, 5)).eval()
    attn, ffn, x = block.attn, block.ffn, tokens()
    q, k, v = (
        (x @ linear.weight.T).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for linear in (attn.query, attn.key, attn.value)
    )
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    bias = attn.inner_norm._bias - attn.inner_norm.init_mean
    expected = (y.transpose(1, 2).flatten(2) + bias) @ attn.out.weight.T
    torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)
    bias = ffn.inner_norm._bias - ffn.inner_norm.init_mean
    expected = (F.gelu(x @ ffn.fc1.weight.T) + bias) @ ffn.fc2.weight.T
    torch.testing.assert_close(ffn(x), expected, rtol=1e-4, atol=1e-5)


def test_rescale_net_has_no_linear_biases():
    """Truth: AddBias before each linear in their place: query, key and value share one."""
    model = small_model("RescaleNet")
    for block in blocks(model):
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 6 and all(m.bias is None for m in linears)
        biases = [tuple(p.shape) for name, p in named(block) if name.endswith("_bias")]
        assert sorted(biases) == sorted([(1, 1, DIM)] * 3 + [(1, 1, 40)])


def test_sigma_reparam_starts_as_the_plain_model(monkeypatch):
    """Truth: the same weights without parametrization, each of standard deviation 0.02."""
    model = small_model("SigmaReparam", dim=96, mlp_dim=192)
    monkeypatch.setitem(NORM_TYPES, "plain", NORM_TYPES["SigmaReparam"]._replace(prepare=None))
    plain = small_model("plain", dim=96, mlp_dim=192)
    state = {k.replace("parametrizations.weight.original", "weight"): v for k, v in named(model)}
    plain.load_state_dict({k: v for k, v in state.items() if not k.endswith("gamma")})
    layers = [m for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sum(k.endswith("gamma") for k in state) == len(layers) == 2 + 6 * 2
    for layer in layers:  # head and patches are among them
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.06)
    images, _ = batch()
    torch.testing.assert_close(model(images)[0], plain(images)[0], rtol=1e-4, atol=1e-5)


def test_sigma_follows_the_weights_in_training():
    """Truth: PyTorch's SVD after 30 steps that change the weights: within 1 %."""
    model = small_model("SigmaReparam")
    layers = [m for m in model.modules() if is_parametrized(m)]
    start = [m.parametrizations.weight[0].u.clone() for m in layers]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for i in range(30):
        optimizer.zero_grad()
        model(*batch(i)).backward()
        optimizer.step()
    errors = {"now": [], "start": []}
    for layer, before in zip(layers, start):
        weight = layer.parametrizations.weight.original.detach().flatten(1)
        sigma = torch.linalg.matrix_norm(weight, 2)
        errors["now"].append(1 - (weight @ layer.parametrizations.weight[0].u).norm() / sigma)
        errors["start"].append(1 - (weight @ before).norm() / sigma)
    assert max(errors["now"]) < 0.01 < max(errors["start"])
