"""Published claims against measurement, and theory against every scheme.

Run with `python benchmarks/theory_claims.py`, about five minutes on one core; writes README.md,
predicted.md and predicted.svg under results/theory/.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from claims import CLAIMS
from claims.claim import Claim, Finding, hold
from claims.page import page, verdict
from claims.picture import picture
from claims.predicted import hold_all, other_specs, specs
from claims.predicted import page as predicted_page
from side_by_side import machine

RESULTS = Path(__file__).parent.parent / "results" / "theory"


def findings(claim: Claim) -> list[Finding]:
    """Every quantity whose scheme this version has."""
    found = [hold(each, claim.seeds) for each in claim.quantities if each.is_there]
    print(f"{verdict(found):>20}  {claim.title}", flush=True)
    return found


def foot() -> Iterator[str]:
    """Where and how it was made."""
    yield machine()
    yield ""
    yield f"Made by `python benchmarks/theory_claims.py`, {datetime.now(UTC):%Y-%m-%d}."


def main() -> None:
    """Measure everything and write the pages."""
    torch.set_num_threads(1)  # the tensors are small
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {claim.title: findings(claim) for claim in CLAIMS}
    text = page(CLAIMS, found, list(foot()))
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    held, others = list(hold_all(specs())), list(hold_all(other_specs()))
    good = sum(each.is_within for each in (*held, *others))
    print(f"{good} of {len(held) + len(others)} predictions within tolerance")
    text = predicted_page(held, others, list(foot()))
    (RESULTS / "predicted.md").write_text(text, encoding="utf-8")
    picture(held).save(RESULTS / "predicted.svg")


if __name__ == "__main__":
    main()
