"""What the pages say about the code, where a change of the code would make it wrong."""

import importlib.util
import re
from pathlib import Path

import pytest

import envs
import mg2l_mappo

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
spec = importlib.util.spec_from_file_location("lines", ROOT / "docs" / "lines.py")
lines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_at_the_lines_they_name(page):
    """`python docs/lines.py` mends them."""
    assert lines.pointed(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_a_thing_that_is_gone_is_noticed():
    with pytest.raises(KeyError):
        lines.pointed("[`no_such_function`](../mg2l_mappo.py#L1)")
    assert lines.pointed("[`gae`](../mg2l_mappo.py#L1-L2)") != "[`gae`](../mg2l_mappo.py#L1-L2)"


@pytest.mark.parametrize("env_id", ["hunting_target", "spread_target"])
def test_shipped_runs_are_of_this_version(env_id):
    agents = mg2l_mappo.load_agents(ROOT / "benchmark" / "results" / env_id)
    assert agents.args.env_id == env_id


def test_python_of_the_readme_runs():
    """Its blocks as they stand there, on a run that is shipped."""
    readme, names = (ROOT / "README.md").read_text(), {}
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        shipped = ROOT / "benchmark" / "results" / "hunting_target"
        exec(compile(block.replace("runs/RUN", str(shipped)), "README.md", "exec"), names)
    agents, env = names["agents"], names["env"]
    assert names["actions"].shape == (1, 3, 2) and agents.env.single_action_space.contains(names["actions"][0, 0])
    assert isinstance(env, envs.ParallelView) and len(env.reset(seed=0)[0]) == 3
    # the sentence between them
    z = agents.prior(num_envs=1)[:, None].expand(-1, 100, -1, -1)  # [n, T, E, d]
    data = mg2l_mappo.rollout(agents.env, agents.actor, [0], z, seed=0)
    memory = [mg2l_mappo.transitions(data, agents.actor)[:, 0]]  # [S, n, transition_dim]
    assert agents.infer(memory).shape == agents.prior(1).shape
