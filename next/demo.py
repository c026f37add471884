"""The procedural benchmark as data for jobs and measurements: drawn and prepared where missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from next.benchmark.card import Benchmark, load_card
from next.benchmark.procedural.benchmark import VARIANTS, write_demo
from next.cli import ProgressLine, named_options
from next.data.source.ingest import prepare

DEMO_CARD = Path(__file__).resolve().parents[1] / "datasets" / "demo.toml"
"""Card of the procedural benchmark, in a checkout of the project."""


def demo_shards(folder: Path, seed: int = 0, variant: str = "demo") -> Path:
    """Shards of the procedural benchmark below ``folder``, drawn and prepared if they are missing.

    Args:
        folder: for raw images and shards.
        seed: of the benchmark.
        variant: one of :data:`next.benchmark.procedural.benchmark.VARIANTS`.

    Raises:
        OSError: the folder cannot be written.
        ValueError: there is no such variant.
    """
    name = str(seed) if variant == "demo" else f"{variant}-{seed}"
    shards, raw = folder / f"shards-{name}", folder / f"raw-{name}"
    draw_demo(raw, seed, variant)
    with ProgressLine("prepare") as progress:  # the same content again keeps the shards
        prepare(demo_card(variant), raw, shards, progress=progress)
    return shards.absolute()


def draw_demo(raw: Path, seed: int, variant: str) -> None:
    """Draw a variant of the procedural benchmark, unless ``raw`` is there already.

    Raises:
        OSError: the folder cannot be written.
        ValueError: there is no such variant, or the seed is negative.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"there is no variant {variant!r} of the procedural benchmark; take "
            f"{', '.join(VARIANTS)}"
        )
    if not raw.is_dir():
        size, difficulty = VARIANTS[variant]
        with ProgressLine("draw") as progress:
            write_demo(raw, size, seed=seed, difficulty=difficulty, progress=progress)


def with_demo_data(argv: Sequence[str]) -> Sequence[str]:
    """A command line without ``--data`` with the shards of its ``--benchmark``, drawn in demo/."""
    named = named_options(argv, "data", "benchmark")
    if "data" in named or {"-h", "--help"} & set(argv):
        return argv
    shards = demo_shards(Path("demo"), variant=named.get("benchmark", "demo"))
    return [*argv, "--data", str(shards)]


def demo_card(variant: str) -> Benchmark:
    """The card of a variant: that of the demo, by a name of its own."""
    card = load_card(DEMO_CARD)
    return card if variant == "demo" else card.model_copy(update={"name": f"demo-{variant}"})
