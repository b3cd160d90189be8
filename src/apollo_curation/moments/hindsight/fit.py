"""From a difference in likelihood to a probability: a logistic curve, how well it separates, and how sure
that is."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

NUM_RESAMPLED = 300  # bootstrap: samples drawn again with replacement, of each class as many as there are
MAX_STEPS = 50  # of Newton's method
INTERVAL = (2.5, 97.5)  # percentiles
MIN_AUC = 0.75  # the lower end of the interval from which a model can tell

Floats = Any  # np.ndarray of float64


class Curve(msgspec.Struct, frozen=True):
    """p = 1 / (1 + exp(-(slope x + offset))), fitted to num_positive of num_samples.

    auc: of a positive and another sample drawn at random, how often the positive has the larger x; auc_low,
    auc_high: 95 % interval by bootstrap; drawn: (slope, offset) of each resample, for the uncertainty of p.
    """

    slope: float
    offset: float
    auc: float
    auc_low: float
    auc_high: float
    num_samples: int
    num_positive: int
    drawn: list[tuple[float, float]] = []

    @property
    def can_tell(self) -> bool:
        return self.auc_low >= MIN_AUC

    def probability(self, x: float, prior: float = 0.5) -> tuple[float, float, float]:
        """Of a positive at `x`, and its 95 % interval over the resamples. prior: the probability before `x`
        is known, in the place of the samples' own share of positives."""
        base = self.num_positive / self.num_samples
        shift = _logit(prior) - _logit(base)
        of_draws = [_logistic(slope * x + offset + shift) for slope, offset in self.drawn]
        low, high = np.percentile(of_draws, INTERVAL)
        return _logistic(self.slope * x + self.offset + shift), float(low), float(high)


def fit(values: list[float], is_positive: list[bool], seed: int = 0) -> Curve:
    """The curve of `values`, of which `is_positive` says what each is. There must be two of each kind."""
    x, y = np.asarray(values, float), np.asarray(is_positive, bool)
    assert min(y.sum(), (~y).sum()) >= 2, "two of each kind"
    rng = np.random.default_rng(seed)
    slope, offset = _platt(x, y)
    positive, other = np.flatnonzero(y), np.flatnonzero(~y)
    drawn, aucs = [], []
    for _ in range(NUM_RESAMPLED):
        some = np.concatenate([rng.choice(positive, len(positive)), rng.choice(other, len(other))])
        drawn.append(_platt(x[some], y[some]))
        aucs.append(auc(x[some], y[some]))
    low, high = np.percentile(aucs, INTERVAL)
    area = auc(x, y)
    return Curve(slope, offset, area, float(low), float(high), len(x), int(y.sum()), drawn)


def auc(x: Floats, y: Floats) -> float:
    """The area under the curve of true over false positives; ties count half. By ranks (Mann and Whitney)."""
    _, place, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; of equal values their mean
    num_yes, num_no = int(y.sum()), int((~y).sum())
    return float((ranks[y].sum() - num_yes * (num_yes + 1) / 2) / (num_yes * num_no))


def _platt(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and offset by maximum likelihood, with Platt's targets, which keep them finite where the classes
    can be separated (Lin, Lin and Weng 2007, A note on Platt's probabilistic outputs)."""
    num_yes, num_no = float(y.sum()), float((~y).sum())
    target = np.where(y, (num_yes + 1) / (num_yes + 2), 1 / (num_no + 2))
    spread = float(x.std()) or 1.0
    z = np.stack([(x - x.mean()) / spread, np.ones_like(x)])  # (2, num_samples)
    weights = np.zeros(2)
    for _ in range(MAX_STEPS):
        p = 1 / (1 + np.exp(-np.clip(weights @ z, -30, 30)))
        gradient = z @ (p - target)
        curvature = (z * np.maximum(p * (1 - p), 1e-9)) @ z.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 4.0 / float(np.abs(step).max() or 1.0))  # Newton overshoots where p is near 0 or 1
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    slope = float(weights[0]) / spread
    return slope, float(weights[1]) - slope * float(x.mean())


def _logistic(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def _logit(p: float) -> float:
    p = min(max(p, 1e-6), 1 - 1e-6)
    return float(np.log(p / (1 - p)))
