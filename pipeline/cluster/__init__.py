"""The adapter to Ray: the driver and its workers, the events and signals between them, metrics for Prometheus, and the
policy for worker failures. `submission` holds jobs that run through Ray's Jobs API.

Ray is told about progress, but nothing that a resume needs is stored by Ray: it is in the run's own journal. Each
attempt is a new Ray Train run.
"""
