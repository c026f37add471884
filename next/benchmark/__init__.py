"""What is measured: benchmarks' cards, and the procedural benchmark.

Read ``card.py`` first. In: a TOML file. Out: :class:`next.benchmark.card.Benchmark`.
"""
