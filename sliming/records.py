"""Files of records as strangers write them: JSON lists and objects, JSONL, paths inside a folder.

Whatever cannot be used raises RecordError: one line that names the file, the place and the fault.
Nothing here keeps a whole file in memory.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import NamedTuple, TextIO

from sliming.guard import InputError, open_file

CHUNK = 1 << 20    # characters read at a time
LONGEST = 1 << 26  # characters of one element, at most

BLANKS = re.compile(r"[ \t\r\n]*")
# Only walks over values: the longest numbers, which Python refuses to convert, do not stop it.
DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 4000 else None)
NESTED = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


class RecordError(InputError):
    """A record or a file of records that cannot be used; the message is one line."""


def inside(folder: Path, name: str) -> Path:
    """The path `name` in `folder`; RecordError where it leads out of it, by `..`, root or link."""
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            return path
    except (ValueError, OSError, RuntimeError) as error:  # a null byte; links in a circle
        raise RecordError(f"{name!r} is no usable path ({error})") from error
    raise RecordError(f"{name} lies outside the folder {folder}")


# -------------------------------------------------------------------------- one JSON list or object


class Element(NamedTuple):
    """One element of a JSON list or object, and where its value stands in the file."""

    key: str | int  # in an object its name, in a list its place
    value: object
    start: int      # first byte of the value
    end: int        # the byte behind it


def elements(path: Path) -> Iterator[Element]:
    """The elements of the one list or object in a JSON file, in turn, a piece of the file at a
    time.

    RecordError, with the line, for a broken file, and for one that holds something else or more.
    """
    try:
        with open_file(path) as binary, TextIOWrapper(binary, "utf-8", newline="") as file:
            reader = _Reader(path, file)
            opening = reader.take("[{")
            closing = {"[": "]", "{": "}"}[opening]
            for place in count():
                if place == 0 and reader.peek() == closing:
                    break
                key = place
                if opening == "{":
                    key = reader.value()
                    reader.take(":")
                reader.peek()
                start = reader.byte()
                yield Element(key, reader.value(), start, reader.byte())
                if reader.peek() == closing:
                    break
                reader.take(",")
            reader.take(closing)
            if reader.peek():
                raise reader.error(f"something follows the closing {closing}: one list per file")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read as UTF-8 text ({error})") from error


class _Reader:
    """A text file read piece by piece, which knows its byte and line."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file, self.text, self.at = path, file, "", 0
        self.bytes, self.counted = 0, 0  # of the file, up to this place of the text
        self.lines = 0                   # before the text
        if self.peek() == "\ufeff":  # a byte-order mark
            self.at += 1

    def byte(self) -> int:
        """The byte of the file at which it stands."""
        self.bytes += len(self.text[self.counted:self.at].encode())
        self.counted = self.at
        return self.bytes

    def error(self, reason: str, at: int | None = None) -> RecordError:
        line = 1 + self.lines + self.text.count("\n", 0, self.at if at is None else at)
        return RecordError(f"{self.path}, line {line}: broken JSON ({reason})")

    def more(self) -> bool:
        """Drops what has been read and reads on; False at the end of the file."""
        piece = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.byte()
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at, self.counted = self.text[self.at:] + piece, 0, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def take(self, expected: str) -> str:
        """Steps over the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"expected {' or '.join(expected)}, found "
                             f"{found or 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> object:
        """Decodes the value that comes next."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                value, end = None, 0
                if isinstance(error, RecursionError):  # what follows it can be read all the same
                    end = self.end_of_nested()
                if not end:
                    if len(self.text) - self.at < LONGEST and self.more():
                        continue  # it may go on behind what was read
                    raise self.error(getattr(error, "msg", "nested too deeply"),
                                     getattr(error, "pos", self.at)) from error
            if end < len(self.text) or not self.more():  # a number at the edge may go on, too
                self.at = end
                return value

    def end_of_nested(self) -> int:
        """Where the list or object that comes next ends; 0 if that was not read yet."""
        depth = 0
        for match in NESTED.finditer(self.text, self.at):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return match.end()
        return 0


# -------------------------------------------------------------------------------------------- JSONL


def parse(line: bytes | str, path: Path, number: int) -> object:
    """The JSON value of line `number`; RecordError where there is none."""
    try:
        return json.loads(line.decode("utf-8-sig") if isinstance(line, bytes) else line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error).partition("\n")[0]
        raise RecordError(f"{path}, line {number}: broken JSON ({reason})") from error


def cached(path: Path, kind: str) -> Path:
    """Where the user's cache keeps what is made of a file; `kind` ends its name."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))) / "sliming"
    return cache / f"{name}.{kind}"


def lines(path: Path, read: Callable = parse) -> Iterator[tuple[int, object]]:
    """Number and value, as `read` takes it, of every line of a JSONL file that is not blank.
    RecordError."""
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, read(line, path, number)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error


def mend(path: Path) -> None:
    """Makes a JSONL file that a program of this package appends to end with a whole line: a last
    one that was torn when its writer was killed is cut off. Reads no more than that line.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = start = file.seek(0, os.SEEK_END)
        last = b""
        while start and b"\n" not in last:
            start = max(0, start - CHUNK)
            file.seek(start)
            last = file.read(end - start)
        last = last[last.rfind(b"\n") + 1:]
        try:
            if last:
                parse(last, path, 0)
                file.write(b"\n")  # whole, but for its end
        except RecordError:
            file.truncate(end - len(last))


def resume(path: Path) -> list[dict]:
    """The rows of a JSONL file that a program of this package appends to, [] where there is none.

    A torn last line is cut off (`mend`); RecordError for anything else that is broken.
    """
    mend(path)
    rows = []
    for number, row in lines(path) if path.exists() else ():
        if not isinstance(row, dict):
            raise RecordError(f"{path}, line {number}: not a row of this program; remove it")
        rows.append(row)
    return rows
