"""Writes a run's result log and TensorBoard events. utils/log_reader.py reads the log."""

import itertools
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from utils.log_reader import EVALUATION, messages

BLOCK = re.compile(r"^(?=.* - (?:\*{5} Running Validation|Best Accuracy:|End Training!))", re.M)
SKIPPED = re.compile(r"^.* - Skipped: .*\n", re.M)


class RunLogger:
    """Writes a run's text log, echoed on stderr, and its TensorBoard events; mute unless `active`.

    With `resume`, the state of the run in a checkpoint, both go on from there: what they hold
    beyond its `step`, its last evaluation (`evaluated`) or its count of skipped steps (`skipped`)
    is dropped. Else both start anew.
    """

    def __init__(self, log_file, tensorboard_dir, active=True, resume: dict | None = None):
        self.active, self.is_new = active, active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, which mistakes need not

        self.log_file = Path(log_file)
        if resume is None:
            self.log_file.write_text("")
        elif self.log_file.exists():
            _drop_beyond(self.log_file, resume["evaluated"], resume["skipped"])
            self.is_new = self.log_file.stat().st_size == 0
        # TensorBoard hides what an earlier process wrote into the folder from the purge step on.
        purge_step = 0 if resume is None else resume["step"] + 1
        self.writer = SummaryWriter(tensorboard_dir, purge_step=purge_step)

    def info(self, message: str) -> None:
        self._write("INFO", message)

    def warning(self, message: str) -> None:
        self._write("WARNING", message)

    def log_head(self, args, config, model, device, world_size, machine: str) -> None:
        """Logs what the run is, and what was chosen for the `machine` that it runs on."""
        self.warning(
            f"Process rank: {args.local_rank}, device: {device}, n_gpu: {world_size}, distributed"
            f" training: {world_size > 1}, 16-bits training: {args.fp16}"
        )
        self.info(str(config))
        self.info(f"Training parameters {args}")
        self.text("flags", str(args))
        parameters = sum(p.numel() for p in model.parameters())
        digits = 1 if parameters >= 1e6 else 3
        self.info(f"Total Parameter: \t{parameters / 1e6:.{digits}f}M")
        self.info(f"Environment: {_environment()}")
        self.info(f"Chosen for this machine: {machine}")
        parts = args.gradient_accumulation_steps
        batch = args.train_batch_size
        self.info("***** Running training *****")
        self.info(f"  Total optimization steps = {args.num_steps}")
        self.info(f"  Instantaneous batch size per GPU = {batch // parts}")
        text = "Total train batch size (w. parallel, distributed & accumulation)"
        self.info(f"  {text} = {batch * world_size}")
        self.info(f"  Gradient Accumulation steps = {parts}")

    def log_resumed(self, step: int) -> None:
        self.info(f"Resumed from step {step}: {_environment()}")

    def log_steps(self, step: int, records, images_per_s: float) -> None:
        """Logs the StepRecords of the steps up to `step`; a skipped one has no loss to plot."""
        for number, record in enumerate(records, step - len(records) + 1):
            if record.finite:
                self._add_scalars(number, {"train/loss": record.loss})
                self._add_scalars(number, {"train/lr": record.learning_rate})
                self._add_scalars(number, {"train/grad_norm": record.grad_norm})
                self._add_scalars(number, {"train/loss_scale": record.loss_scale})
            else:
                self.info(f"Skipped: {fault(number, record)}, loss scale {record.loss_scale:g}")
        self.scalars(step, {"train/images_per_s": images_per_s})

    def log_evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Logs one evaluation: optimizer steps so far, mean test loss, test accuracy in [0, 1]."""
        self.info("Validation Results")
        self.info(f"Global Steps: {step}")
        self.info(f"Valid Loss: {loss:.5f}")
        self.info(f"Valid Accuracy: {accuracy:.5f}")

    def log_end(self, best_accuracy: float, minutes: float, images_per_s: float) -> None:
        """Logs the end of a run: best test accuracy in [0, 1], wall time, speed of training."""
        self.info(f"Best Accuracy: \t{best_accuracy:.6f}")
        self.info(f"Training speed: {images_per_s:.0f} images/s")
        self.info("End Training!")
        self.info(f"last {minutes:.1f} min")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds one point to each TensorBoard curve named in `values`."""
        self._add_scalars(step, values)
        if self.active:  # a checkpoint may follow: a run killed after it must not lack these points
            self.writer.flush()

    def _add_scalars(self, step, values):
        for tag, value in values.items() if self.active else ():
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str) -> None:
        """Adds a text to TensorBoard."""
        if self.active:
            self.writer.add_text(tag, text)

    def hparams(self, flags: dict, metrics: dict[str, float]) -> None:
        """Adds the run to TensorBoard's table of hyperparameters, with its final `metrics`."""
        if not self.active:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = (bool, int, float, str)
        flags = {k: v if isinstance(v, plain) else str(v) for k, v in flags.items()}
        # SummaryWriter.add_hparams would use a sub-folder, which TensorBoard shows as a second run.
        for summary in hparams(flags, metrics):
            self.writer.file_writer.add_summary(summary)
        self.scalars(0, metrics)

    def close(self) -> None:
        if self.active:
            self.writer.close()

    def _write(self, level: str, message: str) -> None:
        if not self.active:
            return
        line = f"{datetime.now():%m/%d/%Y %H:%M:%S} - {level} - train - {message}"
        try:
            with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.log_file)  # a full disk's error names none
            raise
        tqdm.write(line, file=sys.stderr)


def fault(step, record) -> str:
    """What was not finite at `step`, for the log."""
    return f"loss {record.loss}, gradient norm {record.grad_norm} at step {step}"


def _environment() -> str:
    """Versions of what results depend on, the processor and the git commit."""
    packages = ("torch", "torchvision", "numpy")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    commit = _git("describe", "--always")
    if _git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/requirements.txt"):
        commit += "-dirty"
    return (
        f"Python {platform.python_version()}, {versions}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, commit {commit or 'unknown'}"
    )


def _git(*args) -> str:
    """What git says of this program's folder. It takes no lock, which a kill -9 would leave."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *args]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def _drop_beyond(log_file: Path, evaluated: int, skipped: int) -> None:
    """Cuts the log before its first evaluation beyond step `evaluated` or half-written, or its end.

    Of the notes of skipped steps the first `skipped` remain.
    """
    text = log_file.read_text(encoding="utf-8", errors="replace")
    head, *blocks = BLOCK.split(text[: text.rfind("\n") + 1])

    def is_kept(block: str) -> bool:
        evaluation = EVALUATION.search(messages(block))
        return evaluation is not None and int(evaluation[1]) <= evaluated

    text = head + "".join(itertools.takewhile(is_kept, blocks))
    number = itertools.count(1)
    text = SKIPPED.sub(lambda note: note[0] if next(number) <= skipped else "", text)
    temporary = log_file.with_name(log_file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, log_file)
