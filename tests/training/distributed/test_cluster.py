"""What a job asks the nodes of a cluster that is given."""

import os
import signal
import threading
import time

import psutil
import pytest

from next.training.distributed import nodes
from next.training.distributed.nodes import require_alike

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def stop_all_of(node) -> list[psutil.Process]:
    """Its processes, which answer nothing from here on."""
    raylet = psutil.Process(raylet_of(node))
    stopped = [raylet, *raylet.children(recursive=True)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    return stopped


def test_a_node_that_does_not_answer_is_named(cluster, monkeypatch):
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 5.0)
    hung = cluster.add_node(num_cpus=1)
    stopped = stop_all_of(hung)
    try:
        named = (
            r"every node must have what the driver has, but node \S+( \(\w{8}\))? did not "
            r"say within 5 s what it has; mend that node, or take it out"
        )
        with pytest.raises(ValueError, match=named):
            require_alike()
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        cluster.remove_node(hung)


def test_a_node_that_is_lost_while_it_is_asked_is_left_out(cluster):
    gone = cluster.add_node(num_cpus=1)
    stop_all_of(gone)  # so that it has not answered before it is lost
    lost = threading.Timer(2.0, os.kill, (raylet_of(gone), signal.SIGKILL))
    lost.start()
    try:
        began = time.monotonic()
        require_alike()
        assert time.monotonic() - began > 1, "it was waited for"
    finally:
        lost.join()
        cluster.remove_node(gone, allow_graceful=False)
