"""Progress and results as text: a progress bar on a terminal, one plain line per evaluation (for some of them, if there
are very many), and lines for the status of runs and jobs."""

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
from pipeline.format_metrics import (
    NUMBER_WIDTH,
    baseline_warning,
    format_divergence_advice,
    format_headline,
    format_metric_table,
    format_number,
    format_rate,
    headline_fields,
)
from pipeline.redaction import sanitize_for_terminal
from pipeline.runs.status import ListedRun, RunStatus

ERASE_LINE = "\x1b[2K"
"""Clears the line of the cursor."""
PHASE_INTERVAL_S = 10.0
"""Without a terminal, seconds between two lines about a long phase before training, such as filling the cache."""
MAX_VALUE_LENGTH = 24
"""Characters of a job field's value in the list of runs."""
MAX_DAMAGE_LINES = 5
"""Lines about damaged files of a run."""
LINE_INTERVAL_S = 1.0
"""On a terminal, seconds between two lines for evaluations within an epoch; the bar shows the latest in between."""
MAX_EVALUATION_LINES = 100
"""A run with more evaluations prints a line for every second, fifth, tenth, ... of them."""
MAX_SILENCE_S = 600.0
"""Such a run also prints a line for the first evaluation after this many seconds without one."""


class ProgressDisplay:
    """Displays events on standard error, see `pipeline.events`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: _ProgressBar | None = None
        self._is_terminal = sys.stderr.isatty()
        self._stride = 0
        """One line per `_stride` evaluations; 0 until training starts."""
        self._last_step = 0
        self._last_line = 0.0
        self._last_printed_phase = 0
        self._pending_evaluation: EvaluationLogged | None = None
        """The latest evaluation, if its line is not printed."""
        self._pending_best_step: int | None = None
        """Step of the best evaluation, if it is later than the last line."""
        self._last_phase = time.monotonic()
        self._in_phase = False

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._print_pending()
        if self._bar is not None:
            self._bar.close()
        if self._in_phase:
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)

    def show(self, event: Event) -> None:
        match event:
            case WarningMessage():
                self._print_line(f"warning: {event.text}")
            case HangReported():  # the last event of this process: nothing else closes the bar
                self.__exit__(None, None, None)
                self._bar = None
                self._print_line(f"error: {event.text}")
            case _ if self._quiet:
                return
            case StepsLogged():
                if self._bar is not None:
                    self._bar.show_steps(event)
            case PhaseStarted():
                self._show_phase(f"{event.text} ...")
            case Message():
                self._print_line(event.text)
            case RunOpened():
                self._print_line(f"run {event.run} ({'new run' if event.is_new else 'found'}) in {event.url}")
            case TrainingStarted():
                verb = "training" if event.step == 0 else f"resuming after step {event.step},"
                self._print_line(f"{verb} to step {event.last_step} on {event.workers}")
                self._on_start(event)
            case EvaluationLogged():
                self._on_evaluation(event)
            case EarlyStopped():
                self._print_pending()
                reason = format_early_stop(event.evaluations_since_best, event.metric)
                self._print_line(f"early stop at step {event.step} of {event.last_step}: {reason}")

    def _show_phase(self, text: str) -> None:
        if self._is_terminal:  # the next line replaces it
            print(f"{ERASE_LINE}{text}", end="\r", file=sys.stderr, flush=True)
            self._in_phase = True
        elif time.monotonic() - self._last_phase > PHASE_INTERVAL_S:
            self._last_phase = time.monotonic()
            self._print_line(text)

    def _on_start(self, event: TrainingStarted) -> None:
        is_first, evaluations = self._stride == 0, event.num_evaluations
        self._last_step, self._stride = event.last_step, _choose_stride(evaluations)
        if self._stride > 1 and is_first:
            self._print_line(
                f"1 in {self._stride} of {evaluations:,} evaluations is shown here; the metric log has all of them"
            )
        if self._bar is not None:
            self._bar.reset(event.step)
        elif self._is_terminal:
            self._bar = _ProgressBar(event.step, event.last_step)

    def _on_evaluation(self, event: EvaluationLogged) -> None:
        if self._bar is not None:
            self._bar.show_evaluation(event)
        if event.is_best:
            self._pending_best_step = event.step
        self._pending_evaluation = event
        if self._should_print(event):
            self._print_pending()

    def _should_print(self, event: EvaluationLogged) -> bool:
        """Return whether to print a line now. The first and last evaluation of an attempt and the first of a phase
        always have one."""
        now = time.monotonic()
        if event.step in (0, self._last_step) or event.phase != self._last_printed_phase:
            return True
        if self._is_terminal and not event.ends_epoch and now - self._last_line < LINE_INTERVAL_S:
            return False
        return event.number % max(1, self._stride) == 0 or now - self._last_line > MAX_SILENCE_S

    def _print_pending(self) -> None:
        """Print the line of the latest evaluation, if it is pending."""
        event, best = self._pending_evaluation, self._pending_best_step
        if event is None:
            return
        self._pending_evaluation = self._pending_best_step = None
        self._last_line, self._last_printed_phase = time.monotonic(), event.phase
        note = f"  best at step {best}" if best is not None and best != event.step and not event.no_gain else ""
        self._print_line(format_evaluation(event) + note)

    def _print_line(self, text: str) -> None:
        text = sanitize_for_terminal(text)
        if self._in_phase:
            print(ERASE_LINE, end="", file=sys.stderr)
            self._in_phase = False
        if self._bar is not None:
            self._bar.print_line(text)
        else:
            print(text, file=sys.stderr, flush=True)


def _choose_stride(evaluations: int) -> int:
    """Return the first of 1, 2, 5, 10, 20, ... that gives at most `MAX_EVALUATION_LINES` lines."""
    stride = 1
    for factor in itertools.cycle((2, 2.5, 2)):
        if evaluations <= stride * MAX_EVALUATION_LINES:
            break
        stride = int(stride * factor)
    return stride


class _ProgressBar:
    """A progress bar by rich, which is imported only for a terminal.

    It always shows step, bar and remaining time. As many of the loss, the metrics and the throughput follow as fit into
    the terminal's width, each in a field of fixed width.
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
        self._fixed_width = len("step ") + 2 * len(str(last_step)) + len("/ ") + self.BAR + 1 + self.TIME + 1
        self._task = self._progress.add_task("", completed=step, total=last_step, text="")
        self._loss: list[str] = []
        self._throughput: list[str] = []
        self._metrics: list[str] = []
        self._progress.start()

    def reset(self, step: int) -> None:
        """Restart at another step: the time before it does not count in the estimate of the remaining time."""
        self._progress.reset(self._task, completed=step)

    def show_steps(self, event: StepsLogged) -> None:
        self._loss = [_format_field("loss", event.loss)]
        self._throughput = [f"{format_rate(event.samples_per_s):>5s} samples/s"]
        self._update(event.step)

    def show_evaluation(self, event: EvaluationLogged) -> None:
        self._metrics = [
            _format_field(*name_and_value) for name_and_value in headline_fields(event.metrics, event.best_metric)
        ]
        self._update(event.step)

    def _update(self, step: int) -> None:
        width = self._progress.console.width - self._fixed_width
        text = join_fitting([*self._loss, *self._metrics[:1], *self._throughput, *self._metrics[1:]], width)
        self._progress.update(self._task, completed=step, text=text)

    def print_line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _format_field(name: str, value: float) -> str:
    return f"{name} {format_number(value):<{NUMBER_WIDTH}s}"


def join_fitting(fields: Sequence[str], width: int) -> str:
    """Join the first fields, as many as fit into `width`, with two spaces."""
    text = ""
    for next_field in fields:
        longer = f"{text}  {next_field}" if text else next_field
        if len(longer) > width:
            break
        text = longer
    return text[: max(width, 0)]


def format_evaluation(event: EvaluationLogged) -> str:
    """Format one evaluation: `epoch 3  step 1440  val loss 0.1432  accuracy 0.9571  best`."""
    best = "  no better than before training" if event.no_gain else "  best" if event.is_best else ""
    metrics_text = format_headline(event.metrics, event.best_metric)
    return f"epoch {event.epoch:<3d} step {event.step:<6d} {metrics_text}{best}"


def format_early_stop(evaluations: int, metric: str) -> str:
    """Format the reason of an early stop: `5 evaluations without a better val/loss`."""
    return f"{evaluations} evaluation{'s' if evaluations != 1 else ''} without a better {metric}"


def format_run_status(status: RunStatus) -> list[str]:
    """Format the status of a run, with all metrics of its best step and their baselines without any training."""
    tree = status.to_json()
    lines = [_format_status_line(status)]
    if tree.get("error"):
        lines.append(f"  error     {tree['error']['message']}")
    if status.status != "finished":
        lines += [f"  {label:<9s} {text}" for label, text in _format_next_steps(status)]
    best, metrics = tree.get("best"), tree.get("metrics") or {}
    if best:
        lines.append(f"  best      {best['metric']} {format_number(best['value'])} at step {best['step']}")
    chosen = best["metrics"] if best else metrics if status.status == "finished" else {}  # else the untrained ones
    split = (best["metric"] if best else next(iter(metrics), "")).partition("/")[0]
    if status.stopped_early and best and status.evaluations_since_best is not None:
        reason = format_early_stop(status.evaluations_since_best, best["metric"])
        lines.insert(1, f"  stopped   early, of {status.total_steps} steps: {reason}")
    lines += [f"            {line}" for line in format_metric_table(chosen, split)]
    warnings = [status.best.no_improvement_message if status.best else "", baseline_warning(chosen, split)]
    lines += [f"  warning   {text}" for text in warnings if text]
    if metrics:
        lines.append(f"  latest    {format_headline(metrics, best['metric'] if best else '')}")
    if status.skipped_updates:
        lines.append(f"  skipped   {status.skipped_updates:,} updates, because their gradients were too large for fp16")
    if tree["attempts"] > 1:
        lines.append(f"  attempts  {tree['attempts']}")
    lines += [f"  damaged   {text}" for text in status.damaged[:MAX_DAMAGE_LINES]]
    if len(status.damaged) > MAX_DAMAGE_LINES:
        lines.append(f"            and {len(status.damaged) - MAX_DAMAGE_LINES} more: see --json")
    lines.append(f"  in        {tree['url']}")
    return lines


def _format_status_line(status: RunStatus) -> str:
    """Format the first line: `mnist: running at step 3200 of 4800, seen 3 s ago`."""
    prefix = f"{status.run}: {status.status} at step {status.latest_step}"
    of = f" of {status.total_steps}" if status.total_steps else ""
    if status.status == "running":
        return f"{prefix}{of}, seen {format_age(status.seen_s)}"
    if status.status == "stalled":
        return f"{prefix}{of}, no heartbeat for {format_age(status.seen_s).removesuffix(' ago')}"
    return f"{prefix}, epoch {status.epoch}" if status.status == "finished" else f"{prefix}{of}, epoch {status.epoch}"


def _format_next_steps(status: RunStatus) -> list[tuple[str, str]]:
    """Return labels and texts for an unfinished run: where it runs or ran, what is saved, and what to do next."""
    entries = []
    if status.where:
        world_size, device = status.where.get("world_size"), status.where.get("device")
        workers = f"{world_size} workers, " if world_size not in (None, 1) else ""
        verb = "runs on" if status.status == "running" else "ran on"
        entries.append(
            (verb, f"{status.where.get('host')} ({workers}{device}), since {_format_utc(status.where['since'])}")
        )
    if status.latest_step > status.step:
        saved = f"step {status.step}, epoch {status.epoch}" if status.step else "no step yet"
        entries.append(("saved", saved))
    if status.error is not None and status.error.get("type") == NotFiniteError.__name__:
        best, step = status.best, status.step or None
        no_gain = best.no_improvement_message if best is not None else ""
        entries.append(("next", "the same command would fail there again:"))
        entries.append(
            ("", format_divergence_advice(status.run, best.step if best is not None else None, step, no_gain))
        )
    elif status.status != "running":
        start = f"resumes from step {status.step}" if status.step else "starts from the beginning"
        entries.append(("next", f"the same command {start}"))
    return entries


def format_age(seconds: float | None) -> str:
    """Format an age: `42 s ago`, `12 min ago`, `5 h ago`, `3 days ago`; empty for None."""
    if seconds is None:
        return ""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{int(seconds / length)} {unit} ago"
    return f"{int(seconds / 86400)} days ago"


def _format_utc(timestamp: str) -> str:
    """Format a time: `2026-11-20 13:05 UTC`."""
    return f"{timestamp[:16].replace('T', ' ')} UTC"


def format_runs(url: str, runs: Sequence[ListedRun], width: int | None = None) -> list[str]:
    """Format runs in columns, one line per run.

    Parameters
    ----------
    width: of the terminal; None: do not shorten lines. Lines that are too long first lose the columns that `show` has
        too, then are cut.
    """
    labels = _shorten_names({name for run in runs for name in run.differs})
    rows = [_RUN_COLUMNS]
    for run in runs:
        status = run.status
        best = f"{status.best.metric} {format_number(status.best.value)}" if status.best is not None else ""
        step = f"{status.latest_step}/{status.total_steps}" if status.total_steps else str(status.latest_step)
        differs = " ".join(f"{labels[name]}={_shorten_value(value)}" for name, value in run.differs.items())
        latest = format_headline(status.to_json()["metrics"])
        rows.append(
            (status.run, status.status, format_age(status.seen_s).removesuffix(" ago"), step, best, differs, latest)
        )
    if len(rows) == 1:
        return [f"no runs in {url}"]
    columns = [column for column, title in enumerate(_RUN_COLUMNS) if title != "DIFFERS" or labels]
    for title in ("LATEST", "SEEN", "STEP"):
        if width is not None and max(map(len, _select_columns(rows, columns))) > width:
            columns.remove(_RUN_COLUMNS.index(title))
    lines = _select_columns(rows, columns)
    return lines if width is None else [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


_RUN_COLUMNS = ("RUN", "STATUS", "SEEN", "STEP", "BEST", "DIFFERS", "LATEST")


def _select_columns(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> list[str]:
    return _align_columns([[row[column] for column in columns] for row in rows])


def _shorten_names(names: Collection[str]) -> dict[str, str]:
    """Return the shortest unambiguous suffix of each field's path: `lr` for `train.phases.0.lr`, `optimizer` for
    `train.optimizer.kind`."""
    short = {name: re.sub(r"\.(kind|by|all)$", "", name) for name in names}
    labels = {}
    for name, path in short.items():
        parts = path.split(".")
        suffixes = [".".join(parts[first:]) for first in reversed(range(len(parts))) if not parts[first].isdecimal()]
        others = [f".{other}" for other in short.values() if other != path]
        labels[name] = next(
            (suffix for suffix in suffixes if not any(other_path.endswith(f".{suffix}") for other_path in others)), path
        )
    return labels


def _shorten_value(value: Any) -> str:
    """Format a field's value in at most `MAX_VALUE_LENGTH` characters."""
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_jobs(url: str, jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Format the jobs of a cluster in columns, one line per job."""
    rows = [("JOB", "STATUS", "RUN", "SUBMITTED (UTC)", "TOOK")]
    for job in jobs:
        submitted = str(job["submitted"] or "").replace("T", " ").partition("+")[0]
        took = f"{job['seconds']:,.0f} s" if job["seconds"] is not None else ""
        rows.append((job["job"], job["status"], job["run"] or "", submitted, took))
    return _align_columns(rows) if len(rows) > 1 else [f"no jobs on {url}"]
