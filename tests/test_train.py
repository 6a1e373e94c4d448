"""train.py as its user runs it: mistakes, a whole run and what it leaves, processes, restarts."""

import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import ROOT, TINY, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import dist_util
from utils.args import RunFiles, parse_args
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.run_logger import read_log

DATA = Path(os.environ.get("RESCALEVIT_DATA", ROOT / "data"))


def needs_cifar10():
    """Skip where the real CIFAR-10 is not, unless it is required (as in CI)."""
    if not (DATA / "cifar-10-batches-py").exists():
        if os.environ.get("RESCALEVIT_REQUIRE_CIFAR"):
            pytest.fail(f"CIFAR-10 is required but not in {DATA}")
        pytest.skip(f"no CIFAR-10 in {DATA}")


# What is wrong, and what the line must name: the flag, the value and what is allowed.
MISTAKES = {
    "no name": (["--dataset", "digits"], ["--name"]),
    "unknown flag": (["--lr", "1"], ["--lr"]),
    "norm": (["--norm_type", "XN"], ["--norm_type", "XN", "LN, BN, GN, Rescale"]),
    "model": (["--model_type", "ViT-X_9"], ["--model_type", "ViT-X_9", "ViT-B_16"]),
    "dataset": (["--dataset", "mnist"], ["--dataset", "mnist", "cifar100"]),
    "patch": (["--img_size", "100"], ["--img_size", "100", "16"]),
    "accumulation": (
        ["--train_batch_size", "10", "--gradient_accumulation_steps", "3"],
        ["--train_batch_size", "10", "3"],
    ),
    "zero steps": (["--num_steps", "0"], ["--num_steps", "0", "from 1"]),
    "negative batch": (["--train_batch_size", "-4"], ["--train_batch_size", "-4", "from 1"]),
    "fraction": (["--eval_every", "2.5"], ["--eval_every", "2.5", "whole number"]),
    "negative rate": (["--learning_rate", "-1"], ["--learning_rate", "-1", "from 0"]),
    "nan": (["--weight_decay", "nan"], ["--weight_decay", "nan"]),
    "zero clip": (["--max_grad_norm", "0"], ["--max_grad_norm", "above 0"]),
    "level": (["--fp16_opt_level", "O4"], ["--fp16_opt_level", "O4", "O0, O1, O2, O3"]),
    "decay": (["--decay_type", "step"], ["--decay_type", "step", "cosine, linear"]),
    "path in name": (["--name", "../x"], ["--name", "../x"]),
    "apex": (["--amp_backend", "apex"], ["--amp_backend", "2025", "native"]),
    "output is a file": (["--output_dir", "a_file"], ["--output_dir", "a_file"]),
    "output unwritable": (["--output_dir", "/proc/here"], ["--output_dir", "/proc/here"]),
    "loss scale at O3": (
        ["--fp16", "--fp16_opt_level", "O3", "--loss_scale", "8"],
        ["--loss_scale", "8", "O1 and O2"],
    ),
    "empty path": (["--pretrained_dir", ""], ["--pretrained_dir", "''", "a path"]),
    "empty checkpoint": (["--resume="], ["--resume", "''"]),
    "no weights": (["--pretrained_dir", "none.npz"], ["--pretrained_dir", "none.npz", "auto"]),
    "no checkpoint": (["--resume", "none.bin"], ["--resume", "none.bin"]),
    "damaged data": (
        ["--dataset", "cifar10", "--data_dir", "damaged"],
        ["--data_dir", "data_batch_1", "damaged"],
    ),
    "cut weights": (["--pretrained_dir", "cut.npz"], ["--pretrained_dir", "cut.npz"]),
    "text as weights": (["--pretrained_dir", "a_file"], ["--pretrained_dir", "a_file"]),
    "wrong weights": (
        ["--pretrained_dir", "other.npz"],
        ["--pretrained_dir", "other.npz", "lacks"],
    ),
    "cut checkpoint": (["--resume", "cut.bin"], ["--resume", "cut.bin"]),
    "weights only": (["--resume", "weights.bin"], ["--resume", "weights.bin", "weights only"]),
    "no best yet": (["--eval"], ["checkpoint.bin", "no such file"]),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """What train.py answers to each mistake; run two at a time, as each takes seconds to start.

    Their seeds differ, or they would be one run, which cannot be under way twice.
    """
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "a_file").write_text("not a folder\n")
    (folder / "damaged/cifar-10-batches-py").mkdir(parents=True)
    (folder / "damaged/cifar-10-batches-py/data_batch_1").write_bytes(b"\0" * 100)
    np.savez(folder / "other.npz", **{"cls": np.zeros((1, 1, 192), np.float32)})
    (folder / "cut.npz").write_bytes((folder / "other.npz").read_bytes()[:100])
    save_checkpoint({"model": {"w": torch.zeros(9)}}, folder / "weights.bin")
    (folder / "cut.bin").write_bytes((folder / "weights.bin").read_bytes()[:-200])
    before = sorted(folder.rglob("*"))

    def answer(mistake):
        tiny = [] if mistake == "no name" else [*TINY, "--seed", str(list(MISTAKES).index(mistake))]
        return run([*tiny, *MISTAKES[mistake][0]], folder, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(MISTAKES, pool.map(answer, MISTAKES)))
    left = [path for path in folder.rglob("*") if path not in before and path.is_file()]
    return done, left


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_line_and_status_2(mistakes, mistake):
    done = mistakes[0][mistake]
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
    for word in MISTAKES[mistake][1]:
        assert word in done.stderr


def test_mistakes_leave_no_files(mistakes):
    assert mistakes[1] == []


def test_help_groups_flags_with_defaults(tmp_path):
    text = run(["--help"], tmp_path).stdout
    for group in ("experiment:", "optimization:", "precision and speed:", "processes:"):
        assert group in text
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
    assert all(f"--{flag}" in text for flag in flags.keys() - {"processes"})  # torchrun says


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on digits to its end, and its --eval."""
    folder = tmp_path_factory.mktemp("finished")
    learn = ["--num_steps", "150", "--eval_every", "60", "--norm_type", "Rescale", "--fp16"]
    done = run([*TINY, *learn], folder)
    evaluated = run([*TINY, *learn, "--eval"], folder)
    return folder, done, evaluated


def test_run_learns_and_leaves_its_files(finished):
    folder, done, _ = finished
    log = read_log(next(folder.glob("output/digits_ViT-Ti_16_norm_Rescale_fp_True_img_16*.txt")))
    assert log.steps == [60, 120, 150] and log.finished
    assert log.accuracy[-1] > 0.6 and log.loss[-1] < 1.5  # chance is 0.1 and 2.3
    assert log.total_parameters == "5.5M"
    assert log.flags["num_steps"] == 150 and log.flags["fp16"] is True
    text = log.path.read_text()
    assert re.search(r"Environment: Python .* torch 2\..*, commit \w+", text)
    assert "\r" not in done.stderr, "the progress bar is for terminals only"

    run_name = "tiny_ViT-Ti_16_norm_Rescale_fp_True_img_16_pretrain_F"
    best = load_checkpoint(next(folder.glob(f"output/{run_name}*_checkpoint.bin")), True)
    assert best["accuracy"] == pytest.approx(log.best_accuracy, abs=1e-6)
    assert all(v.dtype in (torch.float32, torch.int64) for v in best["model"].values())
    assert len(list(folder.glob("output/*_step_*.bin"))) == 2
    assert not list(folder.glob("output/*.lock")) + list(folder.glob("output/*.part"))


def test_tensorboard_has_every_step(finished):
    folder, _, _ = finished
    events = EventAccumulator(str(next(folder.glob("logs/tiny_*"))))
    events.Reload()
    tags = events.Tags()
    curves = "loss lr grad_norm loss_scale images_per_s".split()
    assert {f"train/{name}" for name in curves} <= set(tags["scalars"])
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 151))
    rates = {point.step: point.value for point in events.Scalars("train/lr")}
    assert rates[3] == pytest.approx(0.02 * 3 / 5) and rates[150] == 0
    assert [point.step for point in events.Scalars("test/accuracy")] == [60, 120, 150]
    assert [point.step for point in events.Scalars("test/loss")] == [60, 120, 150]
    assert any("flags" in tag for tag in tags["tensors"])


def test_eval_repeats_the_best_evaluation_and_draws(finished):
    folder, _, evaluated = finished
    log = read_log(next(folder.glob("output/*.txt")))
    best = log.accuracy.index(max(log.accuracy))
    assert f"Valid Accuracy: {log.accuracy[best]:.5f}" in evaluated.stdout
    assert f"Valid Loss: {log.loss[best]:.5f}" in evaluated.stdout
    for figure in ("plot_attn/Rescale_layer_0", "plot_attn/Rescale_layer_9"):
        assert (folder / f"img/{figure}.png").stat().st_size > 1000
    assert (folder / "img/plot_attn/Rescale_attention.png").exists()
    assert (folder / "img/plot_acc_loss/Rescale_loss_acc.png").exists()


def test_plots_by_themselves(finished, tmp_path):
    folder, _, _ = finished
    log = str(next(folder.glob("output/*.txt")))
    run([log], tmp_path, program="plot_acc_loss.py")
    best = str(next(folder.glob("output/*_checkpoint.bin")))
    run([best, "--out_dir", "here"], tmp_path, program="plot_attn.py")
    for figure in ("img/plot_acc_loss/Rescale_loss_acc.png", "here/Rescale_layer_3.png"):
        data = (tmp_path / figure).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 200


def test_existing_run_is_not_overwritten(finished):
    folder, _, _ = finished
    learn = ["--num_steps", "150", "--eval_every", "60", "--norm_type", "Rescale", "--fp16"]
    files = {path: path.read_bytes() for path in folder.rglob("output/*.*")}
    done = run([*TINY, *learn], folder, check=False)
    assert done.returncode == 2 and "--resume" in done.stderr and "--overwrite" in done.stderr
    assert files == {path: path.read_bytes() for path in folder.rglob("output/*.*")}


def test_log_alone_is_not_overwritten(finished, tmp_path):
    """As in a clone of this repository, where logs come without their weights."""
    folder, _, _ = finished
    log = shutil.copy(next(folder.glob("output/*.txt")), tmp_path)
    learn = ["--num_steps", "150", "--eval_every", "60", "--norm_type", "Rescale", "--fp16"]
    done = run([*TINY, *learn, "--output_dir", "."], tmp_path, check=False)
    assert done.returncode == 2 and Path(log).name in done.stderr
    assert Path(log).read_bytes() == next(folder.glob("output/*.txt")).read_bytes()


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(dist_util.DeviceError, match="--gpu_id 2: the GPUs here are 0 to 1"):
        dist_util.init(parse_args(["--name", "x", "--gpu_id", "2"]))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(dist_util.DeviceError, match="--local_rank 3: the GPUs here are 0 to 1"):
        dist_util.init(parse_args(["--name", "x", "--local-rank", "3"]))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(dist_util.DeviceError, match="--local_rank 2"):
        dist_util.init(parse_args(["--name", "x", "--local_rank", "0"]))


def test_runs_with_other_flags_share_no_file(monkeypatch):
    """Names: the reference's to begin with, and different for every different flag."""
    changes = [
        [],
        ["--dataset", "cifar100"],
        ["--seed", "1"],
        ["--learning_rate", "0.03"],
        ["--train_batch_size", "64"],
        ["--fp16", "--fp16_opt_level", "O1"],
        ["--fp16"],
        ["--pretrained_dir", "auto"],
        ["--pretrained_dir", "a/ViT-B_16.npz"],
        ["--pretrained_dir", "b/ViT-B_16.npz"],
        ["--pretrained_dir", "a/other.npz"],
        ["--compile"],
        ["--num_steps", "100", "--warmup_steps", "3"],
        [*"--num_steps 101 --warmup_steps 3 --weight_decay 0.1 --seed 7 --max_grad_norm 2".split()],
        [*"--num_steps 102 --warmup_steps 3 --weight_decay 0.1 --seed 7 --max_grad_norm 2".split()],
        ["--decay_type", "linear"],
    ]
    files = [RunFiles(parse_args(["--name", "x", *change])) for change in changes]
    files.append(RunFiles(parse_args(["--name", "x_ViT-B_16"])))
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "4")
    files.append(RunFiles(parse_args(["--name", "x"])))
    monkeypatch.undo()
    for kind in ("log", "best", "final", "lock", "tensorboard"):
        paths = [getattr(each, kind) for each in files]
        assert len(set(paths)) == len(files), kind
        assert max(len(path.name) for path in paths) < 200
    flags = ["--name", "x", "--pretrained_dir", "./pretrain/ViT-B_16.npz"]  # the reference's
    assert RunFiles(parse_args(flags)).run_name == "x_ViT-B_16_norm_LN_fp_False_img_224_pretrain_T"
    plain = files[0]
    assert plain.run_name == "x_ViT-B_16_norm_LN_fp_False_img_224_pretrain_F"
    assert plain.best == Path("output") / f"{plain.run_name}_checkpoint.bin"
    assert all(
        each.log.name.startswith(
            (
                "cifar10_ViT-B_16_norm_LN_fp_",
                "cifar100_ViT-B_16_norm_LN_fp_False_img_224_pretrain_F",
            )
        )
        for each in files
    )


def test_real_cifar10_run_is_reproducible(tmp_path):
    """Two short runs on the real CIFAR-10 agree to the bit, and learn."""
    needs_cifar10()
    flags = (
        "--name c --dataset cifar10 --model_type ViT-Ti_16 --img_size 32 --train_batch_size 32"
        " --learning_rate 0.03 --warmup_steps 10 --num_steps 60 --eval_every 60"
    ).split()
    logs = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        run([*flags, "--data_dir", str(DATA)], tmp_path / folder)
        logs.append(read_log(next((tmp_path / folder / "output").glob("cifar10_*.txt"))))
    assert logs[0].loss == logs[1].loss and logs[0].accuracy == logs[1].accuracy
    assert logs[0].accuracy[-1] > 0.15 and logs[0].loss[-1] < 2.25  # chance: 0.1 and 2.303
    finals = [next((tmp_path / f).glob("output/*_final.bin")).read_bytes() for f in "ab"]
    assert finals[0] == finals[1]


def test_two_processes_train_as_one_twice_as_large(tmp_path):
    """torchrun with 2 processes of 8 images against 1 of 16: the same images, so near-equal loss.

    Dropout differs between them, hence the tolerance.
    """
    flags = [*TINY, "--num_steps", "6", "--eval_every", "6", "--save_every", "6"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--master_port", "29517", str(ROOT / "train.py")]
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [*torchrun, *flags, "--train_batch_size", "8"],
        cwd=tmp_path / "two",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "one").mkdir()
    run([*flags, "--train_batch_size", "16"], tmp_path / "one")
    two, one = (read_log(next((tmp_path / n).glob("output/*.txt"))) for n in ("two", "one"))
    assert "distributed training: True" in two.path.read_text()
    assert two.loss[-1] == pytest.approx(one.loss[-1], abs=0.05)
    assert done.stderr.count("Global Steps: 6") == 1, "only the main process logs"


def test_stop_after_leaves_the_schedule_alone(tmp_path):
    """--stop_after 6 and then --resume ends where the uninterrupted run does.

    --grad_checkpointing may come and go: it changes memory and time alone.
    """
    run([*TINY, "--stop_after", "6"], tmp_path)
    log = read_log(next(tmp_path.glob("output/*.txt")))
    assert log.steps == [6] and not log.finished
    run([*TINY, "--resume", "--grad_checkpointing"], tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    run(TINY, whole)
    ends = [next(folder.glob("output/*_final.bin")).read_bytes() for folder in (tmp_path, whole)]
    assert ends[0] == ends[1]


def test_importing_train_has_no_effect(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "import train"], cwd=tmp_path, env=env, check=True)
    assert list(tmp_path.iterdir()) == []
