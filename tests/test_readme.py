"""What the README tells a newcomer to type exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"(?:jobs|datasets|tune_spaces|benchmarks)/[\w.]+\.\w+", README))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_make_target_of_the_readme_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_flag_of_the_readme_is_a_flag_of_its_job():
    from next.config import setting_names

    job_flags = {"card", "source", "out", "data", "dry-run", "space", "trials", "checkpoint"}
    flags = set(re.findall(r"--([a-z][\w.-]*)", README)) - {"help", "json"}
    settings = set(setting_names())
    assert {flag for flag in flags if flag not in settings} <= job_flags


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
