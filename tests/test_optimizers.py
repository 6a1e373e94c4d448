"""The optimizers against PyTorch's own, and which parameter is whose, by names written out here."""

import copy

import numpy as np
import pytest
import torch
from small import batch, recipe, small_config

from models.modeling import VisionTransformer
from models.norms import NORM_TYPES
from recipes import OPTIMIZERS, small
from utils.optimizers import Muon, make_optimizers, orthogonalized
from utils.precision import Precision

SHAPES = [(24, 24), (24, 24), (40, 24), (24, 40), (40, 24), (64, 8)]  # square, tall and wide
A, B, C = 3.4445, -4.7750, 2.0315  # Newton-Schulz's polynomial, of Jordan et al. 2024


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grown(shape, seed):
    """A random matrix, of another size each."""
    return random(*shape, seed=seed) * 10.0 ** (seed % 5 - 2)


def parameters():
    return [torch.nn.Parameter(random(*s, seed=i)) for i, s in enumerate(SHAPES)]


def newton_schulz(x):
    """Five steps on one matrix in float64."""
    x = x.astype(np.float64)
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        x = A * x + B * (x @ x.T @ x) + C * (x @ x.T @ x @ x.T @ x)
    return x


# Muon


def test_newton_schulz_of_a_stack():
    """Truth: NumPy in float64, matrix by matrix; none sees another of its stack, nor its size."""
    for rows, columns in ((24, 24), (40, 24), (24, 40), (64, 8), (1, 5)):
        stack = torch.stack([grown((rows, columns), seed) for seed in range(6)])
        got = orthogonalized(stack, Muon([torch.zeros(1, 1)]).param_groups[0])
        for mine, matrix in zip(got, stack):
            expected = newton_schulz(matrix.numpy())
            np.testing.assert_allclose(mine.numpy(), expected, rtol=0, atol=1e-5)


def test_singular_values_come_near_1():
    """Truth: the SVD: the same singular vectors, values within 0.65 and 1.25.

    That holds where the smallest is no less than 1 % of the norm: 3.4445^5 brings it up.
    """
    u, v = (torch.linalg.qr(random(20, 20, seed=seed).double())[0] for seed in (1, 2))
    values = torch.logspace(0, -1.8, 20, dtype=torch.float64)
    x = (u * values @ v.mT).float()
    got = orthogonalized(x[None], Muon([torch.zeros(1, 1)]).param_groups[0])[0].double()
    turned = u.mT @ got @ v
    assert ((turned.diagonal() > 0.65) & (turned.diagonal() < 1.25)).all()
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_is_pytorchs(momentum, weight_decay):
    """Truth: torch.optim.Muon, whose products are in bf16: moves agree to 5 %, momenta exactly."""
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    params, theirs = parameters(), parameters()
    mine = Muon(params, **settings)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="original", **settings)
    for step in range(6):
        before = [p.detach().clone() for p in params]
        rate = 0.1 / (step + 1)
        for optimizer, group in ((mine, params), (reference, theirs)):
            optimizer.param_groups[0]["lr"] = rate
            for i, p in enumerate(group):
                p.grad = grown(p.shape, 10 * step + i)
            optimizer.step()
        for p, q, old in zip(params, theirs, before):
            moved, expected = (x.detach() - (1 - rate * weight_decay) * old for x in (p, q))
            assert (moved - expected).norm() < 0.05 * expected.norm()
            assert torch.equal(
                mine.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            )
            q.data.copy_(p.data)  # on with the same numbers


def test_muon_written_out():
    """Truth: NumPy in float64: momentum as a moving average, Nesterov's, decay, rate by shape."""
    lr, momentum, decay = 0.05, 0.9, 0.3
    params = parameters()
    truths = [p.detach().numpy().astype(np.float64) for p in params]
    buffers = [np.zeros(s) for s in SHAPES]
    muon = Muon(params, lr=lr, momentum=momentum, weight_decay=decay)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = grown(p.shape, 10 * step + i)
            grad = p.grad.numpy().astype(np.float64)
            buffers[i] = momentum * buffers[i] + (1 - momentum) * grad
            update = newton_schulz(momentum * buffers[i] + (1 - momentum) * grad)
            rows, columns = SHAPES[i]
            truths[i] = (1 - lr * decay) * truths[i] - lr * max(1, rows / columns) ** 0.5 * update
        muon.step()
        for p, truth in zip(params, truths):
            np.testing.assert_allclose(p.detach().numpy(), truth, rtol=0, atol=1e-5 * (step + 1))


def test_without_a_gradient_a_matrix_stays():
    """Truth: the others move as if it were not there, and it has no decay and no momentum."""
    params = [torch.nn.Parameter(random(8, 8, seed=i)) for i in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params[::2]]
    still = params[1].detach().clone()
    muons = [Muon(x, lr=0.1, weight_decay=0.5) for x in (params, alone)]
    for x in (params[::2], alone):
        for i, p in enumerate(x):
            p.grad = random(8, 8, seed=9 + i)
    for muon in muons:
        muon.step()
    assert torch.equal(params[1], still) and params[1] not in muons[0].state
    for p, q in zip(params[::2], alone):
        assert torch.equal(p, q)


def test_muon_resumes():
    """Truth: the optimizer that was not interrupted, to the bit."""
    params = parameters()
    muon = Muon(params, lr=0.1, weight_decay=0.1)

    def step(optimizer, number):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = random(*p.shape, seed=100 * number + i)
        optimizer.step()

    step(muon, 1)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Muon(copies, lr=0.7, momentum=0.1)
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))
    for optimizer in (muon, resumed):
        step(optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    assert not torch.equal(copies[0], random(*SHAPES[0]))


# Which parameter is whose

LINEARS = [f"attn.{name}" for name in ("query", "key", "value", "out")] + ["ffn.fc1", "ffn.fc2"]


def model_of(norm_type="LN", **entries):
    torch.manual_seed(0)
    config = small_config(patch=4)
    config.update(entries)
    return VisionTransformer(config, 16, norm_type, 7, qk_norm="rms")


def expectation(norm_type):
    """Names of the blocks' matrices, and of the other weights that decay."""
    weight = "parametrizations.weight.original" if norm_type == "SigmaReparam" else "weight"
    matrices = {
        f"transformer.encoder.layer.{block}.{linear}.{weight}"
        for block in range(2)
        for linear in LINEARS
    }
    return matrices, {f"head.{weight}", f"transformer.embeddings.patch_embeddings.{weight}"}


def owners(optimizers, named):
    """{name: (optimizer's type, weight decay, factor)}; each parameter once."""
    name_of = {p: name for name, p in named.items()}
    found = [
        (name_of[p], (type(optimizer), group["weight_decay"], group["factor"]))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(named)
    return dict(found)


def flags(page=small, **entries):
    values = page().to_dict()
    values = OPTIMIZERS[entries.get("optimizer", values["optimizer"])] | values | entries
    return recipe(**values)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_whose_each_parameter_is(norm_type):
    """Truth: Muon has the six linears of each block; of AdamW's only the head's and the patches'
    weights decay: no gain, bias, scale, position, class token, alpha, gamma or resweight does."""
    named = dict(model_of(norm_type).named_parameters())
    matrices, weights = expectation(norm_type)
    assert matrices | weights <= named.keys()
    for name, (kind, decay, factor) in owners(make_optimizers(flags(), named), named).items():
        is_muons = name in matrices
        assert kind is (Muon if is_muons else torch.optim.AdamW), name
        assert decay == (0.02 if is_muons or name in weights else 0), name
        assert factor == (1 if is_muons else 0.15), name

    for optimizer, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        alone = make_optimizers(flags(optimizer=optimizer), named)
        for name, owner in owners(alone, named).items():
            decay = 0.02 if name in matrices | weights else 0
            assert owner == (kind, decay, 1), name

    all_decay = make_optimizers(flags(decay_all=True), named)
    assert {decay for _, decay, _ in owners(all_decay, named).values()} == {0.02}


@pytest.mark.parametrize("stem", ["conv", "conv_bn"])
def test_kernels_of_a_stem_decay(stem):
    """Truth: both kernels decay, neither is Muon's; biases and the stem's norm do not decay."""
    named = dict(model_of(stem=stem).named_parameters())
    found = owners(make_optimizers(flags(), named), named)
    stems = {name: owner for name, owner in found.items() if ".patch_embeddings." in name}
    assert len(stems) == (6 if stem == "conv_bn" else 4)
    for name, owner in stems.items():
        decay = 0.02 if name.endswith(("0.weight", "3.weight")) else 0
        assert owner == (torch.optim.AdamW, decay, 0.15), name


# A training of each


def trained(precision, rates=(0.02, 0.03, 0.01)):
    for i, rate in enumerate(rates):
        precision.backward(precision.model(*batch(i)))
        precision.clip(1.0)
        precision.update(rate)
    return precision.model


def trained_by(model, optimizers, rates=(0.02, 0.03, 0.01)):
    """The usual loop, over pairs of a PyTorch optimizer and its factor on the rate."""
    for i, rate in enumerate(rates):
        model.zero_grad()
        model(*batch(i)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, factor in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
    return model


def ours(model, entries):
    precision = Precision(copy.deepcopy(model), "O0", None)
    precision.attach(make_optimizers(entries, precision.named_masters()))
    return precision


def assert_equal(model, other, tolerance=0.0):
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


def split(model, norm_type="LN"):
    """Parameters: the blocks' matrices, the other weights, and the rest."""
    named = dict(model.named_parameters())
    matrices, weights = expectation(norm_type)
    rest = [p for name, p in named.items() if name not in matrices | weights]
    return [p for n, p in named.items() if n in matrices], [named[n] for n in sorted(weights)], rest


def test_the_reference_is_plain_sgd():
    """Truth: torch.optim.SGD over all parameters as one group, to the bit."""
    model = model_of()
    precision = ours(model, recipe(weight_decay=0.1))
    (optimizer,) = precision.optimizers
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    plain = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=0.1, fused=True)
    assert_equal(trained(precision), trained_by(model, [(plain, 1)]))


def test_adamw_is_pytorchs():
    """Truth: torch.optim.AdamW with the decaying weights and the others as groups, to the bit."""
    model = model_of("LayerScale")
    entries = flags(optimizer="adamw", betas=(0.8, 0.9), weight_decay=0.5)
    matrices, weights, rest = split(model)
    groups = [{"params": matrices + weights}, {"params": rest, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, lr=1, weight_decay=0.5, betas=(0.8, 0.9), fused=True)
    assert_equal(trained(ours(model, entries)), trained_by(model, [(adamw, 1)]))


def test_muon_and_its_adamw():
    """Truth: both by themselves, AdamW at 0.15 of the learning rate; Muon's rounds differently."""
    model = model_of("SigmaReparam")
    matrices, weights, rest = split(model, "SigmaReparam")
    muon = Muon(matrices, lr=1, weight_decay=0.02, momentum=0.95)
    groups = [{"params": weights}, {"params": rest, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, lr=1, weight_decay=0.02, betas=(0.9, 0.95), fused=True)
    together = trained_by(model, [(muon, 1), (adamw, 0.15)])
    assert_equal(trained(ours(model_of("SigmaReparam"), flags())), together, tolerance=1e-5)
