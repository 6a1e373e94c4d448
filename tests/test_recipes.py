"""Recipes: --recipe and --set, what they decide, their mistakes, and runs that use all of it."""

import shlex

import pytest
import torch
from forks import Forks
from programs import TINY, call, refused, run
from runs import IN_STEP, KILLED, RUN, assert_same, content, steps

import train
from recipes import RECIPES
from utils.args import ENTRIES, parse_args
from utils.checkpoint import load_checkpoint
from utils.log_reader import read_log
from utils.run_files import RunFiles, result_flags

# The reference program's, whose numbers for transforms and model stood in its code
REFERENCE = (
    "model_type=ViT-B_16 img_size=224 train_batch_size=128 gradient_accumulation_steps=1"
    " num_steps=20000 learning_rate=0.05 weight_decay=0.0 warmup_steps=500 decay_type=cosine"
    " max_grad_norm=1.0 eval_every=100 save_every=100 val_split=0 qk_norm=none recipe=reference"
    " optimizer=sgd momentum=0.9 betas=None adamw_factor=None decay_all=True ema=0.0 crop=resized"
    " smallest_crop=0.05 flip=False randaugment_ops=0 mixup=0.0 cutmix=0.0 label_smoothing=0.0"
    " dropout=0.1 drop_path=0.0 pool=token positions=learned stem=patch zero_head=False"
    " zero_branches=False patch_dropout=0.0 patch_dropout_until=1.0"
).split()
PLAIN = "x_ViT-B_16_norm_LN_fp_False_img_224_pretrain_F"
SMALL = "x_ViT-64x4_4_norm_LN_fp_False_img_32_pretrain_F"
FEW = """
import sklearn.datasets, torchvision.datasets, torchvision.ops
shrink()
parts = zip(vars(data_utils._digits()).values(), (250, 250, 40, 40, 10))
few = data_utils.Dataset(*[part[:n] for part, n in parts])
data_utils._digits = lambda: few
"""
# All that the reference does not do, in a run of seconds: with the flags of RUN 5 steps an epoch
EVERYTHING = (
    "--recipe small --model_type ViT-64x4_4 --img_size 32 --train_batch_size 48 --qk_norm rms"
    " --val_split 13 --set ema=0.7 mixup=0.2 cutmix=1.0 randaugment_ops=2 drop_path=0.2"
    " mix_share=0.8 dropout=0.1 stem=conv_bn zero_head=False zero_branches=False"
    " patch_dropout=0.3 patch_dropout_until=0.5"
)


@pytest.fixture(scope="module")
def forks():
    """As in conftest.py, with 250 training and 40 test images."""
    with Forks(FEW) as forks:
        yield forks


def flags_of(line=""):
    return parse_args(["--name", "x", *line.split()])


def log_of(folder):
    return read_log(next(folder.glob("output/*.txt")))


# What is chosen


def test_the_reference_is_the_default():
    """Truth: the reference's own numbers, and its files' names without a suffix."""
    for line in ("", "--recipe reference"):
        args = flags_of(line)
        told = {f"{name}={value}" for name, value in vars(args).items()}
        assert told.issuperset(REFERENCE)
        files = RunFiles(args)
        assert files.run_name == PLAIN
        assert files.log.name == "cifar10_ViT-B_16_norm_LN_fp_False_img_224_pretrain_F_x.txt"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_entry_has_a_flag_or_set(recipe):
    """Truth: a value that is set comes back: entries by --set, the others by their flag."""
    page = RECIPES[recipe]().to_dict()
    pairs = [f"{name}={value}" for name, value in page.items() if name in ENTRIES]
    args = vars(parse_args(["--name", "x", "--recipe", recipe, "--set", *pairs]))
    assert {name: args[name] for name in page} == page
    for name in page.keys() - ENTRIES:
        other = parse_args(["--name", "x", "--recipe", recipe, f"--{name}", str(page[name])])
        assert vars(other) == vars(flags_of(f"--recipe {recipe}"))


@pytest.mark.parametrize(
    ("line", "changed", "name"),
    [
        ("--recipe small", {}, f"{SMALL},recipe=small"),
        ("--num_steps 9 --recipe=small", {"num_steps": 9}, f"{SMALL},num_steps=9,recipe=small"),
        ("--recipe small --set flip=False", {"flip": False}, f"{SMALL},flip=False,recipe=small"),
        ("--set flip=True ema=0.5", {"flip": True, "ema": 0.5}, f"{PLAIN},ema=0.5,flip"),
        ("--set flip=True --set ema=0.5", {"flip": True, "ema": 0.5}, f"{PLAIN},ema=0.5,flip"),
        ("--set flip=True flip=False", {"flip": False}, PLAIN),  # as it is without
        ("--set dropout=0.1", {"dropout": 0.1}, PLAIN),
        ("--qk_norm rms --val_split 9", {"val_split": 9}, f"{PLAIN},qk_norm=rms,val_split=9"),
        ("--log_signal", {"log_signal": True}, PLAIN),  # decides no result
    ],
)
def test_flags_and_set_override(line, changed, name):
    """Truth: the recipe's page but for what the line changes, which is in the files' names."""
    args = flags_of(line)
    expected = RECIPES[args.recipe]().to_dict() | changed
    assert {name: getattr(args, name) for name in expected} == expected
    assert RunFiles(args).run_name == name
    assert result_flags(args).items() >= {k: changed[k] for k in changed.keys() & ENTRIES}.items()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--recipe small", (0.95, (0.9, 0.95), 0.15)),
        ("--recipe small --set optimizer=sgd", (0.9, None, None)),  # not Muon's momentum
        ("--recipe small --set optimizer=adamw betas=0.8,0.9", (None, (0.8, 0.9), None)),
        ("--set optimizer=muon adamw_factor=1", (0.95, (0.9, 0.95), 1.0)),
        ("--set momentum=0.5 optimizer=muon", (0.5, (0.9, 0.95), 0.15)),
    ],
)
def test_an_optimizer_has_its_own_entries(line, expected):
    """Truth: OPTIMIZERS, where --set does not say otherwise."""
    args = flags_of(line)
    assert (args.momentum, args.betas, args.adamw_factor) == expected


def test_a_recipe_may_set_an_optimizer_s_entry(monkeypatch):
    """Truth: the recipe's value, for the optimizers that have the entry; --set overrides it."""
    recipe = RECIPES["small"]()
    recipe.momentum = 0.8
    monkeypatch.setitem(RECIPES, "own", lambda: recipe)
    assert flags_of("--recipe own").momentum == 0.8
    assert flags_of("--recipe own --set optimizer=adamw").momentum is None
    assert flags_of("--recipe own --set momentum=0.7").momentum == 0.7


def test_help_tells_the_recipes_defaults(capsys):
    """Truth: the page of `small`; without it, that of the reference."""
    for line, words in [
        ("--recipe small --help", ["ViT-64x4_4)", "0.02)", "3128)", "391)", "linear)"]),
        ("--help", ["ViT-B_16)", "0.05)", "20000)", "500)", "cosine)"]),
    ]:
        with pytest.raises(SystemExit) as end:
            parse_args(line.split())
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0
        assert [word for word in words if f"(default: {word}" not in text] == []


# Mistakes

BAD_ENTRIES = (
    "optimizer=lion optimizer= momentum=1 momentum=-0.1 momentum=nan momentum=high betas=0.9"
    " betas=0.9,0.95,0.99 betas=0.9;0.95 adamw_factor=0 adamw_factor=inf decay_all=true"
    " decay_all=1 ema=1 ema=-0.5 crop=center smallest_crop=0 smallest_crop=1.5 shift=17 shift=-1"
    " shift=2.5 flip=yes flip= randaugment_ops=11 randaugment_ops=1.0 randaugment_magnitude=31"
    " mixup=-0.1 mixup=1e3 cutmix=x mix_share=1.1 label_smoothing=1 dropout=1 drop_path=1"
    " drop_path=nan head_factor=0 position_resize=nearest pool=max positions=rotary stem=conv_ln"
    " zero_head=0 zero_branches=None patch_dropout=1 patch_dropout_until=1.1"
).split()
ONE_TOKEN = "--recipe small --set crop=resized --img_size 4"
MISTAKES = [  # the line, and what the error must name
    *((f"--set '{e}'", [e.replace("=", "='", 1) + "' is not allowed"]) for e in BAD_ENTRIES),
    ("--set betas=0.9,1", ["--set: betas='1' is not allowed"]),
    ("--recipe large", ["--recipe", "'large'", "reference", "small"]),
    ("--recipe", ["--recipe", "expected one argument"]),
    ("--set", ["--set", "expected at least one argument"]),
    ("--set rate=1", ["--set", "'rate=1'", "NAME=VALUE", "smallest_crop"]),
    ("--set learning_rate=1", ["--set", "'learning_rate=1'"]),  # it has a flag
    ("--set flip", ["--set", "'flip'", "NAME=VALUE"]),
    ("--set =True", ["--set", "'=True'"]),
    ("--set betas=0.9,0.95", ["--set", "betas", "sgd", "it has momentum"]),
    ("--set adamw_factor=1 optimizer=adamw", ["adamw_factor", "adamw", "it has betas"]),
    ("--set momentum=0.9 optimizer=adamw", ["momentum", "adamw", "it has betas"]),
    ("--set mixup=1 --train_batch_size 1", ["--train_batch_size", "1 image", "mixup"]),
    ("--dataset digits --val_split 1436 --set mixup=1", ["1 image", "mixup"]),
    ("--set cutmix=1 --train_batch_size 8 --gradient_accumulation_steps 8", ["1 image", "cutmix"]),
    ("--dataset digits --val_split 1437", ["--val_split", "1437", "digits", "no training images"]),
    ("--val_split 50000", ["--val_split", "cifar10 has 50000"]),
    (
        f"{ONE_TOKEN} --norm_type BN --train_batch_size 1",
        ["--norm_type", "BN", "one token", "--img_size 4"],
    ),
    (
        "--recipe small --norm_type BN --train_batch_size 1 --set patch_dropout=0.99",
        ["--norm_type", "BN", "one token", "patch_dropout=0.99"],
    ),
    (f"{ONE_TOKEN} --norm_type RepBN --val_split 79", ["--norm_type", "RepBN", "one token"]),
    ("--val_split -1", ["--val_split", "'-1'", "from 0"]),
    ("--set crop=shift --img_size 64", ["--img_size", "64", "crop=shift", "32"]),
    ("--recipe small --img_size 64", ["--img_size", "64", "crop=shift", "32"]),
    ("--set stem=conv", ["stem=conv", "ViT-B_16", "4 pixels"]),
    ("--recipe small --model_type ViT-Ti_16 --set stem=conv_bn", ["stem=conv_bn", "ViT-Ti_16"]),
    ("--amp_backend apex --set ema=0.9", ["--amp_backend", "ema=0"]),
    ("--amp_backend apex --set optimizer=adamw", ["--amp_backend", "optimizer=sgd"]),
    ("--set position_resize=bicubic", ["position_resize", "without --pretrained_dir"]),
    ("--qk_norm l2", ["--qk_norm", "'l2'", "rms"]),
]


def assert_one_line(done, words, folder):
    refused(done, *words)
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line(line, words, tmp_path, monkeypatch):
    """Truth: one line on stderr and status 2, before anything is looked at but the flags."""
    assert {entry.partition("=")[0] for entry in BAD_ENTRIES} == ENTRIES.keys()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "RunFiles", None)  # what comes next
    done = call(train.main, "--name", "x", *shlex.split(line))
    assert_one_line(done, words, tmp_path)


def test_each_process_needs_a_training_image(tmp_path, monkeypatch):
    """Truth: the flag's line, where the images of an epoch are fewer than the processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    few = ["--name", "x", "--dataset", "digits", "--val_split"]
    assert_one_line(call(train.main, *few, "1436"), ["--val_split", "1436", "1437"], tmp_path)
    assert parse_args([*few, "1435"]).processes == 2


def test_a_mistake_of_the_real_command(tmp_path):
    """Truth: as above, of the program in its own process."""
    for line, words in (MISTAKES[0], MISTAKES[-3]):
        done = run(["--name", "x", *shlex.split(line)], tmp_path, check=False)
        assert_one_line(done, words, tmp_path)


# Runs

RECORDED = """
update, trail = precision.Precision.update, []
def recorded(self, rate):
    def copy():
        trail.append({n: p.detach().clone() for n, p in self.named_masters().items()})
        torch.save(trail, "trail.pt")
    trail or copy()
    update(self, rate)
    copy()
precision.Precision.update = recorded
"""
# "tokens" tells how many tokens of an image each training step's blocks get.
TOKENS = """
from models.modeling import Encoder
forward = Encoder.forward
def told(self, x):
    if self.training and x.device.type != "meta":
        with open("tokens", "a") as file:
            print(x.shape[1], file=file)
    return forward(self, x)
Encoder.forward = told
"""
# Image k is all of grey k; "seen.txt" tells which were trained and evaluated on.
GREYS = """
def greys(first, n):
    k = torch.arange(first, first + n)
    return k.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), k % 10
data_utils._digits = lambda: data_utils.Dataset(*greys(0, 60), *greys(200, 30), [*"0123456789"])
def tell(kind, images):
    with open("seen.txt", "a") as file:
        print(kind, *images[:, 0, 0, 0].tolist(), file=file)
augment, batches = train.Augmentation.__call__, data_utils.TestBatches.__iter__
train.Augmentation.__call__ = lambda self, *a: (tell("train", a[0]), augment(self, *a))[1]
data_utils.TestBatches.__iter__ = lambda self: (tell("test", self.images), batches(self))[1]
"""


def test_the_log_and_the_checkpoints_tell_the_entries(forks, tmp_path):
    """Truth: the entries as they ended up; a run goes on with the same ones alone."""
    args = [*TINY, "--set", "flip=True", "optimizer=muon", "betas=0.8,0.9", "--stop_after", "6"]
    forks.run(args, tmp_path)
    told = {"recipe": "reference", "flip": True, "optimizer": "muon", "betas": (0.8, 0.9)}
    told |= {"momentum": 0.95, "adamw_factor": 0.15, "crop": "resized"}
    (file,) = tmp_path.glob("output/*_step_6.bin")
    for flags in (log_of(tmp_path).flags, load_checkpoint(file)["flags"]):
        assert {name: flags[name] for name in told} == told
    other = [*TINY, "--set", "flip=False", "optimizer=muon", "betas=0.8,0.95", "--resume", file]
    line = refused(
        forks.run(other, tmp_path, check=False),
        " betas (0.8, 0.95) (there (0.8, 0.9))",
        ", flip False (there True)",
    )
    assert line.count("there") == 2
    assert "Resumed from step 6" in forks.run([*args[:-2], "--resume"], tmp_path).output


@pytest.mark.parametrize("level", ["", "--fp16 --half_dtype bf16"])
@pytest.mark.parametrize("norm_type", ["LN", "RescaleNet", "SigmaReparam", "RepBN"])
def test_resumes_to_the_bit(forks, reference, tmp_path, norm_type, level):
    """Truth: the run that was never interrupted; this one is killed in its second epoch."""
    flags = f"{EVERYTHING} --norm_type {norm_type} {level}"
    args = [*RUN, *flags.split(), "--resume"]
    assert forks.run(args, tmp_path, IN_STEP.format(9), check=False).returncode == KILLED
    assert steps(tmp_path) == [3, 6]
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference(flags))


@pytest.mark.parametrize(("until", "expected"), [("0.4", 2), ("0.8", 3), ("1", 4), ("0", 0)])
def test_patch_dropout_ends(forks, tmp_path, until, expected):
    """Truth: of 4 steps, the first 4 x `until`, rounded, are on 16 of the 64 patches."""
    line = "--name x --dataset digits --recipe small --num_steps 4 --train_batch_size 8"
    line += f" --set patch_dropout=0.75 patch_dropout_until={until}"
    forks.run(line.split(), tmp_path, TOKENS)
    counts = (tmp_path / "tokens").read_text().split()
    assert counts == ["16"] * expected + ["64"] * (4 - expected)


@pytest.mark.parametrize("level", ["", "--fp16 --half_dtype bf16"])
def test_averaged_weights_are_evaluated_and_saved(forks, tmp_path, level):
    """Truth: 0.7^n w_0 + 0.3 (0.7^(n-1) w_1 + ... + w_n) over the weights after each step, which
    are those of the same run without averages."""
    args = [*RUN, *EVERYTHING.split(), *level.split()]
    for ema in ("0", "0.7"):
        folder = tmp_path / ema
        folder.mkdir()
        forks.run([*args, "--set", f"ema={ema}"], folder, RECORDED)
    assert content(tmp_path / "0.7/trail.pt") == content(tmp_path / "0/trail.pt")

    trail = torch.load(folder / "trail.pt")
    for kind in ("checkpoint", "final"):
        (file,) = folder.glob(f"output/*_{kind}.bin")
        saved = load_checkpoint(file)
        n = saved["step"]
        for name, start in trail[0].items():
            average = 0.7**n * start.double()
            for k in range(1, n + 1):
                average += 0.3 * 0.7 ** (n - k) * trail[k][name].double()
            torch.testing.assert_close(saved["model"][name].double(), average, rtol=0, atol=1e-5)
    newest = load_checkpoint(next(folder.glob("output/*_step_16.bin")))["model"]
    assert all(torch.equal(newest[name], p) for name, p in trail[16].items())

    log = log_of(folder)
    best = log.accuracy.index(max(log.accuracy))
    evaluated = forks.run([*args, "--set", "ema=0.7", "--eval"], folder).output
    assert f"Valid Accuracy: {log.accuracy[best]:.5f}\n" in evaluated
    assert f"Valid Loss: {log.loss[best]:.5f}\n" in evaluated


@pytest.mark.parametrize(("split", "tested"), [(10, range(50, 60)), (0, range(200, 230))])
def test_val_split(forks, tmp_path, split, tested):
    """Truth: the last N training images are evaluated on, by --eval too, and the test images are
    not; all others, and none of them, are trained on."""
    args = [*TINY, "--val_split", str(split)]
    forks.run(args, tmp_path, GREYS)
    forks.run([*args, "--eval"], tmp_path, GREYS)
    lines = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    trained = {int(k) for kind, *greys in lines if kind == "train" for k in greys}
    assert trained == set(range(60 - split))
    evaluated = [[int(k) for k in greys] for kind, *greys in lines if kind == "test"]
    assert evaluated == [list(tested)] * 3  # at steps 6 and 12, and by --eval
