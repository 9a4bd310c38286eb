"""What a person sees: a live progress bar on a terminal, one plain line an evaluation elsewhere, and the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from pipeline.learn.words import no_better_words, number, short_words, table_lines
from pipeline.record.standing import Standing

ERASE = "\x1b[2K"
"""Clears the line that the cursor is in."""
PHASE_S = 10.0
"""Off a terminal, seconds between two lines on what takes long before training, such as filling the cache."""
LINE_S = 1.0
"""On a terminal, seconds between two lines for evaluations within an epoch; the bar shows the latest in between."""


class Progress:
    """Shows events on standard error, see `pipeline.context.Tell`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: _Bar | None = None
        self._live = sys.stderr.isatty()
        self._last_line = 0.0
        self._last_phase = time.monotonic()
        self._in_phase = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._in_phase:
            print(ERASE, end="", file=sys.stderr, flush=True)

    def show(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "warning":
            self._line(f"warning: {event['text']}")
        elif self._quiet:
            return
        elif kind == "phase":
            self._phase(f"{event['text']} ...")
        elif kind == "message":
            self._line(str(event["text"]))
        elif kind == "run":
            self._line(f"run {event['run']} ({event['text']}) in {event['url']}")
        elif kind == "start":
            verb = "training" if event["step"] == 0 else f"resuming after step {event['step']},"
            self._line(f"{verb} to step {event['last_step']} on {event['workers']}")
            if self._live:
                self._bar = self._bar or _Bar(event["last_step"])
        elif kind == "steps" and self._bar is not None:
            self._bar.steps(event)
        elif kind == "evaluation":
            self._evaluation(event)

    def _phase(self, text: str) -> None:
        if self._live:  # until the next line, which takes its place
            print(f"{ERASE}{text}", end="\r", file=sys.stderr, flush=True)
            self._in_phase = True
        elif time.monotonic() - self._last_phase > PHASE_S:
            self._last_phase = time.monotonic()
            self._line(text)

    def _evaluation(self, event: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.evaluation(event)
        now = time.monotonic()
        if self._live and not event["ends_epoch"] and now - self._last_line < LINE_S:
            return
        self._last_line = now
        self._line(evaluation_line(event))

    def _line(self, text: str) -> None:
        if self._in_phase:
            print(ERASE, end="", file=sys.stderr)
            self._in_phase = False
        if self._bar is not None:
            self._bar.line(text)
        else:
            print(text, file=sys.stderr, flush=True)


class _Bar:
    """rich's progress bar; imported only where there is a terminal to draw on."""

    def __init__(self, last_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = self._progress.add_task("", total=last_step, text="")
        self._loss = self._metrics = ""
        self._progress.start()

    def steps(self, event: Mapping[str, Any]) -> None:
        self._loss = f"loss {event['loss']:.4f}  {event['samples_per_s']:,.0f} samples/s"
        self._progress.update(self._task, completed=event["step"], text=f"{self._loss}  {self._metrics}")

    def evaluation(self, event: Mapping[str, Any]) -> None:
        self._metrics = short_words(event["metrics"], event["best_metric"])
        self._progress.update(self._task, completed=event["step"], text=f"{self._loss}  {self._metrics}")

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()


def evaluation_line(event: Mapping[str, Any]) -> str:
    """`epoch 3  step 1440  val loss 0.1432  accuracy 0.9571  best`"""
    best = "  best" if event["is_best"] else ""
    words = short_words(event["metrics"], event["best_metric"])
    return f"epoch {event['epoch']:<3d} step {event['step']:<6d} {words}{best}"


def result_lines(standing: Standing) -> list[str]:
    """How a run stands, for people: with all metrics of its best step beside what no learning at all would give."""
    found = standing.to_json()
    lines = [f"{found['run']}: {found['status']} at step {found['step']}, epoch {found['epoch']}"]
    if found.get("error"):
        lines.append(f"  error     {found['error']['message']}")
    best, metrics = found.get("best"), found.get("metrics") or {}
    if best:
        lines.append(f"  best      {best['metric']} {number(best['value'])} at step {best['step']}")
    chosen = best["metrics"] if best else metrics
    split = (best["metric"] if best else next(iter(metrics), "")).partition("/")[0]
    lines += [f"            {line}" for line in table_lines(chosen, split)]
    if words := no_better_words(chosen, split):
        lines.append(f"  warning   {words}")
    if metrics:
        lines.append(f"  latest    {short_words(metrics, best['metric'] if best else '')}")
    if found["attempts"] > 1:
        lines.append(f"  attempts  {found['attempts']}")
    lines.append(f"  in        {found['url']}")
    return lines


def runs_lines(url: str, standings: Iterable[Standing]) -> list[str]:
    """One line a run, in columns."""
    rows = [("RUN", "STATUS", "STEP", "BEST", "LATEST")]
    for standing in standings:
        found = standing.to_json()
        best = found.get("best")
        best_words = f"{best['metric']} {number(best['value'])} @{best['step']}" if best else ""
        step = f"{found['step']}/{found['total_steps']}" if found.get("total_steps") else str(found["step"])
        rows.append((found["run"], found["status"], step, best_words, short_words(found.get("metrics") or {})))
    if len(rows) == 1:
        return [f"no runs in {url}"]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
