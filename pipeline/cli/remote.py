"""Commands that work through the Jobs API of a Ray cluster."""
