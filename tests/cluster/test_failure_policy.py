"""Which failures end a run and which lead to another attempt, decided without a cluster."""

from __future__ import annotations

import pickle
import signal

import pytest
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st
from ray.train import WorkerGroupError

from pipeline.cluster.failure_policy import FailurePolicy, WorkerFailure, summary_line
from pipeline.context import PeerFailure
from pipeline.errors import Interrupted, NotFiniteError, OutOfMemoryError, RepeatedFailureError, WorkerLostError

ACTOR_DIED = ray.exceptions.ActorDiedError()


def make_worker_error(rank: int = 1, step: int | None = 7, text: str = "no such luck") -> WorkerFailure:
    error = ValueError(text)
    if step is not None:
        error.__dict__["step"] = step
    return WorkerFailure.from_error(error, rank)


def make_group_error(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank.removeprefix("r")): failure for rank, failure in failures.items()})


def test_worker_error_pickles_any_error() -> None:
    class UserError(Exception):
        def __init__(self, first: object, second: object) -> None:
            super().__init__(f"{first} and {second}")

    try:
        raise UserError(lambda: 1, 2)
    except UserError as error:
        unpickled = pickle.loads(pickle.dumps(WorkerFailure.from_error(error, rank=3)))
    assert (unpickled.rank, unpickled.step, unpickled.is_consequence) == (3, None, False)
    assert unpickled.summary.startswith("UserError: ")
    assert "raise UserError(lambda: 1, 2)" in unpickled.traceback_text


def test_failing_rank_is_named_and_not_its_peers() -> None:
    consequence = WorkerFailure.from_error(PeerFailure("a collective failed"), 0)
    assert (
        summary_line(make_group_error(r0=consequence, r1=make_worker_error()))
        == "worker 1 failed at step 7: ValueError: no such luck"
    )
    assert summary_line(make_group_error(r0=consequence, r1=ACTOR_DIED)).startswith("worker 1 was lost (")
    assert summary_line(make_group_error(r0=consequence)) == "a worker was lost"


RAY_ERROR_TEXT = """The actor died unexpectedly before finishing this task.
	class_name: CLASS
	namespace: SOME
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly."""


def make_actor_died_error(actor: str) -> Exception:
    """Return Ray's error for an actor whose process was killed."""
    error = ray.exceptions.ActorDiedError()
    error.error_msg = RAY_ERROR_TEXT.replace("CLASS", actor)
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ray.exceptions.ActorDiedError(), "a helper process of Ray was lost (its process was killed)"),
        (
            make_actor_died_error("TrainController"),
            "Ray Train's controller was lost (its process was killed)",
        ),
        (
            make_actor_died_error("EventChannel"),
            "a helper process of Ray was lost (its process was killed)",
        ),
        (ray.exceptions.WorkerCrashedError(), "its process was killed"),
        (ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable: RpcError", None), None),
        (ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready."), "it did not respond"),
        (ray.exceptions.NodeDiedError("The node has died"), "its node was lost"),  # type: ignore[no-untyped-call]
        (ray.exceptions.RaySystemError("first\nsecond"), None),  # type: ignore[no-untyped-call]
    ],
)
def test_ray_errors_are_summarized_in_one_line(error: Exception, line: str | None) -> None:
    summary = summary_line(error)
    assert summary == (line if line is not None else summary)
    assert "\n" not in summary
    assert len(summary) < 120


def test_controller_failure_is_retried_up_to_the_limit() -> None:
    policy = FailurePolicy("run", 2, lambda: 0)
    error = make_actor_died_error("TrainController")
    for _ in range(2):
        policy.decide(error, 0)
    with pytest.raises(WorkerLostError, match="Ray Train's controller was lost") as raised:
        policy.decide(error, 0)
    assert "common causes" not in str(raised.value)


def test_trainyard_error_of_a_worker_is_raised() -> None:
    error = NotFiniteError("the loss is nan")
    with pytest.raises(NotFiniteError, match="nan"):
        FailurePolicy("run", 3, lambda: 0).decide(
            make_group_error(r0=WorkerFailure.from_error(PeerFailure(), 0), r1=error), 0
        )


def test_signal_takes_precedence_over_a_restart() -> None:
    with pytest.raises(Interrupted) as raised:
        FailurePolicy("run", 3, lambda: 0).decide(make_group_error(r1=ACTOR_DIED), signal.SIGTERM)
    assert raised.value.exit_code == 143


def test_repeated_error_at_the_same_step_is_a_bug() -> None:
    policy = FailurePolicy("run", 5, iter([0, 3, 6, 9, 12]).__next__)  # with checkpoints in between
    policy.decide(make_group_error(r1=make_worker_error()), 0)
    with pytest.raises(RepeatedFailureError) as raised:
        policy.decide(make_group_error(r0=WorkerFailure.from_error(PeerFailure(), 0), r1=make_worker_error()), 0)
    text = str(raised.value)
    assert "worker 1 failed at step 7: ValueError: no such luck, twice" in text
    assert text.index("ValueError") < text.index("the same command")
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    "other", [make_worker_error(step=8), make_worker_error(text="another"), make_worker_error(step=None), ACTOR_DIED]
)
def test_different_error_or_step_is_retried(other: Exception) -> None:
    policy = FailurePolicy("run", 5, lambda: 0)
    policy.decide(make_group_error(r1=make_worker_error()), 0)
    policy.decide(make_group_error(r1=other), 0)
    policy.decide(make_group_error(r1=make_worker_error()), 0)


def test_repeated_out_of_memory_ends_the_run_despite_progress() -> None:
    policy = FailurePolicy("run", 99, iter(range(0, 100, 10)).__next__)
    killed: Exception = ray.exceptions.OutOfMemoryError(  # type: ignore[no-untyped-call]
        "Task was killed due to the node running low on memory"
    )
    policy.decide(make_group_error(r1=killed), 0)
    assert "memory" in policy.describe(make_group_error(r1=killed))
    with pytest.raises(OutOfMemoryError, match="second time") as raised:
        policy.decide(make_group_error(r1=killed), 0)
    assert "train.batch_size" in raised.value.fix
    assert "train.micro_batch" in raised.value.fix


@given(st.integers(0, 4), st.lists(st.booleans(), max_size=40))
def test_only_consecutive_failures_without_a_checkpoint_count(retries: int, progress: list[bool]) -> None:
    step = 0
    policy = FailurePolicy("run", retries, lambda: step)
    consecutive = 0
    for number, has_checkpoint in enumerate(progress):
        step += has_checkpoint
        consecutive = 1 if has_checkpoint else consecutive + 1
        failure = make_group_error(r1=make_worker_error(step=number))
        if consecutive > retries:
            with pytest.raises(WorkerLostError, match="retries"):
                policy.decide(failure, 0)
            return
        policy.decide(failure, 0)
        assert f"from step {step} ({consecutive} of {retries})" in policy.describe(failure)


def test_preemptions_without_progress_are_limited() -> None:
    policy = FailurePolicy("run", 2, lambda: 0)
    policy.decide_preemption()
    policy.decide_preemption()
    with pytest.raises(WorkerLostError, match="were preempted"):
        policy.decide_preemption()
