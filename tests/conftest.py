"""Fixtures that several test files share."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
from forks import Forks
from runs import RUN, left

# The CPU's computation is tested; check_gpu.py compares a GPU's with it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# torch.compile's cache does not tell apart for which instructions its programs were made: those
# made without ATEN_CPU_CAPABILITY=avx2 give NaN with it, or overwrite memory the other way round.
CACHE = f"torchinductor_{getpass.getuser()}_{os.environ.get('ATEN_CPU_CAPABILITY', 'all')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / CACHE))


@pytest.fixture(scope="module")
def forks():
    """Runs train.py in forks of one process, with models cut to two blocks."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def reference(forks, tmp_path_factory):
    """reference(flags, setup): what a run without interruption left; each is made once."""
    made = {}

    def reference(flags="", setup=""):
        if (flags, setup) not in made:
            folder = tmp_path_factory.mktemp("reference")
            forks.run(RUN + flags.split(), folder, setup)
            made[flags, setup] = left(folder)
        return made[flags, setup]

    return reference
