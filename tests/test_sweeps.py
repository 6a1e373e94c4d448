"""The sweeps as their user runs them: sh train1.sh, sh train3.sh."""

import os
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, environment

from utils.args import parse_args
from utils.log_reader import read_log

MODELS = ("ViT-B_16", "ViT-B_32", "ViT-L_32", "ViT-L_16")
NORMS = ("LN", "BN", "GN", "Rescale")
TINY = "--dataset digits --img_size 16 --train_batch_size 8 --eval_every 2 --output_dir out"


def start(script, cwd, flags="", **env):
    """Starts a sweep over one small model, unless `env` says otherwise, as a process group."""
    env = {"DATASET": "", "GPU": "", "MODELS": "ViT-Ti_16", "PYTHON": sys.executable} | env
    return subprocess.Popen(
        ["sh", str(ROOT / script), *flags.split()],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep(*args, **env):
    """What a whole sweep printed on stderr and on stdout, and its exit status."""
    process = start(*args, **env)
    return process.communicate(timeout=600)[::-1] + (process.returncode,)


@pytest.mark.parametrize(
    "script, dataset, gpu", [("train1.sh", "cifar10", "0"), ("train3.sh", "cifar100", "1")]
)
def test_the_reference_s_trainings_in_its_order(tmp_path, script, dataset, gpu):
    """20 commands, by their meaning: a flag at its default may be written or not."""
    expected = []
    for model in MODELS:
        own = f"--name {dataset}-100_500 --dataset {dataset} --model_type {model} --gpu_id {gpu}"
        own += " --learning_rate 0.05 --fp16 --fp16_opt_level O2 --resume"
        if model == "ViT-L_16":
            own += " --train_batch_size 64"
        expected.append(f"{own} --norm_type LN --pretrained_dir ./pretrain/{model}.npz")
        expected += [f"{own} --norm_type {norm}" for norm in NORMS]

    errors, printed, status = sweep(script, tmp_path, PYTHON="echo", MODELS="")
    *commands, last = printed.splitlines()
    assert [parse_args(command.split()[1:]) for command in commands] == [
        parse_args(flags.split()) for flags in expected
    ]
    assert {command.split()[0] for command in commands} == {str(ROOT / "train.py")}
    assert last.endswith("0 of 20 trainings failed")
    assert status == 0 and errors == "" and not [*tmp_path.iterdir()]


def test_pretrained_and_from_scratch(tmp_path):
    """Pairs of commands that differ in their weights alone."""
    words = {"NORMS": "RMS Rescale", "DATASETS": "cifar100"}
    _, printed, status = sweep("train_pretrained.sh", tmp_path, PYTHON="echo", **words)
    *commands, last = printed.splitlines()
    assert status == 0 and last.endswith("0 of 4 trainings failed")
    runs = [vars(parse_args(command.split()[1:])) for command in commands]
    assert [run["norm_type"] for run in runs] == ["RMS", "RMS", "Rescale", "Rescale"]
    for tuned, scratch in (runs[:2], runs[2:]):
        assert {k for k in tuned if tuned[k] != scratch[k]} == {"pretrained_dir"}
        assert (tuned["pretrained_dir"], scratch["pretrained_dir"]) == ("auto", None)
        assert (tuned["recipe"], tuned["dataset"], tuned["fp16"]) == ("finetune", "cifar100", True)


def test_the_reference_s_curves(tmp_path):
    """Its four commands, cut to 200 steps; then the figure of their logs on those of its runs."""
    python = fake_python(tmp_path, 'echo "$@"')
    _, printed, status = sweep("reproduce.sh", tmp_path, PYTHON=python, REFERENCE="theirs")
    *commands, figure, last = printed.splitlines()
    assert status == 0 and last.endswith("0 of 4 trainings failed")
    own = "--name cifar10-100_500 --dataset cifar10 --model_type ViT-B_32 --fp16 --resume"
    own += " --fp16_opt_level O2 --stop_after 200 --output_dir reproduced --norm_type"
    expected = [parse_args(f"{own} {norm}".split()) for norm in NORMS]
    assert [parse_args(command.split()[1:]) for command in commands] == expected
    program, logs, flag, theirs = figure.split()
    assert (program, flag) == (str(ROOT / "plot_acc_loss.py"), "--reference")
    runs = "cifar10_ViT-B_32_norm_*_fp_True_img_224_pretrain_F"
    assert (logs, theirs) == (f"reproduced/{runs}_cifar10-100_500*.txt", f"theirs/{runs}.txt")


def test_flags_are_passed_on(tmp_path):
    flags = "--num_steps 2 --output_dir elsewhere --data_dir a*b"
    _, printed, _ = sweep("train3.sh", tmp_path, flags, PYTHON="echo")
    *commands, _ = printed.splitlines()
    assert len(commands) == 5
    assert all(command.endswith(f"--resume {flags}") for command in commands)


def fake_python(folder, commands):
    """The path of a new program to run trainings by: `commands`, of the shell."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{commands}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("status, started", [(130, 1), (143, 1), (2, 5), (137, 5)])
def test_an_interrupt_ends_the_sweep_a_failure_does_not(tmp_path, status, started):
    python = fake_python(tmp_path, f"echo started\nexit {status}")
    errors, printed, outcome = sweep("train1.sh", tmp_path, PYTHON=python)
    assert printed.count("started\n") == started
    if started == 1:
        assert outcome == status and errors == ""
    else:
        assert outcome == 1 and errors.count(f"failed with status {status}: ") == 5
        assert printed.endswith("5 of 5 trainings failed\n")


def test_a_sweep_and_the_same_again(tmp_path):
    """Real trainings of LN: from scratch it succeeds, and is then skipped; a file is missing."""
    python = fake_python(
        tmp_path, f'case "$*" in *"type LN"*) exec "{sys.executable}" "$@" ;; esac'
    )
    flags = f"{TINY} --num_steps 2"
    errors, printed, status = sweep("train1.sh", tmp_path, flags, PYTHON=python)
    assert status == 1 and printed.endswith("1 of 5 trainings failed\n")
    assert "--pretrained_dir pretrain/ViT-Ti_16.npz: no such file" in errors
    assert errors.count("failed with status 2: ") == errors.count("failed with status") == 1
    (log,) = (tmp_path / "out").glob("*.txt")
    assert "_norm_LN_fp_True_img_16_pretrain_F" in log.name
    text = log.read_text()
    assert text.count("End Training!") == 1

    errors, printed, status = sweep("train1.sh", tmp_path, flags, PYTHON=python)
    assert status == 1 and printed.count("is finished: nothing to do") == 1
    assert printed.endswith("1 of 5 trainings failed\n")
    assert [*(tmp_path / "out").glob("*.txt")] == [log] and log.read_text() == text


def test_control_c(tmp_path):
    """It reaches the shell and the training: that one saves itself, no other one starts."""
    commands = f'case "$*" in *pretrained*) ;; *) exec "{sys.executable}" "$@" ;; esac'
    python = fake_python(tmp_path, commands)
    process = start("train1.sh", tmp_path, f"{TINY} --num_steps 100000", PYTHON=python)
    try:
        log, deadline = None, time.monotonic() + 300
        while not log or "Global Steps: 2\n" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
            log = next((tmp_path / "out").glob("*.txt"), None)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    # Some shells exit with 128 + 2, others let the signal end them too.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Stopped by SIGINT" in log.read_text()
    assert [*(tmp_path / "out").glob("*.txt")] == [log] and "_norm_LN_" in log.name


def test_the_bench_chooses_rates_and_runs_seeds(tmp_path):
    """Truth: the learning rate whose log has the best last validation accuracy; then two seeds."""
    flags = "--num_steps 12 --warmup_steps 2 --train_batch_size 16 --eval_every 12"
    words = {"NORMS": "RMS", "RATES": "1e-6 0.02", "SEEDS": "1 2", "HELD_OUT": "300"}
    errors, printed, status = sweep("train_small.sh", tmp_path, flags, DATASET="digits", **words)
    assert status == 0, errors
    assert printed.splitlines()[-1].endswith("0 of 4 trainings failed")
    logs = [read_log(path) for path in tmp_path.glob("output/*.txt")]
    rates = {r.final_accuracy: r.flags for r in logs if r.flags["name"] == "rates"}
    assert len(rates) == 2 and {flags["val_split"] for flags in rates.values()} == {300}
    best = rates[max(rates)]["learning_rate"]
    seeds = [run.flags for run in logs if run.flags["name"] == "seeds"]
    assert sorted((f["seed"], f["learning_rate"]) for f in seeds) == [(1, best), (2, best)]
    assert {(f["val_split"], f["norm_type"]) for f in seeds} == {(0, "RMS")}


def test_the_bench_goes_beyond_its_rates(tmp_path):
    """The best rate is the highest of the grid, then twice it; that diverges at four times it.

    A stand-in for train.py writes the logs: accuracy grows with the rate up to 0.1.
    """
    commands = f"""
case $1 in *train.py) ;; *) exec "{sys.executable}" "$@" ;; esac
rate=$(echo "$@" | sed "s/.*learning_rate //; s/ .*//")
say() {{ printf "11/25/2026 01:00:00 - INFO - train - %s\\n" "$1"; }}
mkdir -p output
log="output/cifar10_x_norm_LN_x_rates,$rate.txt"
touch "output/cifar10_x_norm_LN_x_rates_bench_adamw.txt"  # of another sweep
case "$*" in *seeds*) log="output/seeds_$rate.txt" ;; esac
{{
    say "Training parameters Namespace(dataset='cifar10', model_type='x', norm_type='LN',\
 fp16=False, img_size=32, pretrained_dir=None, recipe='bench', val_split=9,\
 learning_rate=$rate, num_steps=1)"
    say "Global Steps: 1"; say "Valid Loss: 1.00000"
    if [ "$rate" = 0.16 ]; then say "Training images of the step: 1"; exit; fi
    say "Valid Accuracy: 0$(echo "$rate" | sed "s/^0//; s/$/000/; s/\\(......\\).*/\\1/")"
    say "End Training!"
}} > "$log"
"""
    python = fake_python(tmp_path, commands)
    words = {"NORMS": "LN", "SEEDS": "1 2"}
    errors, printed, status = sweep("train_small.sh", tmp_path, PYTHON=python, **words)
    assert status == 0, errors
    rates = [path.name.split(",")[1] for path in tmp_path.glob("output/*rates,*")]
    tried = ["0.005", "0.01", "0.02", "0.04", "0.08", "0.16"]
    assert sorted(rates) == [f"{rate}.txt" for rate in tried]
    assert [path.name for path in tmp_path.glob("output/seeds*")] == ["seeds_0.08.txt"]
    assert printed.splitlines()[-1].endswith("0 of 8 trainings failed")


def test_a_sweep_of_an_unknown_recipe_is_refused(tmp_path):
    errors, printed, status = sweep("train_small.sh", tmp_path, RECIPE="bogus")
    assert (status, printed) == (2, "") and errors.count("\n") == 1
    assert "RECIPE bogus is none of reference, small, bench," in errors


def test_the_bench_beside_another_sweep(tmp_path):
    """Runs of the same name with other flags leave the best rate open: said, and no seed is run."""
    flags = "--num_steps 12 --warmup_steps 2 --train_batch_size 16 --eval_every 12"
    words = {"NORMS": "RMS", "RATES": "0.02", "SEEDS": "1", "HELD_OUT": "300", "DATASET": "digits"}
    for more, name, status, text in (
        ("", "", 0, ""),
        ("--train_batch_size 8", "", 1, "several sweeps (NAME): RMS\n"),
        ("--train_batch_size 8", "eight", 0, ""),
    ):
        more_words = words | {"NAME": name} if name else words
        errors, printed, outcome = sweep(
            "train_small.sh", tmp_path, f"{flags} {more}", **more_words
        )
        assert (outcome, text in errors) == (status, True), errors
        assert "0 of 1 trainings" in printed if status else "0 of 2 trainings" in printed
    names = sorted(read_log(path).flags["name"] for path in tmp_path.glob("output/*.txt"))
    assert names == ["rates", "rates", "rates_eight", "seeds", "seeds_eight"]
