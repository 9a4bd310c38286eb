"""The metric log: Parquet segments with one row per step and one per evaluation, and the live rows."""
