"""A progress bar with the time left on a terminal; plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Screen:
    """Implements `couplings_experiments.experiment.Progress` on a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, steps: float) -> None:
        """So many more steps are coming."""
        self._total += steps
        self._bar.update(self._task, total=self._total)

    def advance(self, steps: float, what: str) -> None:
        """So many steps of ``what`` are done."""
        self._bar.update(self._task, advance=steps, description=what)

    def say(self, line: str) -> None:
        """One line that stays on the screen."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
