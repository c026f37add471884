"""``docs/questions.md``: the words of a question lead through ``docs/tree.md`` to its answer."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")

ENTRY = re.compile(r"^\d+\. \*\*(.+?)\?\*\* \[(.+?)\]\((.+?)\), `([\w.]+)`: ", re.MULTILINE)
SMALL = {"a", "does", "how", "is", "of", "on", "that", "the", "to", "what", "where", "who"}


class Question(NamedTuple):
    text: str
    path: str
    link: str
    name: str
    """Of the class or function to read there."""


QUESTIONS = [Question(*found) for found in ENTRY.findall(PAGE)]


def words(text: str) -> set[str]:
    """Words without their endings: ``The losses`` -> ``{"loss"}``."""
    plain = re.findall(r"[a-z]+", text.lower())
    ending = r"(?<=\w{3})(?<!s)(es|ed|s|n)$|(?<=ss)es$"
    return {re.sub(ending, "", word) for word in plain if word not in SMALL}


def lines_of_the_tree(page: str) -> dict[str, str]:
    """File -> its name and its sentence."""
    found, folder = {}, ""
    for line in page.splitlines():
        if opened := re.match(r"\*\*(next/.*?)\*\* ", line):
            folder = opened[1]
        elif said := re.match(r"\* `(\w+\.py)` (.*)", line):
            found[folder + said[1]] = f"{said[1]} {said[2]}"
    return found


def suggested(question: str, page: str) -> list[str]:
    """The files whose line shares the most words with a question."""
    asked = words(question)
    shared = {path: len(asked & words(line)) for path, line in lines_of_the_tree(page).items()}
    return [path for path, count in shared.items() if count == max(shared.values())]


def names_in(path: str) -> set[str]:
    """The classes, functions and methods of a module."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, kinds):
            found |= {node.name}
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, kinds)}
    return found


def test_there_are_ten_questions_in_order():
    assert re.findall(r"^(\d+)\. ", PAGE, re.MULTILINE) == [str(n) for n in range(1, 11)]
    assert len(QUESTIONS) == 10, "a question has no file or no name to read"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.text)
def test_the_tree_alone_suggests_the_one_file_that_answers(question):
    assert suggested(question.text, TREE) == [question.path]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.text)
def test_the_file_has_what_the_answer_names(question):
    assert (ROOT / "docs" / question.link).resolve() == ROOT / question.path
    assert question.name in names_in(question.path)


def test_two_files_that_a_question_fits_are_both_suggested():
    page = "**next/a/** A.\n* `one.py` Losses.\n**next/b/** B.\n* `two.py` A loss.\n* `plan.py` No."
    assert suggested("Where is the loss", page) == ["next/a/one.py", "next/b/two.py"]
