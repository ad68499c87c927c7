"""benchmark/tuning.py: its draws are fit for the scripts, its table ranks them, and nothing is run twice."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import tyro

BENCHMARK = Path(__file__).parents[1] / "benchmark"
TINY = "--num-envs 2 --update-epochs 1 --hidden-dim 8 --num-threads 1 --no-cuda --explore-episodes 1 --test-episodes 2"
TINY += " --eval-copies 6 --total-timesteps"


@pytest.fixture
def tuning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("tuning")


@pytest.mark.parametrize("name", ["ma_pearl", "mix_mate"])
def test_a_script_takes_every_draw(tuning, name):
    script, drawn = importlib.import_module(name), set()
    for draw in range(40):
        flags = tuning.flags_of(name, draw)
        assert flags == tuning.flags_of(name, draw)
        script.check_args(tyro.cli(script.Args, args=[*tuning.FIXED.split(), tuning.EASIER["hunting_target"], *flags]))
        drawn.add(tuple(flags))
    assert tuning.STARTS[name].keys() == tuning.SPACES[name].keys()
    assert len(drawn) == 40


def search(tuning, monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["tuning.py", "mix_mate", *map(str, argv)])
    tuning.main()
    return capsys.readouterr()


def test_search_ranks_its_runs_and_goes_on(tuning, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tuning, "FIXED", f"{TINY} 400 --env-kwargs")
    argv = ["--draws", 3, "--run-dir", tmp_path / "runs", "--out", tmp_path / "tuning.csv", "--jobs", 2]
    printed = search(tuning, monkeypatch, capsys, *argv)
    lines = [line.split("|") for line in printed.out.splitlines()[2:]]
    with open(tmp_path / "tuning.csv") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["posterior"]))
    assert [cells[1].strip() for cells in lines] == [row["draw"] for row in rows] and len(rows) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/checkpoint.pt")}

    argv += ["--finalists", 1, "--seeds", 1, 2]
    printed = search(tuning, monkeypatch, capsys, *argv)
    seeds = {cells[1].strip(): cells[3].strip() for cells in [line.split("|") for line in printed.out.splitlines()[2:]]}
    best = next(row["draw"] for row in rows if row["draw"] != "0")
    assert seeds == {draw: "2" if draw in ("0", best) else "1" for draw in ("0", "1", "2")}
    assert before == {path: path.stat().st_mtime_ns for path in before}  # seed 1 was there


def test_a_run_that_fails_is_told(tuning, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tuning, "FIXED", f"{TINY} 4 --env-kwargs")  # less than an iteration
    with pytest.raises(SystemExit, match="no run came to its end"):
        search(tuning, monkeypatch, capsys, "--draws", 1, "--run-dir", tmp_path)
    assert "total-timesteps: got 4" in capsys.readouterr().err
