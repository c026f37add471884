"""``docs/glossary.md`` has one word for one thing, and no other word stands for it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "glossary.md"

RETIRED = {
    "bell": "request",
    "benchmark card": "card",
    "early killing": "pruning",
    "entrant": "candidate",
    "fingerprint": "digest",
    "hang up": "channel",
    "hold-out": "held-out identities",
    "hyper-parameter": "setting",
    "hyperparameter": "setting",
    "purse": "budget",
    "racer": "candidate",
    "test set": "split",
    "toy data": "procedural benchmark",
    "training run": "run",
    "training set": "split",
    "trial run": "trial",
    "trunk": "tower",
    "validation identities": "held-out identities",
    "validation score": "held-out identities",
    "validation set": "held-out identities",
}
"""Word -> the term of the glossary. The plural is retired, too."""

UNCLEAR = {
    "alike": "the same way, both",
    "anew": "again, from nothing",
    "perhaps": "may",
}
"""Words that a reader of English as a second language reads twice, and plainer ones."""

ALLOWED = {
    "a key of timm's weights": {("trunk", "next/model/towers/timm_vit.py")},
}
"""Why a word may stand in a file."""

_ANY = re.compile(rf"(?<![\w-])({'|'.join(RETIRED)})s?(?![\w-])", re.IGNORECASE)

TEXTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in PAGE.parent.glob("*.md")),
)


def words_of(identifier: str) -> str:
    """``hangUp_racers`` -> ``hang up racers``."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier)
    return " ".join(apart.replace("_", " ").split()).lower()


def retired_in(text: str) -> set[str]:
    """Retired words in a text."""
    return {found.lower() for found in _ANY.findall(text)}


def names_and_texts(source: str) -> Iterator[str]:
    """The identifiers of a module, and its strings: help texts, messages, docstrings."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield words_of(node.name)
            case ast.Name():
                yield words_of(node.id)
            case ast.Attribute():
                yield words_of(node.attr)
            case ast.arg() | ast.keyword() if node.arg is not None:
                yield words_of(node.arg)
            case ast.Constant(value=str(text)):
                yield " ".join(text.split())


def terms() -> list[str]:
    return re.findall(r"^\* \*\*(.+?)\*\*: ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_each_term_has_one_line_and_the_terms_are_in_order():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert len(terms()) == sum(line.startswith("* ") for line in lines) > 40
    assert terms() == sorted(set(terms()), key=str.lower)


def test_a_retired_word_is_named_at_its_term():
    lines = dict(re.findall(r"^\* \*\*(.+?)\*\*: (.*)$", PAGE.read_text(), re.MULTILINE))
    for word, term in RETIRED.items():
        told = lines[term].partition("*Not*: ")[2]
        assert word in told or word.partition(" ")[0] in told, f"{term} does not say: not {word}"


@pytest.mark.parametrize("folder", ["next", "jobs", "benchmarks", "tune_spaces"])
def test_no_name_help_text_or_message_has_a_retired_word(folder):
    allowed = set().union(*ALLOWED.values())
    found = {
        f"{path.relative_to(ROOT)}: {word}, which is: {RETIRED[word]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for word in retired_in("\n".join(names_and_texts(path.read_text(encoding="utf-8"))))
        if (word, path.relative_to(ROOT).as_posix()) not in allowed
    }
    assert found == set()


@pytest.mark.parametrize("folder", ["next", "jobs"])
def test_no_docstring_help_text_or_message_has_a_word_that_is_read_twice(folder):
    unclear = re.compile(rf"\b({'|'.join(UNCLEAR)})\b", re.IGNORECASE)
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {word}, which is: {UNCLEAR[word.lower()]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in unclear.findall(node.value)
    }
    assert found == set()


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "docs/glossary.md"])
def test_no_page_has_a_retired_word(page):
    found = retired_in((ROOT / page).read_text(encoding="utf-8"))
    assert {word: RETIRED[word] for word in found} == {}


@pytest.mark.parametrize(
    "source",
    ["class Bell: ...", "def next_racer(): ...", "f(purse=1)", "x.hang_up()", "'a hold-out'"],
)
def test_a_retired_word_is_found(source):
    assert [word for text in names_and_texts(source) for word in retired_in(text)]
