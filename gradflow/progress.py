"""How long work tells how far it is. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

# (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]

MOST_CALLS = 1000


def counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    """Tells it of a phase, when it is called once for each of `total` steps."""
    done = 0
    # A bar has no more than so many places, and each call takes as long as a small layer.
    stride = max(1, total // MOST_CALLS)

    def tick() -> None:
        nonlocal done
        done += 1
        if done % stride == 0 or done == total:
            progress(phase, min(done, total), total)

    return tick
