"""What a run keeps: --keep, and that nothing which ends a run early costs more than the steps since its checkpoint."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data_prep
import models.runs
import reports.training
import train
from data_prep import InputError, lock_folder
from data_prep.loaders import start_loader
from models.adapt import RunningAverage
from models.head import HeadSettings, Loss, MarginHead
from models.runs import load_run, load_tuned, save_weights
from tests.conftest import LONG, ROOT, TINY, assert_gone
from tests.test_interrupted_training import assert_one_line, start, stop_at, wait_for_step
from tests.test_train import assert_same_weights, log_of, run_here, weights_of

SHORT = [*TINY, "--images", "160", "--save-every", "2", "--domains", "object,body"]  # 10 steps


def kept(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in sorted((run / "checkpoints").glob("step-*"))]


# ---------------------------------------------------------------- --keep


def test_the_newest_checkpoints_stay_and_are_runs_of_their_own(demo_root, tmp_path):
    run = tmp_path / "run"
    run_here(*SHORT, "--data", demo_root, "--out", run, "--keep", "2", "--ema", "0.5")
    assert kept(run) == [8, 10] and not (run / "checkpoints/best").exists()
    assert_same_weights(run / "checkpoints/step-00000010", run)
    stop_at(tmp_path / "eight", [*SHORT, "--data", demo_root, "--ema", "0.5"], 8)
    assert_same_weights(run / "checkpoints/step-00000008", tmp_path / "eight")
    found = load_run(run / "checkpoints/step-00000008")  # without --allow-partial: it is whole as it is
    assert found.config["steps"] == 8 and sum(found.config["counts"].values()) == 8 * 16
    assert load_tuned(found).dim == 64


def test_the_best_by_the_look_at_fixed_images_stays(demo_root, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.8, 0.7, 0.6])  # before step 1, after 3, 6, 9 and 10
    monkeypatch.setattr(train, "probe", lambda *_: {"object/val": 0.5, "body/test": next(scores)})
    run_here(*SHORT, "--data", demo_root, "--out", tmp_path / "run", "--keep", "1", "--eval-every", "3")
    assert kept(tmp_path / "run") == [6, 10]
    best = tmp_path / "run/checkpoints/best"
    assert best.resolve().name == "step-00000006" and load_run(best).config["steps"] == 6


def test_what_is_kept_is_cut_back_with_the_logs(demo_root, tmp_path):
    """Killed after step 6 was kept and before the state of step 6 was written: it goes on from step 4."""
    common, run = [*SHORT, "--data", demo_root, "--keep", "9"], tmp_path / "run"
    stop_at(run, common, 4)
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/step-00000006")
    (run / "checkpoints/step-00000008.tmp").mkdir()
    run_here(*common, "--out", run, "--resume")
    assert kept(run) == [2, 4, 6, 8, 10] and not list((run / "checkpoints").glob("*.tmp"))
    run_here(*common, "--out", tmp_path / "whole")
    for step in kept(run):
        name = f"checkpoints/step-{step:08d}"
        assert_same_weights(run / name, tmp_path / "whole" / name)


def test_older_ones_go_only_when_the_new_one_is_complete(demo_root, tmp_path, monkeypatch):
    save, run = save_weights, tmp_path / "run"

    def full_disk(folder, *rest):
        if folder.name == "step-00000006.tmp":
            (folder / "model.safetensors").write_text("half")
            raise InputError(f"{folder}: cannot be written (No space left on device)")
        save(folder, *rest)

    monkeypatch.setattr(models.runs, "save_weights", full_disk)
    with pytest.raises(InputError, match="No space left"):
        run_here(*SHORT, "--data", demo_root, "--out", run, "--keep", "1")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    load_tuned(load_run(run / "checkpoints/step-00000004"))


# ---------------------------------------------------------------- what ends a run early


@pytest.fixture(scope="module")
def half(demo_root, tmp_path_factory) -> Path:
    """LONG, interrupted right after the checkpoint of step 10."""
    run = tmp_path_factory.mktemp("half") / "run"
    stop_at(run, [*LONG, "--data", demo_root], 10)
    return run


def flip(path: Path, at: float) -> None:
    """Change one bit of a file, `at` as a fraction of it."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def resaved(path: Path, change) -> None:
    """A state file after `change`, with good checksums."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


STATES = {  # what may be wrong with a state file -> what the one line says
    "step of another run": (lambda s: s.update(step=10**6), "step is not"),
    "step -5": (lambda s: s.update(step=-5), "step is not"),
    "no step": (lambda s: s.pop("step"), "step is not"), "no tally": (lambda s: s.pop("tally"), "tally is not"),
    "tally": (lambda s: s["tally"].update(seconds="x"), "tally is not"),
    "start": (lambda s: s["tally"].update(start="x"), "tally is not"),
    "clock": (lambda s: s["tally"].update(seconds=float("nan")), "tally is not"),
    "number": (lambda s: next(iter(s["model"].values())).fill_(float("nan")), "model is not"),
    "sparse": (lambda s: s.update(head=s["head"].to_sparse()), "head is not"),
    "meta": (lambda s: s.update(head=s["head"].to("meta")), "head is not"),
    "streak": (lambda s: s.update(health=torch.tensor([1, 3])), "health is not"),
    "head": (lambda s: s.update(head=s["head"][1:]), "head is not"),
    "health": (lambda s: s.update(health=None), "health is not"),
    "model": (lambda s: s["model"].popitem(), "model is not"),
    "moment": (lambda s: max(s["optimizer"]["state"].items())[1].update(exp_avg=torch.zeros(3, 4)), "optimizer is not"),
    "moments": (lambda s: s["optimizer"]["state"].update({10**6: {}}), "optimizer is not"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_not_this_runs(name, half, demo_root, tmp_path):
    shutil.copytree(half, run := tmp_path / "run")
    change, words = STATES[name]
    resaved(run / "last/state.pt", change)
    with pytest.raises(InputError, match=rf"state.pt: damaged \({words}.*restore it"):
        run_here(*LONG, "--data", demo_root, "--out", run, "--resume")


def test_a_flipped_bit_is_found(half, tiny_run, demo_root, tmp_path):
    for number in range(6):
        for name in ("model.safetensors", "head.safetensors"):
            shutil.copytree(tiny_run, run := tmp_path / f"{number}-{name}", ignore=shutil.ignore_patterns("eval"))
            flip(run / name, (number + 0.5) / 6)
            with pytest.raises(InputError, match=f"{name}: damaged"):
                load_tuned(load_run(run))
    shutil.copytree(half, run := tmp_path / "run")
    flip(run / "last/state.pt", 0.5)
    with pytest.raises(InputError, match=r"state.pt: damaged \(the checksum of .* differs\)"):
        run_here(*LONG, "--data", demo_root, "--out", run, "--resume")


def test_a_run_is_checked_when_it_is_read(tiny_run, tmp_path):
    tensors, metadata = models.runs.read_tensors(tiny_run / "head.safetensors")
    weight, classes = tensors["weight"], json.loads(metadata["classes"])
    config = json.loads((tiny_run / "config.json").read_text())
    nan = weight.clone()
    nan[1, 2] = float("nan")
    short = classes | {"body": classes["body"][1:]}
    cases = [({"weight": nan}, classes, "weight holds non-finite numbers"),
             ({"weight": weight.to(torch.int8)}, classes, r"class weights are torch.int8"),
             ({"weight": weight[0]}, classes, r"class weights are torch.float32 \[64\]"),
             ({"weight": weight[:, 1:].contiguous()}, classes, "class weights of width 63, not 64"),
             ({"other": weight}, classes, "class weights are none"), ({"weight": weight}, short, "class weights are"),
             ({"weight": weight}, [1], "not one list per domain"),
             ({"weight": weight}, classes | {"body": 3}, "not one list per domain"),
             ({"weight": weight}, None, "not one list per domain")]
    shutil.copytree(tiny_run, run := tmp_path / "run", ignore=shutil.ignore_patterns("eval", "last", "analysis"))
    for tensors, names, words in cases:
        models.runs.write_tensors(run / "head.safetensors", tensors, **{"classes": json.dumps(names)} if names else {})
        with pytest.raises(InputError, match=words):
            load_tuned(load_run(run))
    shutil.copy(tiny_run / "head.safetensors", run)
    for changes in ({"embed_dim": "x"}, {"domains": "cars"}, {"domains": "body,body"}, {"steps": -1},
                    {"shards": {}}, {"counts": 3}, {"image_size": [32]}, {"seed": None}, {"backbone": "x"},
                    {"backbone": None}, {"size": "x"}, {"sources": []}, {"sources": {"body": {"images": "x"}}},
                    {"degrade": "x"}, {"degrade": [1]}, {"image_size": 10**9}, {"embed_dim": 10**9}):
        changed = {part: values | {k: v for k, v in changes.items() if k in values} for part, values in config.items()}
        (run / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"config\.json.*: restore it, or train the run again"):
            load_run(run)
    (run / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json: damaged"):
        load_run(run)
    facts = {key: value for key, value in config["facts"].items() if key != "shards"}
    (run / "config.json").write_text(json.dumps(config | {"facts": facts}))
    with pytest.raises(InputError, match="lacks 'shards'"):
        run_here(*TINY, "--data", config["options"]["data"], "--out", run, "--resume")


def test_a_log_that_was_cut_or_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert data_prep.read_lines(path) == [{"step": 1}, {"step": 2}] and data_prep.read_lines(tmp_path / "none") == []
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log.jsonl, line 2: damaged .*: remove the line"):
        data_prep.read_lines(path)
    models.runs.forget_after(tmp_path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000009").symlink_to(tmp_path)
    (tmp_path / "checkpoints/step-²").mkdir()  # a digit, but no number
    assert models.runs.kept_steps(tmp_path) == {}
    models.runs.forget_after(tmp_path, 1)


def test_nothing_is_saved_within_a_streak_of_bad_steps(demo_root, tmp_path, monkeypatch):
    """The streak begins at step 7: what stays is of step 5, and a run that ends within one is not done."""
    common, fail = [*TINY, "--images", "480", "--save-every", "5", "--domains", "object,body", "--log-every", "1",
                    "--keep", "9", "--data", demo_root], train.gradient_norm
    seen = []

    def norm(*arguments):
        seen.append(1)
        return fail(*arguments) if len(seen) < 7 else torch.tensor(float("nan"))

    for most, number in ((10, 11), (100, 24)):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(train, "gradient_norm", norm)
            patch.setattr(reports.training, "MAX_SKIPPED", most)
            with pytest.raises(InputError, match=f"{number} steps in a row were not finite") as error:
                run_here(*common, "--out", (run := tmp_path / f"run{most}"))
        assert f"the checkpoint from before them, of step 5, is in {run}/last" in error.value.message
        assert torch.load(run / "last/state.pt", weights_only=True)["step"] == 5 and kept(run) == [5]
        assert not (run / "done.json").exists()
    monkeypatch.setattr(reports.training, "MAX_SKIPPED", 1)
    with pytest.raises(InputError, match=r"no checkpoint was written before them, .*none starts anew"):
        run_here(*common, "--out", tmp_path / "none", "--head-lr", "inf")


def test_one_process_writes_a_run(demo_root, tmp_path):
    run = tmp_path / "run"
    process = start(*ENDLESS, "--data", demo_root, "--out", run)
    wait_for_step(run, 1, process)
    result = subprocess.run([sys.executable, "train.py", *ENDLESS, "--data", demo_root, "--out", run, "--resume"],
                            cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and f"process {process.pid} on" in result.stderr, result.stderr
    assert "is writing to it" in result.stderr and len(result.stderr.splitlines()) == 1
    process.kill()
    process.communicate()
    with lock_folder(run, "--out"):  # its lock ended with it
        pass


def test_the_memory_of_a_step_may_be_lowered_on_resume(uninterrupted, half, demo_root, tmp_path):
    """As the line about a full memory says; the weights are the same to rounding."""
    shutil.copytree(half, run := tmp_path / "run")
    run_here(*LONG, "--data", demo_root, "--out", run, "--resume", "--micro-batch", "6")
    a, b = weights_of(uninterrupted), weights_of(run)
    assert all((a[key].float() - b[key].float()).abs().max() < 2e-2 for key in a)


def test_swapped_weights_come_back_after_an_error():
    head = MarginHead([3], 2, HeadSettings([Loss(1.0)]))
    head.weight.data.copy_(whole := torch.arange(6.0).view(3, 2))
    optimizer = torch.optim.AdamW([head.weight])
    optimizer.state[head.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2),
                                    "exp_avg_sq": torch.ones(3, 2)}
    head.step_rows = head.step_rows._replace(rows=torch.tensor([2]))
    with pytest.raises(KeyError), head.drawn(optimizer):
        assert torch.equal(head.weight.data, whole[2:])
        raise KeyError
    assert torch.equal(head.weight.data, whole) and optimizer.state[head.weight]["exp_avg"].shape == (3, 2)
    average = RunningAverage([head.weight], 0.5)
    average.values[0].fill_(7)
    with pytest.raises(KeyError), average.swapped_in():
        assert head.weight[0, 0] == 7
        raise KeyError
    assert torch.equal(head.weight.data, whole) and average.values[0][0, 0] == 7


def test_names_in_a_report_are_shown_as_they_are(demo_root, tmp_path):
    run_here(*SHORT, "--data", demo_root, "--out", tmp_path / "<img src=x onerror=alert(1)>", "--eval-every", 5)
    page = (tmp_path / "<img src=x onerror=alert(1)>/report.md").read_text()
    assert "<img" not in page.replace("\\<img", "") and page.startswith("# \\<img src=x")
    done = json.loads((tmp_path / "<img src=x onerror=alert(1)>/done.json").read_text())
    assert done["seconds"] > log_of(tmp_path / "<img src=x onerror=alert(1)>")[-1]["seconds"]


def test_seconds_go_on_when_the_clock_is_set_back(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "time", lambda: -1e6)
    run_here(*SHORT, "--data", demo_root, "--out", tmp_path / "run")
    seconds = [record["seconds"] for record in log_of(tmp_path / "run")]
    assert seconds[0] > 0 and seconds == sorted(seconds)


def test_the_time_of_a_run_counts_its_start(demo_root, tmp_path, monkeypatch, capsys):
    """By a clock on which the weights take an hour to load and the class means two."""
    real, later = time.monotonic, [0]
    monkeypatch.setattr(train.time, "monotonic", lambda: real() + later[0])

    def takes(name: str, seconds: int):
        of = getattr(train, name)

        def slow(*arguments, **options):
            later[0] += seconds
            return of(*arguments, **options)

        monkeypatch.setattr(train, name, slow)

    takes("build_model", 3600), takes("starting_weights", 7200)
    run_here(*TINY, "--images", "32", "--domains", "object,body", "--data", demo_root, "--out", tmp_path / "run")
    seconds = json.loads((tmp_path / "run/done.json").read_text())["seconds"]
    assert 10_800 < seconds < 10_800 + 300 and f"run in {seconds:.0f} s" in capsys.readouterr().out
    assert log_of(tmp_path / "run")[-1]["images_per_second"] > 0.1  # of the steps alone


def test_a_line_after_a_resume_averages_what_it_would_have(demo_root, tmp_path):
    common = [*TINY, "--images", "160", "--log-every", "4", "--save-every", "3", "--domains", "object,body", "--data",
              demo_root]
    run_here(*common, "--out", tmp_path / "whole")
    stop_at(tmp_path / "run", common, 3)
    run_here(*common, "--out", tmp_path / "run", "--resume")
    logs = [[(r["step"], r["loss"]) for r in log_of(tmp_path / name)] for name in ("whole", "run")]
    assert logs[0] == logs[1] and [step for step, _ in logs[0]] == [3, 4, 6, 8, 9, 10]


def loaders_of(process: subprocess.Popen, count: int) -> list[int]:
    """The loader processes of a run, when all are there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(pids) == count:
            return [int(pid) for pid in pids]
        time.sleep(0.05)
    raise AssertionError(f"{pids}: want {count}")


ENDLESS = [*TINY, "--images", "1000000", "--log-every", "1", "--domains", "object,body", "--batch", "64"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_loader_ends_the_run_in_one_line(workers, demo_root, tmp_path):
    process = start(*ENDLESS, "--data", demo_root, "--out", tmp_path / "run", "--workers", workers)
    wait_for_step(tmp_path / "run", 2, process)
    pids = loaders_of(process, workers)
    os.kill(pids[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in err, err
    assert len(lines) == 1 and "a loader process died" in lines[0] and "lower --workers or --batch" in lines[0], err
    assert_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("killed", [False, True])
def test_a_loader_that_starts_after_its_run_was_killed_ends(killed, monkeypatch):
    """Another loader, forked later, may hold the pipe that would tell it."""
    parent = 1 if killed else os.getpid()
    monkeypatch.setattr(os, "getppid", lambda: parent)
    loader = multiprocessing.get_context("fork").Process(target=start_loader, args=(0,))
    loader.start()
    loader.join(60)
    assert loader.exitcode == int(killed)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM twice"])
def test_loaders_do_not_outlive_their_run(how, demo_root, tmp_path):
    process = start(*ENDLESS, "--data", demo_root, "--out", tmp_path / "run", "--workers", "2")
    wait_for_step(tmp_path / "run", 2, process)
    pids = loaders_of(process, 2)
    if how == "SIGKILL":
        process.kill()
    else:
        process.send_signal(signal.SIGSTOP)  # both signals wait for it: the second comes during the first one's wait
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode in ((-signal.SIGKILL,) if how == "SIGKILL" else (128 + signal.SIGTERM, 130))
    assert_gone(pids)


def test_an_unexpected_error_ends_a_run_with_its_loaders(demo_root, tmp_path):
    code = """if True:
        import train
        def fail(*_): raise KeyError("a defect")
        train.check_health = fail
        train.run_command(train.main)"""
    arguments = map(str, [*ENDLESS, "--data", demo_root, "--out", tmp_path / "run", "--workers", "2"])
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
                            timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 1 and "KeyError: 'a defect'" in result.stderr


def test_too_few_files_may_be_open(demo_root, tmp_path):
    result = subprocess.run([sys.executable, "train.py", *ENDLESS, "--data", demo_root, "--out", tmp_path / "run",
                             "--workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and "ulimit -n" in result.stderr


# argv: which write of which file ends the process by kill -9, when half of it is written or after it
KILLED_WHILE_WRITING = """
import models.weights, os, signal, sys, train
name, number, half = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1) == "half"
write, seen = train.write_atomically, 0

def fatal(path, fill):
    global seen
    seen += path.name == name
    if seen != number:
        return write(path, fill)
    def part(temporary):
        fill(temporary)
        os.truncate(temporary, temporary.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, part if half else fill)
    os.kill(os.getpid(), signal.SIGKILL)

models.weights.write_atomically = train.write_atomically = fatal
train.run_command(train.main)
"""


def test_killed_while_a_checkpoint_is_written(uninterrupted, half, demo_root, tmp_path):
    """In the middle of the weights, between them and the state, in the middle of the state, right after it."""
    shutil.copytree(half, run := tmp_path / "run")
    places = [("model.safetensors", 1, "half", 10), ("head.safetensors", 2, "after", 15),
              ("state.pt", 2, "half", 20), ("state.pt", 1, "after", 25)]
    for workers, (name, number, where, expected) in enumerate(places):
        arguments = [*LONG, "--data", demo_root, "--out", run, "--resume", "--workers", workers % 3]
        result = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, name, str(number), where,
                                 *map(str, arguments)], cwd=ROOT, capture_output=True, timeout=300,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert torch.load(run / "last/state.pt", weights_only=True)["step"] == expected
        load_tuned(load_run(run, allow_partial=True))  # the weights are whole, whichever they are
    run_here(*LONG, "--data", demo_root, "--out", run, "--resume")
    assert_same_weights(uninterrupted, run)
    assert [r["step"] for r in log_of(run)] == [r["step"] for r in log_of(uninterrupted)]
    assert not list(run.rglob("*.tmp"))


def test_a_small_dev_shm_is_named(demo_root, tmp_path):
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if os.geteuid() or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    result = subprocess.run([*command, sys.executable, "train.py", *ENDLESS, "--data", demo_root, "--out",
                             tmp_path / "run", "--workers", "2"], cwd=ROOT, capture_output=True, text=True,
                            timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "of /dev/shm are free, too little for one: use --workers 0" in result.stderr.splitlines()[-1]
    assert "--shm-size" in result.stderr and "--ipc=host" in result.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_checkpoint_that_cannot_be_written(file, uninterrupted, half, demo_root, tmp_path):
    """Files may not grow beyond a size: of the weights, or of the state, which is larger."""
    shutil.copytree(half, run := tmp_path / "run")
    sizes = {path.name: path.stat().st_size for path in (run / "model.safetensors", run / "last/state.pt")}
    limit = sizes["model.safetensors"] // 2 if file == "model.safetensors" else sum(sizes.values()) // 2
    assert sizes["model.safetensors"] < limit < sizes["state.pt"] or file == "model.safetensors"
    before = {path: path.read_bytes() for path in (run / "model.safetensors", run / "last/state.pt")}
    result = subprocess.run([sys.executable, "train.py", *map(str, [*LONG, "--data", demo_root, "--out", run,
                                                                    "--resume"])],
                            cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2, result.stderr
    assert_one_line(result.stderr, f"{file}: cannot be written")
    for path, content in before.items():
        assert path.name == "model.safetensors" != file or path.read_bytes() == content
    assert torch.load(run / "last/state.pt", weights_only=True)["step"] == 10 and not list(run.rglob("*.tmp"))
    run_here(*LONG, "--data", demo_root, "--out", run, "--resume")
    assert_same_weights(uninterrupted, run)
