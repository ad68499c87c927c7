"""benchmark/figures.py: its numbers by hand, and its files from runs that the scripts left."""

import csv
import dataclasses
import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    (finished / "folder_of_runs").mkdir()  # as --run-dir runs/folder_of_runs leaves
    capsys.readouterr()
    command(monkeypatch, ROOT / "benchmark" / "figures.py", *sorted(finished.iterdir()), "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    for name in ("none_2", "folder_of_runs"):
        assert f"not finished, left out: {finished / name}" in printed
    lines = [line.split("|") for line in printed.splitlines()]
    table = {cells[2].strip(): cells for cells in lines if len(cells) == 11}
    curve = next(cells[3] for cells in lines if len(cells) == 5 and cells[2].strip() == "mg2l_mappo")
    assert [point.split(":")[0].strip() for point in curve.split(",")] == ["0", "10", "20", "50", "100"]
    assert set(table) >= {"mg2l_mappo", "task_given", "task_given none"}
    assert table["task_given"][3].strip() == "2" and "[" in table["task_given"][5]
    assert "(one seed)" in table["mg2l_mappo"][5]
    assert "a single seed" in table["mg2l_mappo"][6] or "not clearly above" in table["mg2l_mappo"][6]

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


def test_a_table_goes_on_with_more_runs(finished, tmp_path, monkeypatch, capsys):
    """The rows it wrote before say the same as the run folders, and a new run takes the place of its like."""

    def printed(*given, out):
        capsys.readouterr()
        command(monkeypatch, ROOT / "benchmark" / "figures.py", *given, "--out", tmp_path / out)
        return capsys.readouterr().out

    folders = [finished / name for name in RUNS]
    whole, table = printed(*folders, out="whole"), tmp_path / "whole" / "meta_test.csv"
    assert printed(table, out="again") == whole
    assert (tmp_path / "again" / "meta_test.csv").read_bytes() == table.read_bytes()
    printed(*folders[:2], out="part")
    assert printed(tmp_path / "part" / "meta_test.csv", *folders[2:], out="again") == whole
    assert (tmp_path / "again" / "meta_test.csv").read_bytes() == table.read_bytes()

    args = json.loads((folders[1] / "args.json").read_text())
    (folders[2] / "args.json").write_text(json.dumps(args))  # of seed 2, and says it is of seed 1
    out = printed(table, folders[2], out="again")
    assert f"{folders[2]}: in place of what was given before of task_given, hunting_target, 1" in out
    with open(tmp_path / "again" / "meta_test.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == "task_given"]
    returns = {seed: [row["return"] for row in rows if row["seed"] == seed] for seed in "12"}
    assert returns["1"] == returns["2"]
    for label, scale, name in [("code", 1, "code"), ("code", 0.5, "code x0.5"), ("one-hot", 8, "one-hot x8")]:
        (folders[2] / "args.json").write_text(json.dumps(args | dict(task_label=label, label_scale=scale)))
        assert {row["script"] for row in figures["read"](folders[2])} == {f"task_given {name}"}
        assert f"task_given {name}" in figures["COLOURS"]


def test_points_that_not_all_episodes_reached_are_left_out(finished):
    """Else the episodes that went well would be compared with all."""
    file = finished / "mg2l_1" / "meta_test.csv"
    lines = file.read_text().splitlines(keepends=True)
    where = lines[0].strip().split(",").index("context_steps")
    at = [k for k, line in enumerate(lines) if ",curve," in line and line.split(",")[where] == "50"]
    before = {row["context_steps"] for row in figures["read"](finished / "mg2l_1")}
    file.write_text("".join(line for k, line in enumerate(lines) if k != at[-1]))
    assert before - {row["context_steps"] for row in figures["read"](finished / "mg2l_1")} == {50}


def test_copy_that_ends_on_a_point_of_the_curve(finished):
    """It is recorded there once more for each later point, and that is no copy more."""
    file = finished / "mg2l_1" / "meta_test.csv"
    lines = file.read_text().splitlines(keepends=True)
    names = lines[0].strip().split(",")
    before = {row["context_steps"] for row in figures["read"](finished / "mg2l_1")}
    for k, line in enumerate(lines):  # copy 0 ends after 50 transitions
        row = dict(zip(names, line.strip().split(","), strict=True))
        if row["phase"] == "curve" and row["run"] == "0" and int(row["context_steps"]) > 50:
            lines[k] = ",".join((row | {"context_steps": "50"}).values()) + "\n"
    file.write_text("".join(lines))
    after = {row["context_steps"] for row in figures["read"](finished / "mg2l_1")}
    assert max(before - {""}) > 50 and after == {x for x in before if x == "" or x <= 50}


def test_run_that_was_resumed_for_longer(finished):
    """Its former end has a curve too: Fig. 7 is of the last one, and without that the run is not finished."""
    file = finished / "mg2l_1" / "meta_test.csv"
    before, lines = figures["read"](finished / "mg2l_1"), file.read_text().splitlines(keepends=True)
    last = lines[-1].split(",")[0]
    curve = [line for line in lines if ",curve," in line]
    earlier = [line.replace(f"{last},", "1,", 1) for line in curve]
    file.write_text("".join([lines[0], *earlier, *lines[1:]]))
    assert figures["read"](finished / "mg2l_1") == before
    file.write_text("".join([lines[0], *earlier, *[line for line in lines[1:] if line not in curve]]))
    assert figures["read"](finished / "mg2l_1") == []
    file.write_text("".join([lines[0], *earlier]))  # stopped before it was evaluated again
    assert figures["read"](finished / "mg2l_1") == []


def test_no_gap_where_oracle_and_floor_are_of_other_tasks(finished, tmp_path, monkeypatch, capsys):
    """A one-hot is scored on the tasks that it names, all others on those that are held out."""
    command(monkeypatch, ROOT / "benchmark" / "figures.py", *finished.iterdir(), "--out", tmp_path)
    capsys.readouterr()
    with open(tmp_path / "meta_test.csv") as file:
        rows = list(csv.DictReader(file))
    for name, other in (("same", 0), ("others", 5)):
        with open(tmp_path / f"{name}.csv", "w") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            told = [row["script"] == "task_given" for row in rows]
            writer.writerows(
                row | dict(task=int(row["task"]) + other * own) for row, own in zip(rows, told, strict=True)
            )
        command(monkeypatch, ROOT / "benchmark" / "figures.py", tmp_path / f"{name}.csv", "--out", tmp_path / name)
        (cells,) = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| mg2l_mappo | 1 |" in line]
        assert bool(cells[6].strip()) == (name == "same")


def test_gap_closed_by_hand():
    gap = figures["gap_closed"]
    assert gap([-80.0, -80.0], [-60.0, -60.0], [-160.0, -160.0]) == "0.80 [0.80, 0.80]"
    assert gap([-50.0], [-60.0, -60.0], [-160.0, -160.0]) == "1.10 (a single seed among them)"
    value, low, high = (float(text) for text in gap([1.0, 3.0], [4.0, 4.0], [0.0, 0.0]).replace(",", " ").translate(
        {ord("["): " ", ord("]"): " "}).split())  # fmt: skip
    assert (value, low, high) == (0.5, 0.25, 0.75)


def test_no_gap_to_close_where_the_oracle_is_not_above_the_floor():
    assert (
        figures["gap_closed"]([1.0, 1.0], [-2.0, -2.0], [-1.0, -1.0])
        == "none: the oracle is not clearly above the floor"
    )


def test_clearly_above_means_by_more_than_the_seeds_differ():
    above = figures["clearly_above"]
    assert above([-30.0, -32.0, -37.0], [-38.0, -40.0, -43.0]) and above([1.0], [0.0])
    assert not above([-69.0, -63.0, -66.0], [-68.0, -71.0, -64.0])


def test_interval_of_one_seed_has_no_interval():
    assert figures["interval"]([3.0]) == "3.0 (one seed)"
    assert figures["interval"]([3.0, 3.0]) == "3.0 [3.0, 3.0]"


ABLATIONS = {  # runs of these flags, as if everything else had been the defaults
    "mg2l_1": ("mg2l_mappo", 1, {}),
    "mg2l_2": ("mg2l_mappo", 2, {}),
    "kl_1": ("mg2l_ablations", 1, {"local_loss": "kl"}),
    "local_1": ("mg2l_ablations", 1, {"scheme": "local_only"}),
    "odd_1": ("mg2l_mappo", 1, {"kl_coef": 0.5}),  # of no figure
}


@pytest.fixture
def ablated(tmp_path, monkeypatch):
    """Folders of runs that are short, and whose args.json says that they were not."""
    import mg2l_mappo
    from envs import ENV_IDS

    monkeypatch.syspath_prepend(ROOT / "benchmark")
    defaults = dataclasses.asdict(mg2l_mappo.Args())
    defaults |= {name: by_env[ENV_IDS.index("hunting_target")] for name, by_env in mg2l_mappo.ENV_DEFAULTS.items()}
    defaults |= {"global_loss": "infonce", "scheme": "g2l", "aggregator": "pia"}
    for name, (script, seed, flags) in ABLATIONS.items():
        path = ROOT / "benchmark" / f"{script}.py" if script == "mg2l_ablations" else ROOT / f"{script}.py"
        own = [part for flag, value in flags.items() for part in (f"--{flag.replace('_', '-')}", value)]
        own += "--context-size 8 --warmup-episodes 1 --warmup-updates 1 --total-timesteps 3000".split()
        where = ["--run-dir", tmp_path / "runs", "--run-name", name, "--seed", seed]
        command(monkeypatch, path, *TINY.split(), *own, *where)
        file = tmp_path / "runs" / name / "args.json"
        known = json.loads(file.read_text())
        told = {key: defaults[key] for key in known if key in defaults} | flags | {"seed": seed}
        file.write_text(json.dumps(known | told))
    return tmp_path / "runs"


def table_of(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]


def test_figures_of_ablations(ablated, tmp_path, monkeypatch, capsys):
    cut = ablated / "local_1" / "meta_test.csv"  # not finished
    cut.write_text("".join(line for line in cut.read_text().splitlines(keepends=True) if "curve" not in line))
    capsys.readouterr()
    path = ROOT / "benchmark" / "ablation_figures.py"
    command(monkeypatch, path, *sorted(ablated.iterdir()), "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"not finished, left out: {ablated / 'local_1'}" in printed
    rows = {(cells[0], cells[1]): cells[2:] for cells in table_of(printed)}
    assert len(rows) == 1 + 4 + 5 + 5  # the head, and each variant of each figure
    assert rows["fig12_schemes", "MG2L (infonce)"][1] == rows["fig11_global_losses", "MG2L (contrast)"][1] == "2"
    assert "[" in rows["fig12_schemes", "MG2L (infonce)"][3]
    assert rows["fig12_schemes", "CSTL (kl)"][1] == "1" and "(one seed)" in rows["fig12_schemes", "CSTL (kl)"][3]
    assert rows["fig12_schemes", "Local-Only"][1:4] == ["0", "no run", "no run"]
    assert rows["fig13_aggregators", "PIA"][1] == "0"  # which is compared at another context size
    with open(ablated / "kl_1" / "meta_test.csv") as file:
        last = [row for row in csv.DictReader(file) if row["phase"] == "posterior"]
    last = [float(row["return"]) for row in last if row["step"] == last[-1]["step"]]
    assert float(rows["fig12_schemes", "CSTL (kl)"][3].split()[0]) == pytest.approx(np.mean(last), abs=0.06)
    means = [float(rows["fig12_schemes", name][3].split()[0]) for name in ("MG2L (infonce)", "CSTL (kl)")]
    difference, _, note = rows["fig12_schemes", "CSTL (kl)"][4].partition(" ")
    assert float(difference) == pytest.approx(means[0] - means[1], abs=0.11) and note == "(a single seed among them)"
    with open(tmp_path / "out" / "ablations.csv") as file:
        tidy = list(csv.DictReader(file))
    assert {row["flags"] for row in tidy} == {"", "--local-loss kl", "--kl-coef 0.5"}
    for name in ("fig11_global_losses", "fig12_schemes", "fig13_aggregators"):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")


def test_flags_of_all_runs_tell_nothing_apart(ablated, tmp_path, monkeypatch, capsys):
    """With --base: runs that have those flags, by the rest of their flags; runs without them are left out."""
    for name in ("mg2l_2", "kl_1", "odd_1"):  # mg2l_1 and local_1 are left with the defaults
        file = ablated / name / "args.json"
        args = json.loads(file.read_text()) | {"encoder_dim": 96, "encoder_learning_rate": 0.01}
        file.write_text(json.dumps(args))
    capsys.readouterr()
    path, runs = ROOT / "benchmark" / "ablation_figures.py", sorted(ablated.iterdir())
    base = "--encoder-dim 96 --encoder-learning-rate 0.01"
    command(monkeypatch, path, *runs, "--base", base, "--out", tmp_path / "out")
    rows = {cells[1]: cells[2:] for cells in table_of(capsys.readouterr().out) if cells[0] == "fig12_schemes"}
    seeds = {name: cells[1] for name, cells in rows.items()}
    assert seeds["MG2L (infonce)"] == seeds["CSTL (kl)"] == "1" and seeds["Local-Only"] == "0"
    with open(tmp_path / "out" / "ablations.csv") as file:
        assert {row["flags"] for row in csv.DictReader(file)} == {"", "--local-loss kl", "--kl-coef 0.5"}
    file = ablated / "mg2l_1" / "args.json"
    same_length = {"context_size": 64, "context_sets": 12, "inference_size": 64, "rollout_context_size": 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | same_length | {"warmup_learning_rate": 5e-4}))
    command(monkeypatch, path, file.parent, "--base", "--warmup-learning-rate 0.0005", "--out", tmp_path / "out")
    rows = {cells[1]: cells[2:] for cells in table_of(capsys.readouterr().out) if cells[0] == "fig13_aggregators"}
    assert rows["PIA, warm-up at 5e-4"][1] == rows["PIA"][1] == "1"  # one variant here: all runs have the rate
    with pytest.raises(SystemExit):
        command(monkeypatch, path, *runs, "--base", "--encoder-dim 97", "--out", tmp_path / "out")
    assert "no finished run of hunting_target --encoder-dim 97" in capsys.readouterr().err


def test_difference_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    difference = runpy.run_path(str(ROOT / "benchmark" / "ablation_figures.py"))["difference"]
    assert difference([5.0, 5.0], [3.0, 3.0]) == "2.0 [2.0, 2.0]"
    assert difference([4.0, 6.0], [3.0, 3.0]) == "2.0 [1.0, 3.0]"
    assert difference([5.0], [3.0, 4.0]) == "1.5 (a single seed among them)"


def test_table_of_variants(ablated, monkeypatch, capsys):
    capsys.readouterr()
    command(monkeypatch, ROOT / "benchmark" / "variants.py", *sorted(ablated.iterdir()))
    rows = {(cells[1], cells[2]): cells for cells in table_of(capsys.readouterr().out)}
    found = {
        (script, *[flag for flag in ("kl-coef 0.5", "local-loss kl") if flag in flags]): cells[3]
        for (script, flags), cells in rows.items()
    }
    assert found["mg2l_mappo",] == "2"
    assert found["mg2l_mappo", "kl-coef 0.5"] == found["mg2l_ablations", "local-loss kl"] == "1"
    (run,) = (f for f in ablated.iterdir() if json.loads((f / "args.json").read_text())["kl_coef"] == 0.5)
    events = EventAccumulator(str(run)).Reload()
    (cells,) = (cells for (script, flags), cells in rows.items() if "kl-coef 0.5" in flags)
    for name, cell, rounding in (
        ("episodic_return", cells[6].split()[0], 0.051),
        ("cl_accuracy_global", cells[8].split(", ")[0], 0.0051),
        ("cl_accuracy_local", cells[8].split(", ")[1], 0.0051),
        ("cl_accuracy_local_worst", cells[8].split(", ")[2], 0.0051),
    ):
        last = [event.value for event in events.Scalars(f"charts/{name}")][-10:]
        assert float(cell) == pytest.approx(np.mean(last), abs=rounding)


def test_table_of_variants_of_a_second_evaluation(ablated, monkeypatch, capsys):
    first, *others = sorted(ablated.iterdir())
    with open(first / "meta_test_only.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["phase", "return", "accuracy"])
        writer.writeheader()
        rows = [("prior", -9.0, ""), ("prior", -5.0, ""), ("posterior", -4.0, 0.25), ("posterior", -2.0, 0.75)]
        writer.writerows(dict(zip(writer.fieldnames, row, strict=True)) for row in [*rows, ("curve", 99.0, 0.0)])
    capsys.readouterr()
    command(monkeypatch, ROOT / "benchmark" / "variants.py", "--meta-test-only", first, *others)
    printed = capsys.readouterr().out
    for run in others:
        assert f"no meta_test_only.csv, left out: {run}" in printed
    _, cells = table_of(printed)
    assert [cell.split()[0] for cell in cells[3:6]] == ["1", "-7.0", "-3.0"] and cells[7] == "0.50"


def test_aggregate_by_hand(tmp_path, monkeypatch, capsys):
    """Scores of 0 at the floor and 1 at the oracle, and what cannot be scored is named."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    returns = {  # setting -> script -> one return per seed
        "a": {"mg2l_mappo": [8, 8, 8], "task_given": [10, 10], "task_given none": [0, 0], "ma_pearl": [1, 1]},
        "b": {"mg2l_mappo": [-60, -60, -60], "task_given": [-80, -60], "task_given none": [-90], "ma_pearl": [-90]},
        "c": {"mg2l_mappo": [1], "task_given": [0], "task_given none": [1], "mix_mate": [1]},
        "d": {"mg2l_mappo": [1], "task_given": [0]},
        "e": {"mg2l_mappo": [1, 1], "task_given": [2, 2], "task_given none": [0, 0]},
    }
    with open(tmp_path / "meta_test.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["setting", "script", "seed", "step", "phase", "return"])
        writer.writeheader()
        for setting, by_script in returns.items():
            for script, values in by_script.items():
                for seed, value in enumerate(values):
                    row = dict(setting=setting, script=script, seed=seed, phase="posterior")
                    writer.writerow(row | {"step": 100, "return": 0.0})
                    writer.writerow(row | {"step": 900, "return": value})
                    writer.writerow(row | {"step": 900, "return": 1e6, "phase": "prior"})
    table = ["--table", tmp_path / "meta_test.csv", "--out", tmp_path]
    command(monkeypatch, ROOT / "benchmark" / "aggregate.py", *table)
    printed = capsys.readouterr().out
    assert "left out: c: the oracle is not clearly above the floor" in printed
    assert "left out: e: fewer than three seeds of mg2l_mappo" in printed
    assert "left out: d: no runs of oracle and floor" in printed and "left out: mix_mate: no run on a, b" in printed
    rows = {cells[0]: cells[1:] for cells in table_of(printed)}
    # (8 - 0) / 10 and (-60 + 90) / 20, three seeds each: 0.8 and 1.5 three times, of which the middle half counts
    assert rows["mg2l_mappo"][:2] == ["3 x 2", "1.15 [1.15, 1.15]"]
    assert rows["ma_pearl"] == ["1 x 2", "0.05 (one seed)", "1.00 (one seed)", ""]
    assert rows["mg2l_mappo"][3] == "0.00"
    # better than the oracle on b alone, where it is better than one seed and level with none of the other
    assert float(rows["task_given"][2].split()[0]) == pytest.approx((0 + 0.75) / 2, abs=0.13)
    assert (tmp_path / "aggregate.svg").read_text().startswith("<?xml")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "aggregate.png")).reshape(-1, 4), axis=0)) > 20
    command(monkeypatch, ROOT / "benchmark" / "aggregate.py", *table, "--settings", "b", "d")
    printed = capsys.readouterr().out
    assert "left out: d: no runs of oracle and floor" in printed and "left out: c" not in printed
    rows = {cells[0]: cells[1:] for cells in table_of(printed)}
    assert rows["mg2l_mappo"][:2] == ["3 x 1", "1.50 [1.50, 1.50]"]
    with pytest.raises(SystemExit):
        command(monkeypatch, ROOT / "benchmark" / "aggregate.py", *table, "--settings", "b", "spread")
    assert "got spread, expected some of a, b, c, d, e" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, said",
    [
        ("figures.py benchmark/results/meta_test.csv nowhere elsewhere.csv", "got nowhere, elsewhere.csv, expected"),
        ("aggregate.py --table nowhere.csv", "--table: got nowhere.csv, expected"),
        ("soak.py --iterations 19", "--iterations: got 19, expected at least 20"),
    ],
)
def test_bad_input_is_refused_in_one_line(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    name, *flags = line.split()
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, ROOT / "benchmark" / name, *flags, *([] if name == "soak.py" else ["--out", tmp_path]))
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_run_that_is_shipped(finished, tmp_path, monkeypatch, capsys):
    """It says what the run says, and cannot be trained on."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    for name in ("mg2l_1", "given_1"):
        script, out = {"m": "mg2l_mappo", "g": "task_given"}[name[0]], tmp_path / "out" / name
        command(monkeypatch, ROOT / "benchmark" / "ship.py", finished / name, out)
        assert (out / "checkpoint.pt").stat().st_size < (finished / name / "checkpoint.pt").stat().st_size / 1.5
        assert str(tmp_path) not in (out / "args.json").read_text()
        for run in (finished / name, out):
            with pytest.raises(SystemExit) as stopped:
                command(monkeypatch, ROOT / f"{script}.py", "--meta-test", run)
            assert not stopped.value.code
        assert (out / "meta_test_only.csv").read_bytes() == (finished / name / "meta_test_only.csv").read_bytes()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, ROOT / f"{script}.py", "--resume", out, "--total-timesteps", 9000)
        assert stopped.value.code == 2 and "got actor that does not fit" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, ROOT / "benchmark" / "ship.py", tmp_path, tmp_path / "none")
    assert stopped.value.code == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("env_id", ["hunting_target", "spread_target"])
def test_runs_in_the_results_can_be_watched(env_id):
    import mg2l_mappo

    agents = mg2l_mappo.load_agents(ROOT / "benchmark" / "results" / env_id)
    actions = agents.act(agents.env.reset(seed=0)[0], agents.prior(num_envs=1))
    assert agents.args.env_id == env_id and agents.env.step(actions)[1].shape == (1, agents.env.num_agents)
