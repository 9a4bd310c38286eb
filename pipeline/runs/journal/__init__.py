"""The journal of a run: exclusively created entries that define its state, and the decisions derived from them."""
