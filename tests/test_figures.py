"""benchmark/figures.py: its numbers by hand, and its files from runs that the scripts left."""

import csv
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = "--num-envs 2 --update-epochs 1 --hidden-dim 8 --num-threads 1 --no-cuda --explore-episodes 1 --test-episodes 2"
TINY += " --eval-copies 6 --eval-interval 400 --checkpoint-interval 1000"
RUNS = {
    "mg2l_1": "mg2l_mappo --seed 1 --context-size 8 --warmup-episodes 1 --warmup-updates 1 --total-timesteps 1600",
    "given_1": "task_given --seed 1 --total-timesteps 400",
    "given_2": "task_given --seed 2 --total-timesteps 400",
    "none_1": "task_given --seed 1 --task-label none --total-timesteps 400",
    "none_2": "task_given --seed 2 --task-label none --total-timesteps 400",
}
figures = runpy.run_path(str(ROOT / "benchmark" / "figures.py"))


def command(monkeypatch, path, *argv):
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    for name, line in RUNS.items():
        script, *own = line.split()
        where = ["--run-dir", tmp_path / "runs", "--run-name", name]
        command(monkeypatch, ROOT / f"{script}.py", *TINY.split(), *own, *where)
    return tmp_path / "runs"


def test_table_and_figures_of_finished_runs(finished, tmp_path, monkeypatch, capsys):
    cut = finished / "none_2" / "meta_test.csv"  # not finished: it has no curve
    cut.write_text("".join(line for line in cut.read_text().splitlines(keepends=True) if "curve" not in line))
    capsys.readouterr()
    command(monkeypatch, ROOT / "benchmark" / "figures.py", *sorted(finished.iterdir()), "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"not finished, left out: {finished / 'none_2'}" in printed
    table = {cells[2].strip(): cells for line in printed.splitlines() if (cells := line.split("|"))[1:]}
    assert set(table) >= {"mg2l_mappo", "task_given", "task_given none"}
    assert table["task_given"][3].strip() == "2" and "[" in table["task_given"][5]
    assert "(one seed)" in table["mg2l_mappo"][5] and "a single seed" in table["mg2l_mappo"][6]

    with open(tmp_path / "out" / "meta_test.csv") as file:
        rows = list(csv.DictReader(file))
    own = [
        row for row in rows if row["script"] == "task_given" and row["phase"] == "posterior" and row["step"] == "400"
    ]
    by_seed = [np.mean([float(row["return"]) for row in own if row["seed"] == seed]) for seed in "12"]
    assert float(table["task_given"][5].split()[0]) == pytest.approx(np.mean(by_seed), abs=0.06)
    for name in ("curves", "adaptation"):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # lines in colours, not an empty frame
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")


def test_gap_closed_by_hand():
    gap = figures["gap_closed"]
    assert gap([-80.0, -80.0], [-60.0, -60.0], [-160.0, -160.0]) == "0.80 [0.80, 0.80]"
    assert gap([-50.0], [-60.0, -60.0], [-160.0, -160.0]) == "1.10 (a single seed among them)"
    value, low, high = (float(text) for text in gap([1.0, 3.0], [4.0, 4.0], [0.0, 0.0]).replace(",", " ").translate(
        {ord("["): " ", ord("]"): " "}).split())  # fmt: skip
    assert (value, low, high) == (0.5, 0.25, 0.75)


def test_no_gap_to_close_where_the_oracle_is_not_above_the_floor():
    assert figures["gap_closed"]([1.0, 1.0], [-2.0, -2.0], [-1.0, -1.0]) == "none: the oracle is not above the floor"


def test_interval_of_one_seed_has_no_interval():
    assert figures["interval"]([3.0]) == "3.0 (one seed)"
    assert figures["interval"]([3.0, 3.0]) == "3.0 [3.0, 3.0]"
