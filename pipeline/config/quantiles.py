"""The names of quantiles, and the metrics of a quantile regression."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

MEDIAN = 0.5


def quantile_name(quantile: float) -> str:
    """Return the suffix of the columns of a quantile, in percent: `q10` for 0.1, `q2_5` for 0.025."""
    percent = (Decimal(str(quantile)) * 100).normalize()
    return f"q{percent:f}".replace(".", "_")


def quantile_metrics(quantiles: Sequence[float], median_metrics: Sequence[str]) -> list[str]:
    """Return the metrics of a quantile regression; definitions: `pipeline.training.quantile_metrics`.

    Parameters
    ----------
    median_metrics: metrics of a regression, which the median has, if it is one of the quantiles.
    """
    interval = ["coverage", "interval_width"] if len(quantiles) > 1 else []
    levels = [f"coverage_{quantile_name(quantile)}" for quantile in quantiles]
    return ["loss", "pinball", *interval, *levels, *(median_metrics if MEDIAN in quantiles else [])]
