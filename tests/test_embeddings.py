"""Tokens from images, and what a recipe changes in the model, such as pooling and dropping."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from formulas import DIM, randomized, tokens, variant
from small import batch, small_config
from torch import nn
from torchvision.ops import StochasticDepth

from models.configs import CONFIGS
from models.embeddings import Embeddings, PatchDropout, sincos_positions
from models.fast_cpu import accelerate
from models.modeling import Attention, Mlp
from models.norms import NORM_TYPES, QK_NORMS

# Whose branches start in a way of their own, which zeros would undo.
OWN_STARTS = "DeepNorm ResPost Peri LayerScale ReZero SkipInit RescaleNet TFixup SigmaReparam"


def test_sincos_positions():
    """Truth: sin(p / 10000^(4i/D)), cos(...) of column and row p, i < D/4, by Python's math."""
    for side, dim in ((4, 24), (3, 196), (14, 8)):  # 4/196 is a fraction that rounds
        got = sincos_positions(side, dim)
        assert got.shape == (1, side * side, dim)
        for row in range(side):
            for column in range(side):
                expected = [
                    f(p / 10000 ** (4 * i / dim))
                    for p in (column, row)
                    for f in (math.sin, math.cos)
                    for i in range(dim // 4)
                ]
                assert got[0, row * side + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_fixed_positions(classifier):
    """Truth: patches by F.conv2d plus the positions; the class token has none; none are learned."""
    model = variant(entries={"positions": "sincos", "classifier": classifier}, patch=4)
    embeddings, (images, _) = model.transformer.embeddings, batch()
    convolution = embeddings.patch_embeddings
    x = F.conv2d(images, convolution.weight, convolution.bias, stride=4).flatten(2).mT
    x = x + sincos_positions(4, DIM)
    if classifier == "token":
        nn.init.normal_(embeddings.cls_token)
        x = torch.cat([embeddings.cls_token.expand(len(x), 1, DIM), x], dim=1)
    torch.testing.assert_close(embeddings(images), x, rtol=1e-5, atol=1e-5)
    assert not any("position" in name for name, _ in model.named_parameters())
    assert any("position" in name for name in model.state_dict())


@pytest.mark.parametrize("norm_type", ["LN", "Post", "Rescale"])
def test_mean_pooling(norm_type):
    """Truth: the head on the mean of all 4 patches' outputs, computed by hooks; no class token."""
    model = variant(norm_type, entries={"classifier": "gap"}).eval()
    nn.init.normal_(model.transformer.embeddings.position_embeddings)
    assert not any("cls" in name for name in model.state_dict())
    outputs = []
    model.transformer.encoder.register_forward_hook(lambda m, args, y: outputs.append(y))
    logits, _ = model(batch()[0])
    assert outputs[0].shape == (6, 4, DIM)
    torch.testing.assert_close(logits, model.head(sum(outputs[0].unbind(1)) / 4))
    assert (outputs[0][:, 0] - outputs[0].mean(1)).abs().max() > 0.1  # no token is the mean


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem", ["conv", "conv_bn"])
def test_convolutional_stem(stem, training):
    """Truth: an nn.Sequential made here, with the same weights; 32 px give 8 x 8 tokens."""
    config = small_config(patch=4)
    config.stem, config.classifier = stem, "gap"
    ours = randomized(Embeddings(config, 32)).train(training)
    middle = [nn.BatchNorm2d(12)] * (stem == "conv_bn")
    plain = nn.Sequential(
        nn.Conv2d(3, 12, kernel_size=3, stride=2, padding=1),
        *middle,
        nn.GELU(),
        nn.Conv2d(12, DIM, kernel_size=3, stride=2, padding=1),
    ).train(training)
    with torch.no_grad():
        state = ours.patch_embeddings.state_dict()
        for mine, theirs in zip(state.values(), plain.state_dict().values(), strict=True):
            theirs.copy_(mine)
    images, _ = batch(side=32)
    expected = plain(images).flatten(2).mT
    assert expected.shape == (6, 64, DIM)
    got = ours(images) - ours.position_embeddings
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours.patch_embeddings.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sincos_positions_of_all_sizes():
    """Truth: as many channels as the size has."""
    for config in CONFIGS.values():
        assert sincos_positions(2, config.hidden_size).shape[-1] == config.hidden_size


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_hook_on_the_patches_sees_them(accelerated):
    model, seen = variant(), []
    if accelerated:
        accelerate(model)
    patches = model.transformer.embeddings.patch_embeddings
    patches.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    images, _ = batch()
    model.eval()(images)
    expected = F.conv2d(images, patches.weight, patches.bias, stride=8)
    torch.testing.assert_close(seen, [expected])


# ---------------------------------------------------------------- zeros


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_zero_branches(norm_type):
    """Truth: the last linear layers are 0, and the rest as without; `OWN_STARTS` as without."""
    zeroed = variant(norm_type, entries={"zero_branches": True})
    plain = variant(norm_type).state_dict()
    last = ("attn.out.weight", "attn.out.bias", "ffn.fc2.weight", "ffn.fc2.bias")
    zeros = () if norm_type in OWN_STARTS.split() else last
    for name, value in zeroed.state_dict().items():
        expected = 0 * plain[name] if name.endswith(zeros) else plain[name]
        assert torch.equal(value, expected) or name.endswith("cls_token"), name
    assert sum(name.endswith(last) for name in plain) == 8 or norm_type in OWN_STARTS.split()
    assert set(OWN_STARTS.split()) <= set(NORM_TYPES)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_zero_head(norm_type):
    """Truth: logits 0, loss log(classes); not where the weights are divided by their norm."""
    model = variant(norm_type, entries={"zero_head": True})
    images, labels = batch()
    assert model(images)[0].any() == (norm_type == "SigmaReparam")
    if norm_type != "SigmaReparam":
        assert model(images, labels).item() == pytest.approx(math.log(7), abs=1e-6)
    assert variant(norm_type)(images)[0].any()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("zeros", ["zero_head", "zero_branches", "zero_head zero_branches"])
def test_a_model_of_zeros_learns(norm_type, zeros):
    """Truth: the gradient has come to each block's weights by the fourth step, and is finite.

    A class token of zeros would stay so, or have LayerNorm multiply its gradient by 1,000.
    """
    model = variant(norm_type, entries=dict.fromkeys(zeros.split(), True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(*batch()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert 0 < norm < 100
        optimizer.step()
    for name, parameter in model.named_parameters():
        if ".layer." in name and parameter.ndim == 2:
            assert parameter.grad.any(), name


# ---------------------------------------------------------------- query-key norms


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_query_key_norm_of_a_model(qk_norm):
    """Truth: without it, the same weights and names but for the norms'; `vis`, for its function."""
    plain, model = variant(), variant(qk_norm=qk_norm)
    added = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(added.pop(name), p), name
    kinds = {"none": 0, "rms": 1, "ln": 2}[qk_norm]
    assert sum(p.numel() for p in added.values()) == 2 * 2 * kinds * 8  # blocks, q and k
    complete = variant(qk_norm=qk_norm, vis=True)
    complete.load_state_dict(randomized(model).state_dict())
    images, _ = batch()
    torch.testing.assert_close(model(images)[0], complete(images)[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- patch dropout


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_patch_dropout_as_timm_s(share, class_token, monkeypatch):
    """Truth: timm's PatchDropout, given the same random numbers."""
    numbers, x = torch.rand(5, 16), tokens(batch=5, n=16 + class_token)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: numbers)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: numbers)
    theirs = timm.layers.PatchDropout(share, num_prefix_tokens=int(class_token))
    assert torch.equal(PatchDropout(share, class_token)(x), theirs(x))


def test_patch_dropout_is_fair():
    """Truth: each patch stays with probability 5/8, in each image for itself; none stays twice."""
    numbered = torch.arange(8.0).expand(4000, 8)[..., None]
    kept = F.one_hot(PatchDropout(0.4, False)(numbered).long()[..., 0], 8)  # 5 of 8 stay
    assert kept.shape[1] == 5
    stays = kept.sum(1)
    assert stays.max() == 1
    deviation = math.sqrt(5 / 8 * 3 / 8 / 4000)
    assert (stays.float().mean(0) - 5 / 8).abs().max() < 4 * deviation
    same = (stays[::2] == stays[1::2]).all(1).float().mean()  # 56 subsets
    assert same.item() == pytest.approx(1 / 56, abs=4 * math.sqrt(1 / 56 / 2000))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_patch_dropout_in_a_model(classifier):
    """Truth: blocks get a quarter of the 16 patches in training, with their own positions, and
    all in evaluation."""
    entries = {"classifier": classifier, "patch_dropout": 0.75}
    model, (images, labels) = variant(entries=entries, patch=4), batch()
    shapes, first = [], model.transformer.encoder.layer[0]
    first.register_forward_pre_hook(lambda block, inputs: shapes.append(inputs[0].shape[1]))
    model.train()(images[:1], labels[:1]).backward()
    model.eval()(images)
    class_token = classifier == "token"
    assert shapes == [4 + class_token, 16 + class_token]
    used = (model.transformer.embeddings.position_embeddings.grad != 0).any(-1)[0]
    assert used.sum() == 4 + class_token and used[:class_token].all()
    plain = variant(entries=entries | {"patch_dropout": 0.0}, patch=4).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images)[0], model(images)[0])


# ---------------------------------------------------------------- drop path


@pytest.mark.parametrize("branch", [Attention, Mlp])
def test_drop_path_of_a_branch(branch):
    """Truth: each image's branch is 0, with probability 0.3, or else its output / 0.7."""
    ours = randomized(branch(small_config(dim=DIM), drop_path=0.3))
    torch.manual_seed(0)
    x = tokens(batch=4000, n=2)
    with torch.no_grad():
        got, whole = ours.train()(x), ours.eval()(x)
    dropped = (got == 0).flatten(1).all(dim=1)
    assert abs(dropped.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    torch.testing.assert_close(got[~dropped], whole[~dropped] / 0.7, rtol=1e-5, atol=1e-6)
    assert (got.mean(0) - whole.mean(0)).abs().max() < 0.1 * whole.std()
    pairs = dropped[::2].float().mul(dropped[1::2]).mean()  # neighbours are independent
    assert pairs.item() == pytest.approx(0.09, abs=4 * math.sqrt(0.09 * 0.91 / 2000))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_drop_path_grows_with_depth_and_touches_the_branches(norm_type, monkeypatch):
    """Truth: rates 0, 0.1, 0.2; where all are dropped, the block without what branches add."""
    model = variant(norm_type, entries={"transformer": {"drop_path_rate": 0.2}}, depth=3)
    rates = [
        [m.p for m in block.modules() if isinstance(m, StochasticDepth)]
        for block in model.transformer.encoder.layer
    ]
    assert [set(r) for r in rates] == [set(), {0.1}, {0.2}]
    shapes = []

    def drop_all(self, x):
        shapes.append(x.shape)
        return torch.zeros_like(x)

    monkeypatch.setattr(StochasticDepth, "forward", drop_all)
    block = randomized(model.transformer.encoder.layer[-1].double())
    x = tokens().double()
    dropped = block(x)
    assert shapes == 2 * [x.shape]  # each branch once
    if norm_type in ("ResPost", "Peri"):  # the norm's bias is dropped too
        assert torch.equal(dropped, x)
        return
    monkeypatch.undo()
    for layer in (block.attn, block.ffn):
        layer.forward = lambda y, *args: torch.zeros_like(y)
    torch.testing.assert_close(dropped, block(x))
