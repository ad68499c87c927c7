"""benchmark/sweep.py: runs are finished once, resumed when their worker or the sweep has died; failures are told."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FLAGS = "--num-envs 2 --eval-copies 10 --update-epochs 1 --explore-episodes 1 --test-episodes 2"
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}


def start(run_dir, *flags, seeds=(1,)):
    """A sweep of task_given.py, running, with short runs."""
    command = [sys.executable, ROOT / "benchmark/sweep.py", "--scripts", "task_given", "--run-dir", run_dir]
    command += ["--every", "0.1", "--seeds", *seeds, "--", *FLAGS.split(), *flags]
    given = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON)
    return subprocess.Popen([str(part) for part in command], **given)


def finish(process):
    out, err = process.communicate()
    return process.returncode, out, err


def contents(run):
    return torch.load(io.BytesIO((run / "checkpoint.pt").read_bytes()[:-32]), weights_only=True)


def worker_of(run):
    """The process that started this run."""
    table = subprocess.run(["ps", "-eww", "-o", "ppid=,args="], capture_output=True, text=True).stdout
    (ppid,) = (
        line.split()[0]
        for line in table.splitlines()
        if "python" in line.split()[1] and f"{run.parent} --run-name" in line
    )
    return int(ppid)


def test_finished_runs_are_skipped(tmp_path):
    flags = ["--total-timesteps", "400", "--env-kwargs", "num_preys= 3"]  # a space belongs to its flag
    code, out, err = finish(start(tmp_path, *flags, seeds=(1, 2)))
    assert code == 0, err
    assert "2 runs: 2 finished, 0 failed, 0 running, 0 waiting" in out
    runs = [tmp_path / f"hunting_target__task_given__{seed}" for seed in (1, 2)]
    before = [(run / "checkpoint.pt").stat().st_mtime_ns for run in runs]
    assert [contents(run)["args"]["seed"] for run in runs] == [1, 2]
    code, out, err = finish(start(tmp_path, *flags, seeds=(1, 2)))
    assert code == 0 and "2 runs: 2 finished" in out, err
    assert [(run / "checkpoint.pt").stat().st_mtime_ns for run in runs] == before


def until(process, seen):
    """Read what a sweep prints until `seen()`."""
    for _ in process.stdout:
        if seen():
            return
    raise AssertionError("the sweep ended before that")


def test_death_of_worker_and_of_sweep(tmp_path):
    """What was killed saves itself and goes on from there, and ends as a run that nobody killed."""
    run = tmp_path / "killed" / "hunting_target__task_given__1"
    log, flags = run.with_suffix(".log"), ("--total-timesteps", "20000", "--checkpoint-interval", "1000000")
    process = start(run.parent, *flags)
    until(process, lambda: log.exists() and "return=" in log.read_text())  # an iteration is done
    os.kill(worker_of(run), signal.SIGKILL)
    until(process, lambda: "return=" in log.read_text().partition("--resume")[2])  # a new worker has taken it up
    assert log.read_text().count("stopped by SIGTERM; go on with") == 1
    process.kill()
    process.communicate()
    code, _, err = finish(start(run.parent, *flags))
    assert code == 0, err
    assert log.read_text().count("\n+ ") == 3
    whole = [sys.executable, ROOT / "task_given.py", *FLAGS.split(), *flags, "--num-threads", "1"]
    subprocess.run([*whole, "--run-dir", tmp_path, "--run-name", "whole"], check=True, env=ENVIRON, capture_output=True)
    ours, theirs = (contents(folder)["networks"] for folder in (run, tmp_path / "whole"))
    for network in ours:
        assert all(torch.equal(value, theirs[network][key]) for key, value in ours[network].items())
    assert (run / "meta_test.csv").read_bytes() == (tmp_path / "whole" / "meta_test.csv").read_bytes()


def test_failures_are_told_at_the_end(tmp_path):
    code, out, err = finish(start(tmp_path, "--gamma", "2"))
    assert code == 1 and "1 runs: 0 finished, 1 failed" in out
    assert "hunting_target__task_given__1 failed (exit status 2)" in err
    assert "task_given.py: gamma: got 2.0, expected at most 1" in err


def test_other_flags_need_another_folder(tmp_path):
    """But not where no run has begun with them."""
    (tmp_path / "flags.txt").write_text("--gamma 0.9")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    code, _, err = finish(start(tmp_path))
    assert code == 2 and "run-dir: got flags --num-envs 2" in err and "expected --gamma 0.9, those of its runs" in err
    (tmp_path / "run" / "checkpoint.pt").unlink()
    code, _, err = finish(start(tmp_path, "--total-timesteps", "200"))
    assert code == 0, err


def test_more_than_there_is(tmp_path):
    command = [sys.executable, ROOT / "benchmark/sweep.py", "--run-dir", tmp_path, "--cores", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert done.returncode == 2 and "cores, gpus: got 100000 and 0, expected at most" in done.stderr
    assert not list(tmp_path.glob("*.log"))
