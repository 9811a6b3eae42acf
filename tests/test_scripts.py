"""The shell batches: the grid on the demo corpus, and what a scheduler relies on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import DOMAINS
from tests.conftest import ROOT

# images and steps of the smoke test: more of them make it a longer try, on the same assertions
IMAGES = int(os.environ.get("GRID_IMAGES", "64"))
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
GRID = {"BACKBONES": "clip", "SIZE": "tiny", "SEEDS": "0", "DOMAINS": "object body", "SCHEDULES": "A",
        "MATCH": "exposure", "IMAGES": str(IMAGES), "EVALUATE": "--bootstrap 2 --workers 0 --probe 0 --prompts 1",
        "ANALYZE": "--bootstrap 2 --workers 0 --components 8 --map pca --canon 0",
        "TRAIN": "--weights none --image-size 32 --batch 16 --workers 0 --device cpu --lr 1e-3 --layer-decay 1"}


def environment(**variables) -> dict:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM") and key != "CELL"}
    return inherited | {"PATH": PATH, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in variables.items()}


def grid(*arguments, check: int = 0, **variables) -> subprocess.CompletedProcess:
    result = subprocess.run([ROOT / "scripts/grid.sh", *arguments], capture_output=True, text=True, timeout=300,
                            env=environment(**variables))
    assert result.returncode == check, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_grid_on_the_demo_corpus_and_again(demo_root, tmp_path):
    out = tmp_path / "grid"
    first = grid(**GRID, DATA=demo_root, OUT=out)
    cells = ["A", "object-exposure", "body-exposure"]
    runs = [out / f"clip-tiny-{cell}-s0" for cell in cells]
    counts = [json.loads((run / "config.json").read_text())["facts"]["counts"] for run in runs]
    half = IMAGES // 2
    assert counts == [{"object": half, "body": half}, {"object": half}, {"body": half}]
    assert all((run / name).exists() for run in runs for name in ("done.json", "eval/results.json"))
    assert [(run / "analysis/analysis.json").exists() for run in runs] == [True, False, False]
    table = (out / "summary.md").read_text()
    assert table in first.stdout and (out / "claims.md").exists()
    rows = [line.split(" | ")[0] for line in table.splitlines()[4:]]
    assert sorted(rows) == sorted(["| clip-tiny, untouched", *(f"| clip-tiny-{cell}" for cell in cells)])
    assert "body/test rank-1" in table and "object/val nearest-mean top-1" in table

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    stub = program(tmp_path / "never", "echo trained >&2; exit 3")
    again = grid(**GRID, DATA=demo_root, OUT=out, LAUNCH=stub)  # neither trains nor scores: no file is touched
    assert "trained" not in again.stderr and table in again.stdout
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before


def test_the_whole_grid_is_named():
    lines = grid("list").stdout.splitlines()
    numbers, folders = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(numbers) == [str(i) for i in range(3 * 3 * 12)] and len(set(folders)) == len(folders)
    experts = [f"{domain}-{match}" for domain in DOMAINS for match in ("images", "exposure")]
    kinds = ["A", "B", "sequential", "alternate", *experts]
    assert folders[:12] == tuple(f"runs/grid/clip-large-{kind}-s0" for kind in kinds)
    assert grid("list", SLURM_ARRAY_TASK_ID=13).stdout == "13\truns/grid/clip-large-B-s1\n"


@pytest.mark.parametrize("cell, options", [
    (0, "--schedule A --domains object,face_hq,face_lq,body --images 1000"),
    (2, "--schedule sequential --domains object,face_hq,face_lq,body --images 1000"),
    (6, "--domains face_hq --images 1000"),  # matched in images
    (7, "--domains face_hq --images 250"),  # matched in exposure to its domain
])  # fmt: skip
def test_what_a_cell_trains(cell, options, tmp_path):
    stub = program(tmp_path / "launch", 'echo "$@"; exit 75')
    result = grid(CELL=cell, OUT=tmp_path, LAUNCH=stub, IMAGES=1000, TRAIN="--lr 1", check=75)
    run = f"{tmp_path}/{Path(grid('list', CELL=cell).stdout.split()[1]).name}"
    assert result.stdout == (f"train.py --backbone clip --size large --seed 0 --data data --out {run} --resume "
                             f"{options} --lr 1\n")


def test_an_expert_with_the_exposure_of_schedule_b(tmp_path):
    stub = program(tmp_path / "launch", 'echo "$@"; exit 75')
    run = tmp_path / "clip-large-B-s0"
    missing = grid(CELL=7, OUT=tmp_path, LAUNCH=stub, EXPOSURE="B", check=2)
    assert missing.stderr == f"error: EXPOSURE=B needs {run}/config.json: start that cell first\n"
    run.mkdir()
    (run / "config.json").write_text('{"facts": {"counts": {"face_hq": 321}}}')
    assert "--domains face_hq --images 321" in grid(CELL=7, OUT=tmp_path, LAUNCH=stub, EXPOSURE="B", check=75).stdout


def test_exit_codes(tmp_path):
    """torchrun turns 75 into 1; a cell that fails does not keep the others from being tried."""
    cell = {"OUT": tmp_path, "BACKBONES": "clip", "SEEDS": "0", "DOMAINS": "body", "SCHEDULES": "A"}
    run = tmp_path / "clip-large-A-s0"
    run.mkdir()
    (run / "STOP").touch()  # of an earlier stop: it must not make a failure look like a new one
    grid(**cell, CELL=0, LAUNCH=program(tmp_path / "failing", "exit 1"), check=1)
    grid(**cell, CELL=0, LAUNCH=program(tmp_path / "stopped", f"touch {run}/STOP; exit 1"), check=75)
    result = grid(**cell, LAUNCH=program(tmp_path / "failing", 'echo "$9"; exit 2'), check=1)
    assert len(result.stdout.splitlines()) == 3
    assert "no evaluated run yet" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: not complete: {run} ")


@pytest.mark.parametrize("variables, words", [
    ({"CELL": "108"}, "CELL=108: want 0 to 107"),
    ({"CELL": "-1"}, "CELL=-1: want 0 to 107"),
    ({"IMAGES": "many"}, "IMAGES=many: want a whole number"),
    ({"EXPOSURE": "C"}, "EXPOSURE=C: want A or B"),
    ({"SEEDS": "*"}, "SEEDS=*: want whole numbers"),
])  # fmt: skip
def test_bad_variables_end_in_one_line(variables, words):
    result = grid(**variables, check=2)
    assert result.stderr.count("\n") == 1 and words in result.stderr and not result.stdout


def test_an_unknown_command_ends_in_one_line():
    assert grid("lsit", check=2).stderr == "error: lsit: no such command; want list, summary or nothing\n"


def test_a_job_out_of_time_saves_and_is_queued_again(demo_root, tmp_path):
    """The batch shell alone is told, as `--signal=B:USR1@300` does; the training is asked by a file."""
    program(tmp_path / "scontrol", f'echo "$@" >> {tmp_path}/queue')
    variables = GRID | {"IMAGES": "1600000", "TRAIN": GRID["TRAIN"] + " --log-every 1 --head-init random"}
    variables |= {"DATA": demo_root, "OUT": tmp_path, "SLURM_ARRAY_TASK_ID": 0, "SLURM_JOB_ID": 42,
                  "SLURM_SUBMIT_DIR": ROOT, "PATH": f"{tmp_path}:{PATH}"}
    job = subprocess.Popen(["bash", ROOT / "scripts/slurm.sbatch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env=environment(**variables))
    run, deadline = tmp_path / "clip-tiny-A-s0", time.time() + 120
    while not (run / "log.jsonl").exists() and job.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75 and "stopped by file STOP" in out, out + err
    assert (tmp_path / "queue").read_text() == "requeue 42\n"
    assert (run / "last/state.pt").exists() and not (run / "done.json").exists()


def test_a_job_needs_a_cell():
    result = subprocess.run(["bash", ROOT / "scripts/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True,
                            env=environment(), timeout=30)
    assert result.returncode and "submit this script with sbatch --array" in result.stderr


def test_any_model_and_several_cells_at_once(tmp_path):
    names = grid("list", MODEL="open_clip/ViT-B", SEEDS="0", OUT="x").stdout.splitlines()
    assert names[0] == "0\tx/open_clip-ViT-B-A-s0" and len(names) == 12
    stub = program(tmp_path / "launch", f'echo "$@" >> {tmp_path}/said; exit 3')
    result = grid(MODEL="net", SEEDS="0 1", DOMAINS="body", SCHEDULES="A sequential", MATCH="images", IMAGES=8,
                  SEQUENTIAL="--eval-every 2", JOBS=2, LAUNCH=stub, OUT=tmp_path / "out", check=1)
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 12 and len(set(said)) == 6  # what failed beside others is tried once more, alone
    assert all(line.startswith("train.py --model net --seed ") for line in said)
    assert all(("--eval-every 2" in line) == ("sequential" in line) for line in said)
    assert "error: not complete" in result.stderr


def test_a_stopped_cell_keeps_the_others_from_starting(tmp_path):
    stub = program(tmp_path / "launch", f'echo "$@" >> {tmp_path}/said; exit 75')
    grid(MODEL="net", SEEDS="0", DOMAINS="body", SCHEDULES="A B sequential alternate", MATCH="images", OUT=tmp_path,
         IMAGES=8, JOBS=2, LAUNCH=stub, check=75)
    assert len((tmp_path / "said").read_text().splitlines()) < 5


def test_a_variant_of_a_schedule(tmp_path):
    stub = program(tmp_path / "launch", 'echo "$@"; exit 75')
    cell = {"OUT": tmp_path, "LAUNCH": stub, "SCHEDULES": "sequential+reversed A+hold", "IMAGES": 8,
            "VARIANT_hold": "--retain features=2", "SEQUENTIAL": "--keep 1"}
    assert "--schedule sequential --domains object,face_hq,face_lq,body --images 8 --keep 1 --domains " \
        "body,face_lq,face_hq,object\n" in grid(**cell, CELL=0, check=75).stdout
    assert grid(**cell, CELL=1, check=75).stdout.endswith("--images 8 --retain features=2\n")
    assert grid("list", SCHEDULES="A+none", check=2).stderr == \
        "error: A+none: no variable VARIANT_none with its options\n"


# in place of python: notes what it was called with, and leaves the files by which a cell is known to be complete
STUB = """
echo "$@" >> "$LOG"
for word in "$@"; do case $before in --out|--run) run=$word ;; esac; before=$word; done
case "$1 $3" in
    train.py*) mkdir -p "$run/eval"; touch "$run/done.json" ;;
    evaluate.py*) touch "$run/eval/results.json" ;;
    "-m choose") echo 1e-3 ;;
esac"""


def test_the_study_runs_what_decides_first(tmp_path):
    root, weights = tmp_path / "data", tmp_path / "net.safetensors"
    weights.touch()
    for split in ("object/train", "object/valid", "object/val", "body/train", "body/valid", "body/test"):
        (root / split).mkdir(parents=True)
        (root / split / "index.json").touch()
    program(tmp_path / "python", STUB)
    small = {"DOMAINS": "object body", "SCHEDULES": "A sequential sequential+replay", "RATES": "1e-3 1e-2",
             "SEEDS": "0 1", "FORM": "reduced", "JOBS": 1, "OUT": tmp_path / "o ut", "LOG": tmp_path / "log",
             "PATH": f"{tmp_path}:{PATH}"}
    for _ in range(2):  # the second time all is complete
        subprocess.run([ROOT / "scripts/study.sh", root, weights], check=True, timeout=60, capture_output=True,
                       env=environment(**small))
    said = (tmp_path / "log").read_text().splitlines()
    trained = [line.partition("--out ")[2].partition(" --resume")[0].removeprefix(f"{tmp_path}/o ut/")
               for line in said if line.startswith("train.py")]
    net = "tf_efficientnet_lite0"
    cells = [f"lr-{rate}/{net}-{domain}-images-s0" for rate in ("1e-3", "1e-2") for domain in ("object", "body")]
    kinds = ["A", "sequential", "sequential+replay", "object-images", "object-exposure", "body-images", "body-exposure"]
    everything = [[f"lr-1e-3/{net}-{kind}-s{seed}" for kind in kinds] for seed in (0, 1)]
    cells += [cell for cell in everything[0] if cell not in cells]
    cells += [f"lr-1e-2/{net}-{kind}-s0" for kind in ("A", "sequential")]  # no remedies
    assert trained == cells + everything[1]
    train = next(line for line in said if "+replay" in line and line.startswith("train.py"))
    assert "--splits object/valid,body/valid" in train and "--replay 0.1" in train and "--lr 1e-3" in train
    scored = next(line for line in said if line.startswith("evaluate.py"))
    assert scored.endswith("--splits body/test,object/val")  # neither training nor validation identities
    assert not any(line.startswith("analyze.py --run") and "lr-1e-2" in line for line in said)
    assert [line for line in said if line.startswith("-m")] == [
        f"-m tools.study choose {tmp_path}/o ut", f"-m tools.study report {tmp_path}/o ut"] * 2


def test_preparing_real_sets_says_what_it_needs():
    result = subprocess.run([ROOT / "scripts/prepare_real.sh"], capture_output=True, text=True, env=environment(),
                            timeout=30)
    assert result.returncode == 2 and "scripts/prepare_real.sh SOURCE DATA_ROOT" in result.stderr
    assert "unbound" not in result.stderr


def test_the_study_says_what_it_needs():
    result = subprocess.run([ROOT / "scripts/study.sh"], capture_output=True, text=True, env=environment(), timeout=30)
    assert result.returncode == 2 and "scripts/study.sh DATA_ROOT WEIGHTS" in result.stderr
    for data in (ROOT / "docs", "a b"):
        result = subprocess.run([ROOT / "scripts/study.sh", data, "x"], capture_output=True, text=True,
                                env=environment(), timeout=30)
        assert result.returncode == 2 and "no object/train in it" in result.stderr


def test_the_study_looks_at_its_weights_first(tmp_path):
    (tmp_path / "a b.safetensors").touch()
    for split in ("train", "valid"):
        (tmp_path / "object" / split).mkdir(parents=True)
        (tmp_path / "object" / split / "index.json").touch()
    for weights, words in ((tmp_path / "none", "no such file of weights"), (tmp_path / "a b.safetensors", "spaces")):
        result = subprocess.run([ROOT / "scripts/study.sh", tmp_path, weights], capture_output=True, text=True,
                                env=environment(DOMAINS="object"), timeout=30)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
