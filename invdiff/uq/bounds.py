"""Tests of the mean of bounded losses, valid for any number of cases: the statistics of risk control.

Both give a p-value for "the expected loss is above ``alpha``" from independent losses in [0, 1].

Source: Bates, Angelopoulos, Lei, Malik, Jordan, "Distribution-free, risk-controlling prediction sets", JACM 68
(2021); Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024).
"""

from __future__ import annotations

import math

import numpy as np

from invdiff.errors import InvdiffError


def hoeffding_bentkus(losses: np.ndarray, alpha: float) -> float:
    """Return ``min(exp(-n h(min(m, alpha), alpha)), e P(Bin(n, alpha) <= ceil(n m)))`` with ``m`` the mean loss.

    ``h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))``.
    """
    from scipy.special import rel_entr
    from scipy.stats import binom

    x = _check(losses, alpha)
    n, mean = len(x), float(x.mean())
    low = min(mean, alpha)
    distance = float(rel_entr(low, alpha) + rel_entr(1 - low, 1 - alpha))
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean - 1e-9), n, alpha))
    return min(1.0, math.exp(-n * distance), bentkus)


def waudby_smith_ramdas(losses: np.ndarray, alpha: float, delta: float = 0.1) -> float:
    """Return ``1 / max_i K_i`` for the capital ``K_i = prod_{j <= i} (1 - v_j (L_j - alpha))`` of a gambler.

    The bets ``v_j = min(1, sqrt(2 log(1 / delta) / (n s_{j-1}^2)))`` know earlier losses only; running mean and
    variance start at 1/2 and 1/4. Sharper than `hoeffding_bentkus` where losses vary little.

    Args:
        losses: In the order in which they came, ``(n,)``.
        alpha: Bound for the expected loss.
        delta: Level that the bets are made for.
    """
    x = _check(losses, alpha)
    n = len(x)
    counts = np.arange(2, n + 2)
    mean = (0.5 + x.cumsum()) / counts
    variance = (0.25 + ((x - mean) ** 2).cumsum()) / counts
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (n * before)))
    capital = float(np.log1p(-bets * (x - alpha)).cumsum().max())
    return min(1.0, math.exp(-capital))


def _check(losses: np.ndarray, alpha: float) -> np.ndarray:
    x = np.asarray(losses, float)
    if x.ndim != 1 or not len(x) or not ((x >= 0) & (x <= 1)).all():
        raise InvdiffError("Risk is controlled for losses between 0 and 1, one per case.")
    if not 0 < alpha < 1:
        raise InvdiffError(f"The bound of a risk lies between 0 and 1, got {alpha!r}.")
    return x
