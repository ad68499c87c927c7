"""docs/environments.md: its code runs as it stands there, its tables are true, its environment can be trained on.

Every Python block of the page is executed here, so that the two cannot drift apart.
"""

import csv
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3
from pettingzoo.test import parallel_api_test, parallel_seed_test
from PIL import Image
from stable_baselines3.common.utils import set_random_seed

import envs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environments.md").read_text()


def block(title, number=0, language="python"):
    """One of the fenced blocks below a title and above the next."""
    section = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.M | re.S)
    return [text for of, text in fenced if of == language][number]


def run_block(*where):
    """Execute a block and return its names."""
    names = {}
    exec(compile(block(*where), "docs/environments.md", "exec"), names)
    return names


def rows(header):
    """The rows of the table with this header as lists of cells."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- what the page says of the six ----


def test_the_table_of_the_six_says_what_they_are():
    assert rows("| `hunting_target` | `spread_target` |") == [[f"![{e}](images/{e}.png)" for e in envs.ENV_IDS]]
    table = rows("| environment, engine |")
    assert [re.match(r"`(\w+)`", row[0])[1] for row in table] == list(envs.ENV_IDS)
    for env_id, (_, agents, sees, does, _, tasks, steps) in zip(envs.ENV_IDS, table, strict=True):
        env = envs.make(env_id)
        assert int(agents) == env.num_agents
        assert (int(sees.split()[0]),) == env.single_observation_space.shape
        assert re.findall(r": (\d+) / (\d+)", tasks) == [(str(len(env.tasks.train)), str(len(env.tasks.test)))]
        assert ("the same" in tasks) == np.array_equal(env.tasks.train, env.tasks.test)
        assert int(re.match(r"\d+", steps)[0]) == env.max_episode_steps
        space = env.single_action_space
        actions = (
            f"one of {space.n}:" if hasattr(space, "n") else rf"\b{space.shape[0]} (numbers|torques?) in \[-1, 1\]"
        )
        assert re.search(actions, does)


def test_the_table_of_settings_has_them_all_with_their_defaults():
    told, env_id = {env_id: {} for env_id in envs.ENV_IDS}, None
    for first, name, default, _ in rows("| environment | setting |"):
        env_id = first.strip("`") or env_id
        told[env_id][name.strip("`")] = default
    for env_id in envs.ENV_IDS:
        parameters = list(inspect.signature(type(envs.make(env_id))).parameters.values())[2:]
        assert told[env_id] == {one.name: str(one.default) for one in parameters}


def test_its_command_makes_the_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block("The environments")
    made = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert made == sorted(f"{env_id}.png" for env_id in envs.ENV_IDS)
    for name in made:
        new, committed = (np.asarray(Image.open(folder / "docs/images" / name), float) for folder in (tmp_path, ROOT))
        assert new.shape == committed.shape
        assert new.std() > 20  # there is something to see
        assert np.abs(new - committed).mean() < 10  # another Mesa may draw a MuJoCo picture a little differently


def test_a_split_of_ones_own():
    env = run_block("Tasks of your own")["env"]
    assert env.step(np.zeros((8, 3, 2)))[-1]["task"].tolist() == [2] * 8
    drawn = np.concatenate([env.reset()[1]["task"] for _ in range(30)])
    assert set(drawn.tolist()) == {0, 1, 3}


def test_going_straight_reaches_what_the_page_says(capsys):
    run_block("What could be reached")
    assert f"prints {float(capsys.readouterr().out):.1f}:" in PAGE


def test_the_commands_for_tasks_of_ones_own_are_understood():
    import mg2l_mappo

    commands = block("Tasks of your own", 0, "").splitlines()
    sizes = []
    for command in commands:
        env_id, setting = re.fullmatch(r'python mg2l_mappo\.py --env-id (\w+) --env-kwargs "?(.*?)"?', command).groups()
        env = mg2l_mappo.make_env(mg2l_mappo.Args(env_id=env_id, env_kwargs=(setting,)), 1)
        sizes.append((len(env.tasks.train), len(env.tasks.test)))
    assert sizes == [(2, 2), (3, 1), (3, 3), (5, 5)]


# ---- other people's software ----


@pytest.mark.filterwarnings("ignore:The `render_mode` attribute")
def test_stable_baselines3_learns_on_it(capsys):
    set_random_seed(0)
    names = run_block("Stable-Baselines3")
    model, vector = names["model"], names["vector"]
    assert (vector.num_envs, model.num_timesteps, model._n_updates) == (12, 1200, 20)  # two rollouts, ten epochs each
    assert np.isfinite(model.logger.name_to_value["train/loss"])
    copies = vector.reset().reshape(4, -1)
    assert len({copy.tobytes() for copy in copies}) == 4  # what the seeded reset is for
    done = [vector.step(np.zeros((12, 2), np.float32))[2] for _ in range(100)]
    assert not np.array(done[:-1]).any() and done[-1].all()


@pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested")
def test_torchrl_rolls_out_what_the_environment_plays():
    torch.manual_seed(0)
    names = run_block("TorchRL")
    data = names["data"]
    assert data["next", "truncated"].squeeze().nonzero().flatten().tolist() == [99, 199, 299]
    assert (data["agent", "info", "task"] == 0).all()
    view = envs.parallel_env("hunting_target", task=0)
    seen, _ = view.reset(seed=0)
    for _ in range(5):  # TorchRL resets a few times before it begins
        if np.array_equal(list(seen.values()), data["agent", "observation"][0]):
            break
        seen, _ = view.reset()
    for t in range(300):
        assert np.array_equal(list(seen.values()), data["agent", "observation"][t])
        assert np.array_equal(view.state(), data["state"][t])
        action = data["agent", "action"][t].detach().numpy()
        seen, rewards, *_ = view.step(dict(zip(view.agents, action, strict=True)))
        assert np.array_equal(np.float32(list(rewards.values())), data["next", "agent", "reward"][t, :, 0])
        assert np.array_equal(list(seen.values()), data["next", "agent", "observation"][t])
        if not view.agents:
            seen, _ = view.reset()


# ---- an environment of one's own ----


@pytest.fixture
def spread_ratio(monkeypatch, tmp_path):
    """The page's class, where the page says it is: in envs/spread_ratio.py and in `envs._ENVS`."""
    path = tmp_path / "spread_ratio.py"
    path.write_text(block("Adding an environment"))
    spec = importlib.util.spec_from_file_location("envs.spread_ratio", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "envs.spread_ratio", module)
    monkeypatch.setattr(envs, "_ENVS", dict(envs._ENVS))
    return run_block("Adding an environment", 1)


def test_an_environment_of_ones_own_takes_sixty_lines_and_is_found(spread_ratio):
    assert len(block("Adding an environment").splitlines()) <= 60
    assert spread_ratio["obs"].shape == (4, 3, 18)
    assert spread_ratio["env"].tasks.parameters.tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="ratios"):
        envs.make("spread_ratio", no_such=1)


def test_its_copies_are_plain_mpe2(spread_ratio):
    env, task, rng = envs.make("spread_ratio", 3, seed=5), [2, 0, 1], np.random.default_rng(0)
    obs, _ = env.reset(options={"task": task})
    plain = [simple_spread_v3.parallel_env(local_ratio=ratio, max_cycles=25) for ratio in (1.0, 0.0, 0.5)]
    seeds = [np.random.default_rng([5, k]) for k in range(3)]
    begin = lambda k: plain[k].reset(seed=int(seeds[k].integers(2**31)))[0]  # noqa: E731
    theirs = [begin(k) for k in range(3)]
    rewarded = set()
    for t in range(60):
        assert np.array_equal(obs, np.float32([list(one.values()) for one in theirs]))
        actions = rng.integers(5, size=(3, 3))
        obs, reward, terminated, truncated, _ = env.step(actions)
        for k, one in enumerate(plain):
            theirs[k], rewards, *_ = one.step(dict(zip(one.agents, actions[k], strict=True)))
            assert np.array_equal(reward[k], np.float32(list(rewards.values())))
            if not one.agents:
                theirs[k] = begin(k)
        rewarded |= {k for k in range(3) if len(set(reward[k].tolist())) > 1}
        assert not terminated.any() and (truncated == (t % 25 == 24)).all()
    assert 1 not in rewarded  # with ratio 0 the reward is shared


def test_it_is_a_parallel_env_as_the_others_are(spread_ratio):
    parallel_api_test(envs.parallel_env("spread_ratio"), num_cycles=100)
    parallel_seed_test(lambda: envs.parallel_env("spread_ratio", task=1), num_cycles=60)
    view = envs.parallel_env("spread_ratio")
    view.reset(seed=0)
    assert view.render().ndim == 3


def test_the_script_trains_on_it(tmp_path):
    """As the page says: a file, a line in `_ENVS`, a column in ENV_DEFAULTS; then two iterations."""
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "envs" / "spread_ratio.py").write_text(block("Adding an environment"))
    _, before, added, *_ = [""] + block("Adding an environment", 0, "diff").splitlines()
    index = tmp_path / "envs" / "__init__.py"
    text = index.read_text()
    assert text.count(before[1:] + "\n") == 1 and before[0] == " " and added[0] == "+"
    index.write_text(text.replace(before[1:] + "\n", before[1:] + "\n" + added[1:] + "\n"))

    script = (ROOT / "mg2l_mappo.py").read_text()
    head, table, tail = re.split(r"(^ENV_DEFAULTS = \{.*?^\}\n)", script, maxsplit=1, flags=re.M | re.S)
    column = envs.ENV_IDS.index("spread_target")
    wider, count = re.subn(
        r"^(    \"\w+\": +)\((.*)\),$",
        lambda row: f"{row[1]}({row[2]}, {re.split(', ', row[2])[column]}),",
        table,
        flags=re.M,
    )
    assert count == table.count('    "')
    (tmp_path / "mg2l_mappo.py").write_text(head + wider + tail)

    command = block("Adding an environment", 0, "").split()
    assert command[:2] == ["python", "mg2l_mappo.py"]
    small = "--total-timesteps 136 --num-envs 2 --update-epochs 1 --hidden-dim 8 --warmup-episodes 2 --warmup-updates 2"
    small += " --context-copies 1 --context-interval 1 --context-sets 2 --context-size 16 --encoder-updates 1"
    small += " --eval-copies 3 --explore-episodes 1 --test-episodes 2 --num-threads 1 --no-cuda --run-name run"
    done = subprocess.run(
        [sys.executable, *command[1:], *small.split()],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "runs" / "run" / "meta_test.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["step"] for line in lines} == {"0", "136"}
    assert {line["task"] for line in lines} == {"0", "1", "2"}
    assert all(np.isfinite(float(line["return"])) for line in lines)
    saved = torch.load(tmp_path / "runs" / "run" / "checkpoint.pt", weights_only=True)
    assert (saved["iteration"], saved["args"]["env_id"]) == (2, "spread_ratio")


# ---- the table of speeds ----


@pytest.fixture
def throughput(monkeypatch):
    """benchmark/throughput.py, with next to no steps."""
    spec = importlib.util.spec_from_file_location("throughput", ROOT / "benchmark" / "throughput.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in dict(COPIES=2, STEPS=3, LIBRARY_STEPS=3, ROUNDS=1).items():
        monkeypatch.setattr(module, name, value)
    return module


def test_the_page_has_a_speed_for_each_environment(throughput):
    table = rows("| environment | ours |")
    assert [row[0] for row in table] == [f"`{env_id}`" for env_id in envs.ENV_IDS]
    for row in table:
        assert row[3] == throughput.LIBRARY[row[0].strip("`")][0]
        ours, library, ratio = (float(row[k].replace(",", "")) for k in (1, 4, 5))
        assert ratio == pytest.approx(ours / library, rel=0.1)  # the median ratio beside the ratio of medians


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_throughput_measures_every_environment(throughput, env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back, whatever magent2 does to it
    line = throughput.compare(env_id)
    fast, physics, *_, slow, ratio = line.removeprefix(env_id).replace(",", "").split()
    assert float(fast) > 0 and float(slow) > 0 and float(ratio) > 0
    assert physics == "-" if env_id == "rware_layout" else float(physics) > 0
    assert list(tmp_path.iterdir()) == []


def test_throughput_says_in_a_line_what_is_missing(throughput, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpe2", None)
    for name in [name for name in sys.modules if name.startswith("mpe2.")]:
        monkeypatch.delitem(sys.modules, name)
    line = throughput.compare("spread_target")
    assert re.fullmatch(r"spread_target +not measured: mpe2.* is missing, pip install .*benchmark.* brings it", line)


def test_throughput_of_scripts_is_that_of_each_alone(throughput, tmp_path, monkeypatch):
    (tmp_path / "large.py").write_text("held = b'x' * 1000 * 2**20")
    (tmp_path / "small.py").write_text("print('fine')")
    (tmp_path / "broken.py").write_text("raise SystemExit('out of luck')")
    lines = ["import pathlib, throughput", f"throughput.ROOT = pathlib.Path({str(tmp_path)!r})"]
    lines += [f"print(*throughput.run_script('{name}.py', 'hunting_target', 100))" for name in ("large", "small")]
    # in a process of its own, since what this one holds counts until the child has begun its own program
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmark")])
    process = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(process, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    (seconds, large), (_, small) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert large > 1000 > small + 200 and seconds > 0
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="broken.py --env-id hunting_target .* failed: .*out of luck"):
        throughput.run_script("broken.py", "hunting_target", 100)
