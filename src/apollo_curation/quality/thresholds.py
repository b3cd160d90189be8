"""What is worse than it may be: two measurements held against each other."""

from __future__ import annotations

from apollo_curation.quality.history import Breach, Measurement
from apollo_curation.settings import Quality

# On a GPU the log-probabilities of one prompt differ between batches of other shapes (bf16 sums in another
# order): by some 1e-2 nats a token, less in the mean. Of a loss near zero that is more than any percentage.
MIN_INCREASE_NATS = 0.01


def find_breaches(now: Measurement, before: Measurement | None, quality: Quality) -> list[Breach]:
    """before: None where nothing is known yet; then only what cannot be right in itself is a breach."""
    breaches = []
    for category, loss in now.losses.items():
        old = before.losses.get(category) if before else None
        if old is not None and old.examples_hash != loss.examples_hash:
            old = None
        num_refused = old.num_unmeasured if old else 0
        if loss.num_unmeasured > num_refused:
            sentence = (
                f"{category}: {loss.num_unmeasured} of {loss.num_examples} held-out examples could not be "
                f"measured: {loss.problems[0]}"
            )
            values = (float(num_refused), float(loss.num_unmeasured), float(num_refused))
            breaches.append(Breach("unmeasured", category, *values, sentence))
        if loss.num_tokens and loss.loss is None:
            sentence = f"{category}: the held-out loss is not a number"
            known = old.loss if old else None
            breaches.append(Breach("not_a_number", category, known, None, 0.0, sentence))
        if old is None or old.loss is None or loss.loss is None:
            continue
        limit = old.loss + max(old.loss * quality.max_loss_increase, MIN_INCREASE_NATS)
        if loss.loss > limit:
            sentence = (
                f"{category}: held-out loss {old.loss:.4f} -> {loss.loss:.4f} nats a token "
                f"({_percent(loss.loss, old.loss)}), at most {limit:.4f} is allowed"
            )
            breaches.append(Breach("loss", category, old.loss, loss.loss, limit, sentence))
    return breaches + _lost_canaries(now, before, quality)


def find_lost(now: Measurement, before: Measurement) -> list[str]:
    """Names of canaries that passed before and fail now. One that nobody could judge is not lost."""
    passed = {(one.name, one.canary_hash) for one in before.canaries if one.passed}
    return [one.name for one in now.canaries if one.passed is False and (one.name, one.canary_hash) in passed]


def find_drift(now: Measurement, history: list[Measurement]) -> dict[str, float]:
    """Of each category, its loss relative to that of the oldest good measurement of the same examples, less
    1: 0.03 is three percent more."""
    drift = {}
    for category, loss in now.losses.items():
        for old in (one.losses.get(category) for one in history if one.is_good):
            if old is not None and old.examples_hash == loss.examples_hash and old.loss and loss.loss:
                drift[category] = loss.loss / old.loss - 1
                break
    return drift


def _lost_canaries(now: Measurement, before: Measurement | None, quality: Quality) -> list[Breach]:
    lost = find_lost(now, before) if before else []
    if before is None or len(lost) <= quality.max_canaries_lost:
        return []
    names = ", ".join(lost)
    sentence = (
        f"{len(lost)} of the canaries that passed before fail now, at most {quality.max_canaries_lost} may: "
        f"{names}"
    )
    values = (float(before.num_passed), float(now.num_passed), float(quality.max_canaries_lost))
    return [Breach("canaries", names, *values, sentence)]


def _percent(now: float, before: float) -> str:
    return f"{now / before - 1:+.1%}" if before else "from zero"
