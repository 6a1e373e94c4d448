"""All norm types, and those that a user adds, through training as the program does it."""

import copy
import shutil

import pytest
import torch
from formulas import randomized, variant
from small import NoSynchronization, batch, sgd, small_model

from models.fast_cpu import accelerate
from models.norm_blocks import PreNorm
from models.norm_layers import GroupNorm, LayerNorm
from models.norms import MEASURING_STEPS, NORM_TYPES, NormType
from utils.precision import Precision

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


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
def test_checkpointing_under_compile(norm_type):
    """Truth: the same, eager and without it."""
    model = trained(checkpointing(small_model(norm_type)), 10, "aot_eager")
    assert_same_model(model, trained(small_model(norm_type), 10))


# ---------------------------------------------------------------- norm types as a user adds them


class AllTokens(PreNorm):
    """Its last block computes all tokens, as a block does that does not say what it needs."""

    per_token = False

    def forward(self, x):
        x = x + self.attn(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


def double_head(model):
    with torch.no_grad():
        model.head.weight.mul_(2)


NEW_TYPES = {
    "all-tokens": NormType(AllTokens, LayerNorm),
    "final-groupnorm": NormType(PreNorm, LayerNorm, GroupNorm),  # whose statistics need all tokens
    "double-head": NormType(PreNorm, LayerNorm, prepare=double_head),
}
# Those whose last block cannot compute the class token alone: never, or in training.
NEED_ALL_TOKENS = {"GN", "all-tokens", "final-groupnorm"}
TRAIN_WITH_ALL_TOKENS = {"BN", "RepBN"} | NEED_ALL_TOKENS


@pytest.fixture(params=[*NORM_TYPES, *NEW_TYPES])
def any_type(request, monkeypatch):
    if request.param in NEW_TYPES:
        monkeypatch.setitem(NORM_TYPES, request.param, NEW_TYPES[request.param])
    return request.param


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_type_trains(any_type, level, fast):
    """Truth: the loss of one batch falls; at O0 as in PyTorch's layers, in half nearly so."""
    model, plain = small_model(any_type), small_model(any_type)
    precision = Precision(model, level, torch.bfloat16)
    precision.attach(sgd(precision))
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
def test_checkpointing_changes_nothing(any_type, fast):
    """Truth: the same batches without it, to the bit: gradients, weights, statistics, counts."""
    models = [
        variant(any_type, entries={"transformer": {"drop_path_rate": 0.3}}, dropout=0.1)
        for _ in range(2)
    ]
    steps = 10 if any(hasattr(m, "measuring") for m in models[0].modules()) else 2
    if fast:
        for model in models:
            accelerate(model)
    trained(checkpointing(models[0]), steps), trained(models[1], steps)
    assert_same_model(*models, exact=True)


@pytest.mark.parametrize("fast", [False, True])
def test_class_token_alone(any_type, fast):
    """Truth: the computation with all tokens, as `vis` needs it; logits and gradients."""
    model, complete = small_model(any_type), small_model(any_type, vis=True)
    randomized(model)
    complete.load_state_dict(model.state_dict())
    if fast:
        accelerate(model)
    images, labels = batch()
    shapes = []
    model.transformer.encoder.register_forward_hook(lambda m, args, y: shapes.append(y.shape[1]))
    with torch.no_grad():
        expected = complete.eval()(images)[0]
        torch.testing.assert_close(model.eval()(images)[0], expected, rtol=1e-5, atol=1e-5)
    for m in (model, complete):
        m.train()(images, labels).backward()
    assert_same_model(model, complete)
    assert shapes == [
        5 if any_type in needing else 1 for needing in (NEED_ALL_TOKENS, TRAIN_WITH_ALL_TOKENS)
    ]


@pytest.mark.parametrize("norm_type", ["Rescale", "RescaleNet"])
def test_all_tokens_are_measured(norm_type):
    """Truth: what is measured over all tokens, as `vis` does: the first 8 batches see them all."""
    model, complete = small_model(norm_type), small_model(norm_type, vis=True)
    for i in range(9):
        for m in (model, complete):
            m.zero_grad()
            m(*batch(i)).backward()
    assert_same_model(model, complete)
