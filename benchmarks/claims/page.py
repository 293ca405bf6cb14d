"""The page of all claims, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from claims.claim import Claim, Finding
from gradflow.text import escape_markdown, markdown_table

Findings = Mapping[str, Sequence[Finding]]

HEADINGS = ["quantity", "expected", "measured", "agrees", "control"]
INTRODUCTION = """\
Each claim with its setting, what the paper says, and what gradflow measures at initialisation:
mean ± standard deviation over the seeds. It agrees where the mean lies within the stated tolerance.
The control is another network (another scheme, norm, variance), one seed, which must not agree;
"!" marks one that does. Where the paper states a law and no number, the number is that of the law
in this setting. |g| is the norm of dL/dy at the output y of a unit, g_0 that at the input, g_D that
at the output of the stack. [Predicted against measured](predicted.md) holds theory against every
scheme.
"""


def page(claims: Sequence[Claim], found: Findings, foot: Sequence[str]) -> str:
    """The whole page.

    Args:
        claims: in the order of the page.
        found: the findings of each by its title; none for quantities whose scheme is missing.
        foot: lines at the end.
    """
    lines = ["# Published claims, measured", "", INTRODUCTION, *_overview(claims, found)]
    for claim in claims:
        lines += ["", *_section(claim, found[claim.title])]
    return "\n".join([*lines, "", *foot, ""])


def _overview(claims: Sequence[Claim], found: Findings) -> Iterator[str]:
    rows = ([claim.title, verdict(found[claim.title])] for claim in claims)
    return markdown_table(["claim", "agrees"], rows, left=2)


def verdict(findings: Sequence[Finding]) -> str:
    """`yes`, `no`, `3 of 5`, or that there is nothing to measure."""
    if not findings:
        return "not in this version"
    good = sum(finding.agrees for finding in findings)
    if good in {0, len(findings)}:
        return "yes" if good else "no"
    return f"{good} of {len(findings)}"


def _section(claim: Claim, findings: Sequence[Finding]) -> Iterator[str]:
    yield f"## {escape_markdown(claim.title)}"
    yield ""
    source, setting = escape_markdown(claim.source), escape_markdown(claim.setting)
    yield f"{source}. Setting: {setting}; {claim.seeds} seeds."
    yield ""
    yield f"The paper: {escape_markdown(claim.says)}"
    yield ""
    missing = {q.options["scheme"] for q in claim.quantities if not q.is_there}
    if missing:
        yield f"Not in this version: {', '.join(sorted(missing))}."
    if findings:
        yield from markdown_table(HEADINGS, map(_row, findings))
    if claim.note:
        yield ""
        yield escape_markdown(claim.note)


def _row(finding: Finding) -> list[str]:
    agrees = "yes" if finding.agrees else "no"
    control = f"{finding.control:.4g}" + ("" if finding.tells_apart else " !")
    measured = f"{finding.mean:.4g} ± {finding.spread:.2g}"
    return [finding.quantity.name, finding.quantity.expected.text, measured, agrees, control]
