"""What the first lines of a CSV file say about its form: delimiter, decimal separator, header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from itertools import pairwise

DELIMITERS = ",\t;|"
SAMPLE_RECORDS = 200
SAMPLE_BYTES = 1 << 18

COMMA_NUMBER, POINT_NUMBER = re.compile(r"\s*[+-]?\d+,\d+\s*"), re.compile(r"\s*[+-]?\d*\.\d+\s*")
NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")

EXCEL_LINE = re.compile(r"sep=([^\w\s\"]|\t)\r?\n")
"""A first line that Excel writes to tell the delimiter."""


def find_delimiter(text: str) -> str:
    """Return the delimiter of the first lines of a file: the one that divides them into the same number of columns."""
    best, most = ",", 1
    for delimiter in DELIMITERS:
        records = _sample_records(text, delimiter)
        counts = {len(record) for record in records}
        if len(counts) == 1 and next(iter(counts)) > most:
            best, most = delimiter, next(iter(counts))
    if most > 1:
        return best
    header = text.lstrip("\r\n").partition("\n")[0]  # the lines differ: there will be an error, or the sample misleads
    return max(DELIMITERS, key=header.count) if any(map(header.count, DELIMITERS)) else ","


def has_spaces_after(text: str, delimiter: str) -> bool:
    """Return whether a space follows every delimiter in the first lines of a file; it is then part of the delimiter."""
    records = [field for record in _sample_records(text, delimiter) for field in record[1:]]
    return bool(records) and all(field.startswith(" ") for field in records)


def find_decimal(text: str, delimiter: str) -> str:
    """Return the decimal separator of the numbers in the first lines of a file."""
    if delimiter == ",":
        return "."
    fields = [field for record in _sample_records(text, delimiter)[1:] for field in record]
    has_comma, has_point = (any(map(pattern.fullmatch, fields)) for pattern in (COMMA_NUMBER, POINT_NUMBER))
    return "," if has_comma and not has_point else "."


def _sample_records(text: str, delimiter: str) -> list[list[str]]:
    """Return the first complete records of a text that are not empty."""
    records: list[list[str]] = []
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            if record:
                records.append(record)
            if len(records) > SAMPLE_RECORDS:
                break
    except csv.Error:
        pass
    return records[:-1] if len(records) > 1 and not text.endswith("\n") and len(records) <= SAMPLE_RECORDS else records


def looks_like_values(names: Sequence[str]) -> bool:
    """Return whether names are rather the first row of a file without a header. Whole numbers that count up, such as
    the years 2019 to 2021, are names."""
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if not numbers:
        return False
    if not all(name.isdigit() for name in numbers):
        return True
    values = [int(name) for name in numbers]
    return any(second - first != 1 for first, second in pairwise(values))
