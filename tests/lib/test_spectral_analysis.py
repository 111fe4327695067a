"""Axes, clusters and covers on points one can see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import spectral_analysis as spectral
from lib.cli import rng


def random_points(n, width, label="points"):
    return rng(0, label).standard_normal((n, width)).astype(np.float32)


def test_axes_of_a_line_are_the_line():
    points = np.outer(np.arange(5.0), [3.0, 4.0])
    axes = spectral.principal_axes(points, 2, rng(0))
    np.testing.assert_allclose(axes.axes[0], [0.6, 0.8], atol=1e-12)
    np.testing.assert_allclose(axes.explained_variance_ratio, [1.0, 0.0], atol=1e-12)


def test_randomised_axes_agree_with_exact_ones(monkeypatch):
    points = random_points(400, 30) * np.geomspace(10, 0.1, 30, dtype=np.float32)
    exact = spectral.principal_axes(points, 4, rng(0))
    monkeypatch.setattr(spectral, "EXACT_PCA_FLOPS", 0)
    randomised = spectral.principal_axes(points, 4, rng(1))
    assert exact.is_exact and not randomised.is_exact
    np.testing.assert_allclose(randomised.axes, exact.axes, atol=1e-3)
    np.testing.assert_allclose(randomised.explained_variance_ratio, exact.explained_variance_ratio, atol=1e-4)


def test_points_end_up_on_the_unit_sphere_and_equal_points_in_its_centre():
    points = random_points(20, 5)
    sphere = spectral.to_unit_sphere(points, spectral.principal_axes(points, 3, rng(0)))
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), 1, atol=1e-5)
    same = np.ones((6, 4))
    axes = spectral.principal_axes(same, 3, rng(0))
    assert not spectral.to_unit_sphere(same, axes).any()
    assert not axes.explained_variance_ratio.any()


def test_more_components_than_there_are_give_what_there_is():
    assert spectral.principal_axes(random_points(3, 10), 32, rng(0)).axes.shape == (3, 10)


def test_k_centre_radius_is_that_of_the_assignment():
    points = random_points(200, 3)
    clusters = spectral.k_centre(points, 8, rng(0))
    all_distances = np.linalg.norm(points[:, None] - points[clusters.centres][None], axis=2)
    np.testing.assert_allclose(clusters.distances, all_distances.min(axis=1), atol=1e-5)
    np.testing.assert_array_equal(clusters.assignment, all_distances.argmin(axis=1))
    assert len(set(clusters.centres.tolist())) == 8


def test_duplicates_never_become_centres_of_their_own():
    points = np.repeat(np.eye(3), 4, axis=0)
    clusters = spectral.k_centre(points, 10, rng(0))
    assert len(clusters.centres) == 3
    assert clusters.distances.max() == 0


def test_more_clusters_than_points():
    assert len(spectral.k_centre(random_points(4, 2), 99, rng(0)).centres) == 4


def test_farthest_first_visits_the_ends_of_a_line_first():
    points = np.arange(5.0)[:, None]
    order, radius = spectral.farthest_first(points, 3, start=0)
    assert order.tolist() == [0, 4, 2]
    assert radius == 1.0


def test_farthest_first_stops_when_everything_is_near_enough():
    points = np.arange(9.0)[:, None]
    order, radius = spectral.farthest_first(points, 9, start=0, stop_radius=2.0)
    assert order.tolist() == [0, 8, 4] and radius == 2.0
    longer, _ = spectral.farthest_first(points, 9, start=0, stop_radius=2.0, n_before_stop=5)
    assert len(longer) == 5


def test_farthest_first_takes_every_duplicate_once():
    order, radius = spectral.farthest_first(np.zeros((4, 2)), 4, start=2)
    assert sorted(order.tolist()) == [0, 1, 2, 3] and radius == 0


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 200))
@settings(max_examples=200)
def test_quotas_are_proportional_and_feasible(sizes, n):
    sizes = np.array(sizes)
    n = min(n, int(sizes.sum()))
    quotas = spectral.proportional_quotas(sizes, n)
    assert quotas.sum() == n
    assert (quotas >= 0).all() and (quotas <= sizes).all()
    occupied = sizes > 0
    if n >= occupied.sum():
        assert (quotas[occupied] >= 1).all()
        share = sizes * n / max(sizes.sum(), 1)
        assert (quotas >= np.minimum(np.floor(share), sizes) - occupied.sum()).all()
        assert (quotas <= np.ceil(share) + 1).all()


def test_quotas_by_hand():
    assert spectral.proportional_quotas(np.array([60, 30, 10]), 10).tolist() == [6, 3, 1]
    assert spectral.proportional_quotas(np.array([5, 0, 3]), 1).tolist() == [1, 0, 0]
    # The small cluster is guaranteed one, the largest gives it up.
    assert spectral.proportional_quotas(np.array([96, 2, 2]), 10).tolist() == [8, 1, 1]


def clustered_points(n_per_cluster=100):
    """Three tight clusters and a wide one on the unit circle."""
    stream = rng(0, "clustered")
    angles = [
        stream.normal(centre, width, n_per_cluster) for centre, width in ((0, 0.02), (1, 0.02), (2, 0.02), (4.2, 0.6))
    ]
    angles = np.concatenate(angles)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_cover_spreads_wider_than_one_per_cluster_and_the_rest_at_random():
    points = clustered_points()
    group = np.arange(len(points))
    clusters = spectral.k_centre(points, 4, rng(0))

    def radius(chosen):
        return spectral.nearest_centre(points, points[chosen])[1].max()

    ours = radius(spectral.cover_by_clusters(points, group, clusters, 24).chosen)
    others = [radius(spectral.one_per_cluster_then_random(points, group, clusters, 24, rng(s))) for s in range(20)]
    assert ours < np.mean(others)
    assert ours < 1.5 * min(others)


def test_each_prefix_of_a_cover_is_spread_out():
    points = clustered_points()
    clusters = spectral.k_centre(points, 4, rng(0))
    chosen = spectral.cover_by_clusters(points, np.arange(len(points)), clusters, 40).chosen
    # The first four picks already see all four clusters.
    assert len(set(clusters.assignment[chosen[:4]].tolist())) == 4
    assert len(set(chosen.tolist())) == 40


def test_cover_of_a_small_group_is_the_group():
    points = clustered_points()
    clusters = spectral.k_centre(points, 4, rng(0))
    cover = spectral.cover_by_clusters(points, np.array([3, 150, 399]), clusters, 5)
    assert cover.strategy == "all"
    assert sorted(cover.chosen.tolist()) == [3, 150, 399]


def test_cover_statistics_by_hand():
    points = np.array([[0.0, 0], [1, 0], [3, 0], [10, 0]])
    stats = spectral.cover_statistics(
        points, np.arange(4), np.array([0, 2]), 1.0, sample_size=0, chunk=2, generator=rng(0)
    )
    # Distances to the nearest of 0 and 3: 0, 1, 0, 7.
    assert stats["coverage"] == {"n_covered": 3, "n_uncovered": 1, "fraction_covered": 0.75}
    assert stats["dist_to_nearest_center"]["mean"] == 2.0
    assert stats["dist_to_nearest_center"]["max"] == 7.0
    assert stats["clusters"]["largest"][0]["size"] == 2
    assert stats["clusters"]["largest"][0]["center_global_index"] == 0


def test_quantiles_of_many_values_come_from_a_sample():
    summary = spectral.summarise(np.arange(1000), 100, rng(0))
    assert summary["quantiles_approx"] is True and summary["quantiles_sample_size"] == 100
    assert summary["max"] == 999 and summary["mean"] == pytest.approx(499.5)
