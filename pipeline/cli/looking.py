"""Commands that look at what is in storage."""

from __future__ import annotations

from pipeline.cli.app import Json, RunName, StorageUrl, app, print_result, shown


@app.command(epilog="Example: trainyard runs --storage s3://bucket/runs")
def runs(storage: StorageUrl = None, as_json: Json = False) -> None:
    """List the runs in storage, and how each stands."""
    shown.update(json=as_json, verbose=False)
    from pipeline.verbs.show import runs as verb

    url, found = verb(storage)
    from pipeline.terminal import runs_lines

    print_result({"storage": url, "runs": [standing.to_json() for standing in found]}, runs_lines(url, found), as_json)


@app.command(epilog="Example: trainyard show mnist-mlp-1a2b3c4d")
def show(run: RunName, storage: StorageUrl = None, as_json: Json = False) -> None:
    """How a run stands, from storage alone: running, stalled, interrupted, failed or finished."""
    shown.update(json=as_json, verbose=False)
    from pipeline.terminal import result_lines
    from pipeline.verbs.show import show as verb

    found = verb(run, storage)
    print_result(found.to_json(), result_lines(found), as_json)
