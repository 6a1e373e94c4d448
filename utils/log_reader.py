"""Result logs as data: ours and the reference's.

A log line is `MM/DD/YYYY HH:MM:SS - LEVEL - logger - message`; a message may take several
lines. One that starts with "Process rank" opens a run, and a log may hold several runs.
"""

import ast
import csv
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

LINE = re.compile(r"^\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - [A-Z]+ - \S+ - (.*)$", re.M)
# These match messages without their prefixes. A number must have all its decimals, so that a
# half-written one does not count.
RUN = re.compile(r"^(?:Process rank:|Training parameters|Global Steps:)", re.M)
EVALUATION = re.compile(
    r"^Global Steps: (\d+)\nValid Loss: (nan|-?inf|\d+\.\d{5})\nValid Accuracy: (\d\.\d{5})$", re.M
)
NEEDED = {"dataset", "model_type", "norm_type", "fp16", "img_size", "pretrained_dir"}  # flags
# Flags that older logs lack, and what their runs did.
OLDER = {"recipe": "reference", "optimizer": "sgd", "qk_norm": "none", "val_split": 0}
OLDER |= {"head_factor": 1.0, "position_resize": "auto", "patch_dropout": 0.0}
OLDER |= {"patch_dropout_until": 1.0}
# Flags that decide neither the weights nor which of them count as best: they are in no file name,
# and may change when a run is resumed.
OPERATIONAL = (
    "name output_dir data_dir eval eval_batch_size gpu_id local_rank resume overwrite save_every"
    " stop_after log_every log_signal grad_checkpointing"
).split()


@dataclass(frozen=True)
class RunLog:
    """One run as its log tells it: steps are optimizer steps, accuracies are in [0, 1].

    `steps`, `loss` and `accuracy` have one entry per evaluation: on the test images, or on
    held-out training images where the flag val_split is above 0.
    """

    path: Path
    dataset: str
    model_type: str
    norm_type: str
    img_size: int
    pretrained: bool
    flags: dict  # as logged, or of OLDER; a value that is no Python literal is its source text
    steps: list[int]
    loss: list[float]
    accuracy: list[float]
    total_parameters: str | None  # such as "87.5M"
    pflop: float | None  # of all training steps, forward and backward
    images_per_s: float | None  # in training, over the whole run
    best_accuracy: float | None  # what the log states at its end, else the best so far
    final_accuracy: float | None  # of the last evaluation
    minutes: float | None
    finished: bool
    diverged: bool  # ended by a loss or gradient that is not finite


def read_log(path) -> RunLog:
    """Read a result log, ours or the reference's, as far as it goes.

    Of several runs in one file it takes the last that holds evaluations, else the last. Raises
    UserError if `path` is no result log, OSError if it cannot be read.
    """
    path = Path(path)
    text = messages(path.read_text(encoding="utf-8", errors="replace"))
    runs = [run for run in re.split(r"^(?=Process rank:)", text, flags=re.M) if RUN.search(run)]
    if not runs:
        raise UserError(f"{path} is no result log: it holds no line of a training run")
    run = next((run for run in reversed(runs) if EVALUATION.search(run)), runs[-1])

    def find(pattern: str) -> str | None:
        found = re.search(pattern, run, re.M)
        return found and found[1]

    flags = _parse_flags(find(r"^Training parameters Namespace\((.*)$") or "")
    missing = NEEDED - flags.keys()
    if missing:
        raise UserError(f"{path} is no result log: its flags lack {', '.join(sorted(missing))}")
    flags = OLDER | flags
    evaluations = EVALUATION.findall(run)
    accuracy = [float(accuracy) for _, _, accuracy in evaluations]
    best_accuracy = find(r"^Best Accuracy: \t(\d\.\d{6})$")
    minutes = find(r"^last (\d+\.\d) min$")
    pflop = find(r"^Compute: ([\d.e+-]+) PFLOP$")
    images_per_s = find(r"^Training speed: ([\d.e+-]+) images/s$")
    finished = bool(find(r"^(End Training!)$"))
    return RunLog(
        path=path,
        dataset=flags["dataset"],
        model_type=flags["model_type"],
        norm_type=flags["norm_type"],
        img_size=flags["img_size"],
        pretrained=bool(flags["pretrained_dir"]),
        flags=flags,
        steps=[int(step) for step, _, _ in evaluations],
        loss=[float(loss) for _, loss, _ in evaluations],
        accuracy=accuracy,
        total_parameters=find(r"^Total Parameter: \t(.+M)$"),
        pflop=float(pflop) if pflop else None,
        images_per_s=float(images_per_s) if images_per_s else None,
        best_accuracy=float(best_accuracy) if best_accuracy else max(accuracy, default=None),
        final_accuracy=accuracy[-1] if accuracy else None,
        minutes=float(minutes) if minutes else None,
        finished=finished,
        # What utils/divergence.py logs last.
        diverged=not finished and "\nTraining images of the step:" in run,
    )


def read_published(path) -> list[RunLog]:
    """The results in a CSV file such as docs/reference_results.csv, as runs of 20,000 steps.

    Raises UserError if it is none.
    """
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        runs = [_published(path, row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of results: {error}") from None
    if not runs:
        raise UserError(f"{path} is no table of results: it has no rows")
    return runs


def _published(path, row) -> RunLog:
    accuracy = float(row["best_accuracy_percent"]) / 100
    return RunLog(
        path=Path(path),
        dataset=row["dataset"],
        model_type=row["model"],
        norm_type=row["norm"],
        img_size=224,
        pretrained=row["pretrained"] == "T",
        flags=OLDER | {"recipe": "published", "num_steps": 20000},
        steps=[20000],
        loss=[math.nan],
        accuracy=[accuracy],
        total_parameters=None,
        pflop=float(row["pflop"]) if row.get("pflop") else None,
        images_per_s=None,
        best_accuracy=accuracy,
        final_accuracy=accuracy,
        minutes=float(row["minutes"]),
        finished=True,
        diverged=False,
    )


def is_finished(path) -> bool:
    """Whether the log at `path` is of a finished run; there may be no such log yet."""
    try:
        return read_log(path).finished
    except (OSError, ValueError):
        return False


def messages(text: str) -> str:
    """The first line of each message in `text`, without the prefix."""
    return "\n".join(LINE.findall(text))


def _parse_flags(arguments: str) -> dict:
    """The flags in `name='a', seed=42, ...)`; none where the line was cut."""
    with suppress(SyntaxError, ValueError):
        call = ast.parse(f"Namespace({arguments}", mode="eval").body
        return {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    return {}


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
