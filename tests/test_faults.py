"""Damage, malice, full disks, lost folders, numbers that blow up: one clear line, nothing lost.

As in test_resume.py, most runs are of two blocks and in forks of one process; what a limit or a
signal does to the whole program is tested on the real command.
"""

import io
import os
import pickle
import re
import resource
import socket
import subprocess
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from forks import Forks
from programs import ROOT, TINY, run
from test_resume import (
    CURVES,
    IN_STEP,
    KILLED,
    RESUME,
    RUN,
    assert_same,
    content,
    left,
    scalars,
    start,
    steps,
    wait_for,
)
from test_train import DATA, needs_cifar10

from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

CIFAR = "cifar-10-batches-py"


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """What a run without faults left."""
    folder = tmp_path_factory.mktemp("whole")
    forks.run(RUN, folder)
    return left(folder)


def refused(done, *words, program="train.py"):
    """Asserts that a run ended with status 2 and one line of error with these words; returns it."""
    text = getattr(done, "output", None) or done.stderr
    assert done.returncode == 2, text
    line = text.splitlines()[-1]
    assert line.startswith(f"{program}: error: ") and text.count("error: ") == 1, text
    assert "Traceback" not in text
    for word in words:
        assert str(word) in line
    return line


# Damaged checkpoints


def damaged(data, kind, tenth):
    """The bytes cut at that tenth of them, or with one bit of it flipped."""
    place = len(data) * tenth // 10
    if kind == "cut":
        return data[:place]
    return data[:place] + bytes([data[place] ^ 1 << tenth % 8]) + data[place + 1 :]


@pytest.fixture(scope="module")
def stopped(forks, tmp_path_factory):
    """Folder of a run stopped after step 6, with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    forks.run([*RUN, "--stop_after", "6"], folder)
    return folder


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("kind", ["cut", "bit"])
def test_damaged_newest_checkpoint(forks, stopped, kind, tenth):
    """It is reported, and the one before it used, from which the same step 6 is reached."""
    (file,) = stopped.glob("output/*_step_6.bin")
    good, before = file.read_bytes(), content(file)
    file.write_bytes(damaged(good, kind, tenth))
    with pytest.raises(CheckpointError, match="damaged, its (end is missing|SHA-256 does not fit)"):
        load_checkpoint(file, digest_required=True)
    done = forks.run([*RESUME, "--stop_after", "6"], stopped)
    assert f"{file.name}: damaged" in done.output and "Resumed from step 3" in done.output
    assert content(file) == before


def test_all_checkpoints_damaged(forks, whole, tmp_path):
    """The run starts again, and its new checkpoints push out the damaged ones of later steps."""
    forks.run([*RUN, "--stop_after", "9"], tmp_path)
    for file in tmp_path.glob("output/*_step_*.bin"):
        file.write_bytes(damaged(file.read_bytes(), "cut", 5))
    died = forks.run(RESUME, tmp_path, IN_STEP.format(4), check=False)
    assert died.returncode == KILLED and died.output.count("damaged") == 2
    assert steps(tmp_path) == [3]
    done = forks.run(RESUME, tmp_path)
    assert "Resumed from step 3" in done.output
    assert_same(tmp_path, whole)


def test_damaged_checkpoint_asked_for(forks, stopped, tmp_path):
    (file,) = stopped.glob("output/*_step_6.bin")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(damaged(file.read_bytes(), "cut", 7))
    refused(forks.run([*RUN, "--resume", cut], tmp_path, check=False), f"--resume {cut}", "damaged")
    (best,) = stopped.glob("output/*_checkpoint.bin")
    good = best.read_bytes()
    best.write_bytes(damaged(good, "bit", 7))
    refused(forks.run([*RUN, "--eval"], stopped, check=False), best.name, "damaged")
    refused(
        forks.run([best], stopped, check=False, program="plot_attn"),
        *(best.name, "damaged"),
        program="plot_attn.py",
    )
    best.write_bytes(good)


def test_checkpoints_of_another_make(forks, stopped, tmp_path):
    """Whole files with a digest, but not what this program writes."""
    (file,) = stopped.glob("output/*_step_6.bin")
    good = torch.load(file, weights_only=True)
    momenta, first = good["optimizer"]["state"], good["optimizer"]["state"][0]["momentum_buffer"]

    def other_momentum(state):
        return {"optimizer": good["optimizer"] | {"state": state}}

    for change in [
        {"run": 3},
        {"run": {}},
        {"run": good["run"] | {"step": "6"}},
        {"run": good["run"] | {"window": -1}},
        {"flags": None},
        {"flags": good["flags"] | {"seed": torch.zeros(2)}},
        {"flags": {}},
        {"model": {}},
        {"precision": {}},
        {"optimizer": 5},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"precision": good["precision"] | {"updates": torch.tensor([-5])}},
        other_momentum({}),
        other_momentum(momenta | {0: {}}),
        other_momentum(momenta | {0: {"momentum_buffer": first.flatten()[:1]}}),
        other_momentum(momenta | {0: {"momentum_buffer": first.to_sparse()}}),
        other_momentum(momenta | {0: {"momentum_buffer": first.to("meta")}}),
    ]:
        save_checkpoint(good | change, tmp_path / "other.bin")
        done = forks.run([*RUN, "--resume", "other.bin"], tmp_path, check=False)
        refused(done, "--resume")


# Malice


class Bomb:
    """Pickled, and then unpickled without care, it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_bomb_explodes_where_it_is_let(tmp_path):
    """Else the next test would show nothing."""
    torch.save({"model": Bomb(tmp_path / "a")}, tmp_path / "bomb.bin")
    torch.load(tmp_path / "bomb.bin", weights_only=False)
    np.savez(tmp_path / "bomb.npz", cls=np.array([Bomb(tmp_path / "b")], object))
    np.load(tmp_path / "bomb.npz", allow_pickle=True)["cls"]
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_bombs_execute_nothing(forks, tmp_path):
    mark = tmp_path / "exploded"
    bomb = Bomb(mark)
    np.savez(tmp_path / "bomb.npz", cls=np.array([bomb], object))
    save_checkpoint({"model": {"w": bomb}, "run": bomb, "flags": bomb}, tmp_path / "bomb.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(bomb))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(bomb))
    torch.save(bomb, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for flag in ("--resume", "--pretrained_dir"):
        for file in ("bomb.bin", "bomb.npz", "plain.bin", "plain.npz", "old.bin"):
            refused(forks.run([*RUN, flag, file], tmp_path, check=False), f"{flag} {file}")
    for file in ("bomb.bin", "plain.bin", "old.bin"):
        done = forks.run([file], tmp_path, check=False, program="plot_attn")
        refused(done, file, program="plot_attn.py")

    forks.run([*RUN, "--stop_after", "4"], tmp_path)
    (best,) = tmp_path.glob("output/*_checkpoint.bin")
    save_checkpoint({"model": bomb, "flags": bomb}, best)
    refused(forks.run([*RUN, "--eval"], tmp_path, check=False), best.name)
    for step in tmp_path.glob("output/*_step_*.bin"):
        save_checkpoint({"run": bomb, "flags": {}}, step)
    done = forks.run([*RESUME, "--stop_after", "1"], tmp_path)
    assert done.output.count("refused, it holds more than tensors; passed over") == 2

    folder = tmp_path / "data" / CIFAR
    folder.mkdir(parents=True)
    for name in ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]:
        (folder / name).write_bytes(pickle.dumps(bomb))
    done = forks.run([*RUN, "--dataset", "cifar10"], tmp_path, check=False)
    refused(done, "--data_dir", "data_batch_1", "damaged")
    assert not mark.exists()


NO_NETWORK = """
import urllib.request, urllib.error
def refuse(*args, **kwargs):
    raise urllib.error.URLError("no network")
urllib.request.urlopen = refuse
"""


def test_archive_members_stay_inside(forks, tmp_path):
    """A .npz and CIFAR's archive whose members want to be elsewhere."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(folder / "evil.npz", "w") as archive:
        for name in ("../evil.npy", str(tmp_path / "evil.npy"), "../../evil.npy"):
            archive.writestr(name, array.getvalue())
    refused(forks.run([*RUN, "--pretrained_dir", "evil.npz"], folder, check=False), "evil.npz")

    with tarfile.open(folder / "data/cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"{CIFAR}/../../../evil.npy")
        member.size = len(array.getvalue())
        archive.addfile(member, io.BytesIO(array.getvalue()))
    done = forks.run([*RUN, "--dataset", "cifar10"], folder, NO_NETWORK, check=False)
    refused(done, "--dataset cifar10", "no network")
    assert not list(tmp_path.rglob("evil.npy"))


def sources(*patterns):
    """The repository's own files that are no tests."""
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    assert files
    return {path: path.read_text() for path in files}


def test_nothing_loads_pickles():
    for path, text in sources("*.py", "models/*.py", "utils/*.py").items():
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
        for call in re.findall(r"np\.load\([^)]*\)", text):
            assert "allow_pickle=False" in call, path
        assert not re.search(r"pickle\.loads?\(|[^.]\b(eval|exec)\(|shell=True|os\.system", text), (
            path
        )


def test_nothing_serves_tensorboard_to_the_public():
    shipped = sources("*.py", "*.sh", "*.md", "*.toml", "Makefile*", "models/*", "utils/*", ".ci/*")
    for path, text in shipped.items():
        assert not re.search(r"bind_all|0\.0\.0\.0|--host", text), path
        lines = text.splitlines() if path.suffix != ".md" else []
        starts = [line for line in lines if re.search(r"tensorboard +-|program\.TensorBoard", line)]
        assert all("echo" in line for line in starts), path


# Full and read-only disks


def test_order_of_a_save(tmp_path, monkeypatch):
    """Temporary file in the same folder, its fsync, the rename, the folder's fsync."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(source, target):
        assert load_checkpoint(source, digest_required=True)["model"] == {"w": 1}
        done.append((str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    target = str(tmp_path / "a.bin")
    save_checkpoint({"model": {"w": 1}}, target)
    assert done == [f"{target}.part", (f"{target}.part", target), str(tmp_path)]


@contextmanager
def mounted(folder, options):
    """A tmpfs at `folder`; yields a function to mount it anew with other options."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_file_size_limit(forks, whole, tmp_path):
    """A checkpoint that cannot be written whole: the error names it, the old files are intact."""
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("output/*.bin")}
    size = 6_000_000  # bytes; the weights are 4 MB, the whole state is 8 MB
    done = forks.run(RESUME, tmp_path, f"limit('FSIZE', {size})", check=False)
    line = refused(done, "cannot write", "File too large")
    assert re.search(r"output/\S+_step_\d+\.bin: File too large$", line)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.glob("output/*.part"))
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("size, file", [(500, ".txt"), (5000, "_checkpoint.bin")])
def test_file_size_limit_for_the_whole_program(tmp_path, size, file):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = run(TINY, tmp_path, check=False, preexec_fn=limit)
    assert re.search(rf"output/\S+{file}: File too large$", refused(done))


def test_full_disk(forks, whole, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=18m") as remount:  # a whole state takes 8 MB, the best weights 4
        done = forks.run([*RESUME, "--output_dir", disk], tmp_path, check=False)
        line = refused(done, "cannot write", "No space left on device")
        assert str(disk) in line and steps_in(disk) == [3]
        assert not list(disk.glob("*.part")) and not list(disk.glob("*.lock"))
        remount("size=60m")
        forks.run([*RESUME, "--output_dir", disk], tmp_path)
        (final,) = disk.glob("*_final.bin")
        (tmp_path / "output").mkdir()
        for path in disk.iterdir():
            (tmp_path / "output" / path.name).write_bytes(path.read_bytes())
    found = left(tmp_path)
    for kind in ("weights", "checkpoints", "curves"):
        assert found[kind] == whole[kind], kind


def steps_in(folder):
    names = [path.name for path in folder.glob("*_step_*.bin")]
    return sorted(int(re.search(r"_step_(\d+)\.bin", name)[1]) for name in names)


def test_read_only_folder(forks, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=60m") as remount:
        remount("ro")
        for folder in (disk, disk / "new"):
            done = forks.run([*RUN, "--output_dir", folder], tmp_path, check=False)
            refused(done, f"--output_dir {folder} cannot be written: Read-only file system")


def test_folder_that_becomes_read_only(forks, whole, tmp_path):
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    before = {path: content(path) for path in tmp_path.glob("output/*.bin")}
    # Modes do not keep root from writing.
    lock, free = ("chattr +i", "chattr -i") if os.getuid() == 0 else ("chmod a-w", "chmod u+w")
    output = str(tmp_path / "output")
    try:
        if subprocess.run([*lock.split(), output], capture_output=True).returncode:
            pytest.skip("this file system has no immutable folders")
        subprocess.run([*free.split(), output], check=True)
        setup = f"import subprocess; lock = {[*lock.split(), output]}\n"
        setup += IN_STEP.format("2, lambda: subprocess.run(lock, check=True)")
        done = forks.run(RESUME, tmp_path, setup, check=False)
    finally:
        subprocess.run([*free.split(), output], check=True)
    refused(done, "cannot write output/", "_step_6.bin: ")
    assert {path: content(path) for path in before} == before
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("folder", ["a_file", "a_file/below", "/proc/none", "/dev/null"])
def test_folder_that_cannot_be(forks, tmp_path, folder):
    (tmp_path / "a_file").write_text("")
    done = forks.run([*RUN, "--output_dir", folder], tmp_path, check=False)
    refused(done, f"--output_dir {folder} cannot be written")
    (tmp_path / "logs").write_text("")
    refused(forks.run(RUN, tmp_path, check=False), "logs cannot be written")


# Data


@pytest.mark.parametrize("fault", ["missing", "damaged"])
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_data_batches(forks, tmp_path, name, fault):
    needs_cifar10()
    folder = tmp_path / "data" / CIFAR
    folder.mkdir(parents=True)
    for path in (DATA / CIFAR).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    if fault == "damaged":
        (folder / name).write_bytes(damaged((DATA / CIFAR / name).read_bytes(), "bit", 5))
    done = forks.run([*RUN, "--dataset", "cifar10"], tmp_path, NO_NETWORK, check=False)
    refused(done, "--data_dir data", f"{name} is missing or damaged", "delete")


# Clock and folders


def test_clock_going_backwards(forks, whole, tmp_path):
    """By an hour from run to run, and a little within each."""
    setup = """
real, looks = time.time, 0
def backwards():
    global looks
    looks += 1
    return real() - looks / 1000 - 3600 * {}
time.time = backwards
"""
    for run_number, place in enumerate((IN_STEP.format(7), IN_STEP.format(7), "")):
        forks.run(RESUME, tmp_path, setup.format(run_number) + place, check=False)
    assert_same(tmp_path, whole)


def test_log_folders_deleted_mid_run(forks, whole, tmp_path):
    """They are made again; the run goes on and its result is the same."""
    setup = IN_STEP.format("8, lambda: [shutil.rmtree(name) for name in ('logs', 'output')]")
    forks.run(RUN, tmp_path, setup)
    found = left(tmp_path)
    assert found["weights"] == whole["weights"] and found["checkpoints"] == whole["checkpoints"]
    for tag in CURVES:
        assert found["curves"][tag] == [point for point in whole["curves"][tag] if point[0] > 6]
    assert found["log"] == whole["log"][-len(found["log"]) :]
    assert "Global Steps: 8" in "\n".join(found["log"])


def test_not_enough_memory(tmp_path):
    """One line, before anything is lost: 64 images of 4096x4096 are 12 GB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    args = [*TINY, "--img_size", "4096", "--train_batch_size", "64"]
    done = run(args, tmp_path, check=False, preexec_fn=limit)
    refused(done, "not enough memory", "--train_batch_size", "--grad_checkpointing")


# Two at a time


def test_second_process_is_refused(forks, tmp_path):
    """The lock of one killed does not stand in the next one's way."""
    args = [*RUN, "--num_steps", "100000", "--save_every", "100000"]
    first = start(args, tmp_path)
    try:
        wait_for(tmp_path, "output/*.txt", first)
        for more in (["--resume"], ["--output_dir", "other"]):  # which has the same TensorBoard
            second = forks.run([*args, *more], tmp_path, check=False)
            refused(second, f"process {first.pid} on host {socket.gethostname()}", "under way")
            assert second.output.count("\n") == 1
    finally:
        first.kill()
        first.wait(60)
    (lock,) = tmp_path.glob("output/*.lock")
    forks.run([*args, "--resume", "--stop_after", "1"], tmp_path)
    assert not lock.exists()


# Numbers


def test_learning_rate_that_blows_up(forks, tmp_path):
    done = forks.run([*RUN, "--learning_rate", "1e30"], tmp_path, check=False)
    line = refused(done, "not finite", "at step 2;", "last good checkpoint: none")
    (log,) = tmp_path.glob("output/*.txt")
    assert str(log.relative_to(tmp_path)) in line
    indices = re.search(r"Training images of the step: \[(.*)\]", log.read_text())[1].split(", ")
    assert len(set(map(int, indices))) == 240 and max(map(int, indices)) < 1437
    assert not list(tmp_path.glob("output/*.lock"))


# In window {window} or later the loss is not finite.
BLOWS_UP = """
seed_step, backward = train.seed_step, precision.Precision.backward
def seeded(seed, window):
    precision.window = window
    seed_step(seed, window)
def overflowing(self, loss, accumulation=1):
    backward(self, loss * (float("inf") if precision.window >= {} else 1), accumulation)
train.seed_step, precision.Precision.backward = seeded, overflowing
"""


def test_one_non_finite_loss_without_scaling(forks, whole, tmp_path):
    """It names the last good checkpoint, from which the same command goes on once it is mended."""
    done = forks.run(RUN, tmp_path, BLOWS_UP.format(7), check=False)
    line = refused(done, "loss inf", "at step 8;")
    good = re.search(r"last good checkpoint: (\S+_step_6\.bin)$", line)[1]
    assert load_checkpoint(tmp_path / good, digest_required=True)["run"]["step"] == 6
    forks.run(RESUME, tmp_path)
    for kind, found in left(tmp_path).items():
        assert kind == "log" or found == whole[kind]


def test_50_skipped_steps(forks, tmp_path):
    flags = "--norm_type Rescale --fp16 --half_dtype fp16 --fp16_opt_level O1".split()
    flags += ["--train_batch_size", "60"]  # fp16 is slow on a CPU
    done = forks.run([*RUN, *flags], tmp_path, BLOWS_UP.format(7), check=False)
    refused(done, "loss inf", "at step 8;", "_step_6.bin")
    assert done.output.count(" - Skipped: ") == 50
    assert f"loss scale {2.0**16:g}\n" in done.output and f"scale {2.0**-33:g}\n" in done.output
    (events,) = (tmp_path / "logs").iterdir()
    assert scalars(events)["train/loss"][-1][0] == 7  # a skipped step has no point
