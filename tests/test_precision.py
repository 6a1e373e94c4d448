"""Precision levels against PyTorch's own training loop, and against SGD written out by hand."""

import contextlib
import copy
import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from small import NORMS, NoSynchronization, batch, recipe, sgd, small_model
from torch import nn

from recipes import OPTIMIZERS as RECIPE_OPTIMIZERS
from utils import precision as precision_module
from utils.optimizers import make_optimizers
from utils.precision import ApexPrecision, Precision

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEVELS = ("O0", "O1", "O2", "O3")
MOMENTUM, WEIGHT_DECAY = 0.9, 0.01
RATES = (0.01, 0.03, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01)


def make(level, half=BF16, loss_scale=0.0, norm_type="LN", seed=0, backend=Precision):
    precision = backend(small_model(norm_type, seed=seed), level, half, loss_scale)
    precision.attach(sgd(precision, WEIGHT_DECAY))
    return precision


def one_step(precision, i, parts=1, factor=1.0, offset=0.0, light=1.0, max_norm=1.0, rate=None):
    """Step i of training: images times `light`, losses times `factor` plus a constant `offset`."""
    for part in range(parts):
        images, labels = batch(i * parts + part)
        with precision.autocast():
            loss = precision.model(images.to(precision.input_dtype) * light, labels)
        precision.backward(loss * factor + offset, parts)
    precision.clip(max_norm)
    precision.update(RATES[i % len(RATES)] if rate is None else rate)


def momentum_of(precision):
    return [precision.optimizers[0].state[p]["momentum_buffer"] for p in precision.masters]


def weights_of(precision):
    """Copies of all that a skipped step must leave alone."""
    states = [tensor for s in precision.optimizers[0].state.values() for tensor in s.values()]
    everything = [*precision.model.parameters(), *precision.masters, *states]
    return [tensor.detach().clone() for tensor in everything]


def snapshot(precision):
    return [*weights_of(precision), *(buffer.clone() for buffer in precision.model.buffers())]


def assert_same(got, expected, exact=True):
    assert len(got) == len(expected)
    tolerance = 0 if exact else 1e-6
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- O0


@pytest.mark.parametrize("max_norm", [0.3, 100.0])  # always clipped, never clipped
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("norm_type", ["LN", "BN"])
def test_o0_is_plain_pytorch(norm_type, parts, max_norm):
    """Truth: torch.optim.SGD and clip_grad_norm_ in the usual loop: fused to the bit, else 1e-6.

    Each step has another learning rate, which must be the one that is used.
    """
    ours = make("O0", norm_type=norm_type)
    models = [copy.deepcopy(ours.model) for _ in range(2)]
    optimizers = [
        torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=is_fused
        )
        for model, is_fused in zip(models, (True, False))
    ]
    for i in range(5):
        one_step(ours, i, parts, max_norm=max_norm)
        (record,) = ours.read()
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            total = 0.0
            for part in range(parts):
                loss = model(*batch(i * parts + part)) / parts
                total += loss.item()
                loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.param_groups[0]["lr"] = RATES[i]
            optimizer.step()
        assert record.finite and record.loss_scale == 1.0
        assert record.loss == pytest.approx(total, rel=1e-5)
        assert record.grad_norm == pytest.approx(grad_norm.item(), rel=1e-5)
        assert record.learning_rate == RATES[i] == ours.optimizers[0].param_groups[0]["lr"]
    assert (grad_norm > max_norm) == (max_norm < 1)
    for model, optimizer, exact in zip(models, optimizers, (True, False)):
        momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        assert_same(list(ours.model.parameters()), list(model.parameters()), exact)
        assert_same(momentum_of(ours), momentum, exact)
        assert_same(list(ours.model.buffers()), list(model.buffers()), exact)


def test_read_returns_each_step_once():
    """Truth: one record a step since the last call, with the learning rates that were given."""
    precision = make("O0")
    for start, end in ((0, 3), (3, 8)):
        for i in range(start, end):
            one_step(precision, i)
        assert [record.learning_rate for record in precision.read()] == [*RATES[start:end]]


# ---------------------------------------------------------------- O1, O2, O3


def is_batchnorm(name):
    return ".layer." in name and "norm" in name


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("norm_type", ["LN", "BN"])
def test_o2_is_sgd_on_fp32_masters(norm_type, parts):
    """Truth: SGD with momentum, decay and clipping in plain tensor operations, step by step."""
    ours = make("O2", norm_type=norm_type)
    model = small_model(norm_type)
    names = [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if not (norm_type == "BN" and is_batchnorm(name)):
            p.data = p.data.bfloat16()
    masters = [p.detach().clone() for p in ours.masters]
    momenta = [torch.zeros_like(p) for p in masters]

    for i in range(4):
        one_step(ours, i, parts)
        grads = [torch.zeros_like(p) for p in masters]
        for part in range(parts):
            images, labels = batch(i * parts + part)
            model.zero_grad()
            (model(images.bfloat16(), labels) / parts).backward()
            for grad, p in zip(grads, model.parameters()):
                grad += p.grad
        grad_norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        clip = min(1.0, 1.0 / (grad_norm + 1e-6))
        for master, momentum, grad in zip(masters, momenta, grads):
            momentum.mul_(MOMENTUM).add_(grad * clip + WEIGHT_DECAY * master)
            master.sub_(RATES[i] * momentum)
        (record,) = ours.read()
        assert record.finite and record.grad_norm == pytest.approx(grad_norm, rel=1e-5)
        assert_same(ours.masters, masters, exact=False)
        assert_same(momentum_of(ours), momenta, exact=False)
        # On with the same numbers, so that no last bit grows through bf16's rounding.
        for mine, theirs in zip([*masters, *momenta], [*ours.masters, *momentum_of(ours)]):
            mine.copy_(theirs)
        for name, p, weight, master in zip(names, model.parameters(), ours.weights, masters):
            kept = norm_type == "BN" and is_batchnorm(name)
            assert weight.dtype == (FP32 if kept else BF16), name
            assert torch.equal(weight, master.to(weight.dtype)), name
            p.data.copy_(weight)
    assert_same(list(ours.model.buffers()), list(model.buffers()))
    assert all(master.dtype == FP32 for master in ours.masters)


@pytest.mark.parametrize("half", [BF16, FP16])
def test_masters_start_at_the_fp32_weights(half):
    """Truth: the model before it was cast: pretrained weights keep their last 16 bits."""
    assert_same(make("O2", half).masters, list(small_model().parameters()))


@pytest.mark.parametrize("half", [BF16, FP16])
@pytest.mark.parametrize(
    ("level", "weights", "products"),
    [("O0", FP32, FP32), ("O1", FP32, "half"), ("O2", "half", "half"), ("O3", "half", "half")],
)
def test_dtypes_of_the_levels(level, weights, products, half):
    """Truth: the table of levels: dtype of weights, matrix products, masters, logits."""
    precision = make(level, half)
    seen = set()
    for module in precision.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, y: seen.add(y.dtype))
    images, _ = batch()
    with precision.autocast():
        logits, _ = precision.model(images.to(precision.input_dtype))
    assert seen == {half if products == "half" else FP32}
    assert logits.dtype == FP32
    assert {p.dtype for p in precision.weights} == {half if weights == "half" else FP32}
    assert {p.dtype for p in precision.masters} == {half if level == "O3" else FP32}


@pytest.mark.parametrize("loss_scale", [0.0, 128.0])
@pytest.mark.parametrize("half", [BF16, FP16])
@pytest.mark.parametrize("level", LEVELS)
def test_state_of_the_scale(level, half, loss_scale):
    """Truth: the table of levels and apex's numbers: 2^16 at first, 2^24 at most, 2000 steps."""
    constants = ("INITIAL_SCALE", "MAX_SCALE", "CLEAN_STEPS")
    assert [getattr(precision_module, name) for name in constants] == [65536, 2**24, 2000]
    expected = loss_scale or (65536 if half == FP16 else 1)
    precision = make(level, half, loss_scale)
    assert precision.state["scale"] == (expected if level in ("O1", "O2") else 1)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("half", [BF16, FP16])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_every_level_trains_every_norm_type(level, half, norm_type):
    """Truth: the same steps in fp32, within what half precision allows."""
    precision = make(level, half, loss_scale=64.0 if level != "O3" else 0.0, norm_type=norm_type)
    exact = make("O0", norm_type=norm_type)
    before = torch.cat([p.detach().flatten().float() for p in exact.masters])
    for i in range(4):
        one_step(precision, i)
        one_step(exact, i)
    for record, truth in zip(precision.read(), exact.read()):
        assert record.finite
        assert record.loss == pytest.approx(truth.loss, rel=0.03)
        assert record.grad_norm == pytest.approx(truth.grad_norm, rel=0.1)
    moved, truth = (
        torch.cat([p.detach().flatten().float() for p in x.masters]) - before
        for x in (precision, exact)
    )
    assert torch.cosine_similarity(moved, truth, dim=0) > (0.9 if level == "O3" else 0.98)
    images, _ = batch(50)
    with torch.no_grad(), precision.autocast():
        logits, _ = precision.model.eval()(images.to(precision.input_dtype))
    expected, _ = exact.model.eval()(images)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_parallel_trainings_hooks_stay(level):
    """Truth: DistributedDataParallel, which hooks each weight's gradient accumulator once.

    Were the accumulator another after a checkpoint, the processes would train apart, silently.
    """
    precision = make(level)
    calls, accumulators = [], []
    for weight in precision.weights:
        accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
        accumulator.register_hook(lambda *_: calls.append(1))
        accumulators.append(accumulator)  # held, as it is there
    one_step(precision, 0)
    assert len(calls) == len(precision.weights)
    precision.load_state_dict(copy.deepcopy(precision.state_dict()))
    one_step(precision, 1)
    assert len(calls) == 2 * len(precision.weights)


# ---------------------------------------------------------------- loss scale


@pytest.mark.parametrize("norm_type", ["LN", "BN"])
@pytest.mark.parametrize(
    ("half", "loss_scale", "factor"),
    [
        *((FP16, scale, factor) for scale in (0.0, 64.0) for factor in (1e30, math.inf, math.nan)),
        (BF16, 64.0, math.inf),
        (BF16, 64.0, math.nan),
    ],
)
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_is_skipped(level, loss_scale, half, norm_type, factor):
    """Truth: the weights before: an overflow changes the dynamic scale alone, which halves."""
    precision = make(level, half, loss_scale, norm_type)
    one_step(precision, 0)
    one_step(precision, 1)
    before = weights_of(precision)
    one_step(precision, 2, parts=2, factor=factor)
    assert_same(weights_of(precision), before)
    one_step(precision, 3)
    *_, good, skipped, after = precision.read()
    assert [r.finite for r in (good, skipped, after)] == [True, False, True]
    assert [r.learning_rate for r in (good, skipped, after)] == [*RATES[1:4]]
    scale = loss_scale or 65536.0
    assert skipped.loss_scale == scale
    assert after.loss_scale == (loss_scale or scale / 2)


@pytest.mark.parametrize(("level", "loss_scale"), [("O0", 0.0), ("O2", 0.0), ("O2", 64.0)])
@pytest.mark.parametrize("offset", [math.inf, math.nan])
def test_a_bad_loss_with_good_gradients_is_skipped(level, loss_scale, offset):
    """Truth: the state before: a loss that is no number is a failure whatever its gradient."""
    precision = make(level, BF16, loss_scale)
    one_step(precision, 0)
    before = snapshot(precision)
    one_step(precision, 1, offset=offset)
    assert_same(snapshot(precision), before)
    good, bad = precision.read()
    assert good.finite and not bad.finite
    assert math.isfinite(bad.grad_norm) and not math.isfinite(bad.loss)


MUON = recipe(optimizer="muon", decay_all=False, weight_decay=0.01, **RECIPE_OPTIMIZERS["muon"])
OPTIMIZERS = {
    "RMSprop": lambda p: [torch.optim.RMSprop(p.masters)],  # which knows nothing of found_inf
    "AdamW": lambda p: [torch.optim.AdamW(p.masters)],
    "fused AdamW": lambda p: [torch.optim.AdamW(p.masters, fused=True)],
    "Muon": lambda p: make_optimizers(MUON, p.named_masters()),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_other_optimizers_skip_too(level, optimizer):
    """Truth: a run without scale and without the overflow, bit for bit, as 64 is a power of 2."""
    runs = []
    for loss_scale in (64.0, 0.0):
        precision = Precision(small_model(), level, BF16, loss_scale)
        precision.attach(OPTIMIZERS[optimizer](precision))
        one_step(precision, 0, rate=1e-3)
        before = weights_of(precision)
        if loss_scale:
            one_step(precision, 1, factor=math.inf, rate=1e-3)
            assert_same(weights_of(precision), before)
        one_step(precision, 2, rate=1e-3)
        runs.append((precision, before))
    assert [r.finite for r in runs[0][0].read()] == [True, False, True]
    assert_same(weights_of(runs[0][0]), weights_of(runs[1][0]))
    assert not torch.equal(weights_of(precision)[0], before[0])


def test_averages_of_skipped_steps():
    """Truth: the averages before the step; they lag behind the weights, and so would move."""
    precision = Precision(small_model(), "O2", BF16, 64.0)
    precision.attach(sgd(precision), ema=0.5)
    averages = []
    for i in range(3):
        one_step(precision, i, factor=math.inf if i == 1 else 1.0)
        averages.append([average.clone() for average in precision.averages])
    assert_same(averages[1], averages[0])
    assert not torch.equal(averages[2][0], averages[1][0])


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_statistics_of_skipped_steps(level, norm_type):
    """Truth: the same forward passes without a skipped step: an overflow is none of theirs."""
    skipping, clean = (make(level, BF16, 64.0, norm_type) for _ in range(2))
    for i in range(10):
        one_step(skipping, i, factor=math.inf if i < 3 else 1.0, rate=0.0)
        one_step(clean, i, rate=0.0)
    assert_same(list(skipping.model.buffers()), list(clean.model.buffers()))


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_statistics_stay_finite(level, norm_type):
    """Truth: the statistics before a batch of NaN."""
    precision = make(level, BF16, 64.0, norm_type)
    one_step(precision, 0)
    before = [b.clone() for b in precision.model.buffers() if b.is_floating_point()]
    one_step(precision, 1, light=math.nan)
    assert not precision.read()[-1].finite
    assert_same([b for b in precision.model.buffers() if b.is_floating_point()], before)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_dynamic_scale(level, monkeypatch):
    """Truth: apex's rule by hand: clean steps in a row double it, an overflow halves it."""
    monkeypatch.setattr(precision_module, "CLEAN_STEPS", 3)
    precision = make(level, FP16)
    pattern = "ccccccc.cc.cccc..c"
    scale, clean, expected = 65536.0, 0, []
    for i, kind in enumerate(pattern):
        # Tiny losses: they do not overflow by themselves.
        one_step(precision, i, factor=1e-4 if kind == "c" else 1e30)
        expected.append((scale, kind == "c"))
        clean = clean + 1 if kind == "c" else 0
        scale = scale if kind == "c" else scale / 2
        if clean == 3:
            scale, clean = scale * 2, 0
    assert [(record.loss_scale, record.finite) for record in precision.read()] == expected
    assert precision.state["scale"].item() == scale


def test_the_scale_is_bounded(monkeypatch):
    """Truth: apex's largest scale, 2^24."""
    monkeypatch.setattr(precision_module, "CLEAN_STEPS", 1)
    precision = make("O1", FP16)
    for i in range(11):
        one_step(precision, i, factor=1e-7)
    scales = [record.loss_scale for record in precision.read()]
    assert scales == [min(2.0**16 * 2**i, 2.0**24) for i in range(11)]


def test_a_static_scale_stays(monkeypatch):
    """Truth: --loss_scale 64 is 64 forever, through clean steps and overflows."""
    monkeypatch.setattr(precision_module, "CLEAN_STEPS", 2)
    precision = make("O2", FP16, 64.0)
    for i in range(8):
        one_step(precision, i, factor=1e30 if i in (0, 5) else 1.0)
    assert {record.loss_scale for record in precision.read()} == {64.0}


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_clipping_is_on_unscaled_gradients(level, max_norm):
    """Truth: no scale at all: a power of 2 is exact in bf16, so every bit must agree."""
    plain, *scaled = (make(level, BF16, scale) for scale in (0.0, 1.0, 1024.0))
    for i in range(4):
        for precision in (plain, *scaled):
            one_step(precision, i, max_norm=max_norm)
    expected = plain.read()
    for precision in scaled:
        assert_same(snapshot(precision), snapshot(plain))
        for record, truth in zip(precision.read(), expected):
            assert (record.loss, record.grad_norm) == (truth.loss, truth.grad_norm)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_skipped_first_step_leaves_no_trace(level):
    """Truth: a run without it, bit for bit: no momentum from nowhere."""
    failing, clean = make(level, BF16, 64.0), make(level, BF16, 64.0)
    one_step(failing, 7, factor=math.inf)
    for precision in (failing, clean):
        one_step(precision, 0)
        one_step(precision, 1)
    assert_same(snapshot(failing), snapshot(clean))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_without_a_scale_a_failure_is_final(level, factor):
    """Truth: the state before it: no step from then on changes anything."""
    precision = make(level)
    one_step(precision, 0)
    before = snapshot(precision)
    one_step(precision, 1, factor=factor)
    for i in (2, 3):
        one_step(precision, i)
    assert_same(snapshot(precision), before)
    records = precision.read()
    assert [record.finite for record in records] == [True, False, False, False]
    assert not math.isfinite(records[1].loss)


# ---------------------------------------------------------------- several processes

ONE_OF_TWO_PROCESSES = """
import json, math, sys
sys.path.insert(0, "tests")
import torch
from small import batch, sgd, small_model
from utils import dist_util
from utils.precision import Precision

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
results = {}
for level, loss_scale in (("O0", 0.0), ("O2", 64.0)):
    precision = Precision(small_model(), level, torch.bfloat16, loss_scale)
    precision.attach(sgd(precision))
    parallel = dist_util.wrap(precision.model)
    sums = []
    for step in range(3):
        images, labels = batch(2 * step + rank)
        loss = parallel(images.to(precision.input_dtype), labels)
        precision.backward(loss + (math.inf if (step, rank) == (1, 1) else 0))
        precision.clip(1.0)
        precision.update(0.1)
        sums.append(sum(p.double().sum().item() for p in precision.masters))
    results[level] = [sums, *precision.read()]
print(json.dumps(results))
"""


def test_all_processes_skip_together(tmp_path):
    """Truth: one process's loss is infinite, its gradients are not: neither updates its weights.

    The loss on record is the mean of both.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO_PROCESSES, str(rank), tmp_path / "store"],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert results[0] == results[1]
    model = small_model()
    mean = sum(model(*batch(rank)).item() for rank in range(2)) / 2
    for level, finite in (("O0", [True, False, False]), ("O2", [True, False, True])):
        sums, *records = results[0][level]
        assert [record[0] for record in records] == finite
        assert records[0][1] == pytest.approx(mean, rel=1e-5 if level == "O0" else 0.02)
        assert records[1][1] == math.inf and math.isfinite(records[1][2])
        assert sums[0] == sums[1]
        assert (sums[1] == sums[2]) == (level == "O0")


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize("norm_type", ["LN", "BN", "Rescale"])
@pytest.mark.parametrize("level", LEVELS)
def test_model_state_dict_is_fp32(level, norm_type):
    """Truth: the masters, bit for bit; taking it changes nothing; loading it restores them."""
    precision = make(level, norm_type=norm_type)
    one_step(precision, 0)
    before = snapshot(precision)
    state = copy.deepcopy(precision.model_state_dict())
    assert_same(snapshot(precision), before)
    assert state.keys() == small_model(norm_type).state_dict().keys()
    names = [name for name, _ in precision.model.named_parameters()]
    masters = dict(zip(names, precision.masters))
    for name, value in state.items():
        assert value.dtype == FP32 or not value.is_floating_point(), name
        if name in masters:
            assert torch.equal(value, masters[name].float()), name

    other = make(level, norm_type=norm_type, seed=1)
    other.load_model_state_dict(state)
    assert_same(other.masters, precision.masters)
    assert_same(list(other.model.parameters()), list(precision.model.parameters()))
    assert_same(list(other.model.buffers()), list(precision.model.buffers()))
    small_model(norm_type, seed=2).load_state_dict(state)  # fits a model in fp32


@pytest.mark.parametrize("norm_type", ["LN", "BN", "Rescale"])
@pytest.mark.parametrize(
    ("level", "half"), [("O0", BF16), ("O1", FP16), ("O2", FP16), ("O2", BF16), ("O3", BF16)]
)
def test_resuming_is_bit_exact(level, half, norm_type, monkeypatch):
    """Truth: the run that was not interrupted: weights, momentum, scale, records."""
    monkeypatch.setattr(precision_module, "CLEAN_STEPS", 2)
    factors = [1e-3, 1e30 if half == FP16 else 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    running = make(level, half, norm_type=norm_type)
    for i in range(3):
        one_step(running, i, factor=factors[i])
    running.read()
    file = io.BytesIO()
    torch.save(running.state_dict(), file)
    for i in range(3, 6):
        one_step(running, i, factor=factors[i])

    resumed = make(level, half, norm_type=norm_type, seed=1)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for i in range(3, 6):
        one_step(resumed, i, factor=factors[i])
    assert_same(snapshot(resumed), snapshot(running))
    assert resumed.read() == running.read()
    for name, value in running.state.items():
        assert torch.equal(resumed.state[name], value), name


# ---------------------------------------------------------------- synchronization


@pytest.mark.parametrize("norm_type", ["LN", "BN"])
@pytest.mark.parametrize(
    ("level", "half"), [("O0", BF16), ("O1", FP16), ("O2", FP16), ("O2", BF16), ("O3", BF16)]
)
def test_no_synchronization(level, half, norm_type):
    """Truth: between two reads no operation hands a value to the host, failing steps included."""
    precision = make(level, half, norm_type=norm_type)
    with NoSynchronization():
        for i in range(3):
            one_step(precision, i, parts=2, factor=math.inf if i == 1 else 1.0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronization():
        precision.state["scale"].item()  # the net catches what it is there for
    assert len(precision.read()) == 3


# ---------------------------------------------------------------- apex


def params_of(optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


class FakeAmp(types.ModuleType):
    """apex.amp's interface at O1 with its skipping of overflows, and a list of the calls."""

    def __init__(self):
        super().__init__("apex.amp")
        self.calls, self.scale = [], 1024.0

    def initialize(self, models, optimizers, opt_level="O1", loss_scale=None):
        self.calls.append(("initialize", opt_level, loss_scale))
        return models, optimizers

    def master_params(self, optimizer):
        self.calls.append(("master_params",))
        yield from params_of([optimizer])

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizers):
        params, (optimizer,) = list(params_of(optimizers)), optimizers
        stashed = [p.grad for p in params]
        for p in params:
            p.grad = None
        yield loss * self.scale
        self.calls.append(("scale_loss",))
        for p, stash in zip(params, stashed):
            p.grad = p.grad / self.scale + (0 if stash is None else stash)
        if not all(p.grad.isfinite().all() for p in params):
            self.scale /= 2
            step = optimizer.step

            def skip():
                optimizer.step = step

            optimizer.step = skip

    def state_dict(self):
        return {"loss_scaler0": {"loss_scale": self.scale, "unskipped": 0}}

    def load_state_dict(self, state):
        self.scale = state["loss_scaler0"]["loss_scale"]


@pytest.fixture
def amp(monkeypatch):
    apex = types.ModuleType("apex")
    apex.amp = FakeAmp()
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", apex.amp)
    return apex.amp


@pytest.mark.parametrize(("level", "loss_scale"), [("O1", 0.0), ("O2", 0.0), ("O2", 128.0)])
def test_apex_is_told_the_flags(amp, level, loss_scale):
    """Truth: apex's documented arguments: the level's name, a number or None (the level's own)."""
    make(level, FP16, loss_scale, backend=ApexPrecision)
    assert amp.calls == [("initialize", level, loss_scale or None), ("master_params",)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("max_norm", [0.3, 100.0])
def test_apex_trains_as_plain_pytorch(amp, max_norm, parts):
    """Truth: level O0, bit for bit: the fake scales by a power of 2 and changes nothing else."""
    ours = make("O1", FP16, backend=ApexPrecision)
    plain = make("O0")
    for i in range(4):
        one_step(ours, i, parts, max_norm=max_norm)
        one_step(plain, i, parts, max_norm=max_norm)
    assert_same(snapshot(ours), snapshot(plain))
    assert ours.read() == [record._replace(loss_scale=1024) for record in plain.read()]
    assert [call[0] for call in amp.calls] == (
        ["initialize", "master_params"] + ["scale_loss"] * parts * 4
    )


def test_apex_skips(amp):
    """Truth: the state before the step that apex skips; the next one goes on."""
    precision = make("O1", FP16, backend=ApexPrecision)
    one_step(precision, 0)
    before = snapshot(precision)
    one_step(precision, 1, factor=math.inf)
    assert_same(snapshot(precision), before)
    one_step(precision, 2)
    records = precision.read()
    assert [record.finite for record in records] == [True, False, True]
    assert records[-1].loss_scale == 512 and precision.scaled


def test_apex_resumes(amp):
    """Truth: apex's own state travels in ours, and the masters follow the loaded weights."""
    precision = make("O1", FP16, backend=ApexPrecision)
    one_step(precision, 0, factor=math.inf)
    one_step(precision, 1)
    state = copy.deepcopy(precision.state_dict())
    assert state["apex"] == {"loss_scaler0": {"loss_scale": 512.0, "unskipped": 0}}
    amp.scale = 4.0
    resumed = make("O1", FP16, seed=1, backend=ApexPrecision)
    resumed.load_state_dict(state)
    assert amp.scale == 512
    assert_same(resumed.masters, precision.masters)
