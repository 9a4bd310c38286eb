"""The metric log: Parquet segments with one row a step and one an evaluation, and the live rows beside them."""
