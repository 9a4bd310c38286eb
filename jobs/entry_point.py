"""What a cluster runs for `trainyard submit`: the job that was sent, on this cluster, to its end.

    python jobs/entry_point.py LETTER

LETTER names what came with the job (pipeline/cluster/jobs/letter.py). Exit codes are those of `trainyard train`.
"""

from pipeline.cli.on_cluster import main

if __name__ == "__main__":
    main()
