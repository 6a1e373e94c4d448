"""Result logs as data: ours and the reference's.

A log line is `MM/DD/YYYY HH:MM:SS - LEVEL - logger - message`; a message may go on over further
lines. One that starts with "Process rank" opens a run, and a log may hold several runs.
"""

import ast
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

LINE = re.compile(r"^\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - [A-Z]+ - \S+ - (.*)$", re.M)
# These match messages, freed of their prefixes. A number must have all its decimals, so that a
# half-written one does not count.
RUN = re.compile(r"^(?:Process rank:|Training parameters|Global Steps:)", re.M)
EVALUATION = re.compile(
    r"^Global Steps: (\d+)\nValid Loss: (nan|-?inf|\d+\.\d{5})\nValid Accuracy: (\d\.\d{5})$", re.M
)
NEEDED = {"dataset", "model_type", "norm_type", "fp16", "img_size", "pretrained_dir"}  # flags


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
    evaluations = EVALUATION.findall(run)
    accuracy = [float(accuracy) for _, _, accuracy in evaluations]
    best_accuracy = find(r"^Best Accuracy: \t(\d\.\d{6})$")
    minutes = find(r"^last (\d+\.\d) min$")
    return RunLog(
        path=path,
        dataset=flags["dataset"],
        model_type=flags["model_type"],
        norm_type=flags["norm_type"],
        fp16=flags["fp16"],
        img_size=flags["img_size"],
        pretrained=bool(flags["pretrained_dir"]),
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


def is_finished(path) -> bool:
    """Whether the log at `path` tells of a run to its end; there may be no such log yet."""
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
