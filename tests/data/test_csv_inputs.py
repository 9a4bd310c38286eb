"""What odd CSV files give: a dataset, or one message with the file, the line and the fix."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources.tables.text.blocks import CsvSplitter
from pipeline.errors import DataError
from tests.data.table_files import open_table

NAN = float("nan")

SAME = {
    "comma": b"a,b,y\n1,x,p\n2.5,z,q\n",
    "tab": b"a\tb\ty\n1\tx\tp\n2.5\tz\tq\n",
    "semicolon and decimal comma": b"a;b;y\n1;x;p\n2,5;z;q\n",
    "pipe": b"a|b|y\n1|x|p\n2.5|z|q\n",
    "CRLF": b"a,b,y\r\n1,x,p\r\n2.5,z,q\r\n",
    "CR": b"a,b,y\r1,x,p\r2.5,z,q\r",
    "byte order mark": b"\xef\xbb\xbfa,b,y\n1,x,p\n2.5,z,q\n",
    "no line end at the end": b"a,b,y\n1,x,p\n2.5,z,q",
    "empty lines": b"\n\na,b,y\n\n1,x,p\n\n2.5,z,q\n\n",
    "all quoted": b'"a","b","y"\n"1","x","p"\n"2.5","z","q"\n',
    "spaces after the delimiter": b"a, b, y\n1, x, p\n2.5, z, q\n",
    "delimiter at the end of each line": b"a,b,y,\n1,x,p,\n2.5,z,q,\n",
    "index of pandas": b",a,b,y\n0,1,x,p\n7,2.5,z,q\n",
    "Excel's first line": b"sep=;\na;b;y\n1;x;p\n2.5;z;q\n",
    "gzip": gzip.compress(b"a,b,y\n1,x,p\n2.5,z,q\n"),
    "gzip in parts": gzip.compress(b"a,b,y\n1,x,p\n") + gzip.compress(b"2.5,z,q\n"),
    "bz2": bz2.compress(b"a,b,y\n1,x,p\n2.5,z,q\n"),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_forms_of_one_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    dataset = open_table(tmp_path / "t.csv")
    assert dataset.train.inputs.tolist() == [[1.0, 0.0], [2.5, 1.0]]
    assert dataset.schema is not None
    assert [(column.name, column.categories) for column in dataset.schema.columns] == [("a", ()), ("b", ("x", "z"))]
    assert dataset.label_names == ("p", "q")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["007", "12"], ("007", "12")),
        (["12", "00501"], ("00501", "12")),
        (["12345678901234567890", "1"], ("1", "12345678901234567890")),
        (["0x1F", "1"], ("0x1F", "1")),
        (["1", "2", "abc"], ("1", "2", "abc")),
        (["1.50", "abc"], ("1.50", "abc")),
        (["1,234", "5,678"], ("1,234", "5,678")),
        (["12%", "13%"], ("12%", "13%")),
        (["1", "true"], ("1", "true")),
        (["2024-01-01", "5"], ("2024-01-01", "5")),
        (["1", "2", "3.5"], [1, 2, 3.5]),
        (["1", "1e3"], [1, 1000]),
        ([" 5", "6 "], [5, 6]),
        (["-0", "+5"], [0, 5]),
        (["0", "0.5"], [0, 0.5]),
        (["007", "1.5"], [7, 1.5]),
        (["true", "False"], [1, 0]),
        (["NA", "?", "3"], [NAN, NAN, 3]),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 4 << 20], ids=["a block per row", "one block"])
def test_type_of_a_column_depends_on_all_of_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, values: list[str], expected: object
) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.text.blocks.BLOCK_BYTES", block_bytes)
    for order in (values, values[::-1]):
        (tmp_path / "t.csv").write_text("".join(f"{line}\n" for line in ["a\ty", *(f"{value}\tp" for value in order)]))
        dataset = open_table(tmp_path / "t.csv", decimal=".")
        assert dataset.schema is not None
        column, inputs = dataset.schema.columns[0], dataset.train.inputs[:, 0]
        if isinstance(expected, tuple):
            assert column.categories == expected
            assert [column.categories[int(code)] for code in inputs] == order
        else:
            assert column.kind == "number"
            np.testing.assert_array_equal(inputs if order is values else inputs[::-1], expected)


def test_a_column_has_one_type_in_all_files(tmp_path: Path) -> None:
    for name, value in {"a": "1", "b": "2.5", "c": "x"}.items():
        (tmp_path / f"{name}.csv").write_text(f"v,w,y\n{value},{value if name != 'c' else ''},p\n")
    dataset = open_table(tmp_path)
    assert dataset.schema is not None
    assert [column.categories for column in dataset.schema.columns] == [("1", "2.5", "x"), ()]


REJECTED = {
    "line too long": (b"a,b,y\n1,x,p\n\n1,x,p,q\n", "t.csv, line 4: has 4 columns, but the header names 3"),
    "line too short": (b"a,b,y\r\n1,x,p\r\n1,x\r\n", "t.csv, line 3: has 2 columns, but the header names 3"),
    "after quoted lines": (b'a,y\n"1\n2",p\n3\n', "t.csv, line 4: has 1 columns, but the header names 2"),
    "open quote": (b'a,b,y\n1,x,p\n1,"x,p\n2,w,q\n', "t.csv, line 3: has a quote that is never closed"),
    "not UTF-8": ("a,y\nx,p\né,p\n".encode("latin-1"), "t.csv, line 3: is not UTF-8.*\n.*data.encoding"),
    "mixed encodings": (b"a,y\n\xc3\xa9,p\n\xe9,p\n", "t.csv, line 3: is not UTF-8"),
    "UTF-16": ("a,y\n1,p\n".encode("utf-16"), "is UTF-16.*\n.*data.encoding: utf-16"),
    "NUL byte": (b"a,y\n1,p\n\0,p\n", "t.csv, line 3: has a NUL byte"),
    "binary": (bytes(range(256)), "t.csv, line 1: has a NUL byte"),
    "empty": (b"", "t.csv: is empty"),
    "empty lines": (b"\n\n", "t.csv: has only empty lines"),
    "header alone": (b"a,y\n", "no rows"),
    "no header": (b"5.1,3.5,0\n4.9,3.0,1\n", "line 1: the first line has values instead of the names.*5.1, 3.5, 0"),
    "two names": (b"a,a,y\n1,2,p\n", "line 1: two columns are called 'a'"),
    "no name": (b"a,,y\n1,2,p\n", "line 1: column 2 has no name"),
    "truncated gzip": (gzip.compress(b"a,y\n1,p\n" * 9)[:-6], "is corrupt or truncated"),
    "Parquet": (b"PAR1" + b"\0" * 20, "is not CSV but Parquet\n.*source: parquet"),
    "JSON lines": (b'{"a": 1}\n', "is not CSV but JSON lines.*\n.*source: jsonl"),
}


@pytest.mark.parametrize(("content", "message"), REJECTED.values(), ids=REJECTED)
@pytest.mark.parametrize("block_bytes", [1, 4 << 20], ids=["a block per row", "one block"])
def test_unusable_files_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, content: bytes, message: str
) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.text.blocks.BLOCK_BYTES", block_bytes)
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_table(tmp_path / "t.csv")
    assert caught.value.fix


@pytest.mark.parametrize("block_bytes", [50, 4 << 20])
def test_a_column_of_numbers_with_a_stray_text_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.text.blocks.BLOCK_BYTES", block_bytes)
    values = [*map(str, range(30)), "unknown"]
    (tmp_path / "t.csv").write_text(
        ",a,b,code,y\n" + "".join(f"{row},{value},x{row},0{row},p\n" for row, value in enumerate(values))
    )
    assert open_table(tmp_path / "t.csv").warnings == (
        "the first column has no name: it is left out, like the index that pandas and R write",
        "the column 'a' is text because of values such as 'unknown'; most others are numbers. If they stand for "
        "missing values, add them to data.null_values",
    )
    dataset = open_table(tmp_path / "t.csv", null_values=["unknown"])
    assert dataset.schema is not None
    assert dataset.schema.columns[0].kind == "number"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes("é,y\n1,ü\n2,ß\n".encode(encoding))
    dataset = open_table(tmp_path / "t.csv", encoding=encoding)
    assert dataset.label_names == ("ß", "ü")


def test_text_columns_are_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,y\n1.0,1,1e3\n2,2,5\n")
    dataset = open_table(tmp_path / "t.csv", text_columns=["a", "y"])
    assert dataset.schema is not None
    assert [column.categories for column in dataset.schema.columns] == [("1.0", "2"), ()]
    assert dataset.label_names == ("1e3", "5")
    with pytest.raises(DataError, match="no column 'c'"):
        open_table(tmp_path / "t.csv", text_columns=["c"])


def test_wide_tables_and_long_rows(tmp_path: Path) -> None:
    names = [f"c{index}" for index in range(10_000)]
    (tmp_path / "wide.csv").write_text(",".join([*names, "y"]) + "\n" + ("1," * 10_000 + "p\n") * 3)
    assert open_table(tmp_path / "wide.csv").train.inputs.sum() == 30_000
    (tmp_path / "long.csv").write_text(f"a,b,y\n1,{'x' * 10_000_000},p\n2,z,q\n")
    assert open_table(tmp_path / "long.csv").train.inputs.tolist() == [[1, 0], [2, 1]]


@pytest.mark.parametrize("text", [b'"x\n', b'a,"x\ny', b'a,"x""\n'])
def test_a_record_ends_outside_of_quotes(text: bytes) -> None:
    assert CsvSplitter(",").find_last_end(text) == 0
    assert CsvSplitter(",").find_last_end(b'a,5" pipe\n' + text) == 10, "a quote inside a field does not count"
