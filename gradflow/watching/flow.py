"""`watch`: gradient flow of any model while it trains, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.text import Text
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradflow.errors import UsageError
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.showing.terminal.one_run import run_view
from gradflow.showing.terminal.printing import print_view
from gradflow.specs.run_options import RunOptions
from gradflow.torch_internals import UpdateAfter, is_compiled, scale_tensor
from gradflow.watching import device_rows
from gradflow.watching.discovery import (
    WatchedLayer,
    candidates,
    find_layers,
    outermost_blocks,
    repeats,
)
from gradflow.watching.distributed import ranks_of, sharded_again, unwrapped
from gradflow.watching.layer_hooks import installed
from gradflow.watching.parameters import ParameterWatch
from gradflow.watching.recorder import Recorder, WatchedPass
from gradflow.watching.step_totals import StepNumbers, rank_totals, step_numbers, to_host
from gradflow.watching.watched_run import Watched, verdict_step, watched_run, write_events

if TYPE_CHECKING:
    import pandas as pd


class Flow:
    """The steps that `watch` has seen so far, as a run.

    A step ends when an optimizer steps, when `end_step` is called, or with the `with` block; the
    backward passes before that count as one batch. Steps are numbered by how many came before.
    """

    def __init__(self, watched: Watched, every: int, options: RunOptions, scaler: Any) -> None:
        self._watched, self._every, self._options = watched, every, options
        self._scaler, self._ranks = scaler, watched.ranks
        self._recorder = Recorder(watched.layers)
        self._recorder.prepare(p.device for p in watched.model.parameters())
        self._parameters = ParameterWatch(watched.owned, watched.ranks)
        self._measured: list[StepNumbers] = []
        self._run: Run | None = None
        self._step = 0
        self._started, self._begin = datetime.now(UTC), perf_counter()

    @property
    def run(self) -> Run:
        """All measured steps; the verdict is the first step's, or of the first that loses values.

        Raises:
            MeasurementError: no layer has run.
        """
        if self._run is None:
            environment: dict[str, Any] = {
                "start_utc": self._started.isoformat(timespec="seconds"),
                "duration_s": perf_counter() - self._begin,
            }
            if self._ranks:
                environment["ranks"] = self._ranks.count
            self._run = watched_run(self._watched, self._measured, self._options, environment)
        return self._run

    @property
    def watched_layers(self) -> list[WatchedLayer]:
        """The modules that are watched; a model that has not run may still show others."""
        known = self._watched
        kept = range(known.listed) if known.kept is None else known.kept
        return [known.layers[i] for i in sorted(kept)]

    @property
    def layers(self) -> pd.DataFrame:
        """`layers.csv`: one row per step and layer."""
        return self.run.layers

    @property
    def params(self) -> pd.DataFrame:
        """`params.csv`: one row per step and parameter tensor."""
        return self.run.params

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all that share the model."""
        return self._ranks is None or self._ranks.is_first

    def table(self, console: Console | None = None) -> None:
        """Print the table, the profile and the verdict of one step, as `gradflow run` does.

        Where ranks share the model, the first prints.
        """
        if not self.is_first:
            return
        run = self.run
        step = verdict_step(run.spec, run.layer_records, run.options)
        rows = [row for row in run.layer_records if row.step == step]
        heading = Text(f"step {step} of {len(self._measured)} watched", style="dim")
        shown = replace(run, layer_records=rows)
        notes = (Text(line, style="yellow") for line in run.warnings)
        print_view(Group(heading, run_view(shown), *notes), console or Console())

    def save(self, out: Path | str = "results") -> Path | None:
        """Store the run in a new folder in `out`; return the folder.

        Where ranks share the model, all have the same numbers, and the first stores them; the
        others do nothing and return None.

        Raises:
            UsageError: `out` cannot be written to.
            MeasurementError: the disk is full, or failed; nothing half-written remains.
        """
        return store.save(self.run, out).path if self.is_first else None

    def to_tensorboard(self, folder: Path | str) -> Path | None:
        """Write every column of `layers` as scalars `column/unit` by step; return the folder.

        Where ranks share the model, the first writes; the others do nothing and return None.

        Raises:
            UsageError: the extra `tensorboard` is not installed, or nothing can be written there.
            MeasurementError: no layer has run.
        """
        return write_events(self.run.layer_records, folder) if self.is_first else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside: an evaluation that calls layers and not the model."""
        self._recorder.muted = True
        try:
            yield
        finally:
            self._recorder.muted = False

    def end_step(self) -> None:
        """Say that a training step is over, where no torch optimizer says it.

        The replay of a CUDA graph that has the optimizer's step in it is such a step.
        """
        recorder = self._recorder
        if device_rows.is_capturing():  # and nothing of it has run
            recorder.close()
            self._parameters.reset()
        elif recorder.ran or recorder.captured:
            self._end(self._settle(recorder.close()))

    def _end(self, passes: list[WatchedPass]) -> None:
        """Keep the numbers of a step; a captured graph that was not replayed is no step."""
        recorder = self._recorder
        numbers: list[StepNumbers] = []
        if recorder.active and (passes or recorder.captured or self._ranks):
            numbers = self._read(passes)
            self._measured += numbers
            self._run = None
        recorder.release()
        self._parameters.release()
        if numbers or passes or not recorder.active or not recorder.captured:
            self._step += 1
        recorder.active = self._parameters.active = self._step % self._every == 0

    def _settle(self, passes: list[WatchedPass]) -> list[WatchedPass]:
        """Return passes with the calls of layers alone; the first passes tell which modules are."""
        if self._watched.kept is not None or not self._recorder.active:
            return passes
        recorder = self._recorder
        all_passes = [*passes, *recorder.captured]
        again = {i for one in all_passes for i in one.called_again()}
        mine = outermost_blocks(self._watched.layers, again), bool(all_passes)
        votes = self._ranks.gather(mine) if self._ranks else [mine]
        if any(ran for _, ran in votes):
            kept = {i for again, _ in votes for i in again} or range(self._watched.listed)
            self._watched = replace(self._watched, kept=kept)
            self._parameters.keep(self._watched.owned)
            recorder.kept = kept
        recorder.captured = [one for one in recorder.captured if one.only(recorder.kept)]
        return [one for one in passes if one.only(recorder.kept)]

    def _read(self, passes: Sequence[WatchedPass]) -> list[StepNumbers]:
        """Read the numbers of the step, if a layer has run; waits for the device and for ranks."""
        captured = self._recorder.captured
        pools = list(self._recorder.pools.values())
        pools += self._recorder.graph_pools.values() if captured else ()
        own = self._parameters.read()
        rows, others = to_host(pools, [*own, *_scale_of(self._scaler)])
        scale = float(others[-1][0]) if len(others) > len(own) else 1.0
        params = self._parameters.whole(self._parameters.in_order(others[: len(own)]))
        replayed = (one for one in captured if one.was_replayed(rows))
        mine = rank_totals([*passes, *replayed], rows)
        ranks = self._ranks.gather(mine) if self._ranks else [mine]
        return step_numbers(self._step, ranks, params, scale)

    @contextmanager
    def _attached(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Put all hooks, and take them off at the end."""
        model, parameters = self._watched.model, self._parameters
        steps = parameters.before_step, self._stepped
        with ExitStack() as stack:
            compiled = stack.enter_context(installed(model, self._recorder))
            stack.callback(compiled.forget_graphs)
            for handle in parameters.hooks():
                stack.callback(handle.remove)
            stack.enter_context(_hooked_steps(model.parameters(), optimizer, *steps))
            stack.enter_context(_hooked_scaler(self._scaler, self.end_step))
            stack.callback(self._let_go)
            yield

    def _stepped(self) -> None:
        self._parameters.after_step()
        self.end_step()

    def _let_go(self) -> None:
        self._recorder.active = self._parameters.active = False
        self._recorder.close()


@contextmanager
def watch(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    every: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: Any = None,
    options: RunOptions | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[Flow]:
    """Watch the gradient flow of a model while it runs; the model is left as it was.

    For each call of a layer the output y and its gradient g = dL/dy are measured, and the input x
    where it is not the output of another layer. `gain` is |dL/dx| / |dL/dy|, and
    `identity_share` the squared cosine of the two: with y = x + f(x) it is the part of the
    gradient's energy that the shortcut hands on, as far as f's own part is orthogonal to it.
    Both take all uses of x together, and are empty where x and y differ in shape.

    Under DDP and FSDP2 every rank watches, and all get the numbers of the whole batch; a measured
    step costs an exchange of some 20 numbers a layer. The loss of the whole batch is the mean of
    the ranks' losses, as averaged gradients have it: the gradient of an activation is that of its
    rank's loss, divided by the number of ranks; `headroom_log2` and `underflow_fraction` look at it
    undivided, as its format holds it. Cosines are averaged over the ranks; those between samples do
    not reach from one rank to another.

    Args:
        model: any module; a compiled one is compiled again, on entry and on exit.
        layers: patterns of module names, `blocks.*` for example; None finds the repeated blocks.
        every: measures the first of so many steps.
        optimizer: the one whose steps count; None is any that holds a parameter of the model.
        scaler: the `GradScaler` in use; gradients are divided by its scale.
        options: thresholds of the verdict.
        group: the processes of a DDP model whose inner module is watched; the wrapped model tells
            them itself.

    Yields:
        The flow, which has the results.

    Raises:
        UsageError: a pattern fits no module, `every` is no whole number from 1 up, or parameters
            are spread over processes in another way than by DDP or FSDP2.
    """
    if not isinstance(every, int) or every < 1:
        raise UsageError("every= is a whole number of at least 1", every, "use every=1")
    if not isinstance(model, nn.Module):
        raise UsageError("watch takes an nn.Module", type(model).__name__, "pass the model")
    sharded_again(model)
    ranks, inner = ranks_of(model, group), unwrapped(model)
    if any(map(is_compiled, model.modules())):
        torch.compiler.reset()  # graphs that exist do not see hooks that come later
    patterns = [layers] if isinstance(layers, str) else layers
    listed = find_layers(inner, patterns)
    watched = Watched(inner, listed, len(listed), ranks, range(len(listed)))
    if patterns is None and not repeats(inner):
        watched = replace(watched, layers=[*listed, *candidates(inner, listed)], kept=None)
    # One state of one model, measured as its number format delivers it.
    options = replace(options or RunOptions(), seeds=1, timing=False, raw_range=True)
    flow = Flow(watched, every, options, scaler)
    with flow._attached(optimizer):
        try:
            yield flow
        except BaseException:
            # The step that broke is the one that is looked for; other ranks do not come to it.
            if ranks is None:
                with suppress(Exception):
                    flow.end_step()
            raise
        flow.end_step()


@contextmanager
def _hooked_steps(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None,
    before: Callable[[], None],
    after: Callable[[], None],
) -> Iterator[None]:
    """Call `before` and `after` around each step of one optimizer.

    Where it is None, the steps of every optimizer that holds one of the parameters count.
    """
    ids = {id(p) for p in parameters}

    def calling(action: Callable[[], None]) -> Any:
        def hook(stepping: torch.optim.Optimizer, *_: Any) -> None:
            held = (p for group in stepping.param_groups for p in group["params"])
            if stepping is optimizer or (optimizer is None and any(id(p) in ids for p in held)):
                action()

        return hook

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(calling(before)).remove)
        stack.callback(register_optimizer_step_post_hook(calling(after)).remove)
        yield


@contextmanager
def _hooked_scaler(scaler: Any, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` before a scaler changes its scale: it leaves out steps with infinities."""
    if scaler is None:
        yield
        return
    scaler.update = UpdateAfter(scaler, scaler.update, end)
    try:
        yield
    finally:
        del scaler.update


def _scale_of(scaler: Any) -> list[Tensor]:
    """The factor in the gradients as a tensor on its device; empty without a scaler."""
    if scaler is None or not scaler.is_enabled():
        return []
    scale = scale_tensor(scaler)
    return [torch.ones(1) * scaler.get_scale() if scale is None else scale.reshape(1)]
