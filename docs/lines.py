"""Points the links of these pages at the lines where things are: `python docs/lines.py` after a script has changed.

A link to a script, [`name`](../script.py#L1-L2), names a function, a class or Class.method of it, or the comment with
which a step of the main loop begins. Raises KeyError if the script has no such thing.
"""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).parent
LINK = re.compile(r"\[`([^`]+)`\]\((\.\./(\w+\.py))(?:#L\d+(?:-L\d+)?)?\)")


def places(script: Path) -> dict[str, str]:
    """Where each thing of a script is, e.g. "L10-L20"."""
    source, found = script.read_text(), {}
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for part in (node, *members):
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                name = part.name if part is node else f"{node.name}.{part.name}"
                found[name] = f"L{part.lineno}-L{part.end_lineno}"
    for number, line in enumerate(source.splitlines(), 1):
        if line.strip().startswith("# line"):
            found.setdefault(line.strip()[2:].split(":")[0], f"L{number}")
    return found


def pointed(page: str) -> str:
    """The page with every link to a script at the right lines."""

    def point(match: re.Match) -> str:
        name, path, script = match.groups()
        return f"[`{name}`]({path}#{places(DOCS.parent / script)[name]})"

    return LINK.sub(point, page)


if __name__ == "__main__":
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(pointed(path.read_text()))
