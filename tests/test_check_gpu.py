"""check_gpu.py's rehearsal on a CPU, and that it finds what is wrong."""

import re
from types import SimpleNamespace

import pytest
import torch
from programs import call, run

import benchmark
import check_gpu
from utils.precision import Precision

FAMILIES = "--norm_types LN BN Post Rescale SigmaReparam".split()


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_gpu.losses.cache_clear()


def table(text):
    """The cells of the rows below the heading."""
    _, empty, heading, line, *rows = text.splitlines()
    assert (empty, line) == ("", "|---|---|---|---|")
    assert heading == "| check | result | difference or ratio | seconds |"
    return [re.fullmatch(r"\| (.+) \| (\w+) \| (.+) \| (\d+) \|", row).groups() for row in rows]


def test_the_rehearsal(tmp_path):
    """All but the benchmark, whose start alone takes half a minute."""
    only = "--only levels scale compiled ddp memory".split()
    done = run([*only, *FAMILIES], tmp_path, program="check_gpu.py", timeout=600)
    assert done.stdout.startswith("A rehearsal without a GPU: ")
    found = table(done.stdout)
    assert {result for _, result, *_ in found} == {"ok"}, done.stdout
    words = ["O0", "O1", "O2", "O3", "scale", "--compile", "DDP, processes: 2, gloo", "memory"]
    assert [word in row[0] for word, row in zip(words, found, strict=True)] == [True] * len(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_timm", [True, False])
def test_the_benchmark_s_rows(monkeypatch, has_timm):
    """Without timm, only our own rows. Nothing is run: each contestant takes seconds to start."""
    commands = []

    def run(command, **_):
        commands.append(command[2:])
        return SimpleNamespace(stdout="torch 2\nrow fp16  ratio 1.9\n")

    monkeypatch.setattr(check_gpu.subprocess, "run", run)
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda _: has_timm or None)
    for kind, rows in (("cuda", ["step", "fp16"] if has_timm else ["fp16"]), ("cpu", ["fp16"])):
        args = SimpleNamespace(device=torch.device(kind))
        assert check_gpu.benchmark(args) == [("benchmark", None, "row fp16  ratio 1.9")]
        words = commands.pop()
        assert words[words.index("--rows") + 1 : words.index("--models")] == rows
        assert call(benchmark.main, *words, "--help").returncode == 0  # benchmark.py has the flags


def test_a_wrong_step_is_found(monkeypatch):
    """At O2 alone: its steps are half as long again, which differs by half of what was learned."""
    update = Precision.update
    monkeypatch.setattr(
        Precision, "update", lambda self, rate: update(self, rate * (1 + (self.level == "O2") / 2))
    )
    done = call(check_gpu.main, "--only", "levels", *FAMILIES)
    results = {what[:2]: result for what, result, *_ in table(done.stdout)}
    assert results == {"O0": "ok", "O1": "ok", "O2": "FAILED", "O3": "ok"}
    assert done.returncode == 1


@pytest.mark.parametrize("wrong", ["_adjust_scale", "_is_finite"])
def test_a_wrong_scale_is_found(monkeypatch, wrong):
    """One that never moves; and a step that is taken though it overflowed."""
    always = lambda self, *_: torch.tensor(True)  # noqa: E731
    monkeypatch.setattr(Precision, wrong, always)
    done = call(check_gpu.main, "--only", "scale")
    assert done.returncode == 1 and table(done.stdout)[0][1] == "FAILED"


def test_an_error_is_a_failed_check(monkeypatch):
    monkeypatch.setattr(check_gpu, "make_trial", lambda *_: 1 / 0)
    done = call(check_gpu.main, "--only", "scale")
    assert done.returncode == 1 and "scale: division by zero" in done.stderr
    assert table(done.stdout)[0][:3] == ("scale", "FAILED", "ZeroDivisionError")


def test_another_loss_of_a_run_is_found(monkeypatch):
    monkeypatch.setattr(check_gpu, "run", lambda flags, *_: 2.3 if flags else 2.301)
    done = call(check_gpu.main, "--only", "compiled")
    assert done.returncode == 1 and table(done.stdout)[0][1] == "FAILED"
