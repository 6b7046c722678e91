"""Benchmarks: speed and memory of a model by length and batch size, beside those of the model it was made from."""

from .cases import BenchSettings, Case, quartiles
from .crossover import crossovers
from .rows import BenchRow, bench_rows, crossover_sentences, setup_sentence
from .running import BenchResult, TrainingCases, TrainingStep, run_bench

__all__ = [
    "BenchResult",
    "BenchRow",
    "BenchSettings",
    "Case",
    "TrainingCases",
    "TrainingStep",
    "bench_rows",
    "crossover_sentences",
    "crossovers",
    "quartiles",
    "run_bench",
    "setup_sentence",
]
