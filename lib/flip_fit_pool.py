"""Fitting the rules of many neurons in parallel processes that share one feature matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import UserError
from lib.flip_rules import FitProblem, FitSettings, NeuronFit, TargetStatus
from lib.neurons import Neuron

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def fit_all(
    problem: FitProblem,
    neurons: Sequence[Neuron],
    flips: np.ndarray,
    known: np.ndarray,
    settings: FitSettings,
    policy_dir: Path,
    *,
    jobs: int,
    force: bool,
    progress: Progress,
) -> list[TargetStatus]:
    """Fit every neuron, in `jobs` processes that share the features through one memory-mapped file.

    flips, known: bool [neuron, row]. Results do not depend on `jobs`: seeds derive from neuron and target.
    """
    digest = problem.digest()
    units = [(neuron, flips[place], known[place], policy_dir / neuron.key) for place, neuron in enumerate(neurons)]
    if jobs == 1 or len(units) < 2:
        return [
            status
            for neuron, flip, know, folder in progress(units)
            for status in NeuronFit(problem, digest, settings, neuron, flip, know, folder).run(force=force)
        ]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "features.npy"
        np.save(path, problem.features, allow_pickle=False)
        shared = (path, replace(problem, features=np.empty((0, 0))), digest, settings, force)
        with ProcessPoolExecutor(min(jobs, len(units)), get_context("spawn"), _start_worker, shared) as pool:
            futures = {pool.submit(_fit_in_worker, *unit): place for place, unit in enumerate(units)}
            try:
                done = {futures[future]: future.result() for future in progress(as_completed(futures))}
            except BrokenProcessPool:
                raise UserError(
                    f"one of the {jobs} processes that fit rules was killed, probably for want of memory; "
                    "run again with a smaller --jobs (finished neurons are kept)"
                ) from None
    return [status for place in range(len(units)) for status in done[place]]


_WORKER: dict[str, Any] = {}


def _start_worker(path: Path, rest: FitProblem, digest: str, settings: FitSettings, force: bool) -> None:
    """Prepare a worker process: features from the shared file, one thread (the processes are the parallelism)."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    problem = replace(rest, features=np.load(path, mmap_mode="r"))
    _WORKER.update(problem=problem, digest=digest, settings=settings, force=force)


def _fit_in_worker(neuron: Neuron, flips: np.ndarray, known: np.ndarray, folder: Path) -> list[TargetStatus]:
    fit = NeuronFit(_WORKER["problem"], _WORKER["digest"], _WORKER["settings"], neuron, flips, known, folder)
    return fit.run(force=_WORKER["force"])
