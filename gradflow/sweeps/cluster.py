"""Cells measured on a Ray cluster. Needs the extra `ray`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch

from gradflow.engine.environment import describe_environment, library_version
from gradflow.errors import UsageError, first_line
from gradflow.specs.grid import Cell
from gradflow.specs.stack import StackSpec
from gradflow.sweeps.cells import CellResult, measure_cell

# How often Ray tries a cell again whose worker or node was lost.
_RETRIES = 2
# How long a cluster may take to accept a connection.
_KNOCK_SECONDS = 5.0
# A run is a few megabytes, and finished ones are taken away at once.
_OBJECT_STORE_BYTES = 256 * 2**20
# All nodes of a cluster share these; they may well differ in processor and threads.
_SHARED_KEYS = ("gradflow", "torch", "dtype", "matmul_precision")


class Ray:
    """A Ray cluster: one CPU or GPU share per cell; Ray itself retries what a lost node had.

    Args:
        address: of a running cluster. None takes that of `RAY_ADDRESS`, or starts a cluster on
            this machine and ends it afterwards.
    """

    shared = True

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            rule = "--executor ray needs the extra `ray`"
            remedy = "run pip install 'gradflow-bench[ray]'"
            raise UsageError(rule, "none installed", remedy) from None
        self.ray: Any = ray
        self.address = address or os.environ.get("RAY_ADDRESS")
        self._connected = False

    def environment(self, cell: Cell) -> dict[str, Any]:
        """Return what the nodes of a cluster have in common; UsageError where none answers."""
        here = describe_environment(cell.spec, torch.device("cpu"))
        device = self._device(cell).partition(":")[0]
        common = {key: here[key] for key in _SHARED_KEYS} | {"device": device}
        return common | library_version(cell.spec)

    def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
        """Measure on the cluster, timings included; they are marked as contended."""
        try:
            self._connect()
            told = {"contended": True} | _driver()
            waiting = {self._submit(cell, told): cell for cell in cells}
            while waiting:
                done, _ = self.ray.wait(list(waiting), num_returns=1)
                for reference in done:
                    yield self._outcome(reference, waiting.pop(reference))
        finally:
            self._disconnect()

    def _submit(self, cell: Cell, told: dict[str, Any]) -> Any:
        device = self._device(cell)
        resources = {"num_cpus": 1, "num_gpus": 1 if device == "cuda" else 0}
        task = self.ray.remote(max_retries=_RETRIES, **resources)(_on_cluster)
        return task.remote(cell, device, told)

    def _device(self, cell: Cell) -> str:
        """The device of a cell: a GPU share has no number, for its task sees no other GPU."""
        wanted = cell.options.device
        if wanted == "cpu":
            return wanted
        self._connect()
        if self.ray.cluster_resources().get("GPU", 0):
            return "cuda"
        if wanted != "auto":
            self._disconnect()
            rule = "--device cuda needs a GPU in the cluster"
            raise UsageError(rule, wanted, "use --device cpu")
        return "cpu"

    def _connect(self) -> None:
        if self.ray.is_initialized():
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of it
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            _knock(self.address)
            self.ray.init(address=self.address, **quiet, **({} if self.address else own))
        except (OSError, ValueError, RuntimeError) as error:
            rule = "--address is that of a running Ray cluster"
            got = f"{self.address} ({first_line(error)})"
            raise UsageError(rule, got, "start one with `ray start --head`") from None
        self._connected = True

    def _disconnect(self) -> None:
        if self._connected:
            self.ray.shutdown()  # ends what is still at work
            self._connected = False

    def _outcome(self, reference: Any, cell: Cell) -> CellResult:
        try:
            outcome = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            return CellResult(cell, error=f"{type(cause).__name__}: {first_line(cause)}")
        except self.ray.exceptions.RayError as error:
            return CellResult(cell, error=f"Ray lost it: {first_line(error)}")
        assert isinstance(outcome, CellResult)
        return outcome


def _driver() -> dict[str, Any]:
    """The part of the environment that only the driver knows.

    A worker would tell its own command line, which has paths and addresses in it.
    """
    here = describe_environment(StackSpec(), torch.device("cpu"))
    return {key: here[key] for key in ("argv", "git")}


def _knock(address: str | None) -> None:
    """Raise OSError where nothing listens: Ray itself would go on trying for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _on_cluster(cell: Cell, device: str, told: dict[str, Any]) -> CellResult:
    outcome = measure_cell(cell, timing=cell.options.timing, device=device)
    if outcome.run is None:
        return outcome
    environment = outcome.run.environment | told
    return replace(outcome, run=replace(outcome.run, environment=environment))
