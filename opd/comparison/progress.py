"""What a person sees while a comparison runs: one bar with the time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from opd.comparison.jobs import Job, run_fraction
from opd.comparison.results import PRIMARY
from opd.comparison.workers import Outcome
from opd.run.folder import read_lines


class ComparisonView:
    """Counts runs done and the shares of those running; `total` runs are planned over all phases."""

    def __init__(self, name: str, total: int, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet)
        self._total, self._done, self._fresh, self._started = total, 0, 0, time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}  {task.fields[left]}"),
                TextColumn("[dim]{task.fields[now]}", markup=True),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(name, total=float(total), count=f"0/{total} runs", left="", now="")
            self._bar.start()

    def tick(self, running: Sequence[Job]) -> None:
        if self._bar is None:
            return
        shares = [run_fraction(job) for job in running]
        now = ", ".join(f"{job.title} {share:.0%}" for job, share in zip(running, shares, strict=True))
        left = self._time_left(sum(shares))
        self._bar.update(self._task, completed=self._done + sum(shares), count=f"{self._done}/{self._total} runs", left=left, now=now)

    def done(self, outcome: Outcome) -> None:
        self._done += 1
        self._fresh += not outcome.reused
        if outcome.reused:
            return
        rows = [row for row in read_lines(outcome.job.folder / "eval.jsonl") if row["decoding"] == PRIMARY and row["avg@k"] is not None]
        ending = f", {rows[-1]['split']} accuracy {rows[-1]['avg@k']:.3f}" if rows and outcome.state == "finished" else ""
        text = f"[{self._done}/{self._total}] {outcome.job.title}: {outcome.state} in {outcome.seconds:.0f} s{ending}"
        if outcome.state != "finished":
            text += f": {outcome.why}"
        left = self._time_left(0.0) if self._bar is None and self._done < self._total else ""
        self.say(text + (f"; {left}" if left else ""))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, running: float) -> str:
        fresh = self._fresh + running
        if fresh < 0.2:
            return ""
        seconds = (time.monotonic() - self._started) / fresh * (self._total - self._done - running)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
