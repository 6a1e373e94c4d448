"""train.py as its user runs it: mistakes, a whole run and what it leaves, processes, flags.

Most runs are of small models, in forks of one process (forks.py).
"""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import (
    DATA,
    ROOT,
    TINY,
    call,
    environment,
    events,
    needs_cifar10,
    refused,
    run,
    scalars,
    write_log,
)
from small import small_model

import plot_acc_loss
import plot_attn
from models.fast_cpu import capability
from utils import dist_util, run_logger
from utils.args import ENTRIES, build_parser, parse_args
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.errors import UserError, reported
from utils.log_reader import read_log
from utils.run_files import RunFiles, result_flags

NO_DROPOUT = ("--set", "dropout=0")


def log_of(folder):
    return read_log(next(folder.glob("output/*.txt")))


# Mistakes

# What is wrong, and what the line must name: the flag, the value and what is allowed.
MISTAKES = {
    "no name": (["--dataset", "digits"], ["--name"]),
    "unknown flag": (["--lr", "1"], ["--lr"]),
    "norm": (["--norm_type", "XN"], ["--norm_type", "invalid choice: 'XN'", "Rescale"]),
    "model": (["--model_type", "ViT-X_9"], ["--model_type", "invalid choice", "ViT-B_16"]),
    "dataset": (["--dataset", "mnist"], ["--dataset", "invalid choice", "cifar100"]),
    "level": (["--fp16_opt_level", "O4"], ["--fp16_opt_level", "invalid choice", "O3"]),
    "patch": (["--img_size", "100"], ["--img_size", "100", "16"]),
    "accumulation": (
        ["--train_batch_size", "10", "--gradient_accumulation_steps", "3"],
        ["--train_batch_size", "10", "3"],
    ),
    "zero steps": (["--num_steps", "0"], ["--num_steps", "0", "from 1"]),
    "fraction": (["--eval_every", "2.5"], ["--eval_every", "2.5", "whole number"]),
    "negative rate": (["--learning_rate", "-1"], ["--learning_rate", "-1", "from 0"]),
    "nan": (["--weight_decay", "nan"], ["--weight_decay", "nan"]),
    "zero clip": (["--max_grad_norm", "0"], ["--max_grad_norm", "above 0"]),
    "path in name": (["--name", "../x"], ["--name", "../x"]),
    "apex": (["--amp_backend", "apex"], ["--amp_backend", "2025", "native"]),
    "loss scale at O3": (
        ["--fp16", "--fp16_opt_level", "O3", "--loss_scale", "8"],
        ["--loss_scale", "8", "O1 and O2"],
    ),
    "both": (["--resume", "--overwrite"], ["--overwrite", "not together with --resume"]),
    "empty path": (["--pretrained_dir", ""], ["--pretrained_dir", "''", "a path"]),
    "output is a file": (["--output_dir", "a_file"], ["--output_dir", "a_file"]),
    "output unwritable": (["--output_dir", "/proc/here"], ["--output_dir", "/proc/here"]),
    "damaged data": (
        ["--dataset", "cifar10", "--data_dir", "damaged"],
        ["--data_dir", "cifar-10-batches-py is damaged"],
    ),
    "no weights": (["--pretrained_dir", "none.npz"], ["--pretrained_dir", "none.npz", "auto"]),
    "cut weights": (["--pretrained_dir", "cut.npz"], ["--pretrained_dir", "cut.npz"]),
    "text as weights": (["--pretrained_dir", "a_file"], ["--pretrained_dir", "a_file"]),
    "wrong weights": (["--pretrained_dir", "other.npz"], ["--pretrained_dir", "lacks"]),
    "no checkpoint": (["--resume", "none.bin"], ["--resume", "none.bin"]),
    "cut checkpoint": (["--resume", "cut.bin"], ["--resume", "cut.bin"]),
    "weights only": (["--resume", "weights.bin"], ["--resume", "weights.bin", "weights only"]),
    "no best yet": (["--eval"], ["checkpoint.bin", "no such file"]),
}


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """A folder with files that are not what the flags ask for."""
    folder = tmp_path_factory.mktemp("traps")
    (folder / "a_file").write_text("not a folder\n")
    (folder / "damaged/cifar-10-batches-py").mkdir(parents=True)
    (folder / "damaged/cifar-10-batches-py/data_batch_1").write_bytes(b"\0" * 100)
    np.savez(folder / "other.npz", **{"cls": np.zeros((1, 1, 192), np.float32)})
    (folder / "cut.npz").write_bytes((folder / "other.npz").read_bytes()[:100])
    save_checkpoint({"model": {"w": torch.zeros(9)}}, folder / "weights.bin")
    (folder / "cut.bin").write_bytes((folder / "weights.bin").read_bytes()[:-200])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_line_and_leaves_no_file(forks, traps, mistake):
    flags, words = MISTAKES[mistake]
    tiny = [] if mistake == "no name" else TINY
    done = forks.run([*tiny, *flags], traps, check=False)
    refused(done, *words)
    assert done.output.count("\n") == 1
    assert not [*traps.glob("output/[!.]*")] + [*traps.glob("logs/[!.]*")]


def test_several_processes_leave_without_python_s_clean_up():
    code = "import atexit; from utils.dist_util import leave; atexit.register(print, 'cleaned up')"
    for env, left in (({}, "done\ncleaned up\n"), ({"RANK": "1", "WORLD_SIZE": "2"}, "done\n")):
        command = [sys.executable, "-c", f"{code}; print('done'); leave(3)"]
        done = subprocess.run(command, cwd=ROOT, env=environment(env), stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout.decode()) == (3, left)


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpu_id 2: the GPUs here are 0 to 1"):
        dist_util.init(parse_args(["--name", "x", "--gpu_id", "2"]))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--local_rank 3: the GPUs here are 0 to 1"):
        dist_util.init(parse_args(["--name", "x", "--local-rank", "3"]))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--local_rank 2"):
        dist_util.init(parse_args(["--name", "x", "--local_rank", "0"]))


def named(error, path):
    error.filename = path  # as save_checkpoint and RunLogger do
    return error


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("what is wrong"), "what is wrong"),
        (OSError("what is wrong"), "what is wrong"),  # it has neither file nor strerror
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (named(OSError("what is wrong"), "a/b"), "a/b: what is wrong"),
        (OSError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
    ],
)
def test_an_error_becomes_one_line(error, line):
    @reported
    def main():
        raise error

    done = call(main)
    assert (done.returncode, done.stderr) == (2, f"test_train.py: error: {line}\n")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"head.bias": torch.zeros(9)}, r"head.bias is \(9,\), the model's is \(7,\)"),
        ({"head.bias": None}, r"head.bias is missing, the model's is \(7,\)"),
        ({"more": torch.zeros(2, 3)}, r"more is \(2, 3\), the model's is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words):
    model = small_model()
    state = {k: v for k, v in (model.state_dict() | change).items() if v is not None}
    with pytest.raises(UserError, match=f"^a.bin: .*: {words}$"):
        load_weights(model, state, "a.bin")


# Flags


def test_help_groups_flags_with_defaults():
    text = build_parser().format_help()
    reference = {  # the reference's command line
        "dataset": "cifar10",
        "model_type": "ViT-B_16",
        "norm_type": "LN",
        "pretrained_dir": "None",
        "output_dir": "output",
        "img_size": "224",
        "train_batch_size": "128",
        "eval_batch_size": "512",
        "eval_every": "100",
        "learning_rate": "0.05",
        "weight_decay": "0.0",
        "num_steps": "20000",
        "warmup_steps": "500",
        "decay_type": "cosine",
        "max_grad_norm": "1.0",
        "gpu_id": "0",
        "local_rank": "-1",
        "seed": "42",
        "gradient_accumulation_steps": "1",
        "eval": "False",
        "fp16": "False",
        "fp16_opt_level": "O2",
        "loss_scale": "0.0",
    }
    flags = vars(parse_args(["--name", "x"]))
    assert {k: str(flags[k]) for k in reference} == reference
    named = flags.keys() - {"processes"} - ENTRIES.keys()  # torchrun says; --set does
    assert all(f"--{flag}" in text for flag in named)


def test_help_reads_well_at_80_columns(monkeypatch):
    """Each group has its flags, and no line is longer or breaks a name such as ViT-B_16."""
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\w-$", text, re.M)
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.M)
    groups = {
        name: re.findall(r"^  --(\w+)", flags, re.M)
        for name, flags in zip(parts[1::2], parts[2::2])
    }
    expected = {
        "run": "name",
        "data": "dataset",
        "model": "model_type",
        "optimization": "train_batch_size",
        "precision and speed": "fp16",
        "when": "eval_every",
        "where": "output_dir",
    }
    assert {name: flags[0] for name, flags in groups.items() if flags} == expected
    assert "usage: train.py --name NAME [flags]\n" in text
    assert not re.search(r"default:\s+(None|False|\[\])", text) and "(default: ViT-B_16)" in text


def test_runs_with_other_flags_share_no_file(monkeypatch):
    """Names: the reference's to begin with, and different for every different flag."""
    changes = [
        "",
        "--dataset cifar100",
        "--seed 1",
        "--learning_rate 0.03",
        "--train_batch_size 64",
        "--fp16 --fp16_opt_level O0",
        "--fp16 --fp16_opt_level O1",
        "--fp16",
        "--pretrained_dir auto",
        "--pretrained_dir a/ViT-B_16.npz",
        "--pretrained_dir b/ViT-B_16.npz",
        "--pretrained_dir a/other.npz",
        "--compile",
        "--cpu_kernels plain",
        "--num_steps 100 --warmup_steps 3",
        "--num_steps 101 --warmup_steps 3 --weight_decay 0.1 --seed 7 --max_grad_norm 2",
        "--num_steps 102 --warmup_steps 3 --weight_decay 0.1 --seed 7 --max_grad_norm 2",
        "--decay_type linear",
    ]
    files = [RunFiles(parse_args(["--name", "x", *change.split()])) for change in changes]
    files.append(RunFiles(parse_args(["--name", "x_ViT-B_16"])))
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "4")
    files.append(RunFiles(parse_args(["--name", "x"])))
    for kind in ("log", "best", "final", "lock", "tensorboard", "tensorboard_lock"):
        paths = [getattr(each, kind) for each in files]
        assert len(set(paths)) == len(files), kind
        assert max(len(path.name) for path in paths) < 200
    plain = files[0]
    assert plain.run_name == "x_ViT-B_16_norm_LN_fp_False_img_224_pretrain_F"
    assert plain.best == Path("output") / f"{plain.run_name}_checkpoint.bin"
    for each in files:
        assert re.match("cifar100?_ViT-B_16_norm_LN_fp_(True|False)_img_224_pret", each.log.name)


@pytest.mark.parametrize(
    "flags, others",
    [
        ("", "--fp16_opt_level O1 --loss_scale 8 --half_dtype bf16"),  # without --fp16
        ("--fp16 --fp16_opt_level O0", "--fp16 --fp16_opt_level O0 --half_dtype bf16"),
        ("", "--log_every 3 --save_every 7 --grad_checkpointing --data_dir elsewhere"),
        ("--pretrained_dir auto", "--pretrained_dir ./pretrain/ViT-B_16.npz"),  # the reference's
    ],
)
def test_flags_without_effect_on_results_make_no_other_run(flags, others):
    args, same = (parse_args(["--name", "x", *text.split()]) for text in (flags, others))
    assert result_flags(args) == result_flags(same)
    assert RunFiles(args).run_name == RunFiles(same).run_name
    pretrained, level = "T" if "auto" in flags else "F", ",fp16_opt_level=O0" * args.fp16
    name = f"x_ViT-B_16_norm_LN_fp_{args.fp16}_img_224_pretrain_{pretrained}{level}"
    assert RunFiles(args).run_name == name


def test_flags_without_effect_on_results_may_change(forks, tmp_path):
    """--stop_after keeps the schedule, and resuming with such flags ends as the whole run does."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    whole.mkdir()
    forks.run([*TINY, "--stop_after", "6"], broken)
    assert log_of(broken).steps == [6] and not log_of(broken).finished
    flags = ["--fp16_opt_level", "O1", "--grad_checkpointing"]
    assert "Resumed from step 6:" in forks.run([*TINY, *flags, "--resume"], broken).output
    forks.run(TINY, whole)
    ends = [next(folder.glob("output/*_final.bin")).read_bytes() for folder in (broken, whole)]
    assert ends[0] == ends[1]


def test_plain_cpu_kernels(forks, tmp_path):
    """They give the same losses but for rounding, where no dropout draws other numbers."""
    losses = []
    for kernels in ("auto", "plain"):
        folder, args = tmp_path / kernels, [*TINY, *NO_DROPOUT, "--cpu_kernels", kernels]
        folder.mkdir()
        done = forks.run(args, folder)
        losses.append(np.array(scalars(next(folder.glob("logs/tiny_*")))["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert "Chosen for this machine: O0 in float32, PyTorch's layers\n" in done.output
    evaluated = forks.run([*args, "--eval"], folder).output
    assert f"Valid Accuracy: {log_of(folder).best_accuracy:.5f}\n" in evaluated


# A whole run by the real command, and what it leaves

LEARN = [*TINY, *"--num_steps 100 --eval_every 40 --norm_type Rescale --fp16".split()]
# Has PyTorch, oneDNN and MKL do without AVX-512
AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on digits to its end, and its --eval."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(LEARN, folder)
    evaluated = run([*LEARN, "--eval"], folder)
    return folder, done, evaluated


def test_run_learns_and_leaves_its_files(finished):
    folder, done, _ = finished
    log = log_of(folder)
    assert log.path.name.startswith("digits_ViT-Ti_16_norm_Rescale_fp_True_img_16_pretrain_F_tiny,")
    assert log.steps == [40, 80, 100] and log.finished
    assert log.accuracy[-1] > 0.5 and log.loss[-1] < 1.8  # chance is 0.1 and 2.3
    assert log.total_parameters == "5.5M"
    assert log.flags["num_steps"] == 100 and log.flags["fp16"] is True
    text = log.path.read_text()
    assert re.search(r"Environment: Python .* torch 2\..*, commit \w+", text)
    assert "\r" not in done.stderr, "the progress bar is for terminals only"

    run_name = "tiny_ViT-Ti_16_norm_Rescale_fp_True_img_16_pretrain_F"
    best = load_checkpoint(next(folder.glob(f"output/{run_name}*_checkpoint.bin")))
    assert best["accuracy"] == pytest.approx(log.best_accuracy, abs=1e-6)
    assert all(v.dtype in (torch.float32, torch.int64) for v in best["model"].values())
    assert len(list(folder.glob("output/*_step_*.bin"))) == 2
    assert not list(folder.glob("output/*.part"))


def test_tensorboard_has_every_step(finished):
    (tensorboard,) = finished[0].glob("logs/tiny_*")
    curves = scalars(tensorboard)
    names = "loss lr grad_norm loss_scale images_per_s".split()
    assert {f"train/{name}" for name in names} <= curves.keys()
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 101))
    rates = dict(curves["train/lr"])
    assert rates[3] == pytest.approx(0.02 * 3 / 5) and rates[100] == 0
    for tag in ("test/accuracy", "test/loss"):
        assert [step for step, _ in curves[tag]] == [40, 80, 100]
    assert any("flags" in tag for tag in events(tensorboard).Tags()["tensors"])


def test_eval_repeats_the_best_evaluation_and_draws(finished):
    folder, _, evaluated = finished
    log = log_of(folder)
    best = log.accuracy.index(max(log.accuracy))
    assert f"Valid Accuracy: {log.accuracy[best]:.5f}" in evaluated.stdout
    assert f"Valid Loss: {log.loss[best]:.5f}" in evaluated.stdout
    for figure in ("plot_attn/Rescale_layer_0", "plot_attn/Rescale_layer_9"):
        assert (folder / f"img/{figure}.png").stat().st_size > 1000
    assert (folder / "img/plot_attn/Rescale_attention.png").exists()
    assert (folder / "img/plot_acc_loss/Rescale_loss_acc.png").exists()


def test_plots_by_themselves(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (best,) = finished[0].glob("output/*_checkpoint.bin")
    assert call(plot_acc_loss.main, log_of(finished[0]).path).returncode == 0
    assert call(plot_attn.main, best, "--out_dir", "here").returncode == 0
    for figure in ("img/plot_acc_loss/Rescale_loss_acc.png", "here/Rescale_layer_3.png"):
        data = Path(figure).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 200


def test_existing_run_is_not_overwritten(forks, finished, tmp_path):
    """A log alone is one too: in a clone of this repository logs come without their weights."""
    folder, log = finished[0], log_of(finished[0]).path
    (tmp_path / "alone").mkdir()
    shutil.copy(log, tmp_path / "alone")
    for output_dir in (folder / "output", tmp_path / "alone"):
        files = {path: path.read_bytes() for path in output_dir.glob("*.*")}
        done = forks.run([*LEARN, "--output_dir", output_dir], tmp_path, check=False)
        refused(done, output_dir, "--resume continues it, --overwrite starts over")
        assert files == {path: path.read_bytes() for path in files}
    assert log.name in done.output


@pytest.mark.parametrize("steps", ["2", "3"])
def test_a_warmup_longer_than_the_run_is_noted(forks, tmp_path, steps):
    done = forks.run([*LEARN, "--num_steps", "2", "--warmup_steps", steps], tmp_path)
    text = "The warmup of 3 steps is longer than the run\n"
    assert done.output.count(text) == (steps == "3")


def test_on_a_processor_without_bf16_units(finished, tmp_path):
    """There --fp16 trains in fp32, and a run from elsewhere goes on; the log tells of both."""
    folder = shutil.copytree(finished[0], tmp_path / "here")
    (file,) = folder.glob("output/*_step_80.bin")
    errors = run([*LEARN, "--resume", str(file)], folder, env=AVX2).stderr
    notes = [line for line in errors.splitlines() if "--half_dtype bf16" in line]
    assert len(notes) == 1 and "--fp16 computes in fp32 here: no bf16 units" in notes[0]
    words = "Not exact from here on: O0 in float32, "
    assert errors.count(words) == errors.count("Not exact") == ("AVX512" in capability())
    log = log_of(folder)
    assert log.finished and log.steps == [40, 80, 100] and log.accuracy[-1] > 0.5


def test_real_cifar10_run_is_reproducible(forks, tmp_path):
    """Two short runs on the real CIFAR-10 agree to the bit, and learn."""
    needs_cifar10()
    flags = (
        "--name c --dataset cifar10 --model_type ViT-Ti_16 --img_size 32 --train_batch_size 32"
        " --learning_rate 0.03 --warmup_steps 10 --num_steps 60 --eval_every 60"
    ).split()
    logs, finals = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        forks.run([*flags, "--data_dir", DATA], folder)
        logs.append(log_of(folder))
        finals.append(next(folder.glob("output/*_final.bin")).read_bytes())
    assert logs[0].loss == logs[1].loss and logs[0].accuracy == logs[1].accuracy
    assert logs[0].accuracy[-1] > 0.15 and logs[0].loss[-1] < 2.25  # chance: 0.1 and 2.303
    assert finals[0] == finals[1]


# Two processes


def test_two_processes_train_as_one_twice_as_large(forks, tmp_path):
    """2 x 8 images a step are the same 16 images: all losses on record are equal."""
    flags = "--num_steps 6 --log_every 2 --train_batch_size".split()
    curves = []
    for size, setup in (("16", ""), ("8", "two_processes(train)")):
        folder = tmp_path / size
        folder.mkdir()
        done = forks.run([*TINY, *NO_DROPOUT, *flags, size], folder, setup)
        assert done.output.count("Global Steps: 6") == 1, "only the main process logs"
        assert f"distributed training: {bool(setup)}" in done.output
        curves.append(scalars(next(folder.glob("logs/tiny_*"))))
    for tag in ("train/loss", "train/grad_norm", "test/loss", "test/accuracy"):
        one, two = (np.array(each[tag]) for each in curves)
        assert two == pytest.approx(one, rel=1e-4), tag


def test_torchrun_trains_and_evaluates(tmp_path):
    """BatchNorm's statistics differ between processes: evaluated are those that are saved."""
    flags = [*TINY, *"--norm_type BN --train_batch_size 8 --num_steps 8 --eval_every 4".split()]
    torchrun = "torch.distributed.run --standalone --nproc_per_node 2".split()
    for more in ([], ["--eval"]):
        done = subprocess.run(
            [sys.executable, "-m", *torchrun, str(ROOT / "train.py"), *flags, *more],
            cwd=tmp_path,
            env=environment(),
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    log = log_of(tmp_path)
    assert log.finished and log.flags["processes"] == 2
    best = log.accuracy.index(max(log.accuracy))
    printed = re.findall(r"Valid \w+: (\S+)", done.stdout)
    assert done.stdout.count("Figures: ") == 1
    expected = [log.loss[best], log.accuracy[best]]
    assert [float(number) for number in printed] == pytest.approx(expected, abs=2e-5)


def test_an_error_in_the_main_process_leaves_no_other_waiting(forks, traps):
    args = [*TINY, "--dataset", "cifar10", "--data_dir", "damaged"]
    done = forks.run(args, traps, "two_processes(train)", check=False, timeout=60)
    assert done.returncode == 2
    first, second = done.output.splitlines()
    assert first == second and first.startswith("train.py: error: --data_dir damaged: ")


# Surroundings


def test_importing_train_has_no_effect(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "import train"], cwd=tmp_path, env=env, check=True)
    assert list(tmp_path.iterdir()) == []


def test_results_into_a_closed_pipe(tmp_path):
    """3,000 lines or cells are more than a pipe holds."""
    write_log(tmp_path / "log.txt", evaluations=[(100, 1.0, 0.5)])
    logs = "$(yes log.txt | head -n 3000)"
    command = f"'{sys.executable}' '{ROOT / 'results.py'}' {logs} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("### Recipe reference\n", "")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone of the repository")
def test_only_changed_code_makes_a_commit_dirty(tmp_path, monkeypatch):
    """Figures do not: --eval draws them where the repository keeps its own."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    monkeypatch.setattr(run_logger, "__file__", str(clone / "utils/run_logger.py"))
    (figure, *_) = clone.glob("img/**/*.png")
    dirty = []
    for path in (figure, clone / "README.md", clone / "train.py"):
        path.write_bytes(b"changed")
        dirty.append(run_logger._environment().endswith("-dirty"))
    assert dirty == [False, False, True]
