"""What the pages say about the code, where a change of the code would make it wrong."""

import importlib.util
import re
from pathlib import Path

import pytest

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
