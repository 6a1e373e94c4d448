"""Logs as utils/log_reader.py reads them, ours and the reference's."""

import csv
import math
import os
from pathlib import Path

import pytest
from programs import TINY

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
    assert (run.img_size, run.pretrained) == (384, True)
    assert (run.flags["fp16"], run.flags["name"]) == (True, "a, (b)")
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


def test_reader_gives_the_cost_and_the_last_evaluation(log):
    run = read_log(log)
    assert (run.pflop, run.images_per_s, run.final_accuracy) == (None, None, 0.1)
    assert run.best_accuracy == 0.962345 and not run.diverged
    compute = "04/27/2021 13:52:27 - INFO - train - Compute: 0.012345 PFLOP\n"
    speed = "04/28/2021 14:20:00 - INFO - train - Training speed: 1234 images/s\n"
    head, rest = REFERENCE_STYLE.split("04/27/2021 13:52:42", 1)
    training = rest.split("04/28/2021", 1)[0]
    log.write_text(f"{head}{compute}04/27/2021 13:52:42{training}{speed}")
    run = read_log(log)
    assert (run.pflop, run.images_per_s, run.finished) == (0.012345, 1234.0, True)
    log.write_text(log.read_text().replace(" PFLOP", " PFLO").replace("1234 images/s", "12"))
    run = read_log(log)
    assert (run.pflop, run.images_per_s) == (None, None)


def test_flags_that_older_logs_lack_have_what_their_runs_did(log):
    flags = read_log(log).flags
    assert (flags["recipe"], flags["optimizer"]) == ("reference", "sgd")
    assert (flags["qk_norm"], flags["val_split"]) == ("none", 0)
    new = "recipe='small', optimizer='muon', qk_norm='rms', val_split=5000, device="
    log.write_text(REFERENCE_STYLE.replace("device=", new, 2))
    flags = read_log(log).flags
    assert (flags["recipe"], flags["optimizer"]) == ("small", "muon")
    assert (flags["qk_norm"], flags["val_split"]) == ("rms", 5000)


def test_a_run_has_diverged_where_its_log_ends_with_the_images_of_the_step(log):
    begun = REFERENCE_STYLE.partition("04/27/2021 15:00:03")[0]
    prefix = "04/27/2021 14:00:00 - INFO - train - "
    fault = f"{prefix}Training images of the step: [3, 1]\n"
    skipped = f"{prefix}Skipped: loss nan, gradient norm nan at step 7, loss scale 1\n"
    for end, diverged in (
        ("", False),
        (skipped, False),
        (fault, True),
        (skipped + fault, True),
        (f"{prefix}End Training!\n", False),
    ):
        log.write_text(begun + end)
        assert read_log(log).diverged == diverged, end
        assert is_finished(log) == ("End" in end)


def test_a_training_that_diverges_is_read_as_such(forks, tmp_path):
    done = forks.run([*TINY, "--learning_rate", "1e30"], tmp_path, check=False)
    (log,) = tmp_path.glob("output/*.txt")
    assert done.returncode == 1 and read_log(log).diverged


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
        kind = f"{run.dataset}_{run.model_type}_norm_{run.norm_type}_fp_{run.flags['fp16']}"
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
