"""The interface by which long work tells how far it has come. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

# (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]

_MOST_CALLS = 1000


def counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    """Return what a phase calls at each of its `total` steps, to tell `progress` of them."""
    done = 0
    # A bar has no more than so many places, and each call takes as long as a small layer.
    stride = max(1, total // _MOST_CALLS)

    def tick() -> None:
        nonlocal done
        done += 1
        if done % stride == 0 or done == total:
            progress(phase, min(done, total), total)

    return tick
