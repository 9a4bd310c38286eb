"""Jobs through Ray's Jobs API: the client, what is sent with a job, the preflight checks, and a job's status.

Two modules also run on the cluster: `probe`, before anything of the user's is sent, and `payload`, in the job's entry
point.
"""
