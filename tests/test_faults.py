"""Damage, malice, full disks, numbers that blow up: one clear line, nothing lost.

As in test_resume.py, most runs are of small models and in forks of one process.
"""

import io
import os
import pickle
import random
import re
import resource
import subprocess
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from programs import ROOT, TINY, Bomb, events, refused, run
from runs import IN_STEP, KILLED, OVERFLOW, RESUME, RUN, assert_same, content, plain, steps

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

CIFAR = "cifar-10-batches-py"


# Damaged checkpoints


@pytest.fixture(scope="module")
def stopped(forks, tmp_path_factory):
    """Folder of a run stopped after step 6, with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    forks.run([*RUN, "--stop_after", "6"], folder)
    return folder


def flipped(data, bit):
    """The bytes with that bit flipped."""
    place = bit // 8
    return data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]


def test_each_flipped_bit_is_noticed_or_harmless(stopped, tmp_path):
    """In the tensors, in the headers of the archive's entries, and in its directory."""
    (file,) = stopped.glob("output/*_step_6.bin")
    good, original, copy = file.read_bytes(), content(file), tmp_path / "copy.bin"
    rng = random.Random(0)
    with zipfile.ZipFile(file) as archive:
        directory, entries = archive.start_dir, archive.infolist()
    places = [rng.randrange(len(good)) for _ in range(200)]
    places += [rng.randrange(directory, len(good)) for _ in range(300)]
    places += [entry.header_offset + rng.randrange(64) for entry in entries for _ in range(3)]
    noticed = 0
    for place in places:
        bit = 8 * place + rng.randrange(8)
        copy.write_bytes(flipped(good, bit))
        try:
            found = load_checkpoint(copy)
        except UserError:
            noticed += 1
        else:
            assert plain(found) == original, bit
    print(f"{len(places)} flipped bits: {noticed} noticed, the others harmless")
    assert noticed > len(places) / 2


def test_each_cut_is_noticed(stopped, tmp_path):
    (file,) = stopped.glob("output/*_step_6.bin")
    good, copy = file.read_bytes(), tmp_path / "copy.bin"
    rng = random.Random(0)
    lengths = [0, 1, *(rng.randrange(len(good)) for _ in range(100))]
    lengths += [len(good) - missing for missing in range(1, 100)]
    for length in lengths:
        copy.write_bytes(good[:length])
        with pytest.raises(UserError):
            load_checkpoint(copy)
    print(f"{len(lengths)} cuts, all noticed")


@pytest.mark.parametrize("kind", ["cut", "bit"])
def test_damaged_newest_checkpoint(forks, stopped, kind):
    """It is reported, and the one before it used, from which the same step 6 is reached."""
    (file,) = stopped.glob("output/*_step_6.bin")
    good, before = file.read_bytes(), content(file)
    file.write_bytes(good[: len(good) // 2] if kind == "cut" else flipped(good, 4 * len(good)))
    done = forks.run([*RESUME, "--stop_after", "6"], stopped)
    assert re.search(rf"{file.name}: .*; passed over\n", done.output)
    assert "Resumed from step 3" in done.output
    assert content(file) == before


def test_all_checkpoints_damaged(forks, reference, tmp_path):
    """The run starts again, and its new checkpoints push out the damaged ones of later steps."""
    forks.run([*RUN, "--stop_after", "9"], tmp_path)
    for file in tmp_path.glob("output/*_step_*.bin"):
        os.truncate(file, file.stat().st_size // 2)
    died = forks.run(RESUME, tmp_path, IN_STEP.format(4), check=False)
    assert died.returncode == KILLED and died.output.count("passed over") == 2
    assert steps(tmp_path) == [3]
    done = forks.run(RESUME, tmp_path)
    assert "Resumed from step 3" in done.output
    assert_same(tmp_path, reference())


def test_checkpoint_asked_for_that_cannot_be_used(forks, stopped, tmp_path):
    (file,) = stopped.glob("output/*_step_6.bin")
    (best,) = stopped.glob("output/*_checkpoint.bin")
    saved = torch.load(file, weights_only=True)
    save_checkpoint(saved | {"format": 1}, tmp_path / "old.bin")
    damaged = flipped(file.read_bytes(), 4 * file.stat().st_size)
    (tmp_path / "damaged.bin").write_bytes(damaged)
    for name, words in [
        ("damaged.bin", "damaged, the CRC of"),
        ("old.bin", "was written by another version of this program"),
    ]:
        done = forks.run([*RUN, "--resume", name], tmp_path, check=False)
        refused(done, f"--resume {name}: {words}")
    good = best.read_bytes()
    best.write_bytes(flipped(good, 4 * len(good)))
    refused(forks.run([*RUN, "--eval"], stopped, check=False), best.name, "damaged")
    done = forks.run([best], stopped, check=False, program="plot_attn")
    refused(done, best.name, "damaged", program="plot_attn.py")
    best.write_bytes(good)


# Malice


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
    refused(done, "--data_dir", f"{CIFAR} is damaged")
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
        forbidden = r"pickle\.loads?\(|[^.]\b(eval|exec)\(|shell=True|os\.system"
        assert not re.search(forbidden, text), path


def test_nothing_serves_tensorboard_to_the_public():
    shipped = sources("*.py", "*.sh", "*.md", "*.toml", "Makefile*", "models/*", "utils/*", ".ci/*")
    for path, text in shipped.items():
        assert not re.search(r"bind_all|0\.0\.0\.0|--host(?! 127\.0\.0\.1)", text), path
        lines = text.splitlines() if path.suffix != ".md" else []
        command = r"program\.TensorBoard" if path.suffix == ".py" else r"tensorboard +-"
        starts = [line for line in lines if re.search(command, line)]
        assert all("echo" in line or "--host 127.0.0.1" in line for line in starts), path


# Saves that fail


def test_order_of_a_save(tmp_path, monkeypatch):
    """Temporary file in the same folder, its fsync, the rename, the folder's fsync."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(source, target):
        assert load_checkpoint(source)["model"] == {"w": 1}
        done.append((str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    target = str(tmp_path / "a.bin")
    save_checkpoint({"model": {"w": 1}}, target)
    assert done == [f"{target}.part", (f"{target}.part", target), str(tmp_path)]


FAIL = "def fail(): raise OSError({0}, os.strerror({0}))\n"
FAILING_SAVES = {
    "File too large": "limit('FSIZE', 400_000)",  # the weights are 278 kB, the whole state 556
    "Input/output error": FAIL.format(5)
    + "at(os, 'fsync', do=fail, where=lambda file: '_step_' in os.readlink(f'/dev/fd/{file}'))",
    "Read-only file system": FAIL.format(30)
    + "at(os, 'replace', do=fail, where=lambda source, _: '_step_' in str(source))",
}


@pytest.mark.parametrize("reason", FAILING_SAVES)
def test_failing_save(forks, reference, tmp_path, reason):
    """The error names the checkpoint that cannot be written; the old files are intact."""
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    (before,) = tmp_path.glob("output/*_step_3.bin")
    intact = before.read_bytes()
    line = refused(forks.run(RESUME, tmp_path, FAILING_SAVES[reason], check=False))
    assert re.search(rf"error: output/\S+_step_6\.bin: {reason}$", line)
    assert before.read_bytes() == intact and steps(tmp_path) == [3]
    assert not list(tmp_path.glob("output/*.part"))
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


OUT_OF_MEMORY = "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried 9 bytes')"


@pytest.mark.parametrize(
    "error, line",
    [
        ("MemoryError()", "not enough memory"),
        (OUT_OF_MEMORY, "not enough memory"),
        ("PermissionError(13, 'Permission denied', 'x.bin')", "x.bin: Permission denied"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    forks, reference, tmp_path, error, line
):
    """It may be good: the run ends with one line, and goes on the next time."""
    forks.run([*RUN, "--stop_after", "6"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("output/*.*")}
    setup = f"def fail(): raise {error}\nat(torch, 'load', do=fail)"
    assert line in refused(forks.run(RESUME, tmp_path, setup, check=False))
    assert before == {path: path.read_bytes() for path in tmp_path.glob("output/*.*")}
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_log_that_cannot_grow(tmp_path):
    """By the real command: what it prints goes on."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    done = run(TINY, tmp_path, check=False, preexec_fn=limit)
    assert re.search(r"output/\S+\.txt: File too large$", refused(done))


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


def test_full_disk(forks, reference, tmp_path):
    disk = tmp_path / "output"
    with mounted(disk, "size=1250k") as remount:  # one whole state and two of the weights alone
        line = refused(forks.run(RESUME, tmp_path, check=False), "No space left on device")
        assert re.search(r"error: output/\S+_step_6\.bin: ", line) and steps(disk) == [3]
        assert not list(disk.glob("*.part"))
        remount("size=60m")
        forks.run(RESUME, tmp_path)
        assert_same(tmp_path, reference())


def test_read_only_folder(forks, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=60m") as remount:
        remount("ro")
        for folder in (disk, disk / "new"):
            done = forks.run([*RUN, "--output_dir", folder], tmp_path, check=False)
            refused(done, f"--output_dir {folder} cannot be written: Read-only file system")


def test_folder_that_cannot_be(forks, tmp_path):
    (tmp_path / "logs").write_text("")
    refused(forks.run(RUN, tmp_path, check=False), "logs cannot be written")
    done = forks.run([*RUN, "--output_dir", "logs/below"], tmp_path, check=False)
    refused(done, "--output_dir logs/below cannot be written")


def test_not_enough_memory(forks, tmp_path):
    """One line, before anything is lost: 120 images of 4096x4096 are 24 GB."""
    args = [*RUN, "--img_size", "4096"]
    done = forks.run(args, tmp_path, f"limit('AS', {8 << 30})", check=False)
    refused(done, "not enough memory", "--train_batch_size", "--grad_checkpointing")


# Two at a time


@pytest.mark.parametrize("more", [["--resume"], ["--output_dir", "other"]])
def test_second_process_is_refused(forks, reference, tmp_path, more):
    """Started in a step of the first, which it does not disturb: 'other' has the same TensorBoard.

    The lock files that the first leaves do not stand in a later one's way.
    """
    setup = f"""
def start_again():
    if os.fork() == 0:
        sys.argv += {more}
        os._exit(train.main())
    print("second:", os.waitstatus_to_exitcode(os.wait()[1]))
"""
    first = forks.run(RUN, tmp_path, setup + IN_STEP.format("2, start_again"))
    folder = "output" if more == ["--resume"] else "logs"
    found = re.search(r"^train.py: error: (.*) is locked\nsecond: 2\n", first.output, re.M)
    assert found[1].startswith(f"this run is already under way: {folder}/.tiny_")
    assert_same(tmp_path, reference())
    assert list(tmp_path.glob("output/.*.lock"))
    forks.run([*RUN, "--overwrite"], tmp_path)
    assert_same(tmp_path, {"weights": reference()["weights"]})


# Numbers


def diverged(done, *words):
    """Asserts that a run ended with status 1 and one line of error with these words; returns it."""
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    line = done.output.splitlines()[-1]
    assert line.startswith("train.py: error: not finite: ") and done.output.count("error: ") == 1
    for word in words:
        assert word in line
    return line


def test_learning_rate_that_blows_up(forks, tmp_path):
    done = forks.run([*RUN, "--learning_rate", "1e30"], tmp_path, check=False)
    line = diverged(done, "at step 2;", "last good checkpoint: none")
    (log,) = tmp_path.glob("output/*.txt")
    assert str(log.relative_to(tmp_path)) in line
    indices = re.search(r"Training images of the step: \[(.*)\]", log.read_text())[1].split(", ")
    assert len(set(map(int, indices))) == 240 and max(map(int, indices)) < 1437


def test_one_non_finite_loss_without_scaling(forks, reference, tmp_path):
    """It names the last good checkpoint, from which the same command goes on once it is mended."""
    done = forks.run(RUN, tmp_path, OVERFLOW.format((7,)), check=False)
    line = diverged(done, "loss inf", "at step 8;")
    good = re.search(r"last good checkpoint: (\S+_step_6\.bin)$", line)[1]
    assert load_checkpoint(tmp_path / good)["run"]["step"] == 6
    forks.run(RESUME, tmp_path)
    whole = reference()
    assert_same(tmp_path, {kind: whole[kind] for kind in ("weights", "checkpoints", "curves")})


def test_non_finite_loss_in_one_of_two_processes(forks, tmp_path):
    """Both end alike, and the log has the images of both."""
    setup = "two_processes(train)\n" + OVERFLOW.format("((1,) if dist_util.rank() else ())")
    args = [*RUN, "--train_batch_size", "24"]
    done = forks.run(args, tmp_path, setup, check=False)
    assert done.returncode == 1
    errors = re.findall(r"^train.py: error: not finite: (.*) at step 2;", done.output, re.M)
    assert len(errors) == 2 and errors[0] == errors[1]
    (log,) = tmp_path.glob("output/*.txt")
    indices = re.search(r"Training images of the step: \[(.*)\]", log.read_text())[1].split(", ")
    assert len(set(indices)) == 48


def test_50_skipped_steps(forks, tmp_path):
    flags = "--norm_type Rescale --fp16 --half_dtype fp16 --fp16_opt_level O1 --num_steps 60"
    flags += " --eval_every 60 --train_batch_size 24"  # fp16 is slow on a CPU
    setup = OVERFLOW.format("range(7, 99)")
    done = forks.run([*RUN, *flags.split()], tmp_path, setup, check=False)
    diverged(done, "loss inf", "at step 57;", "_step_54.bin")
    assert done.output.count(" - Skipped: ") == 50
    assert f"loss scale {2.0**16:g}\n" in done.output and f"scale {2.0**-33:g}\n" in done.output
    (folder,) = (path for path in tmp_path.glob("logs/*") if path.is_dir())
    assert events(folder).Scalars("train/loss")[-1].step == 7  # a skipped step has no point
