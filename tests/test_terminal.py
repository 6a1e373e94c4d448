"""What a terminal of 80 columns shows of train.py: the progress bar and the lines around it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from programs import ROOT, TINY, environment

COLUMNS = 80
BAR = re.compile(
    r" *(\d+)%\|[^|]+\| *(\d+)/12 \[\d\d:\d\d<(?:\d\d:\d\d|\?), +[\d.?]+(?:step/s|s/step)"
    r"(?:, loss (\d\.\d{4}), (\d+) images/s)?\] *"
)
LINE = re.compile(r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - (INFO|WARNING) - train - ")


def in_terminal(args, cwd):
    """Exit status and text of train.py whose input and output are a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))
    env = {name: value for name, value in environment().items() if name != "COLUMNS"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        printed = b""
        try:
            while part := os.read(ours, 2**16):
                printed += part
        except OSError:  # how Linux tells that nobody holds the other end any more
            os.close(ours)
    return process.returncode, printed.decode()


def shown(text):
    """The lines that the terminal shows in the end, and all that its last line went through.

    A line that is longer than the terminal goes on below, as on a real one; here it stays one.
    """
    lines, states, column = [""], [], 0
    for part in re.split(r"(\r|\n)", text):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
            column += len(part)
            states.append(lines[-1])
    return lines, states


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    return in_terminal([*TINY, "--log_every", "2"], tmp_path_factory.mktemp("terminal"))


def test_the_bar(terminal):
    """It tells of steps, loss and speed together, never goes back, and fits into the line."""
    status, text = terminal
    assert status == 0, text
    bars = [state for state in shown(text)[1] if "%|" in state]
    assert all(BAR.fullmatch(bar) for bar in bars), bars
    assert max(map(len, bars)) < COLUMNS
    steps = [int(BAR.fullmatch(bar)[2]) for bar in bars]
    assert steps[0] == 0 and steps[-1] == 12 and steps == sorted(steps) and {6, 12} <= {*steps}
    losses = {(BAR.fullmatch(bar)[2], BAR.fullmatch(bar)[3]) for bar in bars}
    assert len(losses) == len({*steps}), "a step is shown with another step's loss"
    assert all(0 < float(loss) < 9 for step, loss in losses if step != "0")


def test_log_lines_do_not_tear_the_bar(terminal):
    """At the end one bar is left, on a line of its own, between the last evaluation and the end."""
    lines = [line.rstrip() for line in shown(terminal[1])[0]]
    (place,) = [i for i, line in enumerate(lines) if "%|" in line]
    assert BAR.fullmatch(lines[place])[1] == "100"
    assert re.search("Valid Accuracy: |Saved model checkpoint", lines[place - 1])
    assert "Best Accuracy" in lines[place + 1]
    for line in lines:
        assert len(LINE.findall(line)) <= 1 and (not LINE.search(line) or LINE.match(line)), line
    assert any(re.fullmatch(r"ViT-Ti_16 with LN \(5.5M parameters\) on .*", line) for line in lines)
    assert any(re.fullmatch(r"About \d+ s left, with 1 evaluation, at .*", line) for line in lines)


def test_an_error_does_not_tear_the_bar(tmp_path):
    status, text = in_terminal([*TINY, "--learning_rate", "1e30"], tmp_path)
    lines = [line for line in shown(text)[0] if line.strip()]
    assert status == 1 and lines[-1].startswith("train.py: error: not finite: loss ")
    assert BAR.fullmatch(lines[-2])
