"""Time, memory and accuracy of sketching, beside a plain step and the reference, on five models.

    python tests/benchmarks/bench_sketch.py [--part time|memory|accuracy|growth|widths] [--models abcde]
        [--figure PATH] [--threads 2] [--repeats 7] [--smoke]

The models are (a) a looped GPT, d = 128; (b) the same, d = 256; (c) the paper's shape, 2 blocks, then 4 that are
applied 32 times, then 2; (d) ALBERT's shape; (e) an ordinary GPT-2 of 4 layers, as a loop of one step. The examples are
GSM8K's where LOOPSWAY_GSM8K names its folder, else made up. The reference is step-decomposed-influence 0.1.1. Without
--part all of it is measured; each part can run alone.

Times with more than one thread are by the wall: run this on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from measurement import markdown_table, parse_arguments
from sketch_accuracy import Extent, SelfInfluence, error_tables
from sketch_memory import memory_tables
from sketch_models import WORKLOADS, workload
from sketch_ranking import RankingExtent, ranking_table
from sketch_time import TIME_HEADER, TIME_LEGEND, Subject, growth_table, time_row, width_growth_table
from sketch_widths import Curve

from loopsway.experiments.texts import DATA_VARIABLE, gsm8k_folder, gsm8k_texts, synthetic_texts

NUM_TEXTS = 512 + 32
SHORT_STEPS = 8  # of (c), for accuracy: exact gradients of 32 steps take long
MEMORY_MODELS = "bc"
CURVE_WIDTHS = tuple(256 << power for power in range(9))
CURVE_PROJECTIONS = (64, 256, 1024, 2048)


def extent(letter: str, *, smoke: bool) -> Extent:
    """Of the accuracy of one model.

    The reference's m gives about as many floats as one of our widths, or 50 times the bytes of one at 1 bit, or is its
    default, 2048.
    """
    chosen = workload(letter, smoke=smoke)
    if smoke:
        return Extent(
            workload=chosen, num_examples=6, training_steps=2, num_seeds=2, widths=(256, 512), projections=(22,)
        )
    if letter == "c":
        return Extent(
            workload=chosen.sized(num_steps=SHORT_STEPS),
            num_examples=16,
            training_steps=60,
            num_seeds=3,
            widths=(8192, 32768, 65536),
            projections=(683, 1069, 2048),
        )
    return Extent(
        workload=chosen,
        num_examples=64,
        training_steps=100,
        num_seeds=5,
        widths=(1024, 8192, 16384),
        projections=(683, 1075, 1366, 2048),
    )


@lru_cache
def influence(letter: str, texts: tuple[str, ...], *, smoke: bool) -> SelfInfluence:
    return SelfInfluence(extent(letter, smoke=smoke), texts)


class Program:
    """The parts, each printing its tables."""

    def __init__(self, arguments: argparse.Namespace, texts: Sequence[str]) -> None:
        self._smoke, self._repeats, self._threads = arguments.smoke, arguments.repeats, arguments.threads
        self._models, self._figure, self._verify = arguments.models, arguments.figure, arguments.verify
        self._texts = tuple(texts)

    def time(self) -> None:
        print(markdown_table(TIME_HEADER, []), flush=True)
        for letter in self._models:  # minutes each: every row is shown at once
            row = time_row(Subject.of(workload(letter, smoke=self._smoke), self._texts), self._repeats)
            print(f"| {' | '.join(row)} |", flush=True)
        print(TIME_LEGEND)

    def memory(self) -> None:
        letters = [letter for letter in MEMORY_MODELS if letter in self._models]
        if self._smoke:
            letters = letters[:1]
        print(memory_tables(letters, threads=self._threads, verify=self._verify, smoke=self._smoke))

    def accuracy(self) -> None:
        for letter in (letter for letter in "ac" if letter in self._models):
            subject = influence(letter, self._texts, smoke=self._smoke)
            print(f"#### {subject.extent}; {len(subject.shapes)} tensors\n")
            print(error_tables(subject), flush=True, end="\n\n")
        if "e" in self._models:
            ranking = self._ranking()
            print(f"#### {ranking.workload}; {ranking.num_train} x {ranking.num_queries} pairs, "
                  f"{ranking.training_steps} steps of training, {ranking.num_seeds} seeds\n")  # fmt: skip
            print(ranking_table(ranking, self._texts))

    def growth(self) -> None:
        print(growth_table(self._texts, self._repeats, smoke=self._smoke), flush=True, end="\n\n")
        print(width_growth_table(self._texts, self._repeats, smoke=self._smoke))

    def widths(self) -> None:
        subject = influence("a", self._texts, smoke=self._smoke)
        widths, projections = ((256, 512), (22,)) if self._smoke else (CURVE_WIDTHS, CURVE_PROJECTIONS)
        curve = Curve.of(subject, widths, projections)
        print(f"#### {subject.extent}\n")
        print(curve.table())
        if self._figure is not None:
            title = str(subject.extent.workload).rpartition(", batch")[0]
            print("\nwrote", *curve.draw(self._figure, title))

    def _ranking(self) -> RankingExtent:
        chosen = workload("e", smoke=self._smoke)
        if self._smoke:
            return RankingExtent(
                workload=chosen, num_train=16, num_queries=2, training_steps=2, num_seeds=1, codes={256: (1,)}
            )
        return RankingExtent(
            workload=chosen,
            num_train=512,
            num_queries=32,
            training_steps=100,
            num_seeds=3,
            codes={4096: (1, 2, 8), 8192: (1, 4), 32768: (1,)},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("time", "memory", "accuracy", "growth", "widths")
    parser.add_argument("--part", choices=parts, action="append", help="may be given again (default: all)")
    parser.add_argument("--models", default="abcde", help="letters of those to measure (default: abcde)")
    parser.add_argument("--figure", type=Path, help="of the part widths: written as PNG and SVG")
    parser.add_argument("--verify", action="store_true", help="memory: measure the largest batches too; minutes more")
    arguments = parse_arguments(parser, threads=2)
    unknown = set(arguments.models) - set(WORKLOADS)
    if unknown:
        parser.error(f"--models {arguments.models}: no model is called {', '.join(sorted(unknown))}; they are abcde")
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    folder = gsm8k_folder()
    texts = gsm8k_texts(folder, NUM_TEXTS) if folder else synthetic_texts(NUM_TEXTS)
    source = "GSM8K" if folder else f"sums in words; GSM8K is skipped: {DATA_VARIABLE} names no folder"
    program = Program(arguments, texts)
    for part in arguments.part or parts:
        run: Callable[[], None] = getattr(program, part)
        load, begin = os.getloadavg()[0], time.perf_counter()
        print(f"### {part}; {source}; {arguments.threads} thread(s), load {load:.1f} before\n", flush=True)
        run()
        print(f"\n({part} took {time.perf_counter() - begin:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
