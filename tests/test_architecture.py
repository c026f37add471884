"""Rules about the source that no single module can check."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("next", "jobs", "tune_spaces", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LEVEL = {
    "addresses": 0,
    "stopping": 0,
    "temporary": 0,
    "config": 1,
    "storage": 2,
    "lease": 3,
    "session": 4,
    "local_ray": 5,
    "benchmark": 5,
    "model": 6,
    "data": 6,
    "tracking": 6,
    "evaluation": 7,
    "captioning": 7,
    "pictures": 8,
    "retrieval": 9,
    "training": 10,
    "export": 11,
    "serving": 11,
    "tuning": 11,
    "cli": 12,
    "doctor": 12,
    "demo": 13,
}
HOMES = {
    "pyarrow": (
        "next/storage.py",
        "next/data/shards/index.py",
        "next/data/shards/reader.py",
        "next/data/shards/writer.py",
        "next/retrieval/gallery.py",
    ),
    "mlflow": ("next/tracking/",),
    "ray": (
        "next/local_ray.py",
        "next/session.py",
        "next/training/distributed/assessment_workers.py",
        "next/training/distributed/cluster.py",
        "next/training/distributed/joining.py",
        "next/training/distributed/nodes.py",
        # Of workers.py, what Ray's controller loads without the network.
        "next/training/distributed/relay.py",
        "next/training/distributed/rendezvous.py",
        "next/training/distributed/workers.py",
        "next/tuning/",
        "next/captioning/requests/pipeline.py",
        "next/retrieval/pipeline.py",
        "next/serving/deployment.py",
        "next/serving/launch.py",
        "next/data/shards/distribution.py",
    ),
    "onnx": ("next/export/",),
    "onnxruntime": ("next/export/",),
    "onnxscript": ("next/export/",),
    "optuna": ("next/tuning/", "tune_spaces/"),
}


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
def test_mypy_finds_the_types_right():
    """A test, so that it runs beside the others."""
    command = [sys.executable, "-m", "mypy"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nobody_binds_the_builtin_next(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                assert bound != "next", f"line {node.lineno}: write `from next.x import y`"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id != "next", f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "next").rglob("*.py")), ids=relative)
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT / "next").with_suffix("").parts
    if parts == ("__init__",):
        return
    own = parts[0]
    for name in imports(path):
        if name.startswith("next."):
            other = name.split(".")[1]
            assert other == own or LEVEL[other] < LEVEL[own], f"{relative(path)} imports {name}"
        assert not name.startswith(("jobs", "tests", "benchmarks")), name


PACKAGES = sorted(path.parent for path in (ROOT / "next").rglob("__init__.py"))[1:]


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_a_package_is_small_and_says_what_enters_what_leaves_and_where_to_begin(package):
    modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 9, "nine modules are what a reader takes in at a glance"
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    first = re.search(r"\bRead ``([\w/]+\.py)`` first", said)
    assert first, f'write "Read ``FILE.py`` first" into {relative(package)}/__init__.py'
    assert (package / first[1]).is_file()
    assert re.search(r"\bIn: .+\bOut: ", said, re.DOTALL), "say what enters and what leaves"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library):
    for path in (ROOT / "next").rglob("*.py"):
        if any(name.split(".")[0] == library for name in imports(path)):
            assert relative(path).startswith(HOMES[library]), f"{relative(path)}: {library}"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNSEEN = {"onnx", "onnxscript", "python-multipart"}
"""What torch's exporter and fastapi import, and no module of ours."""
TOOLS = {
    "flask-wtf", "moto", "mypy", "pytest-timeout", "pytest-xdist", "ruff", "types-psutil", "duckdb",
}  # fmt: skip
"""What tests run as a program or as a plugin, or read from the README."""


def declared(*extras: str) -> set[str]:
    """Distributions that the project asks for, with these extras."""
    lines = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def needed(*folders: str) -> dict[str, set[str]]:
    """Distributions that have each library imported below these folders, by its name."""
    ours = {"next", "jobs", "tests", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}
    names = {
        name.split(".")[0]
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
    } - ours
    known = packages_distributions()
    return {
        name: {one.lower().replace("_", "-") for one in known.get(name, [name])}
        for name in names - sys.stdlib_module_names
    }


SHIPPED = [extra for extra in PROJECT["optional-dependencies"] if extra != "dev"]


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (("next", "jobs", "tune_spaces"), SHIPPED),
        (("next", "jobs", "tune_spaces", "benchmarks", "tests"), [*SHIPPED, "dev"]),
    ],
    ids=["shipped", "with tests and measurements"],
)
def test_what_is_imported_is_declared_and_the_other_way_round(folders, extras):
    libraries = needed(*folders)
    asked = declared(*extras)
    missing = {name for name, of in libraries.items() if not of & asked}
    assert missing == set(), "declare them in pyproject.toml"
    unused = asked.difference(*libraries.values()) - UNSEEN - TOOLS
    assert unused == set(), "nothing imports them: take them out of pyproject.toml"


def test_what_is_declared_is_pinned():
    pins = (ROOT / "requirements.txt").read_text()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins.splitlines()}
    assert declared(*PROJECT["optional-dependencies"]) - pinned == set()


@pytest.mark.parametrize(
    ("first", "without"),
    [
        (["training/loop.py", "model/network.py"], {"ray", "mlflow", "optuna"}),
        (["training/inputs.py"], {"ray", "mlflow", "optuna"}),
        (["tuning/folder.py", "tuning/report/report.py"], {"ray"}),
    ],
    ids=["loop and model", "inputs of a run", "reading a sweep"],
)
def test_what_is_not_needed_is_not_imported(first, without):
    seen, queue = set(), [ROOT / "next" / name for name in first]
    while queue:
        path = queue.pop()
        seen.add(path)
        top_level = {
            name for node in ast.parse(path.read_text()).body for name in imports_of_statement(node)
        }
        assert not {name.split(".")[0] for name in top_level} & without, path
        for name in top_level:
            module = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("next.") and module.exists() and module not in seen:
                queue.append(module)
    assert len(seen) > 5


def imports_of_statement(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()


def test_datasets_is_no_package_and_holds_no_python():
    assert not list((ROOT / "datasets").rglob("*.py"))


MOVES = {
    "next/training/folder.py": 1,  # sets the folder of an earlier run aside
    "next/tuning/record.py": 1,  # the same for a study
    "next/tracking/delivery/publication.py": 1,  # and for a journal
    "next/tuning/execution/forkserver.py": 1,  # a socket, which is no file
}
"""Files that rename, and how often; who writes a file uses the helpers of next/storage.py."""


def test_files_get_their_names_in_one_place_alone():
    """Whole, on the disk, and by drafts that no two writers share."""
    found = {}
    for folder in ("next", "jobs", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            count = sum(map(renames, ast.walk(ast.parse(path.read_text()))))
            if count and relative(path) != "next/storage.py":
                found[relative(path)] = count
    assert found == MOVES, "write by next.storage.replacing, write_whole, drafting or commit"


def renames(node: ast.AST) -> bool:
    """Whether this is a call of ``os.replace``, ``Path.rename`` and the like.

    Those of texts, dates and dataclasses have two arguments or named ones.
    """
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    name, of = node.func.attr, node.func.value
    if isinstance(of, ast.Name) and (of.id, name) in {
        ("os", "replace"), ("os", "rename"), ("os", "renames"), ("shutil", "move"),
    }:  # fmt: skip
        return True
    return name in ("rename", "replace") and len(node.args) == 1 and not node.keywords


def test_text_is_read_and_written_as_utf_8_whatever_the_locale():
    """A machine's locale decides nothing about what a file holds."""
    for folder in ("next", "jobs", "benchmarks", "tune_spaces"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
                assert not asks_the_locale(node), f'{where}: say encoding="utf-8"'


@pytest.mark.parametrize(
    ("call", "asks"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ('path.open("a")', True),
        ("subprocess.run(words, text=True)", True),
        ('path.read_text(encoding="utf-8")', False),
        ('open(path, "rb")', False),
        ("subprocess.run(words)", False),
        ("folder.open(name)", False),
    ],
)
def test_a_call_that_asks_the_locale_is_known(call, asks):
    assert asks_the_locale(ast.parse(call, mode="eval").body) == asks


def asks_the_locale(node: ast.AST) -> bool:
    """Whether this call reads or writes text without saying its encoding."""
    if not isinstance(node, ast.Call):
        return False
    named = {keyword.arg for keyword in node.keywords}
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if "encoding" in named:
        return False
    if name in ("read_text", "write_text"):
        return len(node.args) < (1 if name == "read_text" else 2)
    if name in ("run", "Popen", "check_output"):
        return "text" in named
    modes = [
        argument.value
        for argument in (*node.args, *(one.value for one in node.keywords if one.arg == "mode"))
        if isinstance(argument, ast.Constant) and set(str(argument.value)) <= set("rwaxbt+")
    ]
    if name in ("open", "fdopen") and modes:
        return "b" not in modes[0]
    return name == "open" and isinstance(node.func, ast.Name)


def test_a_clone_alone_has_all_that_tests_and_benchmarks_read():
    """No test and no measurement reads what lies beside the repository, or skips where it lacks."""
    outside = re.compile(r"ROOT\.parent|parents\[\d\]\.parent|\.\./shared")
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                assert not outside.search(path.read_text(encoding="utf-8")), relative(path)


def test_the_metric_that_chooses_by_default_is_named_in_one_place():
    """Beside it, the checkpoints of older versions, which chose by no other."""
    named = {"next/config.py", "next/training/checkpointing/store.py"}
    for path in (ROOT / "next").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value == "val/mAP":
                assert relative(path) in named, f"{relative(path)}:{node.lineno}: write METRIC"


CALLED_BY_NAME = {"_load_pyfunc"}
"""What MLflow calls."""


def test_what_next_defines_is_used_by_more_than_tests():
    """Functions and classes of modules; a name in a docstring does not count."""
    defined, named = {}, Counter()
    for folder in ("next", "jobs", "benchmarks", "tune_spaces"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            named.update(re.findall(r"\w+", re.sub(r'"""(?:.|\n)*?"""', "", text)))
            for node in ast.parse(text).body if folder == "next" else ():
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined[node.name] = f"{relative(path)}:{node.lineno}"
    dead = {where: name for name, where in defined.items() if named[name] < 2}
    assert {name for name in dead.values()} == CALLED_BY_NAME, dead


def test_print_stays_in_the_jobs():
    for path in (ROOT / "next").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), relative(path)
