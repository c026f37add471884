"""Wall time, peak memory and longest silence of a command and everything that it starts.

    python benchmarks/footprint.py -- make demo

Memory is the sum of the proportional set sizes (PSS) of all processes below this one: a page that
several share counts once. Silence is the time without a character on the command's output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import psutil

_EVERY_SECONDS = 1.0


def main(command: list[str]) -> int:
    """Run the command, pass its output on, print one line of JSON at the end."""
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        command = ["make", "demo"]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    spoke = began
    silence = (0.0, "")
    peak = 0
    largest: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        nonlocal peak, largest
        while not done.wait(_EVERY_SECONDS):
            now = process_memory()
            if sum(now.values()) > peak:
                peak, largest = sum(now.values()), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    for line in child.stdout:
        now = time.monotonic()
        silence = max(silence, (now - spoke, line.decode().strip()[:100]))
        spoke = now
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
    code = child.wait()
    done.set()
    watcher.join()
    ranked = sorted(largest.items(), key=lambda item: -item[1])
    print(
        json.dumps(
            {
                "command": " ".join(command),
                "exit_code": code,
                "wall_seconds": round(time.monotonic() - began, 1),
                "peak_mib": peak >> 20,
                "longest_silence_seconds": round(silence[0], 1),
                "silence_ended_with": silence[1],
                "largest_mib": {name: size >> 20 for name, size in ranked[:8]},
            },
            indent=2,
        )
    )
    return code


def process_memory() -> dict[str, int]:
    """PSS in bytes of each process below this one, by its command and number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline() or [process.name()]
            found[f"{' '.join(words)[:60]} ({process.pid})"] = process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
