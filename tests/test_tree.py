"""``docs/tree.md``: each module of ``next/`` by the first sentence of its docstring.

python tests/test_tree.py    # writes the page again
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tree.md"
HISTORY = "CHANGELOG.md"
"""Names what was there then."""
NAMED = re.compile(
    r"\b((?:next|tests|jobs|benchmarks)/[\w/]+\.(?:py|c|html|json)|(?<=`)[\w/]+/test_\w+(?=`))"
)
HEAD = """# The tree

Each folder and each module of `next/` by the first sentence of its docstring.
`python tests/test_tree.py` writes this page. Its lines lead to [ten answers](questions.md).
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


def test_pages_name_modules_and_tests_that_are_there():
    pages = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")) if path.name != HISTORY]
    lost = [
        f"{page.name}: {name}"
        for page in pages
        for name in NAMED.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists() and not (ROOT / "tests" / f"{name}.py").exists()
    ]
    assert lost == []


if __name__ == "__main__":
    PAGE.write_text(tree(), encoding="utf-8")
