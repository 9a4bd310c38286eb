"""A look at a cluster from inside, before anything of the user's is sent: versions, libraries, room, storage.

Runs there as `python -m pipeline.cluster.jobs.probe LETTER`, and answers with records in its log: `versions` first, and
by nothing that an old Python could not import; then `cluster`, or `refused`.
"""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Answer the questions of the letter that the command line names."""
    from importlib import metadata

    from pipeline.cluster.jobs.discretion import be_discreet
    from pipeline.cluster.jobs.records import record_line

    be_discreet()
    installed = {
        str(distribution.metadata["Name"]).lower().replace("_", "-"): distribution.version for distribution in metadata.distributions()
    }
    python = ".".join(str(part) for part in sys.version_info[:3])
    print(record_line("versions", {"python": python, "installed": installed}), flush=True)

    from pipeline.errors import TrainyardError

    try:
        print(record_line("cluster", _look(sys.argv[1])), flush=True)
    except TrainyardError as error:
        refusal = {"what": error.what, "where": error.where, "fix": error.fix}
        print(record_line("refused", refusal), flush=True)


def _look(letter_name: str) -> dict[str, object]:
    """What the cluster has; tries the storage out.

    Raises
    ------
    InputError: storage that cannot be used from here, or workers that will never fit.
    """
    import logging

    from pipeline.cluster.connection import draining
    from pipeline.cluster.jobs.letter import take_out
    from pipeline.cluster.jobs.places import refuse_other_machine
    from pipeline.cluster.reach import check_storage
    from pipeline.cluster.room import Room, added, look_at
    from pipeline.job import IN_PLACE_WORKERS, Scale
    from pipeline.record.lock import boot
    from pipeline.storage import handed

    payload = take_out(letter_name)
    handed.take(payload.environment)
    question = payload.probe or {}
    if question["boot_id"] is not None and question["boot_id"] != boot():
        raise refuse_other_machine(payload.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    scale = Scale.model_validate(question["scale"])
    if scale.workers != IN_PLACE_WORKERS:
        Room(lambda: look_at(ray, draining=draining), scale).check()
    check_storage(ray, payload.storage, from_here=True)
    resources = look_at(ray, draining=draining)
    ray.shutdown()
    return {"nodes": len(resources.total), "has": added(resources.total), "grows": resources.possible is not None}


if __name__ == "__main__":
    main()
