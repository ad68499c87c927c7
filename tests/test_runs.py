"""The scripts from the command line: what a run leaves behind, resuming it, evaluating it, and what it refuses."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import ma_pearl
import mg2l_mappo
import mix_mate
import task_given

ROOT = Path(__file__).parents[1]
MODULES = {"mg2l_mappo": mg2l_mappo, "task_given": task_given}
every_script = pytest.mark.parametrize("script", MODULES)
SMALL = "--num-envs 2 --update-epochs 2 --eval-copies 6 --eval-interval 400 --num-threads 1".split()
CONTEXT = "--warmup-episodes 2 --warmup-updates 2 --context-copies 1 --context-interval 1 --encoder-updates 2"
CONTEXT = [*CONTEXT.split(), "--context-episodes", "2", "--context-episode-steps", "100"]
ITERATIONS = 3
# three iterations each; the buffer of mg2l_mappo.py holds two episodes, so that the third collection pushes one out
TOTAL = {"mg2l_mappo": 1800, "task_given": 600}
STEPS = {"mg2l_mappo": [800, 1300, 1800], "task_given": [200, 400, 600]}
EVALUATED = {"mg2l_mappo": [0, 800, 1300, 1800], "task_given": [0, 400, 600]}
OWN = {"mg2l_mappo": [*CONTEXT, "--buffer-size", "1800"], "task_given": []}
COLUMNS = ["step", "run", "task", "episode", "phase", "context_steps", "return", "accuracy", "probe"]
SCALARS = {
    "mg2l_mappo": "meta_test/cl_accuracy_local meta_test/probe_accuracy_local charts/cl_accuracy_global "
    "charts/cl_accuracy_local charts/cl_accuracy_local_worst losses/consistency_kl time/encoder",
    "task_given": "",
}
SCALARS = {
    script: set(own.split())
    | {"charts/episodic_return", "charts/SPS", "charts/learning_rate"}
    | {"losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"}
    | {"meta_test/return", "meta_test/return_prior", "time/rollout", "time/ppo", "time/eval"}
    for script, own in SCALARS.items()
}


def call(script, *argv):
    """A command line, run in this process: exit code, standard output, standard error. Most exceptions go through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):  # what the interpreter does with sys.exit("...")
                print(code, file=err)
                code = 1
        except OSError as error:  # and what it does with an error that nobody catches
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(script, folder, *more):
    """Three iterations in folder/run."""
    return call(
        script, *SMALL, *OWN[script], "--explore-episodes", 1, "--test-episodes", 2, "--total-timesteps", TOTAL[script],
        "--no-cuda", "--checkpoint-interval", 1, "--run-dir", folder, "--run-name", "run", *more,
    )  # fmt: skip


def rows_of(path):
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def scalars_of(run):
    """Name -> list of (step, value), as TensorBoard would draw them."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def contents(folder):
    """Every file below a folder and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each script a finished run, and its folder as it was on disk before and after every checkpoint."""
    out = {}
    for script in MODULES:
        folder = tmp_path_factory.mktemp(script)
        replace, snapshots, run = os.replace, {}, folder / "run"

        def keep(name, folder=folder, snapshots=snapshots, run=run):
            snapshots[name] = shutil.copytree(run, folder / name)
            for k, path in enumerate(sorted(snapshots[name].glob("events.*"))):
                path.rename(path.with_name(f"events.out.tfevents.{k + 1:010}.earlier"))  # not within the same second

        def watched(source, target, replace=replace, snapshots=snapshots, keep=keep):
            k = len(snapshots) // 2 + 1
            keep(f"before-{k}")
            replace(source, target)
            keep(f"after-{k}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", watched)
            result = train(script, folder)
        assert result.code == 0, result.err
        assert len(snapshots) == 2 * ITERATIONS
        out[script] = SimpleNamespace(run=run, snapshots=snapshots, result=result)
    return out


@pytest.fixture
def copied(trained, tmp_path):
    """script -> a copy of its finished run, to do things to."""
    return lambda script: shutil.copytree(trained[script].run, tmp_path / "runs" / "run")


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def check_rows(rows, tasks, steps, copies, explore, total, has_accuracy):
    """Every evaluation has all its rows, and only the last one the curve."""
    episodes = [("prior", k) for k in range(explore)] + [("posterior", k) for k in range(explore, total)]
    curve = [k for k in (0, 10, 20, 50, 100, 200, 500) if k <= 100 * explore]
    found = [(int(r["step"]), r["phase"], int(r["episode"]), int(r["context_steps"]), int(r["run"])) for r in rows]
    expected = []
    for step in steps:
        expected += [(step, p, k, 100 * explore * (p != "prior"), c) for p, k in episodes for c in range(copies)]
    expected += [(steps[-1], "curve", total, size, c) for size in curve for c in range(copies)]
    assert found == expected
    for row in rows:
        assert int(row["task"]) == tasks[int(row["run"]) % len(tasks)]
        assert -3000 < float(row["return"]) < 3000
        # a copy that is alone on its task has nobody to be compared with
        inferred = has_accuracy and int(row["context_steps"]) > 0
        comparable = inferred and (int(row["run"]) % len(tasks) < copies % len(tasks) or copies >= 2 * len(tasks))
        for key in ("accuracy", "probe"):
            assert 0 <= float(row[key]) <= 1 if comparable else row[key] == ""


@pytest.mark.parametrize("env_id, num_tasks", [("hunting_target", 3), ("spread_target", 4)])
@every_script
def test_command_line(script, env_id, num_tasks, tmp_path):
    total = {"mg2l_mappo": 1600, "task_given": 500}[script]
    last = {"mg2l_mappo": 400 + 300 * num_tasks, "task_given": 400}[script]
    own = CONTEXT if script == "mg2l_mappo" else []
    command = [sys.executable, ROOT / f"{script}.py", "--env-id", env_id, "--total-timesteps", str(total), *SMALL, *own]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert f"{total:,} steps" in done.stdout and "return" in done.stdout.splitlines()[-1]

    [run] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{env_id}__{script}__1__\d+", run.name)
    kinds = sorted("events" if path.name.startswith("events.") else path.name for path in run.iterdir())
    assert kinds == ["args.json", "checkpoint.pt", "events", "meta_test.csv"]
    args = json.loads((run / "args.json").read_text())
    assert args.pop("script") == script
    assert args["env_id"] == env_id and args["num_envs"] == 2 and args["total_timesteps"] == total
    assert {name for name, value in args.items() if value is None} == {
        "run_name",
        "resume",
        "meta_test",
        "wandb_entity",
    }
    saved = checkpoint_of(run)
    assert saved["script"] == script and saved["iteration"] == 2
    saved_args = {name: list(value) if isinstance(value, tuple) else value for name, value in saved["args"].items()}
    assert saved_args == args

    tasks, rows = envs.make(env_id).tasks.test, rows_of(run / "meta_test.csv")
    steps = sorted({int(row["step"]) for row in rows})
    assert steps[0] == 0 and steps[-1] == last
    check_rows(rows, tasks, steps, copies=6, explore=2, total=4, has_accuracy=script == "mg2l_mappo")
    scalars = scalars_of(run)
    assert scalars.keys() >= SCALARS[script]
    assert all(math.isfinite(value) for series in scalars.values() for _, value in series)
    for name, series in scalars.items():
        at = steps if name.startswith("meta_test/") else [last - (200 if not own else 200 + 100 * num_tasks), last]
        assert [step for step, _ in series] == at, name


@every_script
def test_finished_run(script, trained):
    run = trained[script].run
    rows = rows_of(run / "meta_test.csv")
    check_rows(rows, [0, 1, 2], EVALUATED[script], 6, explore=1, total=2, has_accuracy=script == "mg2l_mappo")
    scalars = scalars_of(run)
    for name, series in scalars.items():
        expected = EVALUATED[script] if name.startswith("meta_test/") else STEPS[script]
        assert [step for step, _ in series] == expected, name
    for phase, name in (("prior", "return_prior"), ("posterior", "return")):
        for step, value in scalars[f"meta_test/{name}"]:
            returns = [float(r["return"]) for r in rows if r["phase"] == phase and int(r["step"]) == step]
            assert value == pytest.approx(np.mean(returns), rel=1e-5)
    rates = [5e-4 * (1 - k / ITERATIONS) for k in range(ITERATIONS)]
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx(rates)
    assert not (run / "checkpoint.tmp").exists()


@every_script
def test_same_seed_same_run(script, trained, tmp_path):
    torch.manual_seed(12345)  # whatever was drawn before
    np.random.seed(12345)
    result = train(script, tmp_path, "--checkpoint-interval", 10**6)  # only at the end
    assert result.code == 0, result.err
    again, first = tmp_path / "run", trained[script].run
    assert (again / "meta_test.csv").read_bytes() == (first / "meta_test.csv").read_bytes()
    for key in checkpoint_of(first).keys() - {"args"}:
        assert identical(checkpoint_of(again)[key], checkpoint_of(first)[key]), key


@every_script
def test_same_seed_same_run_on_two_threads(script, tmp_path):
    """As many as most machines have at least; sums are taken in another order than on one."""
    runs = [tmp_path / name / "run" for name in ("a", "b")]
    for run in runs:
        assert train(script, run.parent, "--num-threads", 2).code == 0
    assert runs[0].joinpath("meta_test.csv").read_bytes() == runs[1].joinpath("meta_test.csv").read_bytes()
    first, second = (checkpoint_of(run)["networks"] for run in runs)
    assert identical(first, second)


@every_script
def test_another_seed_another_run(script, trained, tmp_path):
    assert train(script, tmp_path, "--seed", 2).code == 0
    other, first = tmp_path / "run", trained[script].run
    assert (other / "meta_test.csv").read_bytes() != (first / "meta_test.csv").read_bytes()
    assert not identical(checkpoint_of(other)["networks"]["actor"], checkpoint_of(first)["networks"]["actor"])


def test_track(tmp_path):
    """Weights & Biases, offline: its files lie in the run folder."""
    places = {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA")}
    environment = os.environ | places | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "task_given.py", "--track", "--total-timesteps", "200", "--run-name", "run"]
    done = subprocess.run([*command, *SMALL], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    [offline] = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*")
    [log] = offline.glob("*.wandb")
    assert b"losses/policy_loss" in log.read_bytes()  # what TensorBoard gets
    assert checkpoint_of(tmp_path / "runs" / "run")["args"]["track"] is True


def test_track_without_an_account(tmp_path):
    """A warning, and training goes on."""
    elsewhere = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | elsewhere
    command = [sys.executable, ROOT / "task_given.py", "--track", "--total-timesteps", "200", "--run-name", "run"]
    flags = dict(cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    done = subprocess.run([*command, *SMALL], **flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("track: ") and "goes on without" in done.stderr and "Traceback" not in done.stderr
    assert checkpoint_of(tmp_path / "runs" / "run")["iteration"] == 1


@every_script
def test_video_that_cannot_be_drawn(script, trained, tmp_path, monkeypatch):
    """No display, say: a warning, and what was trained is whole."""

    def blind(env):
        raise RuntimeError("no display")

    monkeypatch.setattr(envs.particle.HuntingTarget, "render", blind)
    result = train(script, tmp_path, "--capture-video")
    assert result.code == 0 and "capture-video: got RuntimeError: no display; no video was written" in result.err
    assert identical(checkpoint_of(tmp_path / "run")["networks"], checkpoint_of(trained[script].run)["networks"])
    result = call(script, "--meta-test", tmp_path / "run", "--capture-video")
    assert result.code == 1 and result.err.endswith("got RuntimeError: no display; no video was written\n")
    assert "task 2 (" in result.out and (tmp_path / "run" / "meta_test_only.csv").is_file()


# ----------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.fixture(scope="module", params=["after-1", "before-2", "after-2", "before-3", "after-3"])
def killed(request, trained, tmp_path_factory):
    """For each script a run that was killed before or after a checkpoint was put in place, then resumed."""
    out = {}
    for script in MODULES:
        run = shutil.copytree(trained[script].snapshots[request.param], tmp_path_factory.mktemp(script) / "run")
        out[script] = SimpleNamespace(run=run, result=call(script, "--resume", run))
    return out


@every_script
def test_resume(script, killed, trained):
    """As if it had never been stopped."""
    (run, result), whole = (killed[script].run, killed[script].result), trained[script].run
    assert result.code == 0, result.err
    assert (run / "meta_test.csv").read_bytes() == (whole / "meta_test.csv").read_bytes()
    assert (run / "args.json").read_bytes() == (whole / "args.json").read_bytes()
    resumed, expected = checkpoint_of(run), checkpoint_of(whole)
    assert resumed.keys() == expected.keys()
    for key in expected:
        assert identical(resumed[key], expected[key]), key
    # the summary is the same, but for the seconds it took
    assert result.out.splitlines()[-1].split(" s, ")[1] == trained[script].result.out.splitlines()[-1].split(" s, ")[1]


@every_script
def test_resume_tensorboard(script, killed, trained):
    """Every step once, with the values of a run that was never stopped."""
    resumed, expected = scalars_of(killed[script].run), scalars_of(trained[script].run)
    assert resumed.keys() == expected.keys()
    for name in expected:
        if name.startswith("time/") or name == "charts/SPS":
            assert [step for step, _ in resumed[name]] == [step for step, _ in expected[name]], name
        else:
            assert resumed[name] == expected[name], name


@every_script
def test_resume_for_longer(script, copied):
    run, one_more = copied(script), STEPS[script][-1] - STEPS[script][-2]
    before = (run / "meta_test.csv").read_bytes()
    result = call(script, "--resume", run, "--total-timesteps", TOTAL[script] + one_more)
    assert result.code == 0, result.err
    assert checkpoint_of(run)["iteration"] == ITERATIONS + 1
    assert checkpoint_of(run)["args"]["total_timesteps"] == TOTAL[script] + one_more
    assert (run / "meta_test.csv").read_bytes().startswith(before)
    rows = rows_of(run / "meta_test.csv")
    assert int(rows[-1]["step"]) == TOTAL[script] + one_more and rows[-1]["phase"] == "curve"


@every_script
def test_resume_for_less(script, copied):
    run = copied(script)
    before = contents(run.parent)
    for total in (STEPS[script][0], TOTAL[script] - 1):
        result = call(script, "--resume", run, "--total-timesteps", total)
        one_line(result, script, f"total-timesteps: got {total}, expected at least the {TOTAL[script]} of")
        assert contents(run.parent) == before


@pytest.mark.parametrize("flag", ["--resume", "--meta-test"])
@every_script
def test_run_without_a_name(script, flag, tmp_path, monkeypatch):
    """As a shell gives it that finds no value for $RUN: no new run begins."""
    monkeypatch.chdir(tmp_path)
    one_line(call(script, flag, "", "--total-timesteps", 1), script, "checkpoint.pt: got no file")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Meta-test of a run, videos, and the agents in other people's hands


@every_script
def test_meta_test_and_video(script, copied):
    run = copied(script)
    before = contents(run)
    result = call(script, "--meta-test", run, "--capture-video")
    assert result.code == 0, result.err
    after = contents(run)
    assert {name: after[name] for name in before} == before
    videos = {f"videos/task_{task}.gif" for task in range(3)}
    assert after.keys() - before.keys() == videos | {"meta_test_only.csv"}
    # the same evaluation as at the end of training
    last = [row for row in rows_of(run / "meta_test.csv") if int(row["step"]) == TOTAL[script]]
    assert rows_of(run / "meta_test_only.csv") == last
    assert [f"task {task}" in result.out for task in range(3)] == [True] * 3

    for name in videos:
        with Image.open(run / name) as video:
            assert video.n_frames >= 10
            frames = []
            for k in (0, video.n_frames // 2):
                video.seek(k)
                frames.append(np.asarray(video.convert("RGB"))[24:].astype(int))  # without the line of titles
        assert np.abs(frames[0] - frames[1]).max() > 50
        if script == "mg2l_mappo":  # exploration beside what it taught, from the same start
            halves = [np.split(frame, 2, axis=1) for frame in frames]
            assert np.abs(halves[0][0] - halves[0][1]).max() < 50
            assert np.abs(halves[1][0] - halves[1][1]).max() > 50


@pytest.mark.parametrize("explore, total, copies", [(3, 5, 4), (2, 4, 32)], ids=["others", "defaults of the script"])
@every_script
def test_meta_test_flags(script, explore, total, copies, copied):
    """What is given by hand holds, also where it is the default of the script and not that of the run (1, 2, 6)."""
    run, flags = copied(script), ["--explore-episodes", explore, "--test-episodes", total, "--eval-copies", copies]
    (run / "meta_test_only.csv").write_text("what an earlier evaluation left is replaced")
    result = call(script, "--meta-test", run, *flags, "--seed", 7)
    assert result.code == 0, result.err
    rows = rows_of(run / "meta_test_only.csv")
    check_rows(rows, [0, 1, 2], [TOTAL[script]], copies, explore, total, has_accuracy=script == "mg2l_mappo")


@every_script
def test_evaluation_that_cannot_be_written(script, copied):
    run = copied(script)
    (run / "meta_test_only.csv").mkdir()
    one_line(call(script, "--meta-test", run), script, "meta_test_only.csv: got ")


def test_tasks_with_a_name_are_scored(tmp_path):
    """Held-out ones are nothing that a one-hot could name: they are neither shown nor filmed. A copy has one task."""
    flags = ["--env-id", "spread_target", "--env-kwargs", "num_test=1", "--run-dir", tmp_path, "--capture-video"]
    flags += ["--total-timesteps", 200, *SMALL, "--eval-copies"]
    assert call("task_given", *flags, 2, "--run-name", "run").code == 0
    for copies, scored in ((2, 2), (3, 3), (5, 3)):
        out = call("task_given", "--meta-test", tmp_path / "run", "--eval-copies", copies).out
        assert [f"task {task} (" in out for task in range(4)] == [task < scored for task in range(4)]
        assert out.count("return ") == scored
    assert {path.name for path in tmp_path.glob("run/videos/*")} == {f"task_{task}.gif" for task in range(3)}


@pytest.mark.parametrize("label", ["one-hot", "code", "parameters", "none"])
@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_every_label_goes_with_the_defaults(env_id, label):
    task_given.check_args(task_given.Args(env_id=env_id, task_label=label))


def test_video_at_the_end_of_training(tmp_path):
    flags = ["--total-timesteps", 200, "--run-dir", tmp_path, "--env-kwargs", "num_preys=1", "--capture-video"]
    result = call("task_given", *SMALL, *flags)
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.glob("*/videos/*")] == ["task_0.gif"]


@every_script
def test_load_agents(script, trained):
    agents = MODULES[script].load_agents(trained[script].run)
    env = agents.env
    obs, _ = env.reset(seed=0, options={"task": [1]})
    z = agents.prior(1) if script == "mg2l_mappo" else agents.told([1])

    assert agents.args.num_envs == 2 and identical(
        dict(agents.actor.state_dict()), dict(checkpoint_of(trained[script].run)["networks"]["actor"])
    )
    transitions, discrete = [], hasattr(env.single_action_space, "n")
    for step in range(20):
        action = agents.act(obs, z, greedy=step % 2 == 0)
        next_obs, reward, *_ = env.step(action)  # raises on anything but valid actions
        taken = np.eye(env.single_action_space.n, dtype=np.float32)[action] if discrete else action
        transitions.append(np.concatenate([obs, taken, reward[..., None], next_obs], -1)[0])  # [n, transition_dim]
        obs = next_obs
    assert np.array_equal(agents.act(obs, z), agents.act(obs, z))
    assert any(not np.array_equal(agents.act(obs, z, greedy=False), agents.act(obs, z)) for _ in range(20))
    if script == "mg2l_mappo":
        assert z.shape == (3, 1, agents.args.latent_dim)
        memory = torch.as_tensor(np.stack(transitions), dtype=torch.float32)  # [S, n, transition_dim]
        z = agents.infer([memory, memory[:0]])
        assert z.shape == (3, 2, agents.args.latent_dim) and z.isfinite().all() and not z.requires_grad
        z = z[:, :1]
    else:
        assert torch.equal(z, torch.tensor([0.0, 1, 0]).expand(3, 1, 3))
    env.step(agents.act(obs, z))


def test_code_tells_tasks_apart_and_nothing_else():
    env = envs.make("hunting_target", 1)
    args = task_given.Args(task_label="code")
    code = task_given.told(args, env, np.array([0, 1, 2, 1]), 5, "cpu")  # [n, T, E, 64]
    assert code.shape == (env.num_agents, 5, 4, 64) and (code.abs() == 1).all()
    assert (code == code[:1, :1]).all() and (code[:, :, 1] == code[:, :, 3]).all()
    differ = (code[0, 0, :3, None] != code[0, 0, None, :3]).sum(-1)  # [tasks, tasks]
    assert (differ.fill_diagonal_(32) > 16).all()
    args.label_scale = 0.25
    assert torch.equal(task_given.told(args, env, np.array([0, 1, 2, 1]), 5, "cpu"), code / 4)


@every_script
def test_load_agents_refuses(script, tmp_path):
    with pytest.raises(ValueError, match="checkpoint.pt: got no file"):
        MODULES[script].load_agents(tmp_path)


@pytest.mark.parametrize("script", ["mg2l_mappo", "ma_pearl"])
def test_agents_explore_on_a_prior_of_explore_scale(script, tmp_path):
    """In the context that is collected, and where a run is loaded; at meta-test: tests of meta_test."""
    contexts, deviations = [], []
    for scale in (1, 3):
        flags = [*SMALL, "--warmup-episodes", 2, "--context-episode-steps", 20, "--total-timesteps", 400]
        assert call(script, *flags, "--explore-scale", scale, "--run-dir", tmp_path, "--run-name", scale).code == 0
        contexts.append(torch.load(tmp_path / str(scale) / "checkpoint.pt")["context"])
        prior = runpy.run_path(str(ROOT / f"{script}.py"))["load_agents"](tmp_path / str(scale)).prior(500)
        deviations.append(prior.std().item())
    assert contexts[0].shape == contexts[1].shape and not torch.equal(*contexts)  # all else is equal
    assert deviations == pytest.approx([1, 3], rel=0.05)


@pytest.mark.parametrize("script", ["mg2l_mappo", "mg2l_mappo_cudagraphs", "mg2l_mappo_multigpu"])
def test_encoder_learns_at_its_rates(script, tmp_path, monkeypatch):
    """In the warm-up, in the epochs of PPO beside critic and actors, and after them."""
    rates, step = [], torch.optim.Adam.step
    recording = lambda adam, *args: (rates.append(float(adam.param_groups[0]["lr"])), step(adam, *args))  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    flags = "--learning-rate 0.001 --encoder-learning-rate 0.002 --warmup-learning-rate 0.003 --total-timesteps 800"
    assert call(script, *SMALL, *CONTEXT, *flags.split(), "--no-cuda", "--run-dir", tmp_path).code == 0
    assert rates == pytest.approx(2 * [0.003, 0.003] + 2 * [0.001, 0.002, 0.001] + 2 * [0.002, 0.002])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused: exit code 2, one line, nothing written

POSITIVE = (
    "num_envs update_epochs total_timesteps eval_interval eval_copies test_episodes checkpoint_interval hidden_dim "
    "checkpoint_minutes learning_rate adam_eps gamma clip_coef huber_delta max_grad_norm"
).split()
CONTEXT_POSITIVE = (
    "latent_dim encoder_dim encoder_heads temperature context_size inference_size buffer_size context_episodes "
    "latent_scale explore_scale context_copies warmup_episodes context_interval context_sets rollout_contexts "
    "encoder_learning_rate warmup_learning_rate context_episode_steps rollout_context_size rollout_context_episodes "
    "critic_context_size local_temperature"
).split()
BAD = [  # flags, what the line must say
    *(([f"--{name.replace('_', '-')}", "0"], name.replace("_", "-")) for name in POSITIVE),
    ("--num-envs -3", "num-envs: got -3"),
    ("--seed -1", "seed: got -1"),
    ("--num-threads -1", "num-threads"),
    ("--num-threads 5000000000", "num-threads: got 5000000000"),
    ("--ent-coef -0.1", "ent-coef"),
    ("--learning-rate nan", "learning-rate: got nan"),
    ("--learning-rate inf", "learning-rate: got inf"),
    ("--gamma 2", "gamma: got 2.0"),
    ("--gae-lambda 1.5", "gae-lambda"),
    ("--total-timesteps 199 --num-envs 2", "total-timesteps: got 199"),
    ("--env-id maze", "maze"),
    ("--env-id hunting_target --env-kwargs num_agents=3", "num_agents"),
    ("--env-kwargs num_preys", "num_preys"),
    ("--env-kwargs num_preys=two", "num_preys=two"),
    ("--env-kwargs =3", "unknown setting"),
    ("--env-kwargs num_envs=3", "num_envs"),
    ("--env-kwargs seed=3", "seed"),
    ("--env-kwargs num_preys=__import__('os').getcwd()", "NAME=VALUE"),
    ("--env-kwargs num_preys={[]:1}", "NAME=VALUE"),
    ("--env-kwargs num_preys=0", "num_preys: got 0"),
    ("--env-kwargs num_preys=2.5", "num_preys: got 2.5"),
    ("--env-kwargs radius=-1", "radius: got -1"),
    ("--env-id spread_target --env-kwargs num_test=4", "num_test: got 4"),
    ("--eval-copies 2", "eval-copies: got 2"),
    ("--env-id spread_target --eval-copies 3", "eval-copies: got 3"),
    ("--explore-episodes 4", "test-episodes: got 4"),
    ("--explore-episodes 2 --test-episodes 2", "test-episodes: got 2"),
    ("--resume nowhere", "nowhere"),
    ("--meta-test nowhere", "nowhere"),
    ("--resume somewhere --meta-test somewhere", "got both"),
]
BAD_CONTEXT = [
    *(([f"--{name.replace('_', '-')}", "0"], name.replace("_", "-")) for name in CONTEXT_POSITIVE),
    ("--encoder-heads 5", "encoder-heads: got 5"),
    ("--context-sets 1", "context-sets: got 1"),
    ("--rollout-contexts 1", "rollout-contexts: got 1"),
    ("--context-episode-steps 101", "context-episode-steps: got 101"),
    ("--kl-coef -1", "kl-coef"),
    ("--encoder-updates -1", "encoder-updates"),
    ("--context-size 201 --buffer-size 1800", "context-size: got 201"),
    ("--env-kwargs num_preys=1", "training task"),
    ("--total-timesteps 271 --num-envs 2 --warmup-episodes 2", "total-timesteps: got 271"),
]
TABLE = [(script, *row) for script in MODULES for row in BAD] + [("mg2l_mappo", *row) for row in BAD_CONTEXT]
TABLE.append(("task_given", "--label-scale 0", "label-scale: got 0"))
BASELINES = {"ma_pearl": ma_pearl, "mix_mate": mix_mate}
TABLE += [(script, *row) for script in BASELINES for row in BAD]
TABLE += [
    (script, f"--{name.replace('_', '-')} 0", name.replace("_", "-"))
    for script, module in BASELINES.items()
    for name in (*CONTEXT_POSITIVE, "bptt_steps", "decoded_steps")
    if hasattr(module.Args(), name)
]


def one_line(result, script, word):
    assert result.code == 2, result.err
    assert result.err.startswith(f"{script}.py: ") and result.err.count("\n") == 1, result.err
    assert word in result.err and "expected" in result.err, result.err


@pytest.mark.parametrize("script, flags, word", TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_bad_input(script, flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(call(script, *(flags.split() if isinstance(flags, str) else flags)), script, word)
    assert not list(tmp_path.iterdir())


OF_TYRO = ["--unheard-of 1", "--gamma x", "--num-envs 2.5", "--wandb", "--task-label 3", "--local-loss mse"]


@pytest.mark.parametrize("flags", OF_TYRO)
@pytest.mark.parametrize("script", [*MODULES, *BASELINES])
def test_bad_flag(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(script, *flags.split())
    assert result.code == 2 and flags.split()[0] in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@every_script
def test_run_folder_that_cannot_be_made(script, tmp_path, trained):
    file = tmp_path / "file"
    file.write_text("something")
    one_line(train(script, file), script, str(file))  # --run-dir is a file
    one_line(train(script, file / "below"), script, str(file / "below"))
    (tmp_path / "run").mkdir()
    one_line(train(script, tmp_path), script, str(tmp_path / "run"))  # --run-name is taken
    assert contents(tmp_path) == {"file": b"something"}
    before = contents(trained[script].run)
    one_line(train(script, trained[script].run.parent), script, "run-dir")
    assert contents(trained[script].run) == before


def edit(change):
    """Something done to a checkpoint's content."""

    def apply(path, script):
        saved = torch.load(path, weights_only=True)
        change(saved, script)
        MODULES[script].save_checkpoint(path, saved)  # so that its digest is right

    return apply


BROKEN = {
    "missing": lambda path, script: path.unlink(),
    "empty": lambda path, script: path.write_bytes(b""),
    "truncated": lambda path, script: path.write_bytes(path.read_bytes()[:-1000]),
    "half": lambda path, script: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "random bytes": lambda path, script: path.write_bytes(np.random.default_rng(0).bytes(4096)),
    "no digest": lambda path, script: torch.save(torch.load(path, weights_only=True), path),
    "no dictionary": lambda path, script: MODULES[script].save_checkpoint(path, [1, 2]),
    "no script": lambda path, script: MODULES[script].save_checkpoint(path, {"weights": torch.zeros(3)}),
    "the other script": edit(lambda saved, script: saved.update(script=(MODULES.keys() - {script}).pop())),
    "other shapes": edit(lambda saved, script: saved["args"].update(hidden_dim=64)),
    "other agents": edit(lambda saved, script: saved["args"].update(env_kwargs=("num_predators=2",))),
    "a network missing": edit(lambda saved, script: saved["networks"].pop("critic")),
    "all networks missing": edit(lambda saved, script: saved.pop("networks")),
    "an optimizer of another shape": edit(
        lambda saved, script: saved["optimizers"].update(actor=saved["optimizers"]["critic"])
    ),
    "no arguments": edit(lambda saved, script: saved.pop("args")),
    "an argument of another version": edit(lambda saved, script: saved["args"].update(old_flag=1)),
    "a value out of range": edit(lambda saved, script: saved["args"].update(gamma=2.0)),
    "an unknown environment": edit(lambda saved, script: saved["args"].update(env_id="maze")),
}


@pytest.mark.parametrize("broken", BROKEN)
@every_script
def test_broken_checkpoint(script, broken, copied):
    run = copied(script)
    BROKEN[broken](run / "checkpoint.pt", script)
    before = contents(run.parent)
    one_line(call(script, "--resume", run), script, "got")
    assert contents(run.parent) == before
    if "optimizer" not in broken:
        one_line(call(script, "--meta-test", run), script, "got")
        assert contents(run.parent) == before


@pytest.mark.parametrize(
    "mode, flags",
    [
        ("--resume", "--learning-rate 0.001"),
        ("--resume", "--num-envs 4"),
        ("--resume", "--num-envs 32"),  # the default of the script, not what the run has
        ("--resume", "--seed 3"),
        ("--resume", "--env-id spread_target"),
        ("--resume", "--env-kwargs num_preys=2"),
        ("--resume", "--run-name other"),
        ("--resume", "--total-timesteps 10"),
        ("--meta-test", "--hidden-dim 64"),
        ("--meta-test", "--env-id spread_target"),
        ("--meta-test", "--test-episodes 1"),
        ("--meta-test", "--eval-copies 1"),
    ],
)
@every_script
def test_argument_that_cannot_change(script, mode, flags, copied):
    run = copied(script)
    before = contents(run.parent)
    one_line(call(script, mode, run, *flags.split()), script, flags.split()[0][2:])
    assert contents(run.parent) == before


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
@every_script
def test_checkpoint_runs_no_code(script, plain, tmp_path):
    run, trace = tmp_path / "run", tmp_path / "trace"
    run.mkdir()
    content = {"script": script, "args": Malicious(trace)}
    if plain:
        data = pickle.dumps(content, protocol=2)
        (run / "checkpoint.pt").write_bytes(data + hashlib.sha256(data).digest())
    else:
        MODULES[script].save_checkpoint(run / "checkpoint.pt", content)
    one_line(call(script, "--resume", run), script, "checkpoint.pt")
    one_line(call(script, "--meta-test", run), script, "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt"):
        MODULES[script].load_agents(run)
    assert not trace.exists()
    pickle.loads((run / "checkpoint.pt").read_bytes()) if plain else torch.load(
        run / "checkpoint.pt", weights_only=False
    )
    assert trace.exists()  # it would have


# ----------------------------------------------------------------------------------------------------------------------
# When things break


@pytest.mark.parametrize("script, value", [("mg2l_mappo", math.nan), ("task_given", math.inf)])
def test_not_finite(script, value, trained, tmp_path, monkeypatch):
    """A reward that is no number in the second iteration stops the run; what the first one left is still there."""
    make = envs.make

    def poisoned(env_id, num_envs=1, seed=0, **settings):
        env = make(env_id, num_envs, seed, **settings)
        if num_envs == 2:  # the copies that gather experience for the policies
            steps, step = 0, env.step

            def bad_step(actions):
                nonlocal steps
                obs, reward, *rest = step(actions)
                steps += 1
                return obs, np.full_like(reward, value) if steps == 150 else reward, *rest

            env.step = bad_step
        return env

    monkeypatch.setattr(envs, "make", poisoned)
    result = train(script, tmp_path)
    assert result.code not in (0, 2)
    message = result.err.splitlines()[-1]
    assert message.startswith(f"{script}.py: reward not finite after 50 steps of hunting_target")
    assert "Traceback" not in result.err

    run, saved = tmp_path / "run", trained[script].snapshots["after-1"]
    for key in checkpoint_of(saved).keys() - {"args"}:
        assert identical(checkpoint_of(run)[key], checkpoint_of(saved)[key]), key
    MODULES[script].load_agents(run)
    assert not any(math.isnan(value) for series in scalars_of(run).values() for _, value in series)
    monkeypatch.undo()
    assert call(script, "--resume", run).code == 0
    assert (run / "meta_test.csv").read_bytes() == (trained[script].run / "meta_test.csv").read_bytes()


@every_script
def test_full_disk_leaves_the_last_checkpoint(script, trained, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def fails_the_third_time(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            os.ftruncate(descriptor, 1000)
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_the_third_time)
    result = train(script, tmp_path)
    assert len(calls) == 3 and result.code == 1 and "Traceback" not in result.err
    run = tmp_path / "run"
    assert f"\n{script}.py: {run}: [Errno 28] No space left on device" in result.err
    assert not (run / "checkpoint.tmp").exists()  # it takes no room
    for name, snapshot in (("checkpoint.pt", "after-2"), ("checkpoint_previous.pt", "after-1")):
        found, expected = torch.load(run / name, weights_only=True), checkpoint_of(trained[script].snapshots[snapshot])
        assert identical(found["networks"], expected["networks"]) and found["iteration"] == expected["iteration"]
    MODULES[script].load_agents(run)


@every_script
def test_checkpoint_is_synced_and_then_put_in_place(script, tmp_path, monkeypatch):
    path, order, (fsync, replace) = tmp_path / "checkpoint.pt", [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", Path(b).name)), replace(a, b)))
    MODULES[script].save_checkpoint(path, {"script": script, "x": torch.arange(1000)})
    assert order == [("fsync", path.stat().st_size), ("replace", "checkpoint.pt")]
    assert torch.equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["x"], torch.arange(1000))
    first = contents(tmp_path)
    assert first.keys() == {"checkpoint.pt"}
    assert hashlib.sha256(first["checkpoint.pt"][:-32]).digest() == first["checkpoint.pt"][-32:]
    MODULES[script].save_checkpoint(path, {"script": script, "x": torch.arange(5)})
    assert torch.equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["x"], torch.arange(5))
    assert contents(tmp_path).keys() == {"checkpoint.pt", "checkpoint_previous.pt"}
    assert contents(tmp_path)["checkpoint_previous.pt"] == first["checkpoint.pt"]
