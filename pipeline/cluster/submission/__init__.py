"""The Ray Jobs API: the client of a cluster, what is sent to it, what is asked of it before, and following a job.

Two modules run on the cluster: `probe`, before anything of the user's is sent, and `letter`, in the job's entry point.
"""
