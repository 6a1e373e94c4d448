"""Whatever the command line or the file: a run, or one line of error.

Never a traceback, a hang, or a file half written. Models here have one tiny block and the data is
80 images, so that a thousand runs, in forks of one process (forks.py), take a minute.
"""

import io
import os
import random
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import Forks
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from models.configs import CONFIGS
from models.norms import NORM_TYPES, QK_NORMS
from recipes import RECIPES
from utils.args import parse_args
from utils.precision import LEVELS
from utils.run_files import RunFiles
from utils.scheduler import SCHEDULES

COMMAND_LINES, FILES = 400, 300
GiB = 1 << 30

SMALL = """
import unittest.mock, urllib.error, urllib.request
torch.manual_seed(0)
shrink(1, 24)
digits = data_utils.Dataset(
    torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10,
    torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 10,
    list("0123456789"),
)
data_utils._digits = lambda: digits
urllib.request.urlopen = unittest.mock.Mock(side_effect=urllib.error.URLError("no network"))
os.fsync = lambda descriptor: None
run_logger._environment = lambda: ""  # it asks git
# No figures, nor matplotlib's import
for name in ("plot_acc_loss", "utils.attention_figures", "utils.vis_utils"):
    sys.modules[name] = unittest.mock.MagicMock()
"""
LIMITS = f"limit('AS', {6 * GiB}); limit('FSIZE', {GiB >> 4})"


@pytest.fixture(scope="module")
def forks():
    with Forks(SMALL) as forks:
        yield forks


@pytest.fixture
def folder(tmp_path):
    """Makes an empty folder, the same for each example; in memory where it can be."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    place = f"{memory}/fuzz-{os.getpid()}"

    def folder():
        shutil.rmtree(place, ignore_errors=True)
        os.mkdir(place)
        return place

    yield folder
    shutil.rmtree(place, ignore_errors=True)


def fuzz(examples):
    """A property test of so many examples, the same ones each time."""
    return lambda test: seed(0)(
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)
    )


def run(forks, args, folder, program="train"):
    """Runs a command line and checks how it ends; returns whether it was a run."""
    done = forks.run(args, folder, LIMITS, check=False, timeout=60, program=program)
    text = f"{args}\n{done.output}"
    assert "Traceback" not in done.output, text
    errors = re.findall(rf"^{program}\.py: error: (.+)$", done.output, re.M)
    if done.returncode == 0:
        assert not errors, text
    else:
        assert len(errors) == 1 and done.output.endswith(f"{errors[0]}\n"), text
        assert done.returncode == (1 if errors[0].startswith("not finite: ") else 2), text
    for _, _, names in os.walk(folder):
        assert not [name for name in names if name.endswith((".part", ".tmp"))], text
    return done.returncode == 0


# Command lines

TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=70)
NUMBER = st.one_of(
    st.integers(-(10**25), 10**25).map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-0", "1e400", "-1", "0x10", "1_000", "½", "٣", "1e-400", "NaN"]),
)
COUNT = st.integers(1, 9).map(str) | st.just("10000000")
SETTINGS = "pool=mean zero_head=True zero_branches=True positions=sincos stem=conv".split()
SETTINGS += "ema=0.9 optimizer=muon optimizer=adamw mixup=1 cutmix=1 drop_path=0.5".split()
SETTINGS += ["randaugment_ops=2", "patch_dropout=0.9"]
VALID = {
    "--norm_type": st.sampled_from(list(NORM_TYPES)),
    "--qk_norm": st.sampled_from(list(QK_NORMS)),
    "--recipe": st.sampled_from(list(RECIPES)),
    "--set": st.sampled_from(SETTINGS),
    "--val_split": st.sampled_from(["0", "1", "40", "63"]),
    "--model_type": st.sampled_from(list(CONFIGS)),
    "--fp16_opt_level": st.sampled_from(LEVELS),
    "--half_dtype": st.sampled_from(["auto", "bf16", "fp16"]),
    "--cpu_kernels": st.sampled_from(["auto", "plain"]),
    "--amp_backend": st.just("native"),
    "--loss_scale": st.floats(0, 2.0**24).map(str),
    "--decay_type": st.sampled_from(list(SCHEDULES)),
    "--seed": st.integers(0, 2**32 - 1).map(str),
    "--train_batch_size": st.sampled_from(["1", "2", "7", "24", "64", "65", "10000000"]),
    "--gradient_accumulation_steps": st.sampled_from(["1", "2", "4"]),
    "--num_steps": st.sampled_from(["1", "2", "3"]),
    "--warmup_steps": st.sampled_from(["0", "1", "2", "3", "10000000"]),
    "--learning_rate": st.floats(0, 1e308).map(str) | st.sampled_from(["0", "0.1", "1e-45"]),
    "--weight_decay": st.floats(0, 1e308).map(str) | st.just("0.01"),
    "--max_grad_norm": st.floats(1e-320, 1e308).map(str) | st.just("1"),
    "--img_size": st.sampled_from(["4", "14", "16", "28", "32", "64", "112"]),
    "--eval_every": COUNT,
    "--eval_batch_size": COUNT,
    "--log_every": COUNT,
    "--save_every": COUNT,
    "--stop_after": COUNT,
    "--local_rank": st.integers(-(10**9), 10**9).map(str),
    "--gpu_id": st.integers(0, 10**9).map(str),
    "--name": st.from_regex(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,59}", fullmatch=True).map(
        lambda name: name.replace("-", "_", 1) if name.startswith("-") else name
    ),
}
SWITCHES = "--fp16 --grad_checkpointing --deterministic --resume --overwrite --eval".split()
PATHS = ["", ".", "none", "/dev/null", "/proc/self/mem", "/proc/1/none", "x" * 300, "ü/é", "\udcff"]
PATHS += ["printed.txt", "[*]", "~", "a b"]
INSIDE = TEXT.map(lambda text: text.replace("/", "_").replace("..", "_"))
PATH_FLAGS = ["--output_dir", "--data_dir", "--pretrained_dir", "--resume"]
WRONG = st.one_of(
    st.tuples(st.sampled_from(list(VALID)), NUMBER | TEXT).map(list),
    st.tuples(st.sampled_from(PATH_FLAGS), st.sampled_from(PATHS) | INSIDE).map(list),
    st.tuples(TEXT.map(lambda text: f"--{text}"), TEXT).map(list),
    st.tuples(st.just("--dataset"), st.sampled_from(["mnist", "", "Digits"])).map(list),
    st.sampled_from([["--num_steps"], ["--compile="], ["--"], ["x"], ["--nam", "x"]]),
    st.sampled_from([["--fp16", "O2"], ["--amp_backend", "apex"], ["--help"]]),
)
BASE = "--name fuzz --dataset digits --model_type ViT-Ti_4 --img_size 8 --num_steps 2".split()
BASE += "--train_batch_size 8 --learning_rate 0.1".split()
RUN_NAME = RunFiles(parse_args(BASE)).run_name


@st.composite
def command_lines(draw):
    """Valid flags, and in most cases one or more that are wrong; --num_steps stays small."""
    args = list(BASE)
    for flag in draw(st.lists(st.sampled_from(list(VALID)), max_size=4, unique=True)):
        args += [flag, draw(VALID[flag])]
    args += draw(st.lists(st.sampled_from(SWITCHES), max_size=2))
    if draw(st.integers(0, 9)) < 6:
        for wrong in draw(st.lists(WRONG, min_size=1, max_size=2)):
            args += wrong
    return [arg.replace("\0", "") for arg in args]


def takes_long(args):
    """Whether a wrong value is a right one by chance, and one that means hours."""
    for flag, value in zip(args, args[1:]):
        digits = value.strip("+").replace("_", "")
        if flag in ("--num_steps", "--img_size", "--gradient_accumulation_steps") and (
            digits.isdecimal() and int(digits) > 112
        ):
            return int(digits) <= 10**7
    return False


def test_command_lines(forks, folder):
    counts = {"refused": 0, "run": 0}

    @fuzz(COMMAND_LINES * 11 // 10)
    @given(command_lines(), st.sampled_from([[], ["--resume"], ["--overwrite"], ["--eval"]]))
    def check(args, again):
        if takes_long(args):  # hours: its flags alone are read
            with suppress(SystemExit):
                parse_args(args)
            return
        place = folder()
        was_run = run(forks, args, place)
        counts["run" if was_run else "refused"] += 1
        if was_run and again:
            run(forks, args + again, place)

    check()
    print(counts)
    assert sum(counts.values()) >= COMMAND_LINES and min(counts.values()) > COMMAND_LINES / 5


# Files


@pytest.fixture(scope="module")
def originals(forks, tmp_path_factory):
    """Good files: a checkpoint to go on from, one of weights alone, Google's and timm's."""
    folder = tmp_path_factory.mktemp("originals")
    forks.run([*BASE, "--stop_after", "1"], folder)
    forks.run([*BASE, "--resume"], folder)
    (step,) = folder.glob("output/*_step_1.bin")
    (best,) = folder.glob("output/*_final.bin")
    setup = """
from models.google_layout import google_name, google_shape
from models.configs import CONFIGS
from models.modeling import VisionTransformer
def main():
    model = VisionTransformer(CONFIGS["ViT-Ti_4"], 8, num_classes=10)
    named = {google_name(k): v for k, v in model.state_dict().items()}
    shapes = {k: google_shape(k, tuple(v.shape), 3) for k, v in named.items()}
    np.savez("google.npz", **{k: np.zeros(shape, np.float32) for k, shape in shapes.items()})
    return 0
train.main = main
"""
    forks.run([], folder, setup)
    files = {"step": step, "weights": best, "npz": folder / "google.npz"}
    size = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
        "mlp_ratio": 1,
    }
    theirs = save(timm.models.VisionTransformer(**size).state_dict())
    return {kind: file.read_bytes() for kind, file in files.items()} | {"safetensors": theirs}


def mutated_bytes(data, rng):
    """The bytes with some changed, left out, put in, or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        # The names, offsets and the pickle are at the two ends, the numbers in between.
        place = rng.choice([rng.randrange(len(data)), rng.randrange(min(3000, len(data)))])
        place = rng.choice([place, len(data) - 1 - place])
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice([0, 255, rng.randrange(256)])
            case 2:
                data[place : place + 8] = rng.randbytes(8)
            case 3:
                del data[place : place + rng.choice([1, 64, 10**6])]
            case 4:
                start = rng.randrange(len(data))
                data[place:place] = data[start : start + rng.choice([1, 64, 4096])]
            case 5:
                del data[max(place, 1) :]
        if not data:
            break
    return bytes(data)


ODD = [None, True, 2**70, float("nan"), "a\nb", b"x", [], (), {"x": 1}, torch.zeros(())]
ODD += [torch.zeros(3, 3), torch.zeros(0), torch.tensor([True, False]), torch.tensor([-5])]
ODD += [torch.full((1,), float("nan")), torch.zeros(2).cfloat(), torch.zeros(1).expand(2**40)]


def mutated_weights(data, rng):
    """A checkpoint with one of its weights taken away, renamed or replaced."""
    weights = torch.load(io.BytesIO(data), weights_only=True)["model"]
    key = rng.choice(list(weights))
    value = weights.pop(key)
    match rng.randrange(4):
        case 0:
            weights[rng.choice([7, "x", f"{key}x", "a\nb"])] = value
        case 1 | 2:
            weights[key] = rng.choice(ODD)
    file = io.BytesIO()
    torch.save(rng.choice([weights, {"model": weights}]), file)
    return file.getvalue()


def mutated_arrays(data, rng):
    """A .npz with one array of another name, type, shape or of more than numbers."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    match rng.randrange(7):
        case 0:
            arrays[rng.choice(["", "../x", "/x", "x/encoderblock_9/y", name + "é"])] = array
        case 1:
            arrays[name] = array.astype(rng.choice(["f8", "f2", "i4", "c8", "S3", "?", "M8[s]"]))
        case 2:
            arrays[name] = array.reshape(-1)
        case 3:
            arrays[name] = array[..., None]
        case 4:
            arrays[name] = np.array([array, None, print], object)
        case 5:
            arrays[name] = np.full_like(array, rng.choice([np.nan, np.inf, 1e38]))
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def with_header(data, rng):
    """A .npz with an array whose header lies about what follows."""
    header = rng.choice(
        [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
            "__import__('os').system('touch exploded')",
            "{" * 500,
        ]
    )
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cls.npy", npy)
    return file.getvalue()


def test_files(forks, folder, originals):
    counts = {"refused": 0, "run": 0}

    @fuzz(FILES)
    @given(st.integers(0, 2**32))
    def check(number):
        rng = random.Random(number)
        kind = rng.choice(["step", "weights", "weights", "npz", "safetensors"])
        place, data = folder(), originals[kind]
        mutations = {"weights": [mutated_weights], "npz": [mutated_arrays, with_header]}
        data = rng.choice([mutated_bytes, *mutations.get(kind, ())])(data, rng)
        suffix = kind if kind in ("npz", "safetensors") else "bin"
        file = Path(place, f"mutated.{suffix}")
        file.write_bytes(data)

        args, program = [*BASE], "train"
        uses = {
            "step": ["--resume", "--resume", "newest", "plot_attn"],
            "weights": ["--pretrained_dir", "--pretrained_dir", "--eval", "plot_attn"],
            "npz": ["--pretrained_dir"],
            "safetensors": ["--pretrained_dir"],
        }
        use = rng.choice(uses[kind])
        if use == "plot_attn":
            args, program = ["mutated.bin"], "plot_attn"
        elif use in ("newest", "--eval"):
            name = "step_1" if use == "newest" else "checkpoint"
            os.mkdir(f"{place}/output")
            file.rename(f"{place}/output/{RUN_NAME}_{name}.bin")
            args += ["--resume"] if use == "newest" else [use]
        else:
            args += [use, file.name]
        was_run = run(forks, args, place, program)
        counts["run" if was_run else "refused"] += 1
        assert not os.path.exists(f"{place}/exploded")

    check()
    print(counts)
    assert sum(counts.values()) >= FILES and min(counts.values()) > FILES / 50
