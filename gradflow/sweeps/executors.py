"""Which executor a name stands for."""

from __future__ import annotations

from gradflow.errors import UsageError
from gradflow.specs.fields import check_choice
from gradflow.specs.grid import EXECUTORS
from gradflow.sweeps.cells import Executor, Serial


def make_executor(
    name: str, cells: int, workers: int | None = None, address: str | None = None
) -> Executor:
    """The executor of that name; `auto` takes processes where there is more than one cell.

    Raises:
        UsageError: the name is unknown, an option belongs to another executor, or the extra is
            missing.
    """
    check_choice("--executor", name, EXECUTORS)
    if address is not None and name != "ray":
        rule = "--address is that of a Ray cluster"
        raise UsageError(rule, f"--executor {name}", "add --executor ray")
    if workers is not None and name in ("serial", "ray"):
        rule = "--workers counts worker processes"
        raise UsageError(rule, f"--executor {name}", "leave it out, or use --executor processes")
    if name == "ray":
        from gradflow.sweeps.cluster import Ray

        return Ray(address)
    if name == "processes" or (name == "auto" and cells > 1):
        from gradflow.sweeps.processes import Processes

        return Processes(workers)
    return Serial()
