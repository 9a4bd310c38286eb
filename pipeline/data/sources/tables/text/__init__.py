"""Tables in text files: CSV and JSON lines."""
