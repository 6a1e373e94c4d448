"""A run's result log and TensorBoard events: the one place that knows the log's format.

A log line is `MM/DD/YYYY HH:MM:SS - LEVEL - logger - message`; a message may go on over further
lines. One that starts with "Process rank" opens a run, and a log may hold several runs.
"""

import ast
import itertools
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

LINE = re.compile(r"^\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - [A-Z]+ - \S+ - (.*)$", re.M)
BLOCK = re.compile(r"^(?=.* - (?:\*{5} Running Validation|Best Accuracy:|End Training!))", re.M)
SKIPPED = re.compile(r"^.* - Skipped: .*\n", re.M)
EVENTS = re.compile(r"(events\.out\.tfevents\.)(\d+)(.*)")
FILE_NAME = re.compile(
    r"(?P<dataset>[^_]+)_(?P<model_type>.+)_norm_(?P<norm_type>.+)"
    r"_fp_(?P<fp16>True|False)_img_(?P<img_size>\d+)_pretrain_(?P<pretrained>[TF])"
)
# These match messages, freed of their prefixes. A number must have all its decimals, so that a
# half-written one does not count.
RUN = re.compile(r"^(?:Process rank:|Training parameters|Global Steps:)", re.M)
EVALUATION = re.compile(
    r"^Global Steps: (\d+)\nValid Loss: (nan|-?inf|\d+\.\d{5})\nValid Accuracy: (\d\.\d{5})$", re.M
)


class RunLogger:
    """Writes a run's text log, echoed on stderr, and its TensorBoard events; mute unless `active`.

    With `resume`, the state of the run in a checkpoint, both go on from there: what they hold
    beyond its `step`, its last evaluation (`evaluated`) or its count of skipped steps (`skipped`)
    is dropped. Else both start anew. A folder of theirs that is deleted while the run goes on is
    made again.
    """

    def __init__(
        self,
        log_file,
        tensorboard_dir,
        active: bool = True,
        resume: dict | None = None,
    ):
        self.active, self.is_new = active, active
        if not active:
            return
        self.log_file, self.tensorboard_dir = Path(log_file), Path(tensorboard_dir)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        if resume is None:
            self.log_file.write_text("")
        elif self.log_file.exists():
            _drop_beyond(self.log_file, resume["evaluated"], resume["skipped"])
            self.is_new = self.log_file.stat().st_size == 0
        # TensorBoard hides what an earlier process wrote into the folder from the purge step on.
        self._open_tensorboard(purge_step=0 if resume is None else resume["step"] + 1)

    def info(self, message: str) -> None:
        self._write("INFO", message)

    def warning(self, message: str) -> None:
        self._write("WARNING", message)

    def log_head(self, args, config, model, device, world_size) -> None:
        """Logs what the run is: processes, model config, flags, parameters, versions, commit."""
        self.warning(
            f"Process rank: {args.local_rank}, device: {device}, n_gpu: {world_size}, distributed"
            f" training: {world_size > 1}, 16-bits training: {args.fp16}"
        )
        self.info(str(config))
        self.info(f"Training parameters {args}")
        self.text("flags", str(args))
        parameters = sum(p.numel() for p in model.parameters())
        self.info(f"Total Parameter: \t{parameters / 1e6:.1f}M")
        self.info(f"Environment: {_environment()}")
        micro_batch = args.train_batch_size // args.gradient_accumulation_steps
        self.info("***** Running training *****")
        self.info(f"  Total optimization steps = {args.num_steps}")
        self.info(f"  Instantaneous batch size per GPU = {micro_batch}")
        self.info(
            "  Total train batch size (w. parallel, distributed & accumulation) ="
            f" {args.train_batch_size * world_size}"
        )
        self.info(f"  Gradient Accumulation steps = {args.gradient_accumulation_steps}")

    def log_resumed(self, step: int) -> None:
        self.info(f"Resumed from step {step}: {_environment()}")

    def log_steps(self, records, images_per_s: float) -> None:
        """Adds the StepRecords of training steps to TensorBoard; a skipped step has no point."""
        for record in records:
            if record.finite:
                values = {
                    "train/loss": record.loss,
                    "train/lr": record.learning_rate,
                    "train/grad_norm": record.grad_norm,
                    "train/loss_scale": record.loss_scale,
                }
                self._add_scalars(record.updates, values)
        self.scalars(records[-1].updates, {"train/images_per_s": images_per_s})

    def log_evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Logs one evaluation: optimizer steps so far, mean test loss, test accuracy in [0, 1]."""
        self.info("Validation Results")
        self.info(f"Global Steps: {step}")
        self.info(f"Valid Loss: {loss:.5f}")
        self.info(f"Valid Accuracy: {accuracy:.5f}")

    def log_end(self, best_accuracy: float, minutes: float) -> None:
        """Logs the end of a run: best test accuracy in [0, 1], wall time in minutes."""
        self.info(f"Best Accuracy: \t{best_accuracy:.6f}")
        self.info("End Training!")
        self.info(f"last {minutes:.1f} min")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds one point to each TensorBoard curve named in `values`."""
        self._add_scalars(step, values)
        self.flush()  # a checkpoint may follow: a run killed after it must not lack these points

    def _add_scalars(self, step, values):
        for tag, value in values.items():
            self._record(lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, step))

    def text(self, tag: str, text: str) -> None:
        """Adds a text to TensorBoard."""
        self._record(lambda writer: writer.add_text(tag, text))

    def hparams(self, flags: dict, metrics: dict[str, float]) -> None:
        """Adds the run to TensorBoard's table of hyperparameters, with its final `metrics`."""
        if not self.active:
            return
        from torch.utils.tensorboard.summary import hparams

        flags = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flags.items()
        }
        # SummaryWriter.add_hparams would use a sub-folder, which TensorBoard shows as a second run.
        for summary in hparams(flags, metrics):
            self._record(lambda writer, summary=summary: writer.file_writer.add_summary(summary))
        self.scalars(0, metrics)

    def flush(self) -> None:
        self._record(lambda writer: writer.flush())

    def close(self) -> None:
        self._record(lambda writer: writer.close())

    def _write(self, level: str, message: str) -> None:
        if not self.active:
            return
        line = f"{datetime.now():%m/%d/%Y %H:%M:%S} - {level} - train - {message}"
        # Opened for each message: a crash loses nothing, and a folder may be deleted mid-run.
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with _naming(self.log_file):
            with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        tqdm.write(line, file=sys.stderr)

    def _open_tensorboard(self, purge_step: int | None = None) -> None:
        # Imported here so that the readers of logs, which need no torch, start at once.
        from torch.utils.tensorboard import SummaryWriter

        _age_events(self.tensorboard_dir)
        self._writer = SummaryWriter(self.tensorboard_dir, purge_step=purge_step)

    def _record(self, write) -> None:
        """Calls `write(writer)`, with a new writer where the folder of the old one is gone."""
        if not self.active:
            return
        if not self.tensorboard_dir.is_dir():
            with suppress(OSError):
                self._writer.close()
            self._open_tensorboard()
        try:
            write(self._writer)
        except OSError:  # the writer's own thread was the first to miss the folder
            self._open_tensorboard()
            write(self._writer)


@dataclass(frozen=True)
class RunLog:
    """One run as its log tells it: steps are optimizer steps, accuracies are in [0, 1].

    `steps`, `loss` and `accuracy` have one entry per evaluation.
    """

    path: Path
    dataset: str
    model_type: str
    norm_type: str
    fp16: bool
    img_size: int
    pretrained: bool
    name: str | None
    flags: dict  # as logged; a value that is no Python literal is its source text
    steps: list[int]
    loss: list[float]
    accuracy: list[float]
    total_parameters: str | None  # such as "87.5M"
    best_accuracy: float | None  # what the log states at its end, else the best so far
    minutes: float | None
    finished: bool


def read_log(path) -> RunLog:
    """Reads a result log, ours or the reference's, as far as it goes.

    Of several runs in one file it takes the last that holds evaluations, else the last. What the
    logged flags lack is taken from the file's name. Raises ValueError if `path` is no result log,
    OSError if it cannot be read.
    """
    path = Path(path)
    text = _messages(path.read_text(encoding="utf-8", errors="replace"))
    runs = [run for run in re.split(r"^(?=Process rank:)", text, flags=re.M) if RUN.search(run)]
    if not runs:
        raise ValueError(f"{path} is no result log: it holds no line of a training run")
    run = next((run for run in reversed(runs) if EVALUATION.search(run)), runs[-1])

    def find(pattern: str) -> str | None:
        found = re.search(pattern, run, re.M)
        return found and found[1]

    flags = _parse_flags(find(r"^Training parameters Namespace\((.*)$") or "")
    known = _parse_file_name(path.name) | flags
    missing = {
        "dataset",
        "model_type",
        "norm_type",
        "fp16",
        "img_size",
        "pretrained_dir",
    } - known.keys()
    if missing:
        raise ValueError(
            f"{path}: neither its flags nor its name tell {', '.join(sorted(missing))}"
        )
    evaluations = EVALUATION.findall(run)
    accuracy = [float(accuracy) for _, _, accuracy in evaluations]
    best_accuracy = find(r"^Best Accuracy: \t(\d\.\d{6})$")
    minutes = find(r"^last (\d+\.\d) min$")
    return RunLog(
        path=path,
        dataset=known["dataset"],
        model_type=known["model_type"],
        norm_type=known["norm_type"],
        fp16=known["fp16"],
        img_size=known["img_size"],
        pretrained=bool(known["pretrained_dir"]),
        name=flags.get("name"),
        flags=flags,
        steps=[int(step) for step, _, _ in evaluations],
        loss=[float(loss) for _, loss, _ in evaluations],
        accuracy=accuracy,
        total_parameters=find(r"^Total Parameter: \t(.+M)$"),
        best_accuracy=float(best_accuracy) if best_accuracy else max(accuracy, default=None),
        minutes=float(minutes) if minutes else None,
        finished=bool(find(r"^(End Training!)$")),
    )


def _environment() -> str:
    """Versions of what results depend on, the processor and the git commit."""
    import torch

    packages = ("torch", "torchvision", "numpy")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    commit = _git("describe", "--always")
    if _git("status", "--porcelain", "--untracked-files=no"):
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


def _messages(text: str) -> str:
    """The first line of each message in `text`, without the prefix."""
    return "\n".join(LINE.findall(text))


def _parse_flags(arguments: str) -> dict:
    """The flags in `name='a', seed=42, ...)`; where the line was cut, those before the cut."""
    for source in (arguments, arguments.rpartition(", ")[0] + ")"):
        with suppress(SyntaxError, ValueError):
            return {
                keyword.arg: _literal(keyword.value)
                for keyword in ast.parse(f"Namespace({source}", mode="eval").body.keywords
            }
    return {}


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _parse_file_name(name: str) -> dict:
    """The flags that a log's name tells, none if the name is another."""
    match = FILE_NAME.match(name)
    if not match:
        return {}
    flags = match.groupdict()
    pretrained_dir = "unknown" if flags.pop("pretrained") == "T" else None
    return flags | {
        "fp16": flags["fp16"] == "True",
        "img_size": int(flags["img_size"]),
        "pretrained_dir": pretrained_dir,
    }


@contextmanager
def _naming(path):
    """Names `path` in an OSError that names no file, as one of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _age_events(folder: Path) -> None:
    """Renames event files that are not older than now, as the clock was set back since.

    TensorBoard reads a folder's files in the order of their names, events.out.tfevents.{seconds}.
    """
    files = sorted(path for path in folder.glob("events.out.tfevents.*") if EVENTS.match(path.name))
    for i, path in enumerate(files):
        start, seconds, rest = EVENTS.match(path.name).groups()
        latest = int(time.time()) - len(files) + i
        if int(seconds) > latest:
            path.rename(folder / f"{start}{latest:010d}{rest}")


def _drop_beyond(log_file: Path, evaluated: int, skipped: int) -> None:
    """Cuts the log before its first evaluation beyond step `evaluated` or half-written, or its end.

    Of the notes of skipped steps the first `skipped` remain.
    """
    text = log_file.read_text(encoding="utf-8", errors="replace")
    head, *blocks = BLOCK.split(text[: text.rfind("\n") + 1])

    def is_kept(block: str) -> bool:
        evaluation = EVALUATION.search(_messages(block))
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
