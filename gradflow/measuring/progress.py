"""The interface by which long work tells how far it has come. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of the phase, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]

# A progress bar has no more places than this, and each call takes as long as a small layer.
_MOST_CALLS = 1000


def counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    """Return what is called at each of the `total` steps of a phase, to tell at most 1,000."""
    done = 0
    stride = max(1, total // _MOST_CALLS)

    def tick() -> None:
        nonlocal done
        done += 1
        if done % stride == 0 or done == total:
            progress(phase, min(done, total), total)

    return tick
