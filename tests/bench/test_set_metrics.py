"""Distances between sets of images, and intervals that hold what they should: against formulas and simulations."""

import numpy as np
import pytest

from agentsd.bench.set_metrics import ReferenceSet, clip_scores, frechet_distance, kernel_distance
from agentsd.utils.intervals import bootstrap_mean, bootstrap_median, jackknife


def test_clip_score_is_the_cosine_of_each_image_and_its_text():
    """Whatever their lengths, and never below 0."""
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 20, 3))
    angles = [np.arccos(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(images, texts, strict=True)]
    expected = [max(0.0, 100 * np.cos(angle)) for angle in angles]
    assert 0 in expected
    assert clip_scores(images, texts) == pytest.approx(expected)


def test_frechet_distance_of_normal_distributions():
    """Known in closed form: |μ|² + Σ(σ₁ − σ₂)² for independent features."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200_000, 3))
    second = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 3.0] + [0.5, 0.0, 0.0]
    assert frechet_distance(first, second) == pytest.approx(0.25 + 1 + 4, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased():
    """The mean over many small pairs of sets of one distribution is zero, not above it."""
    rng = np.random.default_rng(0)
    values = [kernel_distance(rng.normal(size=(10, 4)), rng.normal(size=(10, 4))) for _ in range(2000)]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error
    assert kernel_distance(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 2) > 1


def test_kernel_distance_of_pairs_is_unbiased():
    """Also where each image is nearly the same as its counterpart, as with a method that changes little."""
    rng = np.random.default_rng(0)
    values, biased = [], []
    for _ in range(500):
        first = rng.normal(size=(10, 4))
        second = first + 0.01 * rng.normal(size=first.shape)
        values.append(kernel_distance(first, second, paired=True))
        biased.append(kernel_distance(first, second))
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
    assert np.mean(biased) < -1
    first, second = rng.normal(size=(2, 8, 3))
    alone = [(row @ other / 3 + 1) ** 3 for i, row in enumerate(first) for j, other in enumerate(second) if i != j]
    within = [
        [(rows[i] @ rows[j] / 3 + 1) ** 3 for i in range(8) for j in range(8) if i != j] for rows in (first, second)
    ]
    wanted = np.mean(within[0]) + np.mean(within[1]) - 2 * np.mean(alone)
    assert kernel_distance(first, second, paired=True) == pytest.approx(wanted)


def test_the_interval_of_a_mean_covers_it():
    """In nineteen of twenty repetitions, give or take."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = bootstrap_mean(rng.normal(loc=3, size=50))
        covered += low <= 3 <= high
    assert 180 <= covered <= 198


@pytest.mark.parametrize(("average", "fewest"), [(bootstrap_median, 5), (bootstrap_mean, 10)])
def test_an_interval_is_given_only_where_it_holds_what_it_should(average, fewest):
    """Of three values it would miss the true median in a quarter of all repetitions; of one it would be a point."""
    rng = np.random.default_rng(0)
    assert all(len(average(rng.normal(size=count))) == 1 for count in range(1, fewest))
    covered = sum(low <= 0 <= high for _, low, high in (average(rng.normal(size=fewest)) for _ in range(300)))
    assert covered >= 0.88 * 300


def test_a_distance_between_small_sets_has_no_interval():
    rng = np.random.default_rng(0)
    lengths = [len(jackknife(kernel_distance, *rng.normal(size=(2, count, 4)))) for count in (9, 10)]
    assert lengths == [1, 3]


def test_the_interval_of_a_distance_covers_no_difference():
    """Two sets of one distribution must be able to come out as not distinguishable, and two others as different."""
    rng = np.random.default_rng(0)
    covered, told_apart = 0, 0
    for _ in range(30):
        first, second = rng.normal(size=(2, 60, 4))
        _, low, high = jackknife(kernel_distance, first, second)
        covered += low <= 0 <= high
        told_apart += jackknife(kernel_distance, first, second + 0.7)[1] > 0
    assert covered >= 25
    assert told_apart >= 25


@pytest.mark.parametrize("metric", ["frechet_distance", "kernel_distance"])
def test_the_interval_of_a_distance_to_a_reference_is_as_wide_as_it_should_be(metric):
    """Neither narrower than what other images would give, nor so wide that it says nothing."""
    rng = np.random.default_rng(0)
    distance = getattr(ReferenceSet.of(rng.normal(size=(400, 8))), metric)
    intervals = [jackknife(distance, rng.normal(size=(64, 8)) + 0.3) for _ in range(60)]
    wanted = 3.92 * np.std([value for value, _, _ in intervals])
    assert 0.8 * wanted < np.mean([high - low for _, low, high in intervals]) < 1.5 * wanted


def test_a_change_is_told_where_two_intervals_overlap():
    """The same images changed a little for the worse: their distances' own intervals hold each other's values."""
    rng = np.random.default_rng(0)
    reference = ReferenceSet.of(rng.normal(size=(400, 8)))
    baseline = rng.normal(size=(64, 8))
    own = baseline + 0.15
    before, after = (jackknife(reference.frechet_distance, rows) for rows in (baseline, own))
    assert before[2] > after[0]
    _, low, _ = jackknife(lambda a, b: reference.frechet_distance(a) - reference.frechet_distance(b), own, baseline)
    assert low > 0


def test_the_floor_is_what_small_sets_of_the_reference_score():
    rng = np.random.default_rng(0)
    reference = ReferenceSet.of(rng.normal(size=(1000, 8)))
    fresh = [reference.frechet_distance(rng.normal(size=(32, 8))) for _ in range(100)]
    value, low, high = reference.floor(32)
    assert value == pytest.approx(np.mean(fresh), rel=0.1)
    assert [low, high] == pytest.approx(np.percentile(fresh, (2.5, 97.5)), rel=0.25)
    assert reference.floor(501) == []


def test_the_floor_compares_with_all_other_images_though_few_rows_are_kept():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 8))
    kept, whole = ReferenceSet.of(features, rows=100), ReferenceSet.of(features)
    chosen = np.random.default_rng(1).permutation(100)[:20]
    others = np.delete(features, chosen, axis=0)
    left = kept._without(features[chosen])
    np.testing.assert_allclose(left.mean, others.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(left.covariance, np.cov(others, rowvar=False), atol=1e-12)
    assert kept.floor(20)[0] == pytest.approx(whole.floor(20)[0], rel=0.1)
