"""From records to batches: LLaVA-format files, and the order in which they are seen.

A record is {"id": ..., "image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value": text}, ...]};
a file is a JSON list of them or JSONL, one per line. A bad record raises RecordError with one line that says where and what;
in training it is skipped and counted unless the run is strict.

Files may hold millions of records. None is kept in memory: an index of byte offsets is built once, written beside a large file
(or into a cache where that folder is read-only) and memory-mapped from then on, by every rank and worker alike.

Step s of a run shows the records at places s * batch_size ... of an endless order: every epoch a permutation of its own,
drawn from the seed. The ranks share a step's records by size, the largest dealt out first, so that none waits long for
another. What is learned in a step does not depend on who reads what: the order is the same for any number of workers and
ranks, and training goes on from any step without replaying the ones before.

Legend: B records of a step (the global batch), R ranks, I images, L patches, M local tokens of all images.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from sliming.chat import IGNORE, IMAGE, IMAGE_TOKEN, Encoded, encode
from sliming.model import Batch, Sample, SliME
from sliming.records import RecordError
from sliming.slicer import Slices, choose_grid, open_image

CHUNK = 1 << 20    # characters read at a time while a file is indexed
LONGEST = 1 << 26  # characters of one record, at most
SMALL = 1 << 24    # bytes of a file that is indexed anew each time, in a fraction of a second, and leaves no index behind


# ------------------------------------------------------------------------------------------------------- files of records


def offsets_of_lines(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end byte of every line of a JSONL file that is not blank."""
    with open(path, "rb") as file:
        start = 0
        for line in file:
            if line.strip():
                yield start, start + len(line)
            start += len(line)


def offsets_in_list(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end byte of every element of a JSON list, read piece by piece. RecordError, with the line, if it is broken."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    with open(path, encoding="utf-8", newline="") as file:
        text, at, byte, line, expected = file.read(CHUNK), 0, 0, 1, "["

        def advance(end: int) -> None:
            nonlocal at, byte, line
            byte, line, at = byte + len(text[at:end].encode()), line + text.count("\n", at, end), end

        while True:
            if len(text) - at < CHUNK // 2:
                text, at = text[at:] + file.read(CHUNK), 0
            advance(space.match(text, at).end())
            mark = text[at:at + 1]
            if mark and mark in expected:
                advance(at + 1)
                if mark == "]":
                    return
                expected = "]" if mark == "[" else ""  # and a record, in both cases
            elif expected in ("", "]") and mark:
                try:
                    end = decoder.raw_decode(text, at)[1]
                except json.JSONDecodeError as error:
                    piece = file.read(CHUNK) if len(text) - at < LONGEST else ""
                    if piece:  # the record may go on behind what was read
                        text += piece
                        continue
                    raise RecordError(f"{path}, line {line + text.count(chr(10), at, error.pos)}: broken JSON "
                                      f"({error.msg})") from error
                start = byte
                advance(end)
                yield start, byte
                expected = ",]"
            else:
                raise RecordError(f"{path}, line {line}: broken JSON (expected {' or '.join(expected) or 'a record'})")


class RecordFile(Sequence):
    """The records of one JSON or JSONL file, read one at a time through a memory-mapped index of byte offsets.

    The index, int64 [n, 2], is made at the first use and made again when the file's size or time of change differ from
    those that it was made for. Raises RecordError for a missing, empty or broken file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            stat = self.path.stat()
            with open(self.path, "rb") as file:
                first = file.read(4096).lstrip()[:1]
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
        stamp = np.array([stat.st_size, stat.st_mtime_ns], dtype=np.int64)
        beside = self.path.with_name(self.path.name + ".index.npy")
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:24]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sliming" / f"{name}.index.npy"
        for place in (beside, cache):
            if place.is_file():
                index = np.load(place, mmap_mode="r")
                if np.array_equal(index[0], stamp):
                    self.index = index[1:]
                    return
        try:
            offsets = offsets_in_list(self.path) if first == b"[" else offsets_of_lines(self.path)
            # fromiter of a flat stream: 16 bytes per record and no Python list of millions of pairs
            index = np.fromiter((byte for pair in offsets for byte in pair), dtype=np.int64).reshape(-1, 2)
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{path}: cannot be read as text ({error})") from error
        if len(index) == 0:
            raise RecordError(f"{path}: no records in it")
        self.index = index
        if stat.st_size < SMALL:
            return
        place = beside if os.access(beside.parent, os.W_OK) else cache
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.npy")  # ranks and runs may build it at the same time
        np.save(temporary, np.concatenate([stamp[None], index]))
        os.replace(temporary, place)
        self.index = np.load(place, mmap_mode="r")[1:]

    def __len__(self) -> int:
        return len(self.index)

    def size(self, index: int) -> int:
        """Bytes of a record: what its text is worth before it is read."""
        start, stop = self.index[index]
        return int(stop - start)

    def __getitem__(self, index: int) -> dict:
        start, stop = map(int, self.index[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            return json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            with open(self.path, "rb") as file:
                line = 1 + sum(piece.count(b"\n") for piece in iter(lambda: file.read(min(CHUNK, start - file.tell())), b""))
            raise RecordError(f"{self.path}, line {line}: broken JSON ({getattr(error, 'msg', error)}); the file may have "
                              "been changed during the run") from error


class Mixture:
    """Several files as one epoch: file i contributes weights[i] times its length, in an order of its own.

    A weight of 2 shows every record twice an epoch, .5 a different half every epoch. `records[place]` is the record at a
    place of the endless order (see the module's docstring), `len` the records of one epoch.
    """

    def __init__(self, files: list[RecordFile], weights: list[float], seed: int):
        self.files, self.seed = files, seed
        self.counts = [max(1, round(weight * len(file))) for file, weight in zip(files, weights)]
        self.starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def where(self, place: int) -> tuple[RecordFile, int]:
        """File and index in it of the record at a place."""
        epoch, rest = divmod(place, len(self))
        slot = int(permutation(len(self), self.seed, 0, epoch)[rest])
        which = int(np.searchsorted(self.starts, slot, side="right")) - 1
        file = self.files[which]
        turn, at = divmod(epoch * self.counts[which] + slot - int(self.starts[which]), len(file))
        return file, int(permutation(len(file), self.seed, 1 + which, turn)[at])

    def size(self, place: int) -> int:
        file, index = self.where(place)
        return file.size(index)

    def __getitem__(self, place: int) -> dict:
        file, index = self.where(place)
        return file[index]


@lru_cache(maxsize=8)  # a step touches one epoch, or two at its border; drawing one costs as much as all its records
def permutation(size: int, *key: int) -> np.ndarray:
    """A seeded order of `size` things: int64 [size]."""
    return np.random.default_rng(list(key)).permutation(size)


def open_mixture(specification: list[str], seed: int) -> Mixture:
    """Files with optional weights, "a.json" or "b.jsonl:0.5", as one mixture. Raises RecordError."""
    files, weights = [], []
    for item in specification:
        path, colon, weight = item.rpartition(":")
        try:
            weights.append(float(weight) if colon else 1.0)
        except ValueError:
            path, colon = item, ""
            weights.append(1.0)
        if not weights[-1] > 0:
            raise RecordError(f"{item}: a weight must be above 0")
        files.append(RecordFile(path if colon else item))
    return Mixture(files, weights, seed)


# ------------------------------------------------------------------------------------------------------------ one record


def check_record(record: object) -> tuple[list[dict], list]:
    """The conversation and the images of a record in LLaVA's format; raises RecordError that names what is wrong."""
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object with `conversations`, not {type(record).__name__}")
    name = f"record {record.get('id', '(no id)')}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{name}: no conversations")
    for index, turn in enumerate(turns):
        expected = "human" if index % 2 == 0 else "gpt"
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise RecordError(f'{name}: turn {index + 1} must be {{"from": "{expected}", "value": text}}')
        if expected == "gpt" and not turn["value"].strip():
            raise RecordError(f"{name}: turn {index + 1} is an empty answer")
        if expected == "gpt" and IMAGE in turn["value"]:
            raise RecordError(f"{name}: turn {index + 1} is an answer with an {IMAGE} marker")
    if len(turns) % 2:
        raise RecordError(f"{name}: the last question has no answer")
    images = record.get("image", [])
    images = images if isinstance(images, list) else [images]
    markers = sum(turn["value"].count(IMAGE) for turn in turns)
    if markers != len(images):
        raise RecordError(f"{name}: {markers} {IMAGE} markers for {len(images)} images; write one marker per image")
    return turns, images


def load_sample(record: dict, folder: Path | None, template: str, model: SliME, *, parts: str = "both",
                max_tokens: int | None = None) -> Sample:
    """Reads, slices and tokenises one record. Image paths are relative to `folder` and stay inside it.

    A sample of more than `max_tokens` tokens loses crops, never words: the bound on an image's crops falls until it fits.
    Raises RecordError for a malformed record, for a missing, broken or misplaced image, and for a sample that is too long
    with one crop per image.
    """
    turns, images = check_record(record)
    name = f"record {record.get('id', '(no id)')}"
    opened = []
    for image in images:
        if isinstance(image, str):
            path = (folder / image).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise RecordError(f"{name}: image {image} lies outside the image folder {folder}")
            image = path
        elif folder is not None:
            raise RecordError(f"{name}: an image must be a path, not {type(image).__name__}")
        try:
            opened.append(open_image(image))
        except (ValueError, OSError) as error:
            raise RecordError(f"{name}: {error}") from error
    text, limit = encode(turns, template, model.tokenizer), model.config.max_crops
    while max_tokens is not None:
        grids = [choose_grid(image.width, image.height, **model.grid_rule(limit)) for image in opened]
        length = token_count(text, grids, model, parts)
        if length <= max_tokens:
            break
        limit = max((columns * rows for columns, rows in grids), default=1) - 1
        if limit == 0 or parts == "global":
            raise RecordError(f"{name}: {length} tokens with the fewest crops, the limit is {max_tokens}; shorten the conversation")
    return Sample(text, [model.slice(image, max_crops=limit) for image in opened])


def token_count(text: Encoded, grids: list[tuple[int, int]], model: SliME, parts: str) -> int:
    """Tokens of a sample for the language model, before the router drops any; `grids` (columns, rows) of its images."""
    local = sum(columns * rows for columns, rows in grids) * model.config.num_queries if parts != "global" else 0
    whole = len(grids) * (model.adapter.num_tokens + (parts == "both")) if parts != "local" else 0
    return len(text.ids) - len(grids) + whole + local


def with_noise(sample: Sample, model: SliME, *key: int) -> Sample:
    """The sample with the training noise that belongs to `key`: the same on any rank and in any batch."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    local = sum(columns * rows for columns, rows in (image.grid for image in sample.images)) * model.config.num_queries
    return replace(sample, gate_noise=torch.randn(len(sample.images), model.adapter.num_tokens, 2, generator=generator),
                   router_noise=torch.randn(local, generator=generator))


def blank_sample(model: SliME, learned: bool) -> Sample:
    """One dark crop: what a rank without images runs, so that all ranks run the same modules.

    `learned` False: nothing of it is supervised. True: one token is, for a batch of its own whose loss counts nothing.
    """
    view = torch.zeros(3, model.crop_size, model.crop_size, dtype=torch.uint8)
    word = model.separator_id
    text = Encoded([word, IMAGE_TOKEN, word], [IGNORE, IGNORE, word if learned else IGNORE], [word])
    return with_noise(Sample(text, [Slices(view, view[None], (1, 1))]), model, 0)


# --------------------------------------------------------------------------------------------------------- batches of them


@dataclass
class Share:
    """What one rank does in one step: micro-batches, and what had to be left out."""

    batches: list[Batch] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)       # of the records in them
    skipped: list[str] = field(default_factory=list)   # one line each


@dataclass(frozen=True)
class Steps(Dataset):
    """Item s: this rank's share of step s. Every record that can be read is in exactly one rank's share."""

    records: Sequence[dict]     # by place: a Mixture, or an endless generator such as synthetic.TrainingSet
    folder: Path | None         # of the images
    template: str
    parts: str
    model: SliME                # for its slicing rule and tokenizer
    batch_size: int             # B
    steps: int
    first: int = 0              # steps before it are done
    rank: int = 0
    world: int = 1
    strict: bool = False        # raise RecordError instead of skipping
    micro_batch: int | None = None  # records of a micro-batch, at most
    token_budget: int | None = None  # tokens of a micro-batch, at most, unless one sample alone is longer
    max_tokens: int | None = None   # tokens of a sample
    noise: tuple[int, ...] = (0,)   # what the training noise is drawn from, besides the place

    def __len__(self) -> int:
        return self.steps - self.first

    def places(self, step: int) -> list[int]:
        """This rank's places of a step: all of them sorted by size, dealt out there and back."""
        places = list(range(step * self.batch_size, (step + 1) * self.batch_size))
        if self.world > 1 and hasattr(self.records, "size"):
            places.sort(key=self.records.size, reverse=True)
        rounds = [places[start:start + self.world] for start in range(0, len(places), self.world)]
        mine = [turn[self.rank if number % 2 == 0 else -1 - self.rank] for number, turn in enumerate(rounds)]
        return sorted(mine)

    def __getitem__(self, item: int) -> Share:
        if item >= len(self):
            raise IndexError(f"step {item} of {len(self)}")
        share, samples, tokens = Share(), [], 0
        for place in self.places(self.first + item):
            try:
                record = self.records[place]
                sample = load_sample(record, self.folder, self.template, self.model, parts=self.parts, max_tokens=self.max_tokens)
            except RecordError as error:
                if self.strict:
                    raise
                share.skipped.append(str(error))
                continue
            length = token_count(sample.text, [image.grid for image in sample.images], self.model, self.parts)
            full = len(samples) == self.micro_batch or (self.token_budget is not None and tokens + length > self.token_budget)
            if samples and full:
                share.batches.append(self.pack(samples))
                samples, tokens = [], 0
            samples.append(with_noise(sample, self.model, *self.noise, place))
            tokens += length
            share.ids.append(str(record.get("id", f"at place {place}")))
        if samples:
            share.batches.append(self.pack(samples))
        return share

    def pack(self, samples: list[Sample]) -> Batch:
        """Samples as one micro-batch; with several ranks each has an image, a blank one if need be."""
        if self.world > 1 and not any(sample.images for sample in samples):
            samples = [*samples, blank_sample(self.model, learned=False)]
        return Batch.pack(samples)
