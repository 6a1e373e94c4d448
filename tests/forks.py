"""Runs train.py in forks of one process that has imported it: start-up is paid once, not per run.

A run may be given `setup`, Python code executed in its process first: it says where to kill itself,
or which fault to have. It sees what `serve` imports and this file's `at`, `die`, `stop`, ...
"""

import gc
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from programs import ROOT, environment

TIMED_OUT = "timed out"


@dataclass
class Done:
    """How a run ended: its status (-9: killed by signal 9), what it printed on stdout and stderr"""

    returncode: int
    output: str


class Forks:
    """The client's side. `preload` is code that is executed once, before all forks.

    What train.py imports when it needs it is imported there, or takes its seconds in each fork.
    """

    def __init__(self, preload="import sklearn.datasets, torchvision.datasets; shrink()", env=None):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(
                {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | (env or {})
            ),
        )
        assert self._ask(preload) == "ready"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(60)

    def _ask(self, question):
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, args, cwd, setup="", check=True, timeout=300, program="train"):
        """Runs `program`.main() with `args` in the folder `cwd`; `check`: it must exit with 0."""
        output = Path(cwd) / "printed.txt"
        question = [[str(arg) for arg in args], str(cwd), str(output), setup, timeout, program]
        status = self._ask(question)
        text = output.read_bytes().decode(errors="replace")
        assert status != TIMED_OUT, f"still running after {timeout} s: {args}\n{text}"
        assert not check or status == 0, f"exit status {status}\n{text}"
        return Done(status, text)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*signals):
    """What sends this process `signals`, one after the other."""
    return lambda: [os.kill(os.getpid(), number) for number in signals]


def at(owner, name, n=1, do=die, after=False, where=lambda *args: True):
    """Calls do() at the n-th call of owner.name, before it or after.

    `where` says of a call's arguments whether it counts.
    """
    function, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        counts = where(*args)
        calls += counts
        now = counts and calls == n
        if now and not after:
            do()
        result = function(*args, **kwargs)
        if now and after:
            do()
        return result

    setattr(owner, name, wrapped)


def shrink(layers=2, width=48):
    """Makes all models small: few blocks, narrow ones."""
    from models.configs import CONFIGS

    for config in CONFIGS.values():
        config.hidden_size = width
        config.transformer.update(num_layers=layers, num_heads=3, mlp_dim=width)


def two_processes(train):
    """Makes the run one of two processes, as torchrun does. The main one waits for the other."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", RANK="0")
    if os.fork() == 0:
        os.environ["RANK"] = "1"
    else:
        at(train, "main", do=os.wait, after=True)


def limit(kind, size):
    """Sets a resource limit, such as RLIMIT_FSIZE, in bytes."""
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (size, size))


def serve():
    """The server's side: one JSON line in for each run, one out."""
    sys.path.insert(0, str(ROOT))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import numpy as np
    import torch
    import torch._dynamo  # by the optimizer
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import train
    from utils import checkpoint, data_utils, dist_util, evaluation, precision, run_logger

    names = {"np": np, "torch": torch, "train": train, "checkpoint": checkpoint}
    names |= {"data_utils": data_utils, "dist_util": dist_util, "evaluation": evaluation}
    names |= {"precision": precision, "run_logger": run_logger}
    names |= {"os": os, "shutil": shutil, "signal": signal, "sys": sys, "time": time}
    names |= {"at": at, "die": die, "stop": stop, "shrink": shrink, "limit": limit}
    names |= {"two_processes": two_processes}
    exec(json.loads(sys.stdin.readline()), names)
    import plot_attn

    names["plot_attn"] = plot_attn
    gc.collect()
    gc.freeze()  # else a fork's garbage collection copies all pages that hold objects
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        args, cwd, output, setup, timeout, program = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run_child(args, cwd, output, setup, names[program], names))
        print(json.dumps(wait(child, timeout)), file=answers, flush=True)


def run_child(args, cwd, output, setup, program, names):
    os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), errors="backslashreplace", write_through=True)
    sys.argv = [f"{program.__name__}.py", *args]
    try:
        exec(setup, names)
        return program.main() or 0
    except SystemExit as end:  # argparse's way out
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what would end in a traceback must do so here too
        traceback.print_exc()
        return 1


def wait(child, timeout):
    """The exit status of `child`; it is killed if it takes longer than `timeout` seconds."""
    deadline, pause = time.monotonic() + timeout, 0.001
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMED_OUT
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


if __name__ == "__main__":
    serve()
