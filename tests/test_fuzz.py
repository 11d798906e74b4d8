"""Whatever a stranger hands over: no traceback, no hang, one line, counted once.

Seeded; `--fuzz 5000` for a night.
"""

import copy
import importlib
import io
import json
import random
import signal
import sys
from contextlib import contextmanager

import pytest
from PIL import Image

from sliming.config import Parser, Recipe
from sliming.data import RecordFile, Steps, open_mixture
from sliming.guard import plain
from sliming.images import FORMATS, open_image
from sliming.records import RecordError, elements

SECONDS = 5


@pytest.fixture
def count(request):
    return request.config.getoption("--fuzz")


@contextmanager
def in_time(what):
    def late(*_):
        raise AssertionError(f"{what} takes longer than {SECONDS} s")

    if hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def is_one_line(text):
    return text and plain(text) == text and len(text) < 1000


# ------------------------------------------------------------------------------------------- images


def seeds():
    """A small image of every format and mode that can be written."""
    for name in FORMATS:
        for mode in ("RGB", "P", "L", "RGBA", "1", "I;16", "CMYK", "LA", "F"):
            image = Image.radial_gradient("L").resize((37, 23)).convert("RGB")
            with io.BytesIO() as file:
                try:
                    image.convert("L").convert(mode).save(file, name)
                except Exception:  # this format has no such mode, or cannot be written
                    continue
                yield file.getvalue()


def spoiled(rng, content, others):
    """The bytes with a few of the things done to them that a bad disk, link or person does."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) + 1)
        size = rng.choice((1, 2, 4, 64))
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at + size] = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f")) * size
        elif kind == 2:
            content[at:at + size] = rng.randbytes(size)
        elif kind == 3 and rng.random() < 0.3:
            del content[at:]
        elif kind == 4:
            del content[at:at + size]
        elif kind == 5:
            content[at:at] = content[at:at + size]
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            content[at:at + size] = other[start:start + size]
    return bytes(content)


def test_images(tmp_path, count):
    rng, made = random.Random(0), list(seeds())
    assert len(made) > 30
    opened, path = 0, tmp_path / "image"
    for number in range(count):
        path.write_bytes(spoiled(rng, rng.choice(made), made))
        with in_time(f"image {number}"):
            try:
                image = open_image(path)
            except (ValueError, OSError) as error:
                assert is_one_line(str(error)) and str(path) in str(error), number
            else:
                assert image.mode == "RGB" and min(image.size) > 0, number
                opened += 1
    assert 0.05 < opened / count < 0.95


# ------------------------------------------------------------------------------------------ records


ODD = [None, True, 0, -1, 1e308, float("nan"), "", " ", "<image>", "<im<image>age>", "\ud800",
       "\x1b[2J", "a\nb", "\u2028", "\0", "..", "/", "../../etc/passwd", "x" * 3000, "</s>",
       "<|eot_id|>", [], {}, [[]], {"from": "human"}, "a.png", ["a.png"] * 3, {"value": None},
       "\u202e\u0600", 10**400, "word " * 3000, "<image>" * 50]


def altered(rng, record):
    """The record with one of its values, at any depth, replaced, dropped or doubled."""
    record = copy.deepcopy(record)
    place, key = record, rng.choice(list(record))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    what = rng.randrange(4)
    if what == 0:
        del place[key]
    elif what == 1 and isinstance(place, list):
        place.insert(key, place[key])
    else:
        place[key] = copy.deepcopy(rng.choice(ODD))
    return record


def test_records(model, tmp_path, count):
    """Line by line: each is used, or skipped with one line; never both, never twice."""
    rng = random.Random(1)
    Image.new("RGB", (70, 90), "white").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]
    good = {"id": "g", "image": "a.png", "conversations": turns * 1}
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]
    words = {"id": "w", "conversations": talk * 2}
    lines = []
    for _ in range(count):
        line = json.dumps(altered(rng, rng.choice((good, words))), ensure_ascii=rng.random() < 0.5)
        line = line.encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            line = spoiled(rng, line, [b'{"id": [1]}', b'"\\ud800"', b"[" * 2000, b"1" * 5000])
        lines.append(line.replace(b"\n", b" ").strip() or b"?")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"\n".join(lines))  # the first line says that this is JSONL
    mixture = open_mixture([str(path)], 0)
    assert len(mixture) == count + 1
    used, skipped = 0, []
    steps = Steps(mixture, model.processor, "both", "chat", Recipe(1, 0.0), len(mixture), tmp_path)
    for step in range(len(steps)):
        with in_time(f"record {step}"):
            share = steps[step]
        assert len(share.ids) + len(share.skipped) == 1
        used += len(share.ids)
        skipped += share.skipped
    assert all(map(is_one_line, skipped)) and used + len(skipped) == count + 1
    assert 0.05 < used / count < 0.95


def test_files_of_records(tmp_path, count):
    """Whole files: what can be read of them is read, or one line names the file."""
    rng, path, opened = random.Random(2), tmp_path / "a.json", 0
    record = {"id": "w", "n": [1, {"a": "\"]}"}],
              "conversations": [{"from": "human", "value": "Gr\u00fc\u00dfe?"}]}
    reads = (lambda: list(elements(path)), lambda: len(RecordFile(path)),
             lambda: list(RecordFile(path)))
    for number in range(count):
        text = json.dumps([record] * 3, indent=rng.choice((None, 1)), ensure_ascii=False).encode()
        start = rng.choice((b"", b"\xef\xbb\xbf", b" \n" * 3000))
        path.write_bytes(start + spoiled(rng, text, [b"[]", b"1e999", b"[" * 3000]))
        for read in reads:
            with in_time(f"file {number}"):
                try:
                    read()
                    opened += 1
                except RecordError as error:
                    assert is_one_line(str(error)) and "a.json" in str(error), number
    assert opened


# -------------------------------------------------------------------------------------------- flags

PROGRAMS = {"train": [], "sample": [], "sliming.evaluation.run": [],
            "sliming.tiny.__main__": ["--picture", "x"],
            "sliming.checkpoints.__main__": ["--merge", "a", "b"],
            "sliming.smr.build": ["build", "dvqa", "x", "--out", "y"]}
WORDS = ["", " ", "x", "-1", "0", "1", "2", "0.5", "1e3", "-0.0", "1e12", "1e400", "nan", "inf",
         "-inf", "1,5", "0x10", "10" * 40, "\u0663", "a\nb\x1b[31m", "None", "True", "[1]",
         "1" * 5000]


def parser_of(name, monkeypatch):
    """The parser of a program, taken as its `main` begins."""
    class Taken(Exception):
        pass

    def take(self, *_):
        raise Taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", take)
        patch.setattr(sys, "argv", [name])
        try:
            importlib.import_module(name).main()
        except Taken as taken:
            parser = taken.args[0]
    for action in parser._actions:  # of a program with commands, the first one's
        if isinstance(action.choices, dict):
            return parser, action.choices["build"]._actions
    return parser, parser._actions


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags(name, monkeypatch, capsys):
    """Every odd word, and numbers just inside and outside: a value in the range, or one line."""
    parser, actions = parser_of(name, monkeypatch)
    for action in actions:
        if not action.option_strings or action.nargs == 0 or action.dest == "help":
            continue
        flag, words = action.option_strings[0], list(WORDS)
        assert action.type not in (int, float), f"{flag} has no range"
        kind, low, high, above = getattr(action.type, "range", (str, None, None, None))
        if kind is not str:
            words += [str(kind(low)), str(low - 1)]
            if high < 1e300:
                words += [str(kind(high)), str(high + 1)]
        for word in words:
            with in_time(f"{flag} {word[:20]}"):
                try:
                    given = parser.parse_args([*PROGRAMS[name], f"{flag}={word}"])
                    value = getattr(given, action.dest)
                except SystemExit as stop:
                    (line,) = capsys.readouterr().err.splitlines()
                    assert stop.code == 2 and plain(line) == line and flag in line, line
                    continue
            if kind is not str:
                value = value[-1] if isinstance(value, list) else value
                assert low <= value <= high and (value > low or not above), (flag, word)
