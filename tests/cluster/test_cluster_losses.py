"""Which losses end a run and which are made good, decided without a cluster."""

from __future__ import annotations

import pickle
import signal

import pytest
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st
from ray.train import WorkerGroupError

from pipeline.cluster.failure import WorkerFailed
from pipeline.cluster.losses import Losses, first_line
from pipeline.context import PeerFailure
from pipeline.errors import (
    Interrupted,
    NotFiniteError,
    OutOfMemoryError,
    RepeatedFailureError,
    WorkerLostError,
)

GONE = ray.exceptions.ActorDiedError()


def failed(rank: int = 1, step: int | None = 7, text: str = "no such luck") -> WorkerFailed:
    error = ValueError(text)
    if step is not None:
        error.__dict__["step"] = step
    return WorkerFailed.of(error, rank)


def group(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank.removeprefix("r")): failure for rank, failure in failures.items()})


def test_a_failure_crosses_processes_whatever_the_error_was() -> None:
    class OfTheUsersOwnError(Exception):
        def __init__(self, one: object, two: object) -> None:
            super().__init__(f"{one} and {two}")

    try:
        raise OfTheUsersOwnError(lambda: 1, 2)
    except OfTheUsersOwnError as error:
        unpickled = pickle.loads(pickle.dumps(WorkerFailed.of(error, rank=3)))
    assert (unpickled.rank, unpickled.step, unpickled.is_consequence) == (3, None, False)
    assert unpickled.line.startswith("OfTheUsersOwnError: ")
    assert "raise OfTheUsersOwnError(lambda: 1, 2)" in unpickled.trace


def test_the_failing_rank_is_named_and_not_those_that_it_took_along() -> None:
    consequence = WorkerFailed.of(PeerFailure("a sum failed"), 0)
    assert first_line(group(r0=consequence, r1=failed())) == "worker 1 failed at step 7: ValueError: no such luck"
    assert first_line(group(r0=consequence, r1=GONE)).startswith("worker 1 was lost (")
    assert first_line(group(r0=consequence)) == "a worker was lost"


PARAGRAPH = """The actor died unexpectedly before finishing this task.
	class_name: CLASS
	namespace: SOME
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly."""


def died(actor: str) -> Exception:
    """As Ray says it of an actor whose process was killed."""
    error = ray.exceptions.ActorDiedError()
    error.error_msg = PARAGRAPH.replace("CLASS", actor)
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ray.exceptions.ActorDiedError(), "a helper process of Ray's was lost (its process was ended from outside)"),
        (
            died("TrainController"),
            "Ray Train's controller was lost (its process was ended from outside)",
        ),
        (
            died("Desk"),
            "a helper process of Ray's was lost (its process was ended from outside)",
        ),
        (ray.exceptions.WorkerCrashedError(), "its process was ended from outside"),
        (ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable: RpcError", None), None),
        (ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready."), "it did not answer"),
        (ray.exceptions.NodeDiedError("The node has died"), "its node is gone"),  # type: ignore[no-untyped-call]
        (ray.exceptions.RaySystemError("first\nsecond"), None),  # type: ignore[no-untyped-call]
    ],
)
def test_rays_paragraphs_come_to_a_line_of_ours(error: Exception, line: str | None) -> None:
    summary = first_line(error)
    assert summary == (line if line is not None else summary)
    assert "\n" not in summary
    assert len(summary) < 120


def test_a_dead_controller_is_tried_again_as_often_as_the_job_allows() -> None:
    losses = Losses("run", 2, lambda: 0)
    error = died("TrainController")
    for _ in range(2):
        losses.take(error, 0)
    with pytest.raises(WorkerLostError, match="Ray Train's controller was lost") as raised:
        losses.take(error, 0)
    assert "common causes" not in str(raised.value)


def test_what_a_worker_says_itself_is_passed_on() -> None:
    error = NotFiniteError("the loss is nan")
    with pytest.raises(NotFiniteError, match="nan"):
        Losses("run", 3, lambda: 0).take(group(r0=WorkerFailed.of(PeerFailure(), 0), r1=error), 0)


def test_a_signal_goes_before_a_new_start() -> None:
    with pytest.raises(Interrupted) as raised:
        Losses("run", 3, lambda: 0).take(group(r1=GONE), signal.SIGTERM)
    assert raised.value.exit_code == 143


def test_the_same_error_at_the_same_step_twice_is_a_bug_and_shown_whole() -> None:
    losses = Losses("run", 5, iter([0, 3, 6, 9, 12]).__next__)  # checkpoints are made in between
    losses.take(group(r1=failed()), 0)
    with pytest.raises(RepeatedFailureError) as raised:
        losses.take(group(r0=WorkerFailed.of(PeerFailure(), 0), r1=failed()), 0)
    text = str(raised.value)
    assert "worker 1 failed at step 7: ValueError: no such luck, twice" in text
    assert text.index("ValueError") < text.index("the same command")
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("other", [failed(step=8), failed(text="another"), failed(step=None), GONE])
def test_another_error_or_another_step_is_tried_again(other: Exception) -> None:
    losses = Losses("run", 5, lambda: 0)
    losses.take(group(r1=failed()), 0)
    losses.take(group(r1=other), 0)
    losses.take(group(r1=failed()), 0)


def test_memory_that_runs_out_twice_ends_the_run_though_it_makes_progress() -> None:
    losses = Losses("run", 99, iter(range(0, 100, 10)).__next__)
    killed: Exception = ray.exceptions.OutOfMemoryError(  # type: ignore[no-untyped-call]
        "Task was killed due to the node running low on memory"
    )
    losses.take(group(r1=killed), 0)
    assert "memory" in losses.words(group(r1=killed))
    with pytest.raises(OutOfMemoryError, match="second time") as raised:
        losses.take(group(r1=killed), 0)
    assert "train.batch_size" in raised.value.fix
    assert "train.micro_batch" in raised.value.fix


@given(st.integers(0, 4), st.lists(st.booleans(), max_size=40))
def test_only_losses_in_a_row_without_a_checkpoint_count(retries: int, progress: list[bool]) -> None:
    reached = [0]
    losses = Losses("run", retries, lambda: reached[0])
    in_a_row = 0
    for number, made in enumerate(progress):
        reached[0] += made
        in_a_row = 1 if made else in_a_row + 1
        loss = group(r1=failed(step=number))
        if in_a_row > retries:
            with pytest.raises(WorkerLostError, match="retries"):
                losses.take(loss, 0)
            return
        losses.take(loss, 0)
        assert f"from step {reached[0]} ({in_a_row} of {retries})" in losses.words(loss)


def test_notices_without_any_progress_come_to_an_end() -> None:
    losses = Losses("run", 2, lambda: 0)
    losses.take_notice()
    losses.take_notice()
    with pytest.raises(WorkerLostError, match="told to leave"):
        losses.take_notice()
