"""The statistics of the ACPO paper's tables: paired comparison of two models, and agreement of scores with ratings."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def _pair(first: Sequence[float], second: Sequence[float], names: tuple[str, str], least: int):
    """Both as float64 vectors of one length. Anything with `__array__` will do: lists, numpy, CPU tensors."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        found = f"{names[0]} {first.shape} and {names[1]} {second.shape}"
        raise ValueError(f"expected two lists of the same length, found shapes {found}")
    if len(first) < least:
        raise ValueError(f"expected at least {least} values, found {len(first)}")
    for name, values in zip(names, (first, second)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    return first, second


def paired_comparison(
    base: Sequence[float], finetuned: Sequence[float], lower_is_better: bool = False
) -> dict[str, float | int]:
    """Two-sided paired t-test of scores of the same prompts by two models (ACPO, tables 2 to 4).

    Args:
        base: (n,) scores of the base model, any range. finetuned: (n,) scores of the fine-tuned one, in the same
            order. n >= 1.
    Returns:
        `n`; `base_mean`, `finetuned_mean`; `mean_difference` (fine-tuned minus base, whichever is better);
        `std_difference` (of the n differences, with n - 1); `t` and `p` (scipy.stats.ttest_rel); `win_rate`, the
        share of prompts on which the fine-tuned model is strictly better (higher, or lower if `lower_is_better`);
        `tie_rate`, the share of equal scores, which count for neither side. When all the differences are equal there
        is no t-test: `t` and `p` are nan, and of a single prompt `std_difference` too.
    Raises:
        ValueError: for different lengths, no values, or a value that is not finite.
    """
    base, finetuned = _pair(base, finetuned, ("base", "finetuned"), least=1)
    difference = finetuned - base
    # Equal differences leave rounding errors of 1e-16 that would make t astronomically large.
    rounding = np.finfo(np.float64).eps * 4 * max(np.abs(base).max(), np.abs(finetuned).max())
    if np.ptp(difference) <= rounding:
        std, t, p = 0.0 if len(difference) > 1 else float("nan"), float("nan"), float("nan")
    else:
        std = difference.std(ddof=1)
        t, p = stats.ttest_rel(finetuned, base)
    return {
        "n": len(base),
        "base_mean": float(base.mean()),
        "finetuned_mean": float(finetuned.mean()),
        "mean_difference": float(difference.mean()),
        "std_difference": float(std),
        "t": float(t),
        "p": float(p),
        "win_rate": float((difference < 0 if lower_is_better else difference > 0).mean()),
        "tie_rate": float((difference == 0).mean()),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of tests (Holm 1979): adjusted p-values, in the given order.

    Rejecting wherever the adjusted value is below alpha keeps the chance of any false rejection below alpha, whatever
    the tests have to do with each other. The k-th smallest of m values, k from 0, is multiplied by m - k, capped at 1,
    and raised to the largest before it. nan, a test that could not be made, stays nan and does not count in m.

    Raises:
        ValueError: for a value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise ValueError(f"expected p-values in [0, 1], found {p[tested].min():g} to {p[tested].max():g}")
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(order), 0, -1), 1))
    return adjusted.tolist()


def win_rate_interval(wins: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of a win rate, in [0, 1]: `wins` of `n` prompts; ties are not wins.

    Raises:
        ValueError: unless 0 <= wins <= n and n >= 1.
    """
    if not 0 <= wins <= n or n < 1:
        raise ValueError(f"expected wins from 0 to n, n at least 1, found {wins} of {n}")
    interval = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def correlation(prediction: Sequence[float], target: Sequence[float]) -> dict[str, float]:
    """Agreement of predicted scores with mean opinion scores, as image quality assessment reports it.

    Args:
        prediction: (n,) predicted scores. target: (n,) ratings. n >= 2. PLCC and RMSE are of the values as they are,
            without the logistic fit that some papers put before them.
    Returns:
        `srcc` (Spearman), `plcc` (Pearson), `krcc` (Kendall tau-b), each in [-1, 1] and nan when one side is
        constant; `rmse` in the units of `target`.
    Raises:
        ValueError: for different lengths, fewer than two values, or a value that is not finite.
    """
    prediction, target = _pair(prediction, target, ("prediction", "target"), least=2)
    result = {"srcc": float("nan"), "plcc": float("nan"), "krcc": float("nan")}
    if np.ptp(prediction) > 0 and np.ptp(target) > 0:
        tests = {"srcc": stats.spearmanr, "plcc": stats.pearsonr, "krcc": stats.kendalltau}
        result = {name: float(test(prediction, target).statistic) for name, test in tests.items()}
    return result | {"rmse": float(np.sqrt(np.mean((prediction - target) ** 2)))}


def bootstrap_weights(n: int, draws: int = 200, seed: int = 0) -> np.ndarray:
    """How often each of `n` values counts in `draws` draws of n with replacement (Efron 1979): (1 + draws, n) shares.

    Each row sums to 1. Row 0 is the sample itself, 1 / n each, so that a statistic which is a weighted mean has its value
    and its draws in one product. Two models measured with the same weights have their values drawn in pairs. A draw of one
    value alone, which only a few values have, is drawn again: there are no pairs in it.

    Raises ValueError for n < 2.
    """
    if n < 2:
        raise ValueError(f"expected at least 2 values to draw from, found {n}")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    while len(alone := np.flatnonzero(counts.max(1) == n)):
        counts[alone] = rng.multinomial(n, np.full(n, 1 / n), size=len(alone))
    return np.concatenate([np.ones((1, n)), counts]) / n


def bootstrap_change(base: Sequence[float], finetuned: Sequence[float]) -> dict[str, float]:
    """How far a value of a whole set changed, in shares of the base's, with a 95 % interval from paired bootstrap draws.

    Args:
        base, finetuned: (1 + draws,) the value, then its draws, of the same `bootstrap_weights`.
    Returns:
        `change`, (finetuned - base) / base; `change_low` and `change_high`, the percentiles 2.5 and 97.5 of the draws'
        differences over the base's value, moved so that their mean is `change`: a distance between two sets grows when
        images repeat, in both models alike. All are nan where the base's value is not above 0, as an unbiased estimate of
        a distance of 0 may be.
    Raises:
        ValueError: for different lengths, fewer than two values, or a value that is not finite.
    """
    base, finetuned = _pair(base, finetuned, ("base", "finetuned"), least=2)
    if base[0] <= 0:
        return dict.fromkeys(("change", "change_low", "change_high"), float("nan"))
    change = (finetuned - base) / base[0]
    low, high = change[0] - change[1:].mean() + np.percentile(change[1:], [2.5, 97.5])
    return {"change": float(change[0]), "change_low": float(low), "change_high": float(high)}
