"""What a person sees: a live progress bar on a terminal, one plain line an evaluation (of very many, some) there and
elsewhere, and the result."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from pipeline.errors import NotFiniteError
from pipeline.events import (
    EarlyStopped,
    EvaluationLogged,
    Event,
    HangReported,
    Message,
    PhaseStarted,
    RunOpened,
    StepsLogged,
    TrainingStarted,
    WarningMessage,
)
from pipeline.learn.words import (
    NUMBER_WIDTH,
    divergence_advice,
    no_better_words,
    number,
    rate,
    short_fields,
    short_words,
    table_lines,
)
from pipeline.record.standing import Listed, Standing
from pipeline.redaction import printable

ERASE = "\x1b[2K"
"""Clears the line that the cursor is in."""
PHASE_S = 10.0
"""Off a terminal, seconds between two lines on what takes long before training, such as filling the cache."""
LONGEST_VALUE = 24
"""Characters of a job field's value in the list of runs."""
DAMAGE_LINES = 5
"""Of what is damaged in a run's directory."""
LINE_S = 1.0
"""On a terminal, seconds between two lines for evaluations within an epoch; the bar shows the latest in between."""
MOST_LINES = 100
"""A run of more evaluations than this shows a line for every second, fifth, tenth, ... of them."""
SILENT_S = 600.0
"""Then too, there is a line for the first evaluation after so many seconds without one."""


class Progress:
    """Shows events on standard error, see `pipeline.events`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: _Bar | None = None
        self._live = sys.stderr.isatty()
        self._stride = 0
        """Every so many-th evaluation has a line; 0 until training starts."""
        self._last_step = 0
        self._last_line = 0.0
        self._phase_shown = 0
        self._held_back: EvaluationLogged | None = None
        """The latest evaluation, where it has no line."""
        self._best_held_back: int | None = None
        """Step of the best evaluation, where it is later than the last line."""
        self._last_phase = time.monotonic()
        self._in_phase = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._release()
        if self._bar is not None:
            self._bar.close()
        if self._in_phase:
            print(ERASE, end="", file=sys.stderr, flush=True)

    def show(self, event: Event) -> None:
        match event:
            case WarningMessage():
                self._line(f"warning: {event.text}")
            case HangReported():  # the last event of this process: nothing will close the bar
                self.__exit__(None, None, None)
                self._bar = None
                self._line(f"error: {event.text}")
            case _ if self._quiet:
                return
            case StepsLogged():
                if self._bar is not None:
                    self._bar.steps(event)
            case PhaseStarted():
                self._phase(f"{event.text} ...")
            case Message():
                self._line(event.text)
            case RunOpened():
                self._line(f"run {event.run} ({'new run' if event.is_new else 'found'}) in {event.url}")
            case TrainingStarted():
                verb = "training" if event.step == 0 else f"resuming after step {event.step},"
                self._line(f"{verb} to step {event.last_step} on {event.workers}")
                self._start(event)
            case EvaluationLogged():
                self._evaluation(event)
            case EarlyStopped():
                self._release()
                words = early_stop_words(event.evaluations_since_best, event.metric)
                self._line(f"early stop at step {event.step} of {event.last_step}: {words}")

    def _phase(self, text: str) -> None:
        if self._live:  # until the next line, which takes its place
            print(f"{ERASE}{text}", end="\r", file=sys.stderr, flush=True)
            self._in_phase = True
        elif time.monotonic() - self._last_phase > PHASE_S:
            self._last_phase = time.monotonic()
            self._line(text)

    def _start(self, event: TrainingStarted) -> None:
        is_first, evaluations = self._stride == 0, event.num_evaluations
        self._last_step, self._stride = event.last_step, _stride(evaluations)
        if self._stride > 1 and is_first:
            self._line(f"of {evaluations:,} evaluations 1 in {self._stride} is shown here; the metric log has them all")
        if self._bar is not None:
            self._bar.move(event.step)
        elif self._live:
            self._bar = _Bar(event.step, event.last_step)

    def _evaluation(self, event: EvaluationLogged) -> None:
        if self._bar is not None:
            self._bar.evaluation(event)
        if event.is_best:
            self._best_held_back = event.step
        self._held_back = event
        if self._has_line(event):
            self._release()

    def _has_line(self, event: EvaluationLogged) -> bool:
        """Whether an evaluation has a line of its own: the first and the last of an attempt and the
        first of a phase always."""
        now = time.monotonic()
        if event.step in (0, self._last_step) or event.phase != self._phase_shown:
            return True
        if self._live and not event.ends_epoch and now - self._last_line < LINE_S:
            return False
        return event.number % max(1, self._stride) == 0 or now - self._last_line > SILENT_S

    def _release(self) -> None:
        """Write the line of the latest evaluation, where it was held back."""
        event, best = self._held_back, self._best_held_back
        if event is None:
            return
        self._held_back = self._best_held_back = None
        self._last_line, self._phase_shown = time.monotonic(), event.phase
        note = f"  best at step {best}" if best is not None and best != event.step and not event.no_gain else ""
        self._line(evaluation_line(event) + note)

    def _line(self, text: str) -> None:
        text = printable(text)
        if self._in_phase:
            print(ERASE, end="", file=sys.stderr)
            self._in_phase = False
        if self._bar is not None:
            self._bar.line(text)
        else:
            print(text, file=sys.stderr, flush=True)


def _stride(evaluations: int) -> int:
    """The first of 1, 2, 5, 10, 20, ... that leaves `MOST_LINES` at most."""
    stride = 1
    for factor in itertools.cycle((2, 2.5, 2)):
        if evaluations <= stride * MOST_LINES:
            break
        stride = int(stride * factor)
    return stride


class _Bar:
    """rich's progress bar; imported only where there is a terminal to draw on.

    Step, bar and time left are always there. Behind them stand as many of the loss, the metrics and the rate as fit
    into the terminal's width, each in a field of a fixed width.
    """

    BAR = 12
    TIME = 8

    def __init__(self, step: int, last_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._progress = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=self.BAR),
            TimeRemainingColumn(table_column=Column(width=self.TIME, no_wrap=True)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="crop")),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._left = len("step ") + 2 * len(str(last_step)) + len("/ ") + self.BAR + 1 + self.TIME + 1
        self._task = self._progress.add_task("", completed=step, total=last_step, text="")
        self._loss: list[str] = []
        self._rate: list[str] = []
        self._metrics: list[str] = []
        self._progress.start()

    def move(self, step: int) -> None:
        """Begin at another step: the time until then says nothing of the time left."""
        self._progress.reset(self._task, completed=step)

    def steps(self, event: StepsLogged) -> None:
        self._loss = [_field("loss", event.loss)]
        self._rate = [f"{rate(event.samples_per_s):>5s} samples/s"]
        self._update(event.step)

    def evaluation(self, event: EvaluationLogged) -> None:
        self._metrics = [_field(*name_and_value) for name_and_value in short_fields(event.metrics, event.best_metric)]
        self._update(event.step)

    def _update(self, step: int) -> None:
        width = self._progress.console.width - self._left
        text = fitting([*self._loss, *self._metrics[:1], *self._rate, *self._metrics[1:]], width)
        self._progress.update(self._task, completed=step, text=text)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _field(name: str, value: float) -> str:
    return f"{name} {number(value):<{NUMBER_WIDTH}s}"


def fitting(fields: Sequence[str], width: int) -> str:
    """The first fields, as many as a width takes, two spaces apart."""
    text = ""
    for next_field in fields:
        longer = f"{text}  {next_field}" if text else next_field
        if len(longer) > width:
            break
        text = longer
    return text[: max(width, 0)]


def evaluation_line(event: EvaluationLogged) -> str:
    """`epoch 3  step 1440  val loss 0.1432  accuracy 0.9571  best`"""
    best = "  no better than before training" if event.no_gain else "  best" if event.is_best else ""
    metrics_text = short_words(event.metrics, event.best_metric)
    return f"epoch {event.epoch:<3d} step {event.step:<6d} {metrics_text}{best}"


def early_stop_words(evaluations: int, metric: str) -> str:
    """`5 evaluations without a better val/loss`"""
    return f"{evaluations} evaluation{'s' if evaluations != 1 else ''} without a better {metric}"


def result_lines(standing: Standing) -> list[str]:
    """How a run stands, for people: with all metrics of its best step beside what no learning at all would give."""
    tree = standing.to_json()
    lines = [_headline(standing)]
    if tree.get("error"):
        lines.append(f"  error     {tree['error']['message']}")
    if standing.status != "finished":
        lines += [f"  {word:<9s} {text}" for word, text in _going_on(standing)]
    best, metrics = tree.get("best"), tree.get("metrics") or {}
    if best:
        lines.append(f"  best      {best['metric']} {number(best['value'])} at step {best['step']}")
    chosen = best["metrics"] if best else metrics if standing.status == "finished" else {}  # else the untrained ones
    split = (best["metric"] if best else next(iter(metrics), "")).partition("/")[0]
    if standing.stopped_early and best and standing.evaluations_since_best is not None:
        words = early_stop_words(standing.evaluations_since_best, best["metric"])
        lines.insert(1, f"  stopped   early, of {standing.total_steps} steps: {words}")
    lines += [f"            {line}" for line in table_lines(chosen, split)]
    warnings = [standing.best.no_gain if standing.best else "", no_better_words(chosen, split)]
    lines += [f"  warning   {words}" for words in warnings if words]
    if metrics:
        lines.append(f"  latest    {short_words(metrics, best['metric'] if best else '')}")
    if standing.skipped_updates:
        lines.append(f"  skipped   {standing.skipped_updates:,} updates, whose gradients were too large for fp16")
    if tree["attempts"] > 1:
        lines.append(f"  attempts  {tree['attempts']}")
    lines += [f"  damaged   {text}" for text in standing.damaged[:DAMAGE_LINES]]
    if len(standing.damaged) > DAMAGE_LINES:
        lines.append(f"            and {len(standing.damaged) - DAMAGE_LINES} more: see --json")
    lines.append(f"  in        {tree['url']}")
    return lines


def _headline(standing: Standing) -> str:
    """`mnist: running at step 3200 of 4800, seen 3 s ago`"""
    prefix = f"{standing.run}: {standing.status} at step {standing.reached}"
    of = f" of {standing.total_steps}" if standing.total_steps else ""
    if standing.status == "running":
        return f"{prefix}{of}, seen {ago(standing.seen_s)}"
    if standing.status == "stalled":
        return f"{prefix}{of}, no sign of life for {ago(standing.seen_s).removesuffix(' ago')}"
    return f"{prefix}, epoch {standing.epoch}" if standing.status == "finished" else f"{prefix}{of}, epoch {standing.epoch}"


def _going_on(standing: Standing) -> list[tuple[str, str]]:
    """Of a run that has not finished: where it is, what of it is safe, and what can be done."""
    entries = []
    if standing.where:
        world_size, device = standing.where.get("world_size"), standing.where.get("device")
        workers = f"{world_size} workers, " if world_size not in (None, 1) else ""
        verb = "runs on" if standing.status == "running" else "ran on"
        entries.append((verb, f"{standing.where.get('host')} ({workers}{device}), since {_utc(standing.where['since'])}"))
    if standing.reached > standing.step:
        saved = f"step {standing.step}, epoch {standing.epoch}" if standing.step else "nothing yet"
        entries.append(("saved", saved))
    if standing.error is not None and standing.error.get("type") == NotFiniteError.__name__:
        best, step = standing.best, standing.step or None
        no_gain = best.no_gain if best is not None else ""
        entries.append(("next", "the same command would end there again:"))
        entries.append(("", divergence_advice(standing.run, best.step if best is not None else None, step, no_gain)))
    elif standing.status != "running":
        start = f"goes on from step {standing.step}" if standing.step else "begins anew"
        entries.append(("next", f"the same command {start}"))
    return entries


def ago(seconds: float | None) -> str:
    """`42 s ago`, `12 min ago`, `5 h ago`, `3 days ago`."""
    if seconds is None:
        return ""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{int(seconds / length)} {unit} ago"
    return f"{int(seconds / 86400)} days ago"


def _utc(moment: str) -> str:
    """`2026-11-20 13:05 UTC`"""
    return f"{moment[:16].replace('T', ' ')} UTC"


def runs_lines(url: str, runs: Sequence[Listed], width: int | None = None) -> list[str]:
    """One line a run, in columns.

    Parameters
    ----------
    width: of the terminal, into which the lines are made to fit as far as that goes: first the columns go that `show`
        has too, then what differs is cut. None: whole lines.
    """
    labels = _labels({name for run in runs for name in run.differs})
    rows = [_HEADER]
    for run in runs:
        status = run.standing
        best = f"{status.best.metric} {number(status.best.value)}" if status.best is not None else ""
        step = f"{status.reached}/{status.total_steps}" if status.total_steps else str(status.reached)
        differs = " ".join(f"{labels[name]}={_brief(value)}" for name, value in run.differs.items())
        latest = short_words(status.to_json()["metrics"])
        rows.append((status.run, status.status, ago(status.seen_s).removesuffix(" ago"), step, best, differs, latest))
    if len(rows) == 1:
        return [f"no runs in {url}"]
    columns = [column for column, title in enumerate(_HEADER) if title != "DIFFERS" or labels]
    for title in ("LATEST", "SEEN", "STEP"):
        if width is not None and max(map(len, _table(rows, columns))) > width:
            columns.remove(_HEADER.index(title))
    lines = _table(rows, columns)
    return lines if width is None else [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


_HEADER = ("RUN", "STATUS", "SEEN", "STEP", "BEST", "DIFFERS", "LATEST")


def _table(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> list[str]:
    return _columns([[row[column] for column in columns] for row in rows])


def _labels(names: Collection[str]) -> dict[str, str]:
    """For each path of a job's field its shortest end that means no other: `lr` for `train.phases.0.lr`, `optimizer`
    for `train.optimizer.kind`."""
    short = {name: re.sub(r"\.(kind|by|all)$", "", name) for name in names}
    labels = {}
    for name, path in short.items():
        parts = path.split(".")
        suffixes = [".".join(parts[first:]) for first in reversed(range(len(parts))) if not parts[first].isdecimal()]
        others = [f".{other}" for other in short.values() if other != path]
        labels[name] = next((suffix for suffix in suffixes if not any(other_path.endswith(f".{suffix}") for other_path in others)), path)
    return labels


def _brief(value: Any) -> str:
    """A field's value in a few characters."""
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def jobs_lines(url: str, jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line a job of a cluster, in columns."""
    rows = [("JOB", "STATUS", "RUN", "SUBMITTED (UTC)", "TOOK")]
    for job in jobs:
        submitted = str(job["submitted"] or "").replace("T", " ").partition("+")[0]
        took = f"{job['seconds']:,.0f} s" if job["seconds"] is not None else ""
        rows.append((job["job"], job["status"], job["run"] or "", submitted, took))
    return _columns(rows) if len(rows) > 1 else [f"no jobs on {url}"]
