"""Logs as utils/log_reader.py reads them, ours and the reference's, and results.py's tables."""

import csv
import math
import os
from pathlib import Path

import pytest
from programs import call, refused, write_log

import results
from utils.errors import UserError
from utils.log_reader import is_finished, read_log

# As the reference writes it: its flags hold a call, and two --eval runs follow the training.
REFERENCE_STYLE = """\
04/27/2021 13:52:23 - WARNING - __main__ - Process rank: -1, device: cuda, n_gpu: 1
04/27/2021 13:52:27 - INFO - __main__ - classifier: token
hidden_size: 768
04/27/2021 13:52:27 - INFO - __main__ - Training parameters Namespace(dataset='cifar10', \
device=device(type='cuda'), fp16=True, img_size=384, local_rank=-1, model_type='ViT-L_32', \
name='a, (b)', norm_type='GN', num_steps=400, pretrained_dir='x.npz')
04/27/2021 13:52:27 - INFO - __main__ - Total Parameter: \t87.5M
04/27/2021 13:52:42 - INFO - __main__ - ***** Running Validation *****
04/27/2021 13:52:42 - INFO - __main__ -   Num steps = 20
04/27/2021 13:52:49 - INFO - __main__ - \n
04/27/2021 13:52:49 - INFO - __main__ - Validation Results
04/27/2021 13:52:49 - INFO - __main__ - Global Steps: 100
04/27/2021 13:52:49 - INFO - __main__ - Valid Loss: 12.55808
04/27/2021 13:52:49 - INFO - __main__ - Valid Accuracy: 0.96200
04/27/2021 13:52:49 - INFO - __main__ - Saved model checkpoint to [DIR: output]
04/27/2021 13:53:03 - INFO - __main__ - ***** Running Validation *****
04/27/2021 13:53:09 - INFO - __main__ - Validation Results
04/27/2021 13:53:09 - INFO - __main__ - Global Steps: 200
04/27/2021 13:53:09 - INFO - __main__ - Valid Loss: nan
04/27/2021 13:53:09 - INFO - __main__ - Valid Accuracy: 0.10000
04/27/2021 15:00:03 - INFO - __main__ - Best Accuracy: \t0.962345
04/27/2021 15:00:03 - INFO - __main__ - End Training!
04/27/2021 15:00:03 - INFO - root - last 67.7 min
04/28/2021 14:20:38 - WARNING - __main__ - Process rank: -1, device: cuda, n_gpu: 1
04/28/2021 14:20:39 - INFO - __main__ - Total Parameter: \t1.0M
04/28/2021 14:23:42 - WARNING - __main__ - Process rank: -1, device: cuda, n_gpu: 1
04/28/2021 14:23:45 - INFO - matplotlib.category - Using categorical units
"""


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(REFERENCE_STYLE)
    return path


def test_reader_takes_the_training_run_of_a_file_of_several(log):
    run = read_log(log)
    assert (run.dataset, run.model_type, run.norm_type) == ("cifar10", "ViT-L_32", "GN")
    assert (run.fp16, run.img_size, run.pretrained, run.name) == (True, 384, True, "a, (b)")
    assert run.flags["device"] == "device(type='cuda')" and run.flags["local_rank"] == -1
    assert run.steps == [100, 200] and run.accuracy == [0.962, 0.1]
    assert run.loss[0] == 12.55808 and math.isnan(run.loss[1])
    assert (run.total_parameters, run.best_accuracy, run.minutes) == ("87.5M", 0.962345, 67.7)
    assert run.finished


def test_reader_takes_the_last_run_with_evaluations_else_the_last(log):
    log.write_text(REFERENCE_STYLE + REFERENCE_STYLE.replace("0.96200", "0.50000"))
    assert read_log(log).accuracy == [0.5, 0.1]
    head = REFERENCE_STYLE.partition("04/27/2021 13:52:42")[0]
    log.write_text(head + head.replace("87.5M", "86.0M"))
    run = read_log(log)
    assert run.total_parameters == "86.0M" and run.steps == [] and run.best_accuracy is None


def test_a_log_cut_at_any_byte_never_gives_a_wrong_number(log):
    training = REFERENCE_STYLE.partition("04/28/2021")[0].replace("nan", "0.13611")
    log.write_text(training)
    whole = read_log(log)
    assert len(whole.steps) == 2
    refusals = 0
    for length in reversed(range(len(training))):
        os.truncate(log, length)
        try:
            run = read_log(log)
        except UserError:
            refusals += 1
            continue
        for field in ("steps", "loss", "accuracy"):
            assert getattr(run, field) == getattr(whole, field)[: len(run.steps)]
        assert run.flags == whole.flags
        assert run.total_parameters in (None, "87.5M") and run.minutes in (None, 67.7)
        assert run.best_accuracy in (None, 0.962, 0.962345)
    assert refusals <= training.index("Total Parameter")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no line of a training run"),
        (b"\x00\xff\x80" * 100, "no line of a training run"),
        (b"# Notes\nGlobal Steps: 100\n", "no line of a training run"),
        (b"04/27/2021 13:52:23 - WARNING - train - Process rank: -1\n", "dataset, .*norm_type"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(log, content, reason):
    log.write_bytes(content)
    with pytest.raises(UserError, match=f"no result log.*{reason}") as error:
        read_log(log)
    assert "\n" not in str(error.value)
    assert not is_finished(log) and not is_finished(log.parent / "missing.txt")


def test_results_tables(tmp_path, log):
    evaluations = {"LN": [(500, 0.1, 0.98449)], "BN": [(100, 2, 0.2), (200, 2, 0.3111)], "GN": []}
    minutes = {"LN": 12.0, "BN": None, "GN": None}
    logs = [
        write_log(tmp_path / f"{norm}.txt", norm, evaluations[norm], minutes[norm])
        for norm in ("BN", "GN", "LN")
    ]
    assert call(results.main, *logs, log).stdout.splitlines() == [
        "### cifar10",
        "",
        "| model | GN pretrained |",
        "|---|---|",
        "| ViT-L_32 at 384 px | 96.2 (67.7 min) |",
        "",
        "### digits",
        "",
        "| model | LN | BN | GN |",
        "|---|---|---|---|",
        "| ViT-Ti_16 at 32 px | 98.4 (12.0 min) | 31.1 (at step 200 of 500) | no evaluation |",
    ]
    assert call(results.main, "--csv", *logs, log).stdout.splitlines() == [
        "dataset,model,norm,pretrained,best_accuracy_percent,minutes,steps,finished",
        "digits,ViT-Ti_16,BN,F,31.1,,200,F",
        "digits,ViT-Ti_16,GN,F,,,0,F",
        "digits,ViT-Ti_16,LN,F,98.4,12.0,500,T",
        "cifar10,ViT-L_32,GN,T,96.2,67.7,200,T",
    ]


def test_results_refuse_what_is_no_log_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no log")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.txt", tmp_path):
        done = call(results.main, path)
        refused(done, path, program="results.py")
        assert done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not os.environ.get("RESCALEVIT_REFERENCE"),
    reason="RESCALEVIT_REFERENCE does not name a folder of the reference's logs",
)
def test_the_reference_s_own_logs():
    """Every log is read whole, and gives what the reference published (results.csv beside them)."""
    folder = Path(os.environ["RESCALEVIT_REFERENCE"])
    runs = {path.name: read_log(path) for path in sorted(folder.glob("*.txt"))}
    assert runs
    for name, run in runs.items():
        kind = f"{run.dataset}_{run.model_type}_norm_{run.norm_type}_fp_{run.fp16}"
        assert name == f"{kind}_img_{run.img_size}_pretrain_{'FT'[run.pretrained]}.txt"
        assert run.steps == list(range(100, 100 * len(run.steps) + 1, 100))
        assert run.finished == (run.steps[-1:] == [20000]) == (run.minutes is not None)
        assert run.best_accuracy == max(run.accuracy, default=None)
        assert run.flags["num_steps"] == 20000 and run.flags["device"] == "device(type='cuda')"
    with (folder.parent / "results.csv").open() as file:
        published = {
            (row["dataset"], row["model"], row["norm"], row["pretrained"]): row
            for row in csv.DictReader(file)
        }
    for run in runs.values():
        row = published.get((run.dataset, run.model_type, run.norm_type, "FT"[run.pretrained]))
        if row:
            # The reference rounded some of its accuracies and cut off others.
            difference = 100 * run.best_accuracy - float(row["best_accuracy_percent"])
            assert -0.05001 < difference < 0.1
            assert run.minutes == float(row["minutes"])
