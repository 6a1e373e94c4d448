"""Writes a run's result log and TensorBoard events. utils/log_reader.py reads the log."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from utils.signal_stats import measured_copy

STEPS_TO_TIME = 10  # of this process, before it says how long the rest takes


class RunLogger:
    """Writes a run's text log, echoed on stderr, and TensorBoard events; silent unless `active`.

    What the `say_...` methods write depends on time, machine or process: it goes to stderr only.

    With `saved`, the content of a checkpoint, both continue from there. The log is restored as it
    was then, unless that was the log of another run (name or flags): then `is_new` is true.
    """

    def __init__(self, log_file, tensorboard_dir, active=True, saved: dict | None = None):
        self.active, self.is_new = active, False
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.log_file = Path(log_file)
        text = saved["log"].get(self.log_file.name, "") if saved else ""
        self.is_new = not text
        self.log_file.write_text(text, encoding="utf-8")
        # TensorBoard hides what an earlier process wrote into the folder from the purge step on.
        purge_step = saved["run"]["step"] + 1 if saved else 0
        self.writer = SummaryWriter(tensorboard_dir, purge_step=purge_step)

    def info(self, message: str) -> None:
        self._write("INFO", message)

    def warning(self, message: str) -> None:
        self._write("WARNING", message)

    def log_head(self, args, config, model, device, world_size, machine: str) -> None:
        """Log what the run is, and what was chosen for the `machine` that it runs on."""
        self.warning(
            f"Process rank: {args.local_rank}, device: {device}, n_gpu: {world_size}, distributed"
            f" training: {world_size > 1}, 16-bits training: {args.fp16}"
        )
        self.info(str(config))
        self.info(f"Training parameters {args}")
        self.text("flags", str(args))
        self.info(f"Total Parameter: \t{_parameters(model)}")
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
        """Log the StepRecords of the steps up to `step`; a skipped one has no loss to plot."""
        for number, record in enumerate(records, step - len(records) + 1):
            if record.finite:
                values = {"train/loss": record.loss, "train/lr": record.learning_rate}
                values |= {"train/grad_norm": record.grad_norm}
                values |= {"train/loss_scale": record.loss_scale}
                self._add_scalars(number, values)
            else:
                self.info(f"Skipped: {fault(number, record)}, loss scale {record.loss_scale:g}")
        self.scalars(step, {"train/images_per_s": images_per_s})

    def log_evaluation(self, step, batches, batch_size, loss, accuracy) -> None:
        """Log one evaluation, once it is done: optimizer steps so far, this process's batches,
        mean test loss, test accuracy in [0, 1].
        """
        self.info("***** Running Validation *****")
        self.info(f"  Num steps = {batches}")
        self.info(f"  Batch size = {batch_size}")
        self.info("Validation Results")
        self.info(f"Global Steps: {step}")
        self.info(f"Valid Loss: {loss:.5f}")
        self.info(f"Valid Accuracy: {accuracy:.5f}")

    def log_end(self, best_accuracy: float, minutes: float, images_per_s: float) -> None:
        """Log the end of a run: best test accuracy in [0, 1], wall time, speed of training."""
        self.info(f"Best Accuracy: \t{best_accuracy:.6f}")
        self.info(f"Training speed: {images_per_s:.0f} images/s")
        self.info("End Training!")
        self.info(f"last {minutes:.1f} min")

    def say_plan(self, args, dataset, model, machine, pflop, run, last) -> None:
        """Say what will be done from the state `run` to step `last`."""
        self.args, self.last, self.test_images = args, last, len(dataset.test_labels)
        self.first, self.time_is_said = run["step"], False
        device = next(model.parameters()).device
        where = device if args.processes == 1 else f"{args.processes} processes on {device.type}"
        self._say(
            f"{args.model_type} with {args.norm_type} ({_parameters(model)} parameters) on"
            f" {args.dataset} ({len(dataset.train_labels):,} training images); {where}, {machine}"
        )
        images = args.train_batch_size * args.processes
        self._say(
            f"From step {self.first} to {last} of {args.num_steps}, {images} images each;"
            f" {_counted(self._evaluations(run['evaluated'] + 1))}; {pflop:.3g} PFLOP in total"
        )

    def say_time_left(self, step: int, last_read: int, images_per_s: float) -> None:
        """Say once how long the rest takes, at the speed of the steps from `last_read` to `step`.

        With --compile, the first of these times includes compiling and is not used.
        """
        known_since = last_read if self.args.compile else step
        is_early = known_since < self.first + STEPS_TO_TIME
        if self.time_is_said or is_early or step == self.last:
            return
        self.time_is_said = True
        evaluations = self._evaluations(step)
        images = (self.last - step) * self.args.train_batch_size * self.args.processes
        images += evaluations * self.test_images / 3  # forward without backward: a third each
        duration, speed = _duration(images / images_per_s), f"{images_per_s:.0f} images/s"
        self._say(f"About {duration} left, with {_counted(evaluations)}, at {speed}")

    def say_next(self, files) -> None:
        """Say where the finished run's files are, and what to type next."""
        command = sys.orig_argv
        if self.args.processes > 1:
            command = ["torchrun", "--nproc_per_node", str(self.args.processes), *sys.argv]
        command = shlex.join([*command, "--eval"])
        results = shlex.quote(str(Path(sys.argv[0]).with_name("results.py")))
        logs = f"{shlex.quote(str(files.output_dir))}/*.txt"
        self._say(
            f"Log: {files.log}\nBest weights: {files.best}\nTensorBoard: {files.tensorboard}\n"
            f"Next:\n  {command}\n  tensorboard --logdir {files.tensorboard.parent}\n"
            f"  {sys.orig_argv[0]} {results} {logs}"
        )

    def _evaluations(self, first: int) -> int:
        """How many evaluations are due from step `first` to the last."""
        every, last = self.args.eval_every, self.last
        at_end = first <= last == self.args.num_steps and last % every > 0
        return last // every - (first - 1) // every + at_end

    def _say(self, message: str) -> None:
        if self.active:
            tqdm.write(message, file=sys.stderr)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each TensorBoard curve named in `values`."""
        self._add_scalars(step, values)
        if self.active:  # a checkpoint may follow: a run killed after it must not lack these points
            self.writer.flush()

    def _add_scalars(self, step, values):
        for tag, value in values.items() if self.active else ():
            self.writer.add_scalar(tag, value, step)

    def attention(self, step: int, model, images) -> None:
        """Add a figure of the attention over the first image to TensorBoard."""
        if not self.active:
            return
        from plot_attn import attention_figure  # slow to import, and seldom needed

        figure = attention_figure(measured_copy(model), images[:1].float(), "test image 0")
        self.writer.add_figure("attention", figure, step)

    def text(self, tag: str, text: str) -> None:
        """Add a text to TensorBoard."""
        if self.active:
            self.writer.add_text(tag, text)

    def hparams(self, flags: dict, metrics: dict[str, float]) -> None:
        """Add the run to TensorBoard's table of hyperparameters, with its final `metrics`."""
        if not self.active:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = (bool, int, float, str)
        flags = {k: v if isinstance(v, plain) else str(v) for k, v in flags.items()}
        # SummaryWriter.add_hparams would use a sub-folder, which TensorBoard shows as a second run.
        # Its first summary lists the columns; without it, those that differ come first.
        for summary in hparams(flags, metrics)[1:]:
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
            error.filename = str(self.log_file)  # the error of a full disk names no file
            raise
        self._say(line)


def fault(step, record) -> str:
    """What was not finite at `step`, for the log."""
    return f"loss {record.loss}, gradient norm {record.grad_norm} at step {step}"


def _parameters(model) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.{1 if count >= 1e6 else 3}f}M"


def _counted(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' * (evaluations != 1)}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


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
    """git's output for this program's folder, without a lock that a kill -9 would leave."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *args]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""
