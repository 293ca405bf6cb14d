"""A clock that tests set."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.engine.timing import CpuClock


class FakeClock:
    """A clock for tests: every mark comes a scripted time after the one before.

    Args:
        steps: seconds between marks, repeated for ever.
    """

    def __init__(self, steps: Sequence[float]) -> None:
        self._steps, self._count, self._now = list(steps), 0, 0.0

    def mark(self) -> float:
        """The scripted time, moved on by one step."""
        self._now += self._steps[self._count % len(self._steps)]
        self._count += 1
        return self._now

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Differences of neighbours."""
        return CpuClock().seconds(marks)
