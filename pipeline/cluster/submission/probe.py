"""A check that runs on a cluster before anything of the user's is sent: versions, libraries, resources and storage.

It runs as `python -m pipeline.cluster.submission.probe PAYLOAD` and writes records to its log: first `versions`, with
nothing that an old Python cannot import, then `cluster` or `refused`.
"""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Run the probe with the payload that the command line names."""
    from importlib import metadata

    from pipeline.cluster.submission.log_records import format_record, redact_stdout_and_stderr

    redact_stdout_and_stderr()
    installed = {
        str(distribution.metadata["Name"]).lower().replace("_", "-"): distribution.version
        for distribution in metadata.distributions()
    }
    python = ".".join(str(part) for part in sys.version_info[:3])
    print(format_record("versions", {"python": python, "installed": installed}), flush=True)

    from pipeline.errors import TrainyardError

    try:
        print(format_record("cluster", _inspect_cluster(sys.argv[1])), flush=True)
    except TrainyardError as error:
        refusal = {"what": error.what, "where": error.where, "fix": error.fix}
        print(format_record("refused", refusal), flush=True)


def _inspect_cluster(payload_name: str) -> dict[str, object]:
    """Return the cluster's resources, after a check of the storage.

    Raises
    ------
    InputError: storage that cannot be used from the cluster, or workers that can never fit.
    """
    import logging

    from pipeline.cluster.resources import WorkerPlacement, cluster_resources, sum_resources
    from pipeline.cluster.storage_check import check_storage
    from pipeline.cluster.submission.payload import fetch_payload
    from pipeline.cluster.submission.storage_url import make_other_machine_error
    from pipeline.config import IN_PLACE_WORKERS, ScalingConfig
    from pipeline.runs.lease.process_lock import read_boot_id
    from pipeline.storage import credentials

    payload = fetch_payload(payload_name)
    credentials.set_credentials(payload.environment)
    probe = payload.probe or {}
    if probe["boot_id"] is not None and probe["boot_id"] != read_boot_id():
        raise make_other_machine_error(payload.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    scale = ScalingConfig.model_validate(probe["scale"])
    if scale.workers != IN_PLACE_WORKERS:
        WorkerPlacement(lambda: cluster_resources(ray), scale).check_feasible()
    check_storage(ray, payload.storage, include_driver=True)
    resources = cluster_resources(ray)
    ray.shutdown()
    return {
        "nodes": len(resources.total),
        "has": sum_resources(resources.total),
        "grows": resources.autoscaler_max is not None,
    }


if __name__ == "__main__":
    main()
