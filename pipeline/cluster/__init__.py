"""The one adapter to Ray: a context for each worker, events and signals between them and the driver, metrics on the
head, and a new start after a loss; and, in `jobs`, submissions through its Jobs API.

Ray is told what happens; what a resume depends on lies in our own record. Each attempt is a fresh Ray run.
"""
