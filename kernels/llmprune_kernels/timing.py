"""GPU times that can be compared: captured launches, cold weights, interleaved rounds.

A launch from Python takes longer than a decode kernel, so launches are captured in a CUDA graph. A
graph that read one weight again and again would read it from L2 and show bandwidths that memory
does not have, so it reads several copies in turn, together larger than any L2. Candidates that
are compared take turns, so that a change of the clock meets all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# four times the largest L2 of a GPU sold so far (B200: 126 MB; H100 and H200: 50 MB)
COLD_BYTES = 512 << 20
FEWEST_COPIES = 4
MOST_COPIES = 64
Launch = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: the median over rounds, and the fastest and slowest round."""

    median_us: float
    fastest_us: float
    slowest_us: float

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """Summary of the rounds."""
        return Timing(statistics.median(samples_us), min(samples_us), max(samples_us))


class Graph:
    """Launches captured one after another.

    Args:
        launches: What is captured; each has run before, so that nothing compiles in the capture.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.count = len(launches)
        # what they read and write must live as long as the graph that has its addresses
        self.launches = launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for launch in launches:
                launch()

    def round_us(self, repeats: int) -> float:
        """Microseconds of one launch, averaged over `repeats` replays."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (repeats * self.count)


def interleaved(
    graphs: Mapping[str, Graph], *, rounds: int = 5, round_ms: float = 10.0
) -> dict[str, Timing]:
    """Times of graphs that take turns.

    Args:
        graphs: By name.
        rounds: Turns of each.
        round_ms: How long one turn should last at least.
    """
    repeats = {}
    for name, graph in graphs.items():
        graph.round_us(1)
        once_us = graph.round_us(1) * graph.count
        repeats[name] = max(1, min(200, int(round_ms * 1e3 / max(once_us, 1.0))))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(graph.round_us(repeats[name]))
    return {name: Timing.of(times) for name, times in samples.items()}


def copies_needed(weight_bytes: int) -> int:
    """How many copies of a weight of this size keep it out of L2."""
    wanted = -(-COLD_BYTES // max(1, weight_bytes))
    return max(FEWEST_COPIES, min(MOST_COPIES, wanted))
