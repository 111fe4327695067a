"""Spectral coverage: principal axes, the unit sphere, k-centre clusters, and samples that cover a group of points.

Pure numpy on arrays of points; knows nothing of prompts, rules or models. Distances are Euclidean on the unit sphere
(0 to 2). Every random choice comes from a generator that the caller passes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lib.representations import RowView

EXACT_PCA_FLOPS = 2e10
"""Up to this cost (points x width x smaller side) the principal axes are computed exactly, beyond it randomised."""
_CHUNK = 8192


class PrincipalAxes(NamedTuple):
    """Result of `principal_axes`."""

    mean: np.ndarray
    """[width]"""
    axes: np.ndarray
    """[component, width], orthonormal, by falling variance; the entry of largest magnitude of each is positive."""
    explained_variance_ratio: np.ndarray
    """[component]"""
    is_exact: bool


class Clusters(NamedTuple):
    """Farthest-first k-centre clustering."""

    centres: np.ndarray
    """[cluster] point numbers, in the order in which they were picked."""
    assignment: np.ndarray
    """[point] number of the nearest centre (the earliest of equally near ones)."""
    distances: np.ndarray
    """[point] distance to that centre."""


class Cover(NamedTuple):
    """A sample of a group."""

    chosen: np.ndarray
    """[n] point numbers; each prefix is itself spread out (farthest-first order)."""
    strategy: str
    n_clusters_in_group: int


def principal_axes(
    points: np.ndarray | RowView, n_components: int, generator: np.random.Generator
) -> PrincipalAxes:
    """Principal axes of `points` [point, width] (read in chunks, so it may lie on disk).

    At most min(n_components, n_points, width) components. Large inputs take the randomised range finder of Halko,
    Martinsson and Tropp (2011) with six power iterations.
    """
    n_points, width = points.shape
    n_components = min(n_components, n_points, width)
    mean = _chunk_sum(points, lambda chunk: chunk.sum(axis=0)) / n_points
    total_variance = float(_chunk_sum(points, lambda chunk: np.square(chunk - mean).sum()))
    is_exact = float(n_points) * width * min(n_points, width) <= EXACT_PCA_FLOPS
    if is_exact:
        _, singular, axes = np.linalg.svd(np.asarray(points, dtype=np.float64) - mean, full_matrices=False)
    else:
        singular, axes = _randomised_axes(points, mean, n_components, generator)
    axes = axes[:n_components]
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1) < 0, -1.0, 1.0)
    ratio = np.square(singular[:n_components]) / total_variance if total_variance > 0 else np.zeros(n_components)
    return PrincipalAxes(mean, axes, ratio, is_exact)


def _chunk_sum(points: np.ndarray | RowView, summand: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sum of `summand(chunk)` over chunks of rows, in float64."""
    starts = range(0, len(points), _CHUNK)
    parts = (summand(np.asarray(points[start : start + _CHUNK], dtype=np.float64)) for start in starts)
    return sum(parts, start=np.zeros(()))


def _randomised_axes(
    points: np.ndarray | RowView,
    mean: np.ndarray,
    n_components: int,
    generator: np.random.Generator,
    n_iterations: int = 6,
) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular values and right singular vectors of the centred points, without holding a copy of them."""
    n_probes = min(n_components + 10, *points.shape)
    basis, _ = np.linalg.qr(generator.standard_normal((points.shape[1], n_probes)))
    for _ in range(n_iterations):
        basis, _ = np.linalg.qr(_covariance_times(points, mean, basis))
    projected_gram = basis.T @ _covariance_times(points, mean, basis)
    eigenvalues, vectors = np.linalg.eigh((projected_gram + projected_gram.T) / 2)
    order = np.argsort(-eigenvalues, kind="stable")
    return np.sqrt(np.maximum(eigenvalues[order], 0)), (basis @ vectors[:, order]).T


def _covariance_times(points: np.ndarray | RowView, mean: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(centred points)^T (centred points) basis, [width, probe], in float32 products summed in float64."""
    result = np.zeros(basis.shape)
    centre, probes = mean.astype(np.float32), basis.astype(np.float32)
    for start in range(0, len(points), _CHUNK):
        chunk = np.asarray(points[start : start + _CHUNK], dtype=np.float32) - centre
        result += chunk.T @ (chunk @ probes)
    return result


def to_unit_sphere(points: np.ndarray | RowView, axes: PrincipalAxes) -> np.ndarray:
    """Coordinates of the points on the principal axes, each row divided by its length; a zero row stays zero.

    Returns [point, component] float32.
    """
    coordinates = np.empty((len(points), len(axes.axes)), dtype=np.float32)
    for start in range(0, len(points), _CHUNK):
        chunk = np.asarray(points[start : start + _CHUNK], dtype=np.float64) - axes.mean
        coordinates[start : start + len(chunk)] = chunk @ axes.axes.T
    norms = np.linalg.norm(coordinates, axis=1, keepdims=True)
    return np.divide(coordinates, norms, out=np.zeros_like(coordinates), where=norms > 0)


def squared_distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of each point to one centre, [point]; differences first, so never negative."""
    difference = points - centre
    return np.einsum("nd,nd->n", difference, difference)


def k_centre(points: np.ndarray, n_clusters: int, generator: np.random.Generator) -> Clusters:
    """Farthest-first k-centre clusters (Gonzalez, 1985: radius at most twice the best possible).

    The first centre is a uniform draw; each next one is the point farthest from all centres so far. With no more
    distinct points than clusters it stops early: a duplicate never becomes a centre of its own.
    """
    centres = [int(generator.integers(len(points)))]
    nearest = squared_distances(points, points[centres[0]])
    assignment = np.zeros(len(points), dtype=np.int64)
    while len(centres) < min(n_clusters, len(points)):
        candidate = int(nearest.argmax())
        if nearest[candidate] <= 0:
            break
        distance = squared_distances(points, points[candidate])
        closer = distance < nearest
        assignment[closer] = len(centres)
        nearest[closer] = distance[closer]
        centres.append(candidate)
    return Clusters(np.array(centres), assignment, np.sqrt(nearest))


def farthest_first(
    points: np.ndarray, n: int, start: int, *, stop_radius: float | None = None, n_before_stop: int = 1
) -> tuple[np.ndarray, float]:
    """Positions of up to `n` points, each the farthest from those before it, beginning with `start`.

    With `stop_radius` it ends once every point lies within it and `n_before_stop` points are chosen. Points that
    coincide with chosen ones follow in order of position. Returns (positions [<= n], covering radius reached).
    """
    nearest = squared_distances(points, points[start])
    is_chosen = np.zeros(len(points), dtype=bool)
    order = [start]
    is_chosen[start] = True
    while len(order) < min(n, len(points)):
        radius = float(np.sqrt(nearest.max()))
        if stop_radius is not None and radius <= stop_radius and len(order) >= n_before_stop:
            break
        candidate = int(np.where(is_chosen, -1.0, nearest).argmax())
        order.append(candidate)
        is_chosen[candidate] = True
        np.minimum(nearest, squared_distances(points, points[candidate]), out=nearest)
    return np.array(order), float(np.sqrt(nearest.max()))


def most_central(points: np.ndarray) -> int:
    """Position of the point nearest to the mean of the points."""
    return int(squared_distances(points, points.mean(axis=0, dtype=np.float64)).argmin())


def proportional_quotas(sizes: np.ndarray, n: int) -> np.ndarray:
    """Split `n` over clusters in proportion to their sizes, [cluster]; n <= sum(sizes).

    Largest remainders; every non-empty cluster gets at least one while `n` lasts (larger clusters first), none gets
    more than it has.
    """
    sizes = np.asarray(sizes)
    by_size = np.argsort(-sizes, kind="stable")
    occupied = by_size[sizes[by_size] > 0]
    quotas = np.zeros(len(sizes), dtype=np.int64)
    if n <= len(occupied):
        quotas[occupied[:n]] = 1
        return quotas
    quotas[occupied] = 1
    share = sizes * (n / sizes.sum())
    quotas = np.maximum(quotas, np.minimum(np.floor(share).astype(np.int64), sizes))
    while quotas.sum() > n:
        # The guaranteed ones can overshoot: the cluster most above its share gives back.
        quotas[np.argmax(np.where(quotas > 1, quotas - share, -np.inf))] -= 1
    while quotas.sum() < n:
        quotas[np.argmax(np.where(quotas < sizes, share - quotas, -np.inf))] += 1
    return quotas


def cover_by_clusters(points: np.ndarray, group: np.ndarray, clusters: Clusters, n: int) -> Cover:
    """`n` members of a group that cover it: proportional quotas per global cluster, farthest-first inside each.

    The first member taken from a cluster is the one nearest to the cluster's centre. points: [point, component] of
    the whole space, group: [member] point numbers.
    """
    member_cluster = clusters.assignment[group]
    sizes = np.bincount(member_cluster, minlength=len(clusters.centres))
    if n >= len(group):
        chosen, strategy = np.asarray(group), "all"
    else:
        quotas = proportional_quotas(sizes, n)
        picks = []
        for cluster in np.flatnonzero(quotas):
            members = group[member_cluster == cluster]
            start = int(squared_distances(points[members], points[clusters.centres[cluster]]).argmin())
            order, _ = farthest_first(points[members], int(quotas[cluster]), start)
            picks.append(members[order])
        chosen, strategy = np.concatenate(picks), "proportional_quotas_farthest_first"
    order, _ = farthest_first(points[chosen], len(chosen), most_central(points[chosen]))
    return Cover(chosen[order], strategy, int((sizes > 0).sum()))


def one_per_cluster_then_random(
    points: np.ndarray, group: np.ndarray, clusters: Clusters, n: int, generator: np.random.Generator
) -> np.ndarray:
    """The published sample, kept as the yardstick for ours: one representative per cluster, the rest uniform draws."""
    if n >= len(group):
        return np.asarray(group)
    member_cluster = clusters.assignment[group]
    sizes = np.bincount(member_cluster, minlength=len(clusters.centres))
    chosen: list[int] = []
    for cluster in np.argsort(-sizes, kind="stable")[: min(n, int((sizes > 0).sum()))]:
        members = group[member_cluster == cluster]
        chosen.append(int(members[squared_distances(points[members], points[clusters.centres[cluster]]).argmin()]))
    rest = np.setdiff1d(group, chosen)
    return np.concatenate([np.array(chosen), generator.choice(rest, n - len(chosen), replace=False)])


def nearest_centre(points: np.ndarray, centres: np.ndarray, chunk: int = _CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of each point: (centre number [point], distance [point]). centres: [centre, component]."""
    owner = np.empty(len(points), dtype=np.int64)
    distance = np.empty(len(points))
    norms = np.einsum("cd,cd->c", centres, centres)
    for start in range(0, len(points), chunk):
        block = points[start : start + chunk]
        owner[start : start + len(block)] = (norms - 2 * (block @ centres.T)).argmin(axis=1)
        difference = block - centres[owner[start : start + len(block)]]
        distance[start : start + len(block)] = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return owner, distance


def summarise(values: np.ndarray, sample_size: int, generator: np.random.Generator) -> dict[str, object]:
    """Extremes, mean and quantiles of values [n]; quantiles from a random sample when there are more than that many."""
    values = np.asarray(values, dtype=np.float64)
    is_sampled = 0 < sample_size < len(values)
    sample = generator.choice(values, sample_size, replace=False) if is_sampled else values
    p50, p90, p95, p99 = np.quantile(sample, [0.5, 0.9, 0.95, 0.99])
    return {
        "min": values.min(),
        "mean": values.mean(),
        "std": values.std(),
        "max": values.max(),
        "quantiles_approx": is_sampled,
        "quantiles_sample_size": len(sample),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
    }


def cover_statistics(
    points: np.ndarray,
    group: np.ndarray,
    chosen: np.ndarray,
    radius: float,
    *,
    sample_size: int,
    chunk: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """How well chosen points (numbers) cover a group (numbers): share within `radius`, distances, cluster sizes."""
    owner, distance = nearest_centre(points[group], points[chosen], chunk)
    sizes = np.bincount(owner, minlength=len(chosen))
    occupied = np.flatnonzero(sizes)
    sums = np.bincount(owner, weights=distance, minlength=len(chosen))
    farthest = np.zeros(len(chosen))
    np.maximum.at(farthest, owner, distance)
    within = np.bincount(owner, weights=distance <= radius, minlength=len(chosen))
    largest = [
        {
            "center_global_index": chosen[c],
            "size": sizes[c],
            "mean_dist": sums[c] / sizes[c],
            "max_dist": farthest[c],
            "covered_fraction_in_cluster": within[c] / sizes[c],
        }
        for c in np.argsort(-sizes, kind="stable")[:5]
        if sizes[c]
    ]
    n_covered = int((distance <= radius).sum())
    return {
        "n_points": len(group),
        "n_centers": len(chosen),
        "radius": radius,
        "coverage": {
            "n_covered": n_covered,
            "n_uncovered": len(group) - n_covered,
            "fraction_covered": n_covered / len(group),
        },
        "dist_to_nearest_center": summarise(distance, sample_size, generator),
        "clusters": {
            "n_nonempty": len(occupied),
            "cluster_size": summarise(sizes[occupied], sample_size, generator),
            "cluster_max_dist": summarise(farthest[occupied], sample_size, generator),
            "cluster_mean_dist": summarise(sums[occupied] / sizes[occupied], sample_size, generator),
            "largest": largest,
        },
        "status": "ok",
    }
