"""Blocks of complete records of a text file, which is decompressed and converted to UTF-8 while it is read."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipeline.data.sources.tables.sniff import UTF16_BOMS, find_compression
from pipeline.errors import DataError

BLOCK_BYTES = 4 << 20
"""Size of the blocks that are parsed one by one, by several threads."""

HEAD_BYTES = 1 << 20
"""Size of the begin of a text that tells its dialect and columns."""

MAX_RECORD_BYTES = 256 << 20
"""Size from which a single record is taken for a mistake, such as a quote that is never closed."""

QUOTE, NEWLINE, RETURN = (ord(character) for character in '"\n\r')


class Block(NamedTuple):
    """Complete records. offset: of the first byte in the text, in UTF-8 and without a byte order mark."""

    offset: int
    data: bytes


class TextStream:
    """The text of a file in UTF-8, with "\\n" at the ends of its lines if it has nothing but "\\r" there.

    Parameters
    ----------
    raw: the file, positioned at its begin.
    encoding: encoding of the text.

    Raises
    ------
    DataError: from `read`: the text has another encoding.
    OSError: from `read`: the file is damaged.
    """

    def __init__(self, raw: IO[bytes], encoding: str, where: str) -> None:
        self._raw, self._where, self._encoding = raw, where, encoding
        self._stack = ExitStack()
        self._source: Any = raw
        self._decoder: codecs.IncrementalDecoder | None = None
        self._translates = False
        self._pending = b""
        with ExitStack() as stack:
            stack.enter_context(raw)
            self._open(stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def consumed_bytes(self) -> int:
        """Number of bytes of the file that have been read."""
        return self._raw.tell()

    def read(self, length: int) -> bytes:
        """Return about `length` bytes: fewer at the end of the text, none after it; a few more if it is decoded."""
        parts, count = [self._pending], len(self._pending)
        self._pending = b""
        while count < length and (block := self._source.read(length - count)):
            parts.append(self._decode(block))
            count += len(parts[-1])
        if self._decoder is not None and count < length:
            parts.append(self._decode(b"", final=True))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek(self) -> bytes:
        """Return the begin of the text: up to `HEAD_BYTES` before the first `read`."""
        return self._pending

    def _open(self, stack: ExitStack) -> None:
        """Read the begin of the text. stack: closes what is opened."""
        head = self._raw.read(4)
        self._raw.seek(0)
        if (codec := find_compression(head)) is not None:
            compressed = stack.enter_context(pa.PythonFile(self._raw, mode="r"))
            self._source = stack.enter_context(pa.CompressedInputStream(compressed, codec))
        head = self._source.read(HEAD_BYTES)
        if codecs.lookup(self._encoding).name in ("utf-8", "ascii", "utf-8-sig"):
            if head.startswith(UTF16_BOMS):
                raise DataError("is UTF-16, not UTF-8", where=self._where, fix="set data.encoding: utf-16")
            head = head.removeprefix(codecs.BOM_UTF8)
        else:
            self._decoder = codecs.getincrementaldecoder(self._encoding)("strict")
        head = self._decode(head)
        self._translates = b"\r" in head[:-1] and b"\n" not in head
        self._pending = head.replace(b"\r", b"\n") if self._translates else head

    def _decode(self, block: bytes, final: bool = False) -> bytes:
        if self._decoder is not None:
            try:
                block = self._decoder.decode(block, final).removeprefix("\ufeff").encode()
            except UnicodeError as error:
                raise DataError(
                    f"is not {self._encoding}: {error}", where=self._where, fix="set data.encoding to its encoding"
                ) from None
        return block.replace(b"\r", b"\n") if self._translates else block


def iter_blocks(
    stream: TextStream, first: int, block_bytes: int, find_end: Callable[[bytes], int], where: str
) -> Iterator[Block]:
    """Yield the rest of a text in blocks of complete records.

    Parameters
    ----------
    first: number of bytes to skip: the header.
    find_end: returns the end of the last complete record of a text, 0 if there is none.

    Raises
    ------
    DataError: a record is too long.
    """
    rest, offset = stream.read(max(block_bytes, first + 1))[first:], first
    more = rest
    while more:
        end = find_end(rest)
        if end:
            yield Block(offset, rest[:end] if end < len(rest) else rest)
            offset, rest = offset + end, rest[end:]
        elif len(rest) > MAX_RECORD_BYTES:
            raise DataError(
                f"has a record of more than {MAX_RECORD_BYTES >> 20} MB",
                where=f"{where}, from byte {offset:,}",
                fix="check whether a quote is never closed there",
            )
        more = stream.read(max(block_bytes - len(rest), len(rest)))
        rest = rest + more if rest else more
    if rest:
        yield Block(offset, rest)


class CsvSplitter:
    """Finds the ends of records as Arrow does: a quote counts only at the begin of a field, and a line break does not
    end a record inside quotes."""

    def __init__(self, delimiter: str) -> None:
        self._starts = np.zeros(256, bool)  # characters after which a field begins
        self._starts[[ord(delimiter), NEWLINE, RETURN]] = True

    def find_last_end(self, data: bytes) -> int:
        """Return the end of the last complete record, 0 if there is none. `data` begins with a record."""
        end = data.rfind(b"\n") + 1
        if not end or b'"' not in data:
            return end
        opening, closing = self._find_quoted(data)
        while end:
            number = int(np.searchsorted(opening, end)) - 1  # the last quoted part that begins before
            if number < 0 or (number < len(closing) and closing[number] < end):
                return end
            end = data.rfind(b"\n", 0, int(opening[number])) + 1
        return 0

    def find_first_end(self, data: bytes) -> int:
        """Return the end of the first record, 0 if it is not complete."""
        opening, closing = self._find_quoted(data) if b'"' in data else (np.empty(0), np.empty(0))
        end = data.find(b"\n") + 1
        while end:
            number = int(np.searchsorted(opening, end)) - 1
            if number < 0 or (number < len(closing) and closing[number] < end):
                return end
            if number >= len(closing):
                return 0
            end = data.find(b"\n", int(closing[number])) + 1
        return 0

    def find_open_quote(self, data: bytes) -> int:
        """Return the position of a quote that is never closed, -1 if there is none."""
        if b'"' not in data:
            return -1
        opening, closing = self._find_quoted(data)
        return int(opening[-1]) if len(opening) > len(closing) else -1

    def _find_quoted(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the quotes that open and that close quoted text. An escaped quote, which is doubled,
        closes and opens it."""
        characters = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(characters == QUOTE)
        opening, closing = quotes[0::2], quotes[1::2]
        before, after = characters[opening - 1], characters[np.minimum(closing + 1, len(characters) - 1)]
        is_first = opening == 0
        is_last = closing == len(characters) - 1
        if (is_first | self._starts[before] | (before == QUOTE)).all() and (
            is_last | self._starts[after] | (after == QUOTE)
        ).all():
            return opening, closing
        return self._find_quoted_one_by_one(data, quotes.tolist())

    def _find_quoted_one_by_one(self, data: bytes, quotes: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Do the same for text with quotes inside unquoted fields, or text after a closing quote."""
        opening, closing, is_quoted, index = [], [], False, 0
        while index < len(quotes):
            position = quotes[index]
            if is_quoted and index + 1 < len(quotes) and quotes[index + 1] == position + 1:
                index += 1  # doubled
            elif is_quoted:
                closing.append(position)
                is_quoted = False
            elif position == 0 or self._starts[data[position - 1]]:
                opening.append(position)
                is_quoted = True
            index += 1
        return np.array(opening, np.int64), np.array(closing, np.int64)


def count_lines(stream: TextStream, end: int) -> int:
    """Return the number of line ends in the first `end` bytes of a text."""
    count = 0
    while end > 0 and (block := stream.read(min(end, BLOCK_BYTES))):
        count += block[:end].count(b"\n")
        end -= len(block)
    return count
