"""Nodes that differ are named, with what they have and what the driver has."""

import subprocess
import sys
import time

import pytest
import ray.cloudpickle

from next.training.distributed import nodes
from next.training.distributed.nodes import Facts, differences, own_facts, require_versions


def test_a_node_that_has_what_the_driver_has_is_alike():
    here = own_facts()
    assert set(here.versions) >= {"python", "ray", "torch", "next"}
    assert "missing" not in here.versions.values()
    assert differences(own_facts(), here, here.clock, time.time()) == []


def test_other_versions_and_another_time_are_named():
    here = Facts({"python": "3.11.7", "torch": "2.15.0", "next": "aaaa"}, 1000.0)
    there = Facts({"python": "3.11.7", "torch": "2.14.0"}, 5000.0)
    assert differences(there, here, sent=1000.0, got=1002.0) == [
        "torch is 2.14.0, the driver has 2.15.0",
        "next is missing, the driver has aaaa",
        "its clock is 3998 s ahead of the driver's",
    ]
    late = Facts(here.versions, -2600.0)
    assert differences(late, here, 1000.0, 1002.0) == ["its clock is 3600 s behind the driver's"]
    slow = Facts(here.versions, 1030.0)
    assert differences(slow, here, 1000.0, 1060.0) == [], "a task that started late is no clock"


def test_a_node_that_joins_later_with_other_versions_is_refused_where_it_would_train():
    versions = own_facts().versions
    require_versions(versions)
    with pytest.raises(ValueError, match=r"node \S+ must have what the driver has, but torch is "):
        require_versions(versions | {"torch": "1.0"})


def test_what_a_node_is_asked_travels_as_code_to_one_that_has_none_of_it(tmp_path):
    ray.cloudpickle.register_pickle_by_value(nodes)
    try:
        asked = ray.cloudpickle.dumps(own_facts)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(nodes)
    (tmp_path / "asked").write_bytes(asked)
    answer = (
        "import sys, ray.cloudpickle as c; sys.modules['next.training'] = None; "
        "print(c.loads(open('asked', 'rb').read())().versions['torch'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", answer], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == own_facts().versions["torch"], done.stderr
