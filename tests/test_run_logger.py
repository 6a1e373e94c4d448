"""The log as a run writes it, dies over it and resumes it, and as results.py reads it."""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from utils.run_logger import RunLogger, read_log

ROOT = Path(__file__).parent.parent
NAME = "cifar10_ViT-B_32_norm_LN_fp_True_img_224_pretrain_T.txt"
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


def start(folder, resume_step=None, norm_type="LN") -> RunLogger:
    resume = resume_step and {"step": resume_step, "evaluated": resume_step, "skipped": 0}
    logger = RunLogger(folder / "output" / NAME, folder / "logs", resume=resume)
    if resume_step is None:
        logger.warning("Process rank: -1, device: cpu")
        logger.info(
            f"Training parameters Namespace(dataset='digits', fp16=False, img_size=32, "
            f"model_type='ViT-Ti_16', norm_type='{norm_type}', num_steps=500, pretrained_dir=None)"
        )
    return logger


def evaluate(logger, step, accuracy=None):
    logger.info("***** Running Validation *****")
    logger.log_evaluation(step, 100 / step, step / 1000 if accuracy is None else accuracy)
    logger.scalars(step, {"test/accuracy": step / 1000})


def test_reader_takes_the_training_run_of_a_file_of_several(tmp_path):
    path = tmp_path / NAME
    path.write_text(REFERENCE_STYLE)
    run = read_log(path)
    assert (run.dataset, run.model_type, run.norm_type) == ("cifar10", "ViT-L_32", "GN")
    assert (run.fp16, run.img_size, run.pretrained, run.name) == (True, 384, True, "a, (b)")
    assert run.flags["device"] == "device(type='cuda')" and run.flags["local_rank"] == -1
    assert run.steps == [100, 200] and run.accuracy == [0.962, 0.1]
    assert run.loss[0] == 12.55808 and math.isnan(run.loss[1])
    assert (run.total_parameters, run.best_accuracy, run.minutes) == ("87.5M", 0.962345, 67.7)
    assert run.finished


def test_reader_takes_the_last_run_with_evaluations_else_the_last(tmp_path):
    path = tmp_path / NAME
    path.write_text(REFERENCE_STYLE + REFERENCE_STYLE.replace("0.96200", "0.50000"))
    assert read_log(path).accuracy == [0.5, 0.1]
    head = REFERENCE_STYLE.partition("04/27/2021 13:52:42")[0]
    path.write_text(head + head.replace("87.5M", "86.0M"))
    run = read_log(path)
    assert run.total_parameters == "86.0M" and run.steps == [] and run.best_accuracy is None


def test_a_log_cut_at_any_byte_never_gives_a_wrong_number(tmp_path):
    path = tmp_path / NAME
    training = REFERENCE_STYLE.partition("04/28/2021")[0].replace("nan", "0.13611")
    path.write_text(training)
    whole = read_log(path)
    evaluations, refused = 0, 0
    for length in range(len(training)):
        path.write_text(training[:length])
        try:
            run = read_log(path)
        except ValueError:
            refused += 1
            continue
        evaluations = len(run.steps)
        for field in ("steps", "loss", "accuracy"):
            assert getattr(run, field) == getattr(whole, field)[:evaluations]
        assert run.flags.items() <= whole.flags.items()
        assert run.total_parameters in (None, "87.5M") and run.minutes in (None, 67.7)
        assert run.best_accuracy in (None, 0.962, 0.962345)
    assert evaluations == 2
    assert refused <= training.index("Process rank:") + len("Process rank:")


def test_flags_missing_from_the_log_are_read_from_its_name(tmp_path):
    path = tmp_path / NAME
    path.write_text("04/27/2021 13:52:23 - WARNING - train - Process rank: -1\n")
    run = read_log(path)
    assert (run.dataset, run.model_type, run.norm_type) == ("cifar10", "ViT-B_32", "LN")
    assert (run.fp16, run.img_size, run.pretrained, run.flags) == (True, 224, True, {})
    with pytest.raises(ValueError, match="dataset, .*norm_type"):
        read_log(path.rename(tmp_path / "other.txt"))


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x80" * 100, b"# Notes\nGlobal Steps: 100\n"])
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no result log") as error:
        read_log(path)
    assert "\n" not in str(error.value)


def test_reader_reads_what_the_writer_wrote(tmp_path):
    logger = start(tmp_path)
    logger.info("Total Parameter: \t5.5M")
    for step in (100, 200):
        evaluate(logger, step)
    assert read_log(logger.log_file).best_accuracy == 0.2 and not read_log(logger.log_file).finished
    logger.log_end(0.98765, 12.34)
    logger.close()
    run = read_log(logger.log_file)
    assert (run.dataset, run.model_type, run.img_size) == ("digits", "ViT-Ti_16", 32)
    assert (run.steps, run.loss, run.accuracy) == ([100, 200], [1.0, 0.5], [0.1, 0.2])
    assert (run.total_parameters, run.best_accuracy, run.minutes) == ("5.5M", 0.98765, 12.3)
    assert run.finished and not run.pretrained and run.flags["num_steps"] == 500
    prefix = r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - (INFO|WARNING) - train - \S"
    assert all(re.match(prefix, line) for line in logger.log_file.read_text().splitlines())


def test_resuming_repeats_no_evaluation(tmp_path):
    logger = start(tmp_path)
    for step in (100, 200, 300, 400):
        evaluate(logger, step)
    logger.log_end(0.4, 1.0)
    with logger.log_file.open("a") as file:
        file.write("04/27/2021 13:53:09 - INFO - train - Global St")  # the process died here
    logger.close()

    logger = start(tmp_path, resume_step=250)
    logger.info("Resumed from x.bin")
    run = read_log(logger.log_file)
    assert run.steps == [100, 200] and run.minutes is None and not run.finished
    assert run.flags["norm_type"] == "LN"
    for step in (300, 400, 500):
        evaluate(logger, step, accuracy=0.9)
    logger.close()
    run = read_log(logger.log_file)
    assert run.steps == [100, 200, 300, 400, 500] and run.best_accuracy == 0.9
    assert "Global St\n" not in logger.log_file.read_text()
    assert [file.name for file in logger.log_file.parent.iterdir()] == [NAME]


def test_resuming_a_finished_run_goes_on_before_its_end(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100)
    logger.log_end(0.1, 1.0)
    evaluate(start(tmp_path, resume_step=100), 200)
    run = read_log(logger.log_file)
    assert run.steps == [100, 200] and run.best_accuracy == 0.2 and not run.finished


def test_resuming_drops_a_half_written_evaluation(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100)
    evaluate(logger, 200)
    whole = logger.log_file.read_text()
    logger.log_file.write_text(whole[: whole.rindex("0.20000") + 4])
    evaluate(start(tmp_path, resume_step=200), 200)
    assert read_log(logger.log_file).steps == [100, 200]


def test_resuming_writes_nothing_behind_a_half_written_line(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100)
    with logger.log_file.open("a") as file:
        file.write("04/27/2021 13:53:09 - INFO - train - Saved mo")
    evaluate(start(tmp_path, resume_step=100), 200)
    assert read_log(logger.log_file).steps == [100, 200]
    assert "Saved mo" not in logger.log_file.read_text()


def test_a_fresh_run_starts_the_log_anew_and_a_lost_log_can_be_resumed(tmp_path):
    evaluate(start(tmp_path), 100)
    assert read_log(start(tmp_path).log_file).steps == []
    (tmp_path / "output" / NAME).unlink()
    evaluate(start(tmp_path, resume_step=100), 200)
    assert read_log(tmp_path / "output" / NAME).steps == [200]


def test_an_inactive_logger_leaves_no_trace(tmp_path, capsys):
    logger = RunLogger(tmp_path / "output" / NAME, tmp_path / "logs", active=False)
    evaluate(logger, 100)
    logger.warning("no")
    logger.log_end(0.1, 1.0)
    logger.text("flags", "no")
    logger.hparams({"a": 1}, {"b": 2.0})
    logger.flush()
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_messages_on_stderr_leave_a_progress_bar_whole(tmp_path, capsys):
    logger = start(tmp_path)
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        bar.refresh()
        logger.info("two\nlines")
    line = logger.log_file.read_text().splitlines()[-2]
    shown = capsys.readouterr().err
    before, after = shown.split(f"{line}\nlines\n")
    assert re.search(r"\r *\r$", before), "the bar was not cleared before the message"
    assert "50%" in after, "the bar was not drawn again after the message"


def test_folders_deleted_mid_run_are_made_again(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100)
    shutil.rmtree(tmp_path / "output")
    shutil.rmtree(tmp_path / "logs")
    evaluate(logger, 200)
    shutil.rmtree(tmp_path / "logs")
    logger.flush()
    evaluate(logger, 300)
    shutil.rmtree(tmp_path / "output")
    evaluate(logger, 400)
    logger.close()
    assert read_log(logger.log_file).steps == [400]
    assert scalars(tmp_path / "logs") == {300: 0.3, 400: 0.4}


def test_a_tensorboard_write_that_fails_is_made_again(tmp_path, monkeypatch):
    """A folder deleted between check and write shows as an OSError of the writer's thread."""
    logger = start(tmp_path)

    def fail(*_):
        raise FileNotFoundError(tmp_path / "logs")

    monkeypatch.setattr(logger._writer, "add_scalar", fail)
    evaluate(logger, 100)
    logger.close()
    assert scalars(tmp_path / "logs") == {100: 0.1}


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder, tag="test/accuracy") -> dict[int, float]:
    points = [(event.step, round(event.value, 5)) for event in events(folder).Scalars(tag)]
    assert len(points) == len(dict(points)), "a step comes twice"
    return dict(points)


def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path):
    logger = start(tmp_path)
    for step in (100, 200, 300):
        evaluate(logger, step)
    logger.close()
    logger = start(tmp_path, resume_step=200)
    logger.scalars(300, {"test/accuracy": 0.75})
    logger.close()
    assert scalars(tmp_path / "logs") == {100: 0.1, 200: 0.2, 300: 0.75}


def test_tensorboard_shows_a_fresh_run_without_its_predecessor(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100)
    logger.close()
    logger = start(tmp_path)
    evaluate(logger, 200)
    logger.close()
    assert scalars(tmp_path / "logs") == {200: 0.2}


def test_tensorboard_holds_text_and_hparams_in_the_run_s_own_folder(tmp_path):
    logger = start(tmp_path)
    logger.text("flags", "seed 42")
    flags = {"seed": 42, "fp16": True, "pretrained_dir": None, "layers": [0, 3]}
    logger.hparams(flags, {"test/best_accuracy": 0.5})
    logger.close()
    assert all(path.is_file() for path in (tmp_path / "logs").iterdir())
    assert scalars(tmp_path / "logs", "test/best_accuracy") == {0: 0.5}
    held = events(tmp_path / "logs")
    assert held.Tensors("flags/text_summary")[0].tensor_proto.string_val == [b"seed 42"]
    session = held.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in flags:
        assert name.encode() in session
    assert b"[0, 3]" in session


def results(*arguments):
    command = [sys.executable, "results.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_results_tables(tmp_path):
    logger = start(tmp_path / "finished")
    evaluate(logger, 500, accuracy=0.98449)
    logger.log_end(0.98449, 12.0)
    cut = start(tmp_path / "cut", norm_type="BN")
    evaluate(cut, 200, accuracy=0.3111)
    empty = start(tmp_path / "empty", norm_type="GN")
    foreign = tmp_path / NAME
    foreign.write_text(REFERENCE_STYLE)
    logs = (cut.log_file, empty.log_file, logger.log_file, foreign)
    assert results(*logs).stdout.splitlines() == [
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
    assert results("--csv", *logs).stdout.splitlines() == [
        "dataset,model,norm,pretrained,best_accuracy_percent,minutes,steps,finished",
        "digits,ViT-Ti_16,BN,F,31.1,,200,F",
        "digits,ViT-Ti_16,GN,F,,,0,F",
        "digits,ViT-Ti_16,LN,F,98.4,12.0,500,T",
        "cifar10,ViT-L_32,GN,T,96.2,67.7,200,T",
    ]


def test_results_refuse_what_is_no_log_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no log")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.txt", tmp_path):
        outcome = results(path)
        assert outcome.returncode == 2 and outcome.stdout == ""
        assert outcome.stderr.count("\n") == 1 and str(path) in outcome.stderr


def test_the_commit_is_read_without_git_s_lock(tmp_path):
    """Truth: `git rev-parse`. A file's time is not the index's any more, which has git rewrite the
    index under its lock where it may; a kill -9 there would leave the lock."""

    def git(*args):
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        command = ["git", "-C", tmp_path, *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        code = "from utils.run_logger import _environment; print(_environment())"
        command = [sys.executable, "-c", code]
        line = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return line.stdout.strip().rpartition("commit ")[2]

    shutil.copytree(
        ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    file, index = tmp_path / "utils" / "scheduler.py", tmp_path / ".git" / "index"
    os.utime(file, (0, 0))
    before = index.read_bytes()
    assert commit() == git("rev-parse", "--short", "HEAD")
    assert index.read_bytes() == before
    git("status")  # as this does where it may
    assert index.read_bytes() != before
    file.write_text("changed")
    assert commit().endswith("-dirty")


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
    if (folder.parent / "results.csv").exists():
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
