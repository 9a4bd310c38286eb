"""A run's journal: exclusively created entries that are the truth about the run, and the decisions made from them."""
