"""Preparation that kills, full disks or other processes interrupt: nobody is left behind, and the next call goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_prep.write
from data_prep import InputError
from data_prep.format import Split
from data_prep.verify import verify_split
from tests.conftest import ROOT, script
from tests.test_data_prep import class_folders, encode, files_of, picture, run_here

# ---------------------------------------------------------------- kills


def test_ctrl_c_leaves_what_is_done(tmp_path):
    src = class_folders(tmp_path / "src", classes=6, images=60, width=900, height=900)
    for attempt in range(3):  # a busy machine may let it finish before it is interrupted
        out = tmp_path / f"d{attempt}/object/train"
        command = ["-m", "data_prep", "folder", "--src", str(src), "--out", str(out), "--size", "200", "--shard-size",
                   "8", "--workers", "2"]
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        deadline = time.time() + 60
        while len(list(out.glob("shard-*.tar"))) < 2 and time.time() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        _, err = process.communicate(timeout=30)
        if process.returncode:
            break
    assert process.returncode == 130 and err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
    script(*command)
    assert verify_split(out) == []
    shutil.rmtree(out)


def test_what_a_preparation_continues_from_may_be_damaged(tmp_path, monkeypatch):
    src = class_folders(tmp_path / "src", classes=2, images=4, width=16, height=16)
    half = tmp_path / "half/object/train"
    arguments = ["folder", "--src", src, "--size", "16", "--workers", "1", "--drop-duplicates", "--out"]
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="a defect"):  # itself it is no damage
        patch.setattr(data_prep.write, "write_columns", lambda *_: {}["a defect"])
        run_here(*arguments, half)
    for number, (name, damage) in enumerate((("plan", b"\xff"), ("unique.npy", b"\x93NUMPY"), ("unique.npy", b"x"),
                                             ("8/shard-000000.tar.json", b"{}"),
                                             ("8/shard-000000.tar.json", b'{"table": {"samples": 1}, "rows": [[1, 2]], '
                                                                         b'"skipped": []}'))):
        out = shutil.copytree(half, tmp_path / f"{number}/object/train")
        assert (out / ".parts" / name).exists()
        (out / ".parts" / name).write_bytes(damage)
        with pytest.raises(InputError, match=r"\.parts: damaged .*: remove it, and the same command starts anew"):
            run_here(*arguments, out)
        shutil.rmtree(out / ".parts")
        run_here(*arguments, out)
        assert verify_split(out) == []


def test_a_killed_preparation_with_filters_continues_to_the_same_bytes(tmp_path):
    src = class_folders(tmp_path / "src", classes=12, images=40, width=500, height=500)
    (src / "c3" / "copy.jpg").write_bytes((src / "c4" / "0.jpg").read_bytes())
    command = ["-m", "data_prep", "folder", "--src", str(src), "--size", "160", "--shard-size", "8", "--holdout", "0.4",
               "--max-images", "38", "--drop-duplicates"]
    script(*command, "--workers", "2", "--out", tmp_path / "a/body/train")
    out = tmp_path / "b/body/train"
    process = subprocess.Popen([sys.executable, *command, "--workers", "2", "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while len(list(out.glob("shard-*.tar"))) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "index.json").exists() and list(out.glob("shard-*.tar"))
    time.sleep(1.2)  # by now orphaned workers are gone
    script(*command, "--workers", "1", "--out", out)
    assert files_of(out) == files_of(tmp_path / "a/body/train")
    assert not list(out.glob("*.tmp")) and not (out / ".parts").exists()


def children_of(process: subprocess.Popen) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_worker_and_a_terminated_parent_leave_nobody_behind(victim, tmp_path):
    """SIGKILL to a worker, as when memory is short: one line; SIGTERM to the parent: obeyed at once."""
    src = class_folders(tmp_path / "src", classes=4, images=25, width=900, height=900)
    out = tmp_path / "d/object/train"
    command = ["-m", "data_prep", "folder", "--src", str(src), "--out", str(out), "--size", "200", "--shard-size", "1"]
    process = subprocess.Popen([sys.executable, *command, "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    while not list(out.glob("shard-*.tar")) and process.poll() is None:
        time.sleep(0.005)
    workers = children_of(process)
    assert len(workers) == 2
    os.kill(*((workers[0], signal.SIGKILL) if victim == "worker" else (process.pid, signal.SIGTERM)))
    _, err = process.communicate(timeout=120)  # the pipe closes with the last of them
    deadline = time.monotonic() + 60
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    if victim == "worker":
        line, _, rest = err.partition("\n")
        assert process.returncode == 2
        assert line.startswith("error: one of 2 workers was killed: out of memory? Take fewer --workers")
        assert not rest or rest.endswith("Bad file descriptor\n")  # a thread of Python's pool may find its pipe closed
    else:
        assert process.returncode == -signal.SIGTERM and not err
    run_here(*command[2:], "--workers", "1")
    assert verify_split(out) == [] and len(Split(out)) == 100
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == ["index", "index.json"]


# ---------------------------------------------------------------- disks, other processes


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    """The second is refused before anything is read; the lock goes with the life of the first."""
    out, src = tmp_path / "d/object/train", class_folders(tmp_path / "src")
    hold = "import sys; from pathlib import Path; from data_prep import lock_folder\n" \
           "with lock_folder(Path(sys.argv[1]), '--out'): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(out)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = files_of(out)
    result = script("-m", "data_prep", "folder", "--src", tmp_path / "none", "--out", out, check=2)
    assert result.stderr.startswith(f"error: --out {out}: process {holder.pid} on ") and result.stderr.count("\n") == 1
    assert files_of(out) == before
    holder.kill()
    holder.communicate(timeout=60)
    run_here("folder", "--src", src, "--out", out, "--size", 24)
    assert verify_split(out) == [] and not (out / ".lock").exists()


def test_a_refused_command_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run_here("folder", "--src", tmp_path / "none", "--out", tmp_path / "d/object/train")
    assert not list(tmp_path.iterdir())


def limited(megabytes: float, *arguments) -> subprocess.CompletedProcess:
    """A command that may write no file larger than this, which ends as on a full disk: in an OSError."""
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({int(megabytes * 2**20)},) * 2); " \
           "sys.argv[0] = 'data_prep'; from data_prep.__main__ import cli, run_command; run_command(cli)"
    return script("-c", code, *arguments, check=2)


@pytest.mark.parametrize("megabytes", [0.001, 0.2])  # the list of images, a shard
def test_a_disk_that_takes_no_more_ends_in_one_line_and_the_same_command_goes_on(megabytes, tmp_path):
    src, out = tmp_path / "src", tmp_path / "d/object/train"
    for i in range(400):
        (src / f"c{i % 4}").mkdir(parents=True, exist_ok=True)
        (src / f"c{i % 4}/{i}.png").write_bytes(encode(picture(i, 24, 24), "PNG"))
    command = ["folder", "--src", src, "--out", out, "--size", 24, "--shard-size", 200, "--workers", 2]
    result = limited(megabytes, *command)
    assert result.stderr.startswith(f"error: --out {out}: cannot be written (File too large; ")
    assert result.stderr.count("\n") == 1 and not (out / "index.json").exists() and not (out / ".lock").exists()
    run_here(*command)
    assert verify_split(out) == []


@pytest.mark.parametrize("place, reason", [("file/object/train", "Not a directory"), ("d/object/file", "File exists"),
                                           ("d/object/" + 300 * "x", "File name too long")])
def test_places_that_cannot_be_written_are_named_at_once(place, reason, tmp_path):
    (tmp_path / "d/object").mkdir(parents=True)
    for name in ("file", "d/object/file"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as error:
        run_here("folder", "--src", tmp_path / "none", "--out", tmp_path / place)
    assert str(error.value).startswith(f"--out {tmp_path / place}") and reason in str(error.value)


def test_a_place_that_is_read_only_is_named_at_once(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid():
        disk.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk]).returncode:
        pytest.skip("root may write everywhere, and here it may not mount")
    try:
        with pytest.raises(InputError, match=r"^--out .*: cannot be written \((Read-only file|Permission denied)"):
            run_here("folder", "--src", tmp_path / "none", "--out", disk / "object/train")
    finally:
        if not os.geteuid():
            subprocess.run(["umount", disk], check=True)
