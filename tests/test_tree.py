"""``docs/tree.md``: each module of ``next/`` by the first sentence of its docstring.

python tests/test_tree.py    # writes the page again
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# The tree

Each folder and each module of `next/` by the first sentence of its docstring.
`python tests/test_tree.py` writes this page.
"""


def first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".").replace("``", "`")


def tree() -> str:
    lines = [HEAD]
    for package in sorted(path.parent for path in (ROOT / "next").rglob("__init__.py")):
        name = package.relative_to(ROOT).as_posix()
        lines.append(f"\n**{name}/** {first_sentence(package / '__init__.py')}.\n")
        for path in sorted(package.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"* `{path.name}` {first_sentence(path)}.")
    return "\n".join(lines) + "\n"


def test_the_page_of_the_tree_is_that_of_the_tree():
    assert PAGE.read_text(encoding="utf-8") == tree(), "write it by: python tests/test_tree.py"


if __name__ == "__main__":
    PAGE.write_text(tree(), encoding="utf-8")
