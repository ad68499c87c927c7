"""Runs that are killed, stopped, short of disk or fed with nonsense: what is on disk is whole, and they go on from it.

A run that went on must end in the same bits as one that nothing happened to. Episodes are cut to 20 steps, so that a
run of four iterations, with an evaluation and a checkpoint in each, takes a second on any engine.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_env import COLLECT, FEWER, OWN, TINY
from test_runs import call, checkpoint_of, contents, identical, rows_of, scalars_of

import envs
import ma_pearl
import mg2l_mappo
import mix_mate
import task_given

ROOT = Path(__file__).parents[1]
MODULES = {"mg2l_mappo": mg2l_mappo, "task_given": task_given, "ma_pearl": ma_pearl, "mix_mate": mix_mate}
every_script = pytest.mark.parametrize("script", MODULES)
EPISODE, ITERATIONS = 20, 4
PAIRS = [  # every script, and every engine: particles, MuJoCo, rware, MAgent2
    ("mg2l_mappo", "hunting_target"),
    ("ma_pearl", "hopper_param"),
    ("mix_mate", "rware_layout"),
    ("task_given", "magent_gather"),
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=["-".join(pair) for pair in PAIRS])
CHEAP = ("task_given", "hunting_target")  # for what all scripts do with the same text


def settings_of(env_id):
    """As few tasks and agents as test_every_env.py takes."""
    return {name: eval(value) for name, _, value in (text.partition("=") for text in FEWER.get(env_id, "").split())}


def steps_of(script, env_id, iterations):
    num_tasks = len(envs.make(env_id, **settings_of(env_id)).tasks.train)
    return EPISODE * iterations * (2 + num_tasks * (script in COLLECT))


def command(script, env_id, folder, *more):
    """The flags of a small run in folder/run; of a flag given twice the last holds."""
    flags = [*TINY.split(), *OWN[script].split(), "--env-id", env_id, "--run-dir", folder, "--run-name", "run"]
    flags += ["--total-timesteps", steps_of(script, env_id, ITERATIONS), "--eval-interval", 1]
    flags += ["--eval-copies", len(envs.make(env_id, **settings_of(env_id)).tasks.test) + 1, "--checkpoint-interval", 1]
    return [*flags, *(["--env-kwargs", *FEWER[env_id].split()] if env_id in FEWER else []), *more]


# ----------------------------------------------------------------------------------------------------------------------
# Runs as processes of their own, with something happening to them

# Imports take longer than such a run, so one process does them, and each run is a fork of it. `first` is done before
# the script starts. SIGALRM ends what hangs; no run gets near it.
NURSERY = """
import builtins, copy, csv, gc, hashlib, io, json, os, pathlib, queue, resource, runpy, shutil, signal, sys, threading
import gymnasium, torch._dynamo, tqdm, tyro, tensorboard.summary.writer.record_writer as records
import torch.utils.tensorboard, envs.gather, envs.locomotion, envs.particle, envs.warehouse
make = envs.make

def short(*given, **named):
    env = make(*given, **named)
    env.max_episode_steps = EPISODE
    return env

def send(number):
    return lambda *_, **__: os.kill(os.getpid(), number)

def after(seconds, number):
    '''Send a signal when the process has used so much CPU time, wherever it then is.'''
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    wait = lambda: (signal.sigwait({signal.SIGPROF}), os.kill(os.getpid(), number))
    threading.Thread(target=wait, daemon=True).start()
    signal.setitimer(signal.ITIMER_PROF, seconds)

def at(count, owner, name, before=None, after=None, only=lambda *given: True):
    '''Do something before or after a function is called for the count-th time (with such arguments).'''
    original, calls = getattr(owner, name), []
    def watched(*given, **named):
        calls.extend([given] if only(*given) else [])
        now = only(*given) and len(calls) == count
        if now and before:
            before(*given)
        result = original(*given, **named)
        if now and after:
            after(*given)
        return result
    setattr(owner, name, watched)

def full(*_, **__):
    raise OSError(28, 'No space left on device')

def read_only(*_):
    '''From now on. (Permissions of a folder would not stop root.)'''
    def refuse(name, mode='r', *given, plain=open, **named):
        if set(mode) & set('wax+'):
            raise OSError(30, 'Read-only file system')
        return plain(name, mode, *given, **named)
    def keep(*given, **named):
        raise OSError(30, 'Read-only file system')
    builtins.open, os.unlink = refuse, keep

envs.make = short
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    if child := os.fork():
        _, status, used = os.wait4(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)
        continue
    for number in (1, 2):
        os.dup2(os.open(order['output'][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(600)
    sys.argv = order['argv']
    exec(order['first'])
    runpy.run_path(sys.argv[0], run_name='__main__')
    break  # and ends as any interpreter does
""".replace("EPISODE", str(EPISODE))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(script, *flags, first=code) -> exit code (below 0: the signal that ended it), output, error, CPU seconds."""
    folder, environment = tmp_path_factory.mktemp("output"), os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=environment, **pipes) as nursery:

        def start(script, *flags, first=""):
            output = [str(folder / name) for name in ("out", "err")]
            argv = [f"{script}.py", *map(str, flags)]
            print(json.dumps(dict(argv=argv, first=first, output=output)), file=nursery.stdin, flush=True)
            code, seconds = json.loads(nursery.stdout.readline())
            out, err = (Path(name).read_text() for name in output)
            return SimpleNamespace(code=code, out=out, err=err, seconds=seconds)

        yield start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(script, env_id) -> a run to which nothing happened, and the CPU seconds it took."""
    done = {}

    def whole(*pair):
        if pair not in done:
            folder = tmp_path_factory.mktemp("whole")
            result = start(pair[0], *command(*pair, folder))
            assert result.code == 0, result.err
            assert checkpoint_of(folder / "run")["iteration"] == ITERATIONS
            done[pair] = SimpleNamespace(run=folder / "run", seconds=result.seconds)
        return done[pair]

    return whole


def seen(run):
    """What TensorBoard draws, but for the times."""
    return {k: v for k, v in scalars_of(run).items() if not k.startswith("time/") and k != "charts/SPS"}


def same_end(run, expected):
    found, wanted = checkpoint_of(run), checkpoint_of(expected)
    assert found.keys() == wanted.keys()
    for key in wanted.keys() - {"args"}:  # they name the folder
        assert identical(found[key], wanted[key]), key
    assert (run / "meta_test.csv").read_bytes() == (expected / "meta_test.csv").read_bytes()
    assert seen(run) == seen(expected)


def goes_on(start, script, run):
    """Resume a run to its end."""
    for k, path in enumerate(sorted(run.glob("events.*"))):  # TensorBoard reads them by name, in which are the seconds
        path.rename(path.with_name(f"events.out.tfevents.{k + 1:010}.earlier"))
    result = start(script, "--resume", run)
    assert result.code == 0, result.err


# ---- killed ----


KILLS = [*range(5), *(pytest.param(part, marks=pytest.mark.full) for part in range(5, 20))]


@pytest.mark.parametrize("part", KILLS)
@every_pair
def test_killed_at_any_moment(pair, part, start, whole, tmp_path):
    """Moments are in CPU time, one in each fifth of the run in turn, so that a busy machine does not move them."""
    moment = (part % 5 + np.random.default_rng([PAIRS.index(pair), part]).random()) / 5 * whole(*pair).seconds
    flags, run = command(*pair, tmp_path), tmp_path / "run"
    assert start(pair[0], *flags, first=f"after({moment}, signal.SIGKILL)").code in (-9, 0)  # 0: it was faster
    if (run / "checkpoint.pt").exists():
        goes_on(start, pair[0], run)
    else:
        shutil.rmtree(run, ignore_errors=True)
        assert start(pair[0], *flags).code == 0
    same_end(run, whole(*pair).run)


KILL = "send(signal.SIGKILL)"
HALF_A_FILE = f"""
class Half(io.BufferedWriter):
    def write(self, data):
        super().write(data[: len(data) // 2])
        self.flush()
        {KILL}()

def half(name, *given, plain=open, opened=[], **named):
    opened.extend([name] if pathlib.Path(str(name)).name == 'checkpoint.tmp' else [])
    return Half(io.FileIO(name, 'w')) if len(opened) == 3 else plain(name, *given, **named)

builtins.open = half
"""
HALF_A_COPY = f"lambda a, b: (pathlib.Path(b).write_bytes(pathlib.Path(a).read_bytes()[:5000]), {KILL}())"
WRITING = {  # moments of the third write, in their order, and the iteration whose state is then there
    "nothing": (f"at(3, pathlib.Path, 'unlink', after={KILL}, only=lambda path, **_: path.suffix == '.tmp')", 2),
    "half a file": (HALF_A_FILE, 2),
    "no digest": (f"at(3, hashlib, 'sha256', before={KILL})", 2),
    "not synced": (f"at(3, os, 'fsync', before={KILL})", 2),
    "synced": (f"at(3, os, 'fsync', after={KILL})", 2),
    "half a copy of the last one": (f"at(2, shutil, 'copyfile', before={HALF_A_COPY})", 2),
    "a copy of the last one": (f"at(2, shutil, 'copyfile', after={KILL})", 2),
    "not in place": (f"at(3, os, 'replace', before={KILL})", 2),
    "in place": (f"at(3, os, 'replace', after={KILL})", 3),
}


@pytest.mark.parametrize("moment", WRITING)
def test_killed_while_writing_a_checkpoint(moment, start, whole, tmp_path):
    (first, iteration), (script, _), run = WRITING[moment], CHEAP, tmp_path / "run"
    assert start(script, *command(*CHEAP, tmp_path), first=first).code == -9
    assert task_given.load_checkpoint(run)["iteration"] == iteration
    goes_on(start, script, run)
    same_end(run, whole(*CHEAP).run)
    assert "checkpoint.tmp" not in contents(run)


@pytest.mark.parametrize("moment", ["not synced", "not in place"])
def test_killed_while_writing_the_first_checkpoint(moment, start, tmp_path):
    """There is none then, and the line says so."""
    first = WRITING[moment][0].replace("at(3", "at(1")
    assert start(CHEAP[0], *command(*CHEAP, tmp_path), first=first).code == -9
    result = start(CHEAP[0], "--resume", tmp_path / "run")
    assert result.code == 2 and result.err.count("\n") == 1 and "got no file there" in result.err


# ---- stopped by a signal ----

NO_ROOM = "No space left on device"
both_signals = pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
AT_THE_END = ("--checkpoint-interval", 10**9)  # no checkpoint before that


def stopped(result, script, run, name, code, go_on=None):
    """The last line says by what, and how to go on."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    go_on = go_on or f"go on with: python {script}.py --resume {run}"
    assert result.err.splitlines()[-1] == f"{script}.py: stopped by {name}; {go_on}"


ADAM = "torch.optim.Adam, 'step'"  # task_given.py takes two steps in an iteration here
STATE = "only=lambda given, *_: isinstance(given, dict) and 'actor' in given"  # networks, then optimizers
GIVEN = "only=lambda _, event: type(event) is bytes and b'charts/SPS' in event"  # once in an iteration, at its end
MOMENTS = {  # where the signal arrives, the last iteration that is then finished, and flags
    "in an update": (f"at(5, {ADAM}, after=SEND)", 2, AT_THE_END),
    "in an evaluation": ("at(3, csv.DictWriter, 'writerows', after=SEND)", 1, AT_THE_END),
    "when TensorBoard gets a value": (f"at(3, queue.Queue, 'put', before=SEND, {GIVEN})", 2, AT_THE_END),
    "when TensorBoard writes": ("at(4, queue.Queue, 'join', before=SEND)", 3, ()),
    "when the state is copied": (f"at(6, copy, 'deepcopy', before=SEND, {STATE})", 2, AT_THE_END),
    "when the state is put together": (
        "at(3, pathlib.Path, 'stat', before=SEND, only=lambda path, **_: path.name == 'meta_test.csv')",
        2,
        AT_THE_END,
    ),
    "in a checkpoint, not synced": ("at(3, os, 'fsync', before=SEND)", 3, ()),
    "in a checkpoint, not in place": ("at(3, os, 'replace', before=SEND)", 3, ()),
    "after a checkpoint": ("at(3, os, 'replace', after=SEND)", 3, ()),
}


@pytest.mark.parametrize("moment", MOMENTS)
@both_signals
def test_signal(moment, name, code, start, whole, tmp_path):
    """What the last whole iteration left is kept, and the line that is printed leads to the same end."""
    (first, iteration, flags), (script, _), run = MOMENTS[moment], CHEAP, tmp_path / "run"
    result = start(script, *command(*CHEAP, tmp_path, *flags), first=first.replace("SEND", f"send(signal.{name})"))
    stopped(result, script, run, name, code)
    assert task_given.load_checkpoint(run)["iteration"] == iteration
    goes_on(start, script, run)
    same_end(run, whole(*CHEAP).run)


@every_pair
@both_signals
def test_signal_at_any_moment(pair, name, code, start, whole, tmp_path):
    """In the second half of the CPU time that the run takes, most of the first being start-up."""
    moment = (1 + np.random.default_rng([PAIRS.index(pair), code]).random()) / 2 * whole(*pair).seconds
    flags, run = command(*pair, tmp_path, *AT_THE_END), tmp_path / "run"
    result = start(pair[0], *flags, first=f"after({moment}, signal.{name})")
    if (run / "checkpoint.pt").exists():
        if result.code:  # 0: it was faster
            stopped(result, pair[0], run, name, code)
        goes_on(start, pair[0], run)
    else:
        stopped(result, pair[0], run, name, code, "no iteration was finished")
        shutil.rmtree(run)
        assert start(pair[0], *flags).code == 0
    same_end(run, whole(*pair).run)


@every_script
@both_signals
def test_signal_before_the_first_iteration(script, name, code, start, tmp_path):
    """Nothing is kept, and the line says so."""
    first = f"at(1, {ADAM}, after=send(signal.{name}))"
    result = start(script, *command(script, "hunting_target", tmp_path), first=first)
    stopped(result, script, tmp_path / "run", name, code, "no iteration was finished")
    assert not {name for name in contents(tmp_path / "run") if "checkpoint" in name}


@every_script
@both_signals
def test_signal_while_tensorboard_is_closed(script, name, code, start, tmp_path):
    """At the very end, when its file is closed and the script's writer does not know it yet."""
    first = f"at(1, torch.utils.tensorboard.writer.EventFileWriter, 'close', after=send(signal.{name}))"
    run = tmp_path / "run"
    stopped(start(script, *command(script, "hunting_target", tmp_path), first=first), script, run, name, code)


@every_script
def test_signal_in_the_first_iteration_after_resuming(script, start, whole, tmp_path):
    """What was resumed is kept as it was, though most of an iteration was done with it."""
    pair, run = (script, "hunting_target"), tmp_path / "run"
    killed = start(script, *command(*pair, tmp_path), first="at(2, os, 'replace', after=send(signal.SIGKILL))")
    assert killed.code == -9
    before = checkpoint_of(run)
    first = f"at(1, queue.Queue, 'put', before=send(signal.SIGTERM), {GIVEN})"  # after all steps of its optimizers
    result = start(script, "--resume", run, first=first)
    stopped(result, script, run, "SIGTERM", 143)
    assert identical(checkpoint_of(run), before)
    goes_on(start, script, run)
    same_end(run, whole(*pair).run)


@both_signals
def test_second_signal(name, code, start, whole, tmp_path):
    """It does not wait for what the first one has begun."""
    first = f"at(5, {ADAM}, after=send(signal.{name})); at(3, os, 'fsync', before=send(signal.SIGTERM))"
    result = start(CHEAP[0], *command(*CHEAP, tmp_path), first=first)
    assert result.code == code and "stopped by" not in result.err and "Traceback" not in result.err
    assert task_given.load_checkpoint(tmp_path / "run")["iteration"] == 2
    goes_on(start, CHEAP[0], tmp_path / "run")
    same_end(tmp_path / "run", whole(*CHEAP).run)


def test_signal_on_a_full_disk(start, whole, tmp_path):
    """The line says that nothing more could be kept."""
    first = f"at(5, {ADAM}, after=send(signal.SIGTERM)); at(3, os, 'fsync', before=full)"
    result = start(CHEAP[0], *command(*CHEAP, tmp_path), first=first)
    assert result.code in (1, 143) and "Traceback" not in result.err, result.err
    assert NO_ROOM in result.err.splitlines()[-1]
    assert task_given.load_checkpoint(tmp_path / "run")["iteration"] == 2
    goes_on(start, CHEAP[0], tmp_path / "run")
    same_end(tmp_path / "run", whole(*CHEAP).run)


# ---- no room, no permission ----

REFUSED = {  # the write that fails, what the line says, the iteration that is then kept, and flags
    "a checkpoint": ("at(3, os, 'fsync', before=full)", NO_ROOM, 2, ()),
    "a copy of the last one": ("at(2, shutil, 'copyfile', before=full)", NO_ROOM, 2, ()),
    "a rename": ("at(3, os, 'replace', before=full)", NO_ROOM, 2, ()),
    "a file that is too large": (  # for the kernel, so that nothing here pretends
        "at(2, os, 'replace', after=lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))",
        "File too large",
        2,
        (),
    ),
    "anything": ("at(2, os, 'replace', after=read_only)", "Read-only file system", 2, ("--eval-interval", 10**9)),
    "a table": ("at(4, csv.DictWriter, 'writerows', before=full)", NO_ROOM, 2, ()),
    "an event": (f"at(3, records.RecordWriter, 'write', before=full, {GIVEN})", NO_ROOM, 2, ()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_write_that_fails(what, start, whole, tmp_path):
    """The run ends with a line that says why, and goes on from the last checkpoint when there is room again."""
    (first, why, iteration, flags), (script, _), run = REFUSED[what], CHEAP, tmp_path / "run"
    result = start(script, *command(*CHEAP, tmp_path, *flags), first=first)
    assert result.code == 1, result.err
    said = [line for line in result.err.splitlines() if line.startswith(f"{script}.py: {run}")]
    assert len(said) == 1 and why in said[0], result.err  # TensorBoard's thread may still be telling of it below
    assert "Traceback" not in result.err or what == "an event"  # that is written, and told of, by another thread
    assert task_given.load_checkpoint(run)["iteration"] == iteration
    assert what == "anything" or "checkpoint.tmp" not in contents(run)  # it takes no room
    goes_on(start, script, run)
    if not flags:
        same_end(run, whole(*CHEAP).run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(start, tmp_path):
    first = "at(2, os, 'replace', after=lambda _, path: os.chmod(pathlib.Path(path).parent, 0o500))"
    result = start(CHEAP[0], *command(*CHEAP, tmp_path), first=first)
    (tmp_path / "run").chmod(0o700)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert result.err.splitlines()[-1].startswith(f"{CHEAP[0]}.py: {tmp_path / 'run'}: ")
    assert "Permission denied" in result.err.splitlines()[-1]
    assert task_given.load_checkpoint(tmp_path / "run")["iteration"] == 2


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that are not what was written


def corrupted(data, rng):
    """The bytes of a checkpoint with something done to them that changes them."""
    kind = rng.choice(["bits", "cut", "hole", "more", "swap", "zeros"])
    a, b = sorted(rng.integers(0, len(data), 2))
    if kind == "bits":
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 9)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == "cut":
        changed = data[:a] if rng.random() < 0.5 else data[a + 1 :]
    elif kind == "hole":
        changed = data[:a] + data[b + 1 :]
    elif kind == "more":
        changed = data[:a] + rng.bytes(rng.integers(1, 100)) + data[a:] if rng.random() < 0.5 else data + rng.bytes(32)
    elif kind == "swap":
        size = int(rng.choice([1, 512, 4096]))
        a, b = min(a, len(data) - 2 * size), min(b, len(data) - size)
        b = max(b, a + size)
        changed = data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    else:
        changed = data[:a] + bytes(b - a + 1) + data[b + 1 :]
    return kind, bytes(changed)


@every_pair
def test_damaged_checkpoint_is_refused(pair, whole, tmp_path):
    """250 times for each script; where nothing has changed, as when two equal blocks are swapped, it is drawn again."""
    rng, data = np.random.default_rng(PAIRS.index(pair)), (whole(*pair).run / "checkpoint.pt").read_bytes()
    load, path, counts = MODULES[pair[0]].load_checkpoint, tmp_path / "checkpoint.pt", {}
    while sum(counts.values()) < 250:
        kind, changed = corrupted(data, rng)
        if changed == data:
            continue
        path.write_bytes(changed)
        with pytest.raises(ValueError) as refused:
            load(tmp_path)
        message = str(refused.value)
        assert message.startswith(f"{path}: got a damaged file") and "\n" not in message
        counts[kind] = counts.get(kind, 0) + 1
    assert len(counts) == 6 and min(counts.values()) > 20
    path.write_bytes(data)
    assert load(tmp_path)["iteration"] == ITERATIONS


@every_pair
def test_previous_checkpoint_in_place_of_a_damaged_one(pair, start, whole, tmp_path):
    run = shutil.copytree(whole(*pair).run, tmp_path / "run")
    data = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(data[:1000] + bytes(8) + data[1008:])
    result = start(pair[0], "--resume", run)
    assert result.code == 2 and result.err.count("\n") == 1 and "checkpoint_previous.pt" in result.err
    shutil.copy(run / "checkpoint_previous.pt", run / "checkpoint.pt")
    assert MODULES[pair[0]].load_checkpoint(run)["iteration"] == ITERATIONS - 1
    goes_on(start, pair[0], run)
    same_end(run, whole(*pair).run)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none


@pytest.fixture
def made(monkeypatch):
    """Episodes of 20 steps in this process too. A list of what was made; what it holds before, is done to each."""
    make, changes = envs.make, []

    def short(*given, **named):
        env = make(*given, **named)
        env.max_episode_steps = EPISODE
        for change in changes:
            change(env)
        return env

    monkeypatch.setattr(envs, "make", short)
    return changes


def broken_step(script, what, value, copies=2, number=2):
    """Something is no number in the middle of the second rollout of the environment with so many copies."""

    def change(env):
        steps, step = itertools.count(), env.step

        def bad_step(actions):
            obs, reward, *rest = step(actions)
            if next(steps) == EPISODE * (number - 1) + EPISODE // 2:
                (obs if what == "obs" else reward)[0, 0] = value
            return obs, reward, *rest

        if env.num_envs == copies:
            env.step = bad_step

    return change


def stops_in_the_second_iteration(result, script, run, *names):
    """It says what is no number, and nothing of it is kept."""
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    line = result.err.splitlines()[-1]
    assert all(name in line for name in (*names, "not finite")), line
    saved = MODULES[script].load_checkpoint(run)
    assert saved["iteration"] == 1
    assert all(value.isfinite().all() for network in saved["networks"].values() for value in network.values())
    assert "context" not in saved or saved["context"].isfinite().all()
    assert all(math.isfinite(value) for series in scalars_of(run).values() for _, value in series)
    assert {int(row["step"]) for row in rows_of(run / "meta_test.csv")} == {0, steps_of(script, "hunting_target", 1)}


WORDS = {"obs": "observation", "reward": "reward"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["obs", "reward"])
@every_script
def test_rollout_that_is_not_finite(script, what, value, made, tmp_path):
    made.append(broken_step(script, what, value))
    result = call(script, *command(script, "hunting_target", tmp_path))
    stops_in_the_second_iteration(result, script, tmp_path / "run", WORDS[what])


@pytest.mark.parametrize("what", ["obs", "reward"])
@pytest.mark.parametrize("script", sorted(COLLECT))
def test_context_that_is_not_finite(script, what, made, tmp_path):
    """Even if no context that is drawn from the buffer has it in."""
    flags = command(script, "hunting_target", tmp_path, "--context-size", 1, "--inference-size", 1)
    made.append(broken_step(script, what, math.nan, copies=3, number=1))  # one copy for each of three tasks
    flags += ["--warmup-episodes", 2]  # in six copies, so that three are those of later collections
    flags += ["--total-timesteps", steps_of(script, "hunting_target", ITERATIONS) + 3 * EPISODE]
    result = call(script, *flags)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert WORDS[what] in result.err.splitlines()[-1] and "not finite" in result.err.splitlines()[-1]
    assert MODULES[script].load_checkpoint(tmp_path / "run")["iteration"] == 1


NORMS = {  # which show it, of the optimizers in the order in which the scripts make them
    "mg2l_mappo": ["actor_grad_norm", "critic_grad_norm", "global_grad_norm", "local_grad_norm"],
    "task_given": ["actor_grad_norm", "critic_grad_norm"],
    "ma_pearl": ["actor_grad_norm", "critic_grad_norm", "encoder_grad_norm"],
    "mix_mate": ["actor_grad_norm", "critic_grad_norm", "encoder_grad_norm", "decoder_grad_norm"],
}
GRADIENTS = [(script, k, name) for script, names in NORMS.items() for k, name in enumerate(names)]


def break_gradient(monkeypatch, made, number, value):
    """The last gradient in the second iteration of the first parameter of the optimizer with this number."""
    counts, adams, init = [], [], torch.optim.Adam.__init__

    def hook(gradient):
        if counts:
            counts[-1] += 1
        return torch.full_like(gradient, value) if len(counts) == 2 and counts[1] == counts[0] else gradient

    def watched(self, params, **named):
        adams.append(self)
        if len(adams) == number + 1:
            params = list(params)
            params[0].register_hook(hook)
        init(self, params, **named)

    def change(env):
        reset = env.reset
        if env.num_envs == 2:  # reset once in an iteration
            env.reset = lambda **named: (counts.append(0), reset(**named))[1]

    monkeypatch.setattr(torch.optim.Adam, "__init__", watched)
    made.append(change)


@pytest.mark.parametrize("script, number, name", GRADIENTS, ids=lambda value: str(value))
def test_gradient_that_is_not_finite(script, number, name, made, monkeypatch, tmp_path):
    break_gradient(monkeypatch, made, number, math.inf if number % 2 else math.nan)
    result = call(script, *command(script, "hunting_target", tmp_path))
    stops_in_the_second_iteration(result, script, tmp_path / "run", f"losses/{name}")


def test_warm_up_that_is_not_finite(tmp_path):
    """Before any iteration, so that the policies never act on it and nothing is there to be kept."""
    flags = command("mg2l_mappo", "hunting_target", tmp_path, "--warmup-updates", 2, "--warmup-learning-rate", 1e37)
    result = call("mg2l_mappo", *flags)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    line = result.err.splitlines()[-1]
    assert "losses/global_loss" in line and "losses/local_loss" in line and "not finite at step 0" in line, line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_gradient_that_only_the_critic_gives(made, monkeypatch, tmp_path):
    """Without steps of its own the encoder of mg2l_mappo.py still learns from the critic."""
    break_gradient(monkeypatch, made, 2, math.nan)
    result = call("mg2l_mappo", *command("mg2l_mappo", "hunting_target", tmp_path, "--encoder-updates", 0))
    stops_in_the_second_iteration(result, "mg2l_mappo", tmp_path / "run", "losses/critic_encoder_grad_norm")


# ----------------------------------------------------------------------------------------------------------------------
# When checkpoints are written


@pytest.mark.parametrize(
    "steps, minutes, expected",
    [
        (10**9, 1e-9, [1, 2, 3, 4]),
        (10**9, 1e9, [4]),
        (1, 1e9, [1, 2, 3, 4]),
        (60, 1e9, [2, 3, 4]),  # iterations of 40 steps: the third multiple of 60 is not reached before the fourth
        (79, 1e9, [2, 4]),
    ],
)
def test_when_checkpoints_are_written(steps, minutes, expected, made, monkeypatch, tmp_path):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), written.append(checkpoint_of(Path(b).parent))))
    when = ("--checkpoint-interval", steps, "--checkpoint-minutes", minutes)
    result = call(CHEAP[0], *command(*CHEAP, tmp_path, "--eval-interval", 10**9, *when))
    assert result.code == 0, result.err
    assert [saved["iteration"] for saved in written] == expected


# ----------------------------------------------------------------------------------------------------------------------
# Any valid arguments


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


ANY = {
    "seed": st.integers(0, 2**63),
    "num_envs": st.integers(1, 4),
    "update_epochs": st.integers(1, 3),
    "learning_rate": numbers(1e-6, 1e-2),
    "warmup_learning_rate": numbers(1e-6, 1e-2),
    "adam_eps": numbers(1e-8, 1e-3),
    "gamma": numbers(0.01, 1),
    "gae_lambda": numbers(0, 1),
    "clip_coef": numbers(0.01, 1),
    "ent_coef": numbers(0, 1),
    "huber_delta": numbers(0.1, 100),
    "max_grad_norm": numbers(0.01, 100),
    "hidden_dim": st.integers(4, 17),
    "share_policy": st.booleans(),
    "eval_sample": st.booleans(),
    "explore_episodes": st.integers(1, 3),
    "checkpoint_interval": st.integers(1, 10**9),
    "checkpoint_minutes": numbers(1e-9, 1e9),
    "eval_interval": st.integers(1, 10**9),
    # of scripts that infer something
    "encoder_learning_rate": numbers(1e-6, 1e-2),
    "latent_dim": st.integers(1, 9),
    "latent_scale": numbers(0.1, 10),
    "explore_scale": numbers(0.1, 10),
    "encoder_dim": st.sampled_from([4, 8, 12]),
    "encoder_blocks": st.integers(0, 2),
    "encoder_heads": st.sampled_from([1, 2, 4]),
    "critic_coef": numbers(0.01, 1),
    "kl_coef": numbers(0, 1),
    "local_loss": st.sampled_from(["infonce", "cmi", "kl"]),
    "similarity": st.sampled_from(["dot", "cosine"]),
    "temperature": numbers(0.1, 100),
    "context_size": st.integers(1, 2 * EPISODE),
    "inference_size": st.integers(1, 2 * EPISODE),
    "context_episodes": st.integers(1, 3),
    "context_episode_steps": st.integers(1, EPISODE),
    "context_copies": st.integers(1, 2),
    "context_interval": st.integers(1, 3),
    "context_sets": st.integers(2, 3),
    "rollout_contexts": st.integers(2, 3),
    "rollout_context_size": st.integers(1, 2 * EPISODE),
    "rollout_context_episodes": st.integers(1, 3),
    "critic_context_size": st.integers(1, 2 * EPISODE),
    "local_temperature": numbers(0.1, 100),
    "warmup_episodes": st.integers(1, 2),
    "warmup_updates": st.integers(0, 2),
    "encoder_updates": st.integers(0, 2),
    "mixture": st.sampled_from(["expected", "sampled"]),
    "bptt_steps": st.integers(1, 2 * EPISODE),
    "decoded_steps": st.integers(1, 1000),
    "reset_per_episode": st.booleans(),
    "task_label": st.sampled_from(["one-hot", "code", "parameters", "none"]),
    "label_scale": numbers(0.1, 10),
}


@st.composite
def valid_arguments(draw):
    """A script, and arguments for an iteration or two of it."""
    script, env_id = draw(st.sampled_from(list(MODULES))), draw(st.sampled_from(envs.ENV_IDS))
    module, env_kwargs = MODULES[script], tuple(FEWER.get(env_id, "").split())
    env = envs.make(env_id, **settings_of(env_id))
    known = vars(module.Args()).keys()
    drawn = {name: draw(values) for name, values in ANY.items() if name in known}
    drawn["test_episodes"] = drawn["explore_episodes"] + draw(st.integers(1, 2))
    drawn["eval_copies"] = len(env.tasks.test) + draw(st.integers(0, 3))
    if script in COLLECT:
        drawn["buffer_size"] = drawn["context_size"] * len(env.tasks.train) * env.num_agents * draw(st.integers(1, 3))
    args = module.Args(env_id=env_id, env_kwargs=env_kwargs, **drawn)
    drawn["total_timesteps"] = module.iteration_steps(args, env, draw(st.integers(1, 2))) + draw(st.integers(0, 9))
    flags = ["--env-id", env_id, *(["--env-kwargs", *env_kwargs] if env_kwargs else [])]
    for name, value in drawn.items():
        flag = name.replace("_", "-")
        may_be_none = name in ("share_policy", "eval_sample")  # and so takes a value
        switch = isinstance(value, bool) and not may_be_none
        flags += [f"--{'' if value else 'no-'}{flag}"] if switch else [f"--{flag}", value]
    return script, flags


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.full)])
def test_any_valid_arguments(examples, made, tmp_path):
    """An iteration or two, the evaluation at its end, and a meta-test of what was saved give the same rows."""
    folders = (tmp_path / str(k) for k in itertools.count())

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(valid_arguments())
    def run_one(drawn):
        (script, flags), folder = drawn, next(folders)
        result = call(script, *flags, "--num-threads", 1, "--no-cuda", "--run-dir", folder, "--run-name", "run")
        assert result.code == 0, result.err
        result = call(script, "--meta-test", folder / "run")
        assert result.code == 0, result.err
        rows = rows_of(folder / "run" / "meta_test.csv")
        steps = rows[-1]["step"]
        assert rows_of(folder / "run" / "meta_test_only.csv") == [row for row in rows if row["step"] == steps]
        assert all(math.isfinite(float(row["return"])) for row in rows)

    run_one()
