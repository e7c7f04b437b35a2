"""Which of several ways to compute the same thing is the fastest on this processor or GPU: measured, kept, and said.

A choice that was made on one processor is wrong on the next: bfloat16 products in our own loops are the fastest on a processor
without tile products, and several times slower than oneDNN's on one that has them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lorakit.native.library import cache_folder, processor

log = logging.getLogger("lorakit")

Way = Callable[[], Sequence[Callable[[], object]]]

ROUNDS = 3
"""Each way is run so often, in turn; its least time counts."""

FORCED = "LORAKIT_CHOICES"
"""Environment variable: `linear=panels` takes that way without measuring; several are divided by commas."""


CPU = torch.device("cpu")


def fastest(what: str, shape: Sequence[object], ways: Mapping[str, Way], device: torch.device = CPU) -> str:
    """The way with the least geometric mean of its times over the cases, among those that there are.

    Found once per processor or GPU, version of torch and number of threads, and kept in the cache folder.

    Args:
        what: the operation ("linear"), by which a way can be forced.
        shape: what else it depends on.
        ways: name -> what makes one function per case, the same cases for each; not called where nothing is measured.
        device: where they run.
    """
    names = list(ways)
    forced = dict(pair.split("=", 1) for pair in os.environ.get(FORCED, "").split(",") if "=" in pair).get(what)
    if forced in names:
        return forced
    if len(names) == 1:
        return names[0]
    key = f"{what} {'x'.join(map(str, shape))} {'/'.join(names)}"
    file = _file(device)
    kept = _kept(file)
    if kept.get(key) not in names:
        times = _times({name: make() for name, make in ways.items()}, device)
        kept[key] = min(names, key=lambda name: times[name])
        log.info(
            "native: %s %s goes by %s (%s)", what, "x".join(map(str, shape)), kept[key],
            ", ".join(f"{name} {1e6 * times[name]:.0f} µs" for name in names),
        )  # fmt: skip
        _keep(file, kept)
    return kept[key]


def _times(ways: Mapping[str, Sequence[Callable[[], object]]], device: torch.device = CPU) -> dict[str, float]:
    """Way -> geometric mean of its cases' least times in seconds."""
    least = {name: [float("inf")] * len(cases) for name, cases in ways.items()}
    for number in range(ROUNDS + 1):  # the first one warms up
        for name, cases in ways.items():
            for case, run in enumerate(cases):
                begin = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                took = time.perf_counter() - begin
                if number:
                    least[name][case] = min(least[name][case], took)
    return {name: statistics.geometric_mean(times) for name, times in least.items()}


def _file(device: torch.device = CPU) -> Path:
    about = f"{processor()} {torch.__version__} {torch.get_num_threads()}"
    if device.type == "cuda":
        about = f"{torch.cuda.get_device_name(device)} {torch.__version__}"
    return cache_folder() / f"choices-{hashlib.sha256(about.encode()).hexdigest()[:20]}.json"


@functools.cache
def _kept(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _keep(file: Path, kept: Mapping[str, str]) -> None:
    """Written whole, in one step; where that cannot be, the next process measures again."""
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=1))
        os.replace(part, file)
    except OSError as problem:
        log.debug("native: the choices could not be kept: %s", problem)
