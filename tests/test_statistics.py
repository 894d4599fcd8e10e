import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from acpo_utils.statistics import correlation, holm, paired_comparison, win_rate_interval


def scores_with(base_mean, finetuned_mean, std, n=500):
    """Paired scores whose means and whose differences' standard deviation are exactly these."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(n)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    base = rng.standard_normal(n)
    base = base - base.mean() + base_mean
    return base, base + (finetuned_mean - base_mean) + std * noise


# The paper's table 2 (500 prompts). Its means are rounded to four decimals, so t is exact only up to sqrt(n) / std *
# 1e-4 (two means, half a unit each), and by the rounding of std.
@pytest.mark.parametrize(
    "metric, base_mean, finetuned_mean, std, t",
    [
        ("IPCE", 2.8831, 2.9166, 0.2176, 3.4424),
        ("Pickscore", 20.5847, 21.1083, 0.9112, 12.8494),
        ("CLIPscore", 0.2840, 0.2983, 0.0287, 11.1089),
        ("Twostream", 74.9430, 76.1658, 11.0330, 2.4783),
    ],
)
def test_reproduces_t_of_the_papers_table_2(metric, base_mean, finetuned_mean, std, t):
    result = paired_comparison(*scores_with(base_mean, finetuned_mean, std))
    assert result["n"] == 500
    assert result["base_mean"] == pytest.approx(base_mean) and result["finetuned_mean"] == pytest.approx(
        finetuned_mean
    )
    assert result["std_difference"] == pytest.approx(std)
    rounding = math.sqrt(500) * 1e-4 / std + t * 0.5e-4 / std
    assert rounding < 0.12 * t
    assert result["t"] == pytest.approx(t, abs=rounding)
    assert result["p"] == pytest.approx(2 * stats.t.sf(result["t"], 499))
    assert result["p"] < 0.014


def test_paired_comparison_against_the_definition():
    rng = np.random.default_rng(1)
    base = rng.normal(size=37)
    finetuned = base + rng.normal(0.2, 1, size=37)
    finetuned[:3] = base[:3]
    result = paired_comparison(base, finetuned)
    difference = finetuned - base
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(37))
    assert result["mean_difference"] == pytest.approx(difference.mean())
    assert result["t"] == pytest.approx(t)
    assert result["win_rate"] == np.count_nonzero(finetuned > base) / 37
    assert result["tie_rate"] == 3 / 37
    swapped = paired_comparison(finetuned, base)
    assert swapped["t"] == pytest.approx(-t) and swapped["p"] == pytest.approx(result["p"])
    assert swapped["win_rate"] == pytest.approx(1 - result["win_rate"] - 3 / 37)
    assert all(type(value) in (int, float) for value in result.values())  # json.dump takes them


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_equal_differences_have_no_t_and_no_warning(shift):
    base = np.array([0.1, 0.2, 0.3, 0.7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_comparison(base, base + shift)
    assert math.isnan(result["t"]) and math.isnan(result["p"])
    assert result["std_difference"] == 0
    assert result["mean_difference"] == pytest.approx(shift)
    assert result["win_rate"] == float(shift > 0) and result["tie_rate"] == float(shift == 0)


def test_small_but_real_differences_are_tested():
    base = np.full(50, 0.5)
    finetuned = base + np.linspace(-1e-9, 2e-9, 50)
    assert paired_comparison(base, finetuned)["t"] == pytest.approx(stats.ttest_rel(finetuned, base).statistic)


def test_correlation_against_scipy_and_a_known_ranking():
    rng = np.random.default_rng(2)
    target = rng.uniform(size=80)
    prediction = np.exp(3 * target)  # monotone: ranks agree, values do not
    result = correlation(torch.from_numpy(prediction), target.tolist())
    assert result["srcc"] == pytest.approx(1) and result["krcc"] == pytest.approx(1)
    assert result["plcc"] == pytest.approx(np.corrcoef(prediction, target)[0, 1]) and result["plcc"] < 0.99
    assert result["rmse"] == pytest.approx(math.sqrt(((prediction - target) ** 2).mean()))
    noisy = prediction + rng.normal(0, 5, size=80)
    result = correlation(noisy, target)
    assert result["srcc"] == pytest.approx(stats.spearmanr(noisy, target).statistic)
    assert result["krcc"] == pytest.approx(stats.kendalltau(noisy, target).statistic)


def test_constant_prediction_has_no_correlation_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = correlation([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert all(math.isnan(result[name]) for name in ("srcc", "plcc", "krcc"))
    assert result["rmse"] == pytest.approx(math.sqrt(2 / 3))


@pytest.mark.parametrize("function", [paired_comparison, correlation])
@pytest.mark.parametrize(
    "first, second, message",
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "same length"),
        ([], [], "at least"),
        ([1.0, float("nan")], [1.0, 2.0], "1 values that are not finite"),
        ([1.0, 2.0], [float("inf"), 2.0], "not finite"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "same length"),
    ],
)
def test_bad_input(function, first, second, message):
    with pytest.raises(ValueError, match=message):
        function(first, second)


def test_one_pair_is_compared_without_a_test_and_correlates_with_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_comparison([1.0], [2.5])
    assert (result["n"], result["mean_difference"], result["win_rate"]) == (1, 1.5, 1.0)
    assert all(math.isnan(result[name]) for name in ("std_difference", "t", "p"))
    with pytest.raises(ValueError, match="at least 2"):
        correlation([1.0], [2.0])


# The paper's table 3, n from its t = difference / (std / sqrt(n)): 200 prompts, and 66 of PartiPrompts.
@pytest.mark.parametrize(
    "row, difference, std, t, win_rate, n",
    [
        ("DiffusionDB PickScore", 0.1736, 0.6876, 3.5713, 61.5, 200),
        ("DiffusionDB CLIPScore", 0.0110, 0.0252, 6.1726, 68.5, 200),
        ("DrawBench PickScore", 0.4763, 0.8514, 7.9104, 70.5, 200),
        ("DrawBench CLIPScore", 0.0180, 0.0334, 7.6321, 68.0, 200),
        ("DrawBench IPCE", 0.0364, 0.1991, 2.5837, 51.5, 200),
        ("PartiPrompts PickScore", 0.9131, 0.9939, 7.4635, 83.3, 66),
        ("PartiPrompts CLIPScore", 0.0344, 0.0376, 7.4262, 84.9, 66),
        ("PartiPrompts IPCE", 0.0819, 0.2513, 2.6468, 63.6, 66),
    ],
)
def test_reproduces_t_of_the_papers_table_3(row, difference, std, t, win_rate, n):
    result = paired_comparison(*scores_with(0.0, difference, std, n))
    rounding = math.sqrt(n) / std * 0.5e-4 + t * 0.5e-4 / std
    assert result["t"] == pytest.approx(t, abs=rounding) and result["p"] < 0.012
    wins = win_rate / 100 * n
    assert wins == pytest.approx(round(wins), abs=0.04), "the win rate is a number of whole prompts"


def test_one_row_of_the_papers_table_3_does_not_follow_from_its_own_numbers():
    """DiffusionDB IPCE: difference 0.0075, std 0.1162, t printed as 1.7107; with the table's n = 200 it is 0.91."""
    result = paired_comparison(*scores_with(2.6718, 2.6718 + 0.0075, 0.1162, 200))
    assert result["t"] == pytest.approx(0.913, abs=0.01) and result["p"] > 0.3


def test_holm_against_a_case_worked_out_by_hand():
    # Sorted: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04, raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []
    # A test that could not be made stays nan and is none of the family.
    adjusted = holm([0.01, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)
    with pytest.raises(ValueError, match=r"expected p-values in \[0, 1\], found 0.1 to 1.5"):
        holm([0.1, 1.5])


def test_holm_is_monotone_and_between_the_raw_and_the_bonferroni_value():
    p = np.random.default_rng(3).uniform(size=40) ** 3
    adjusted = np.array(holm(p))
    order = np.argsort(p)
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted >= p).all() and (adjusted <= np.minimum(40 * p, 1) + 1e-12).all()
    assert adjusted[order[0]] == pytest.approx(min(40 * p.min(), 1))


def test_win_rate_interval_against_wilsons_formula():
    wins, n, z = 61, 100, stats.norm.ppf(0.975)
    centre = (wins + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(wins * (n - wins) / n + z**2 / 4)
    assert win_rate_interval(wins, n) == pytest.approx((centre - half, centre + half))
    assert win_rate_interval(0, 10)[0] == 0 and win_rate_interval(10, 10)[1] == pytest.approx(1)
    narrow = win_rate_interval(61, 100, confidence=0.5)
    assert narrow[0] > win_rate_interval(61, 100)[0] and narrow[1] < win_rate_interval(61, 100)[1]
    with pytest.raises(ValueError, match="found 5 of 4"):
        win_rate_interval(5, 4)
