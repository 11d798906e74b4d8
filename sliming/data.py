"""From records to batches: LLaVA-format files, and the order in which they are seen.

A record is {"id": ..., "image": path | [paths] | absent, "conversations": [{"from": "human" |
"gpt", "value": text}, ...]}, or has one of the hub's forms (hub.py); a file is a JSON list of them,
JSONL or parquet. A bad record raises RecordError; in training it is skipped, named and counted
unless the run is strict.

Files may hold millions of records. None is kept in memory: an index of byte offsets is built once,
written beside a large file (or into a cache where that folder is read-only) and memory-mapped from
then on, by every rank and worker alike.

Step s of a run shows the records at places s * batch_size ... of an endless order: every epoch a
permutation of its own, drawn from the seed. What is learned in a step does not depend on who reads
what: the order is the same for any number of workers and ranks, and training goes on from any step
without replaying the ones before.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from sliming.chat import IMAGE, encode
from sliming.config import Recipe
from sliming.guard import fingerprint, open_file
from sliming.hub import FORMS, Picture, Shards, as_llava, download, form_of
from sliming.images import full_size
from sliming.inputs import Batch, Processor, Sample
from sliming.records import RecordError, cached, elements, inside, parse
from sliming.slicer import Slices

SMALL = 1 << 24  # bytes of a file that is indexed anew each time, in a fraction of a second

# ------------------------------------------------------------------------------------------ records


class RecordFile(Sequence):
    """The records of one JSON or JSONL file, read one at a time through an index of byte offsets.

    The index, int64 [n, 2], is made at the first use, and anew when the file's size or time of
    change differ from those it was made for. RecordError for a missing, empty or broken file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open_file(self.path) as file:
                stat = os.fstat(file.fileno())
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
                while not start and file.tell() < stat.st_size:
                    start = file.read(1 << 20).lstrip()
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
        if start and not 0x20 <= start[0] < 0x80:
            raise RecordError(f"{path}: does not begin as JSON in UTF-8 does; is it compressed, or "
                              "in UTF-16?")
        stamp = np.array([stat.st_size, stat.st_mtime_ns], dtype=np.int64)
        for place in self.places():
            if (index := read_index(place, stamp)) is not None:
                self.index = index
                return
        start = start[:1]
        offsets = offsets_in_list(self.path) if start == b"[" else offsets_of_lines(self.path)
        # A flat stream: 16 bytes per record, and no Python list of millions of pairs.
        flat = np.fromiter((byte for pair in offsets for byte in pair), dtype=np.int64)
        self.index = flat.reshape(-1, 2)
        if len(self.index) == 0:
            raise RecordError(f"{path}: no records in it")
        if stat.st_size >= SMALL:
            self.keep(stamp)

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    @property
    def form(self) -> str:
        """How its first record says what is said."""
        try:
            return FORMS.get(form_of(self[0]), "of no known form")
        except RecordError:
            return "the first is broken"

    def places(self) -> list[Path]:
        """Where the index may lie: beside the file, or in the user's cache."""
        return [self.path.with_name(self.path.name + ".index.npy"),
                cached(self.path, "index.npy")]

    def keep(self, stamp: np.ndarray) -> None:
        """Writes the index, and maps it into memory from there. Where no place takes it, it stays
        in memory."""
        for place in self.places():
            temporary = None
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                # Ranks and runs, of other machines too, may build it at the same time: each its
                # own file.
                handle, temporary = tempfile.mkstemp(".npy", f".{place.name}.", place.parent)
                with os.fdopen(handle, "wb") as file:
                    np.save(file, np.concatenate([stamp[None], self.index]))
                os.replace(temporary, place)
                self.index = read_index(place, stamp)
                return
            except OSError:  # read-only, or full
                if temporary:
                    Path(temporary).unlink(missing_ok=True)

    def __reduce__(self) -> tuple:
        """A worker that is handed the file opens it anew: the index is not copied."""
        return RecordFile, (self.path,)

    def __len__(self) -> int:
        return len(self.index)

    def size(self, index: int) -> int:
        """Bytes of a record: what its text is worth before it is read."""
        start, stop = self.index[index]
        return int(stop - start)

    def __getitem__(self, index: int) -> dict:
        start, stop = map(int, self.index[index])
        with open_file(self.path) as file:
            file.seek(start)
            text = file.read(stop - start)
            try:
                return parse(text, self.path, 0)
            except RecordError:  # count the lines up to it for the message
                file.seek(0)
                line = 1 + sum(file.read(min(1 << 20, start - at)).count(b"\n")
                               for at in range(0, start, 1 << 20))
        return parse(text, self.path, line)


def read_index(place: Path, stamp: np.ndarray) -> np.ndarray | None:
    """The index of a file of that size and time, mapped into memory; None where there is none, or
    it is damaged."""
    try:
        with open_file(place):
            index = np.load(place, mmap_mode="r", allow_pickle=False)
        start, stop = index[1:].T
        whole = index.dtype == np.int64 and np.array_equal(index[0], stamp)
        return index[1:] if whole and (start < stop).all() and (stop <= stamp[0]).all() else None
    except Exception:  # there is no end to what can be wrong with it, and it is made anew
        return None


def offsets_in_list(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end byte of every element of a JSON list."""
    return ((element.start, element.end) for element in elements(path))


def offsets_of_lines(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end byte of every line of a JSONL file that is not blank."""
    with open_file(path) as file:
        start = 0
        for line in file:
            if line.strip():
                yield start, start + len(line)
            start += len(line)


def check_record(record: object) -> tuple[list[dict], list]:
    """The conversation and the images of a record; RecordError that names what is wrong."""
    if not isinstance(record, dict):
        raise RecordError("a record must be an object with `conversations`, "
                          f"not {type(record).__name__}")
    record = as_llava(record)
    name = f"record {record.get('id', '(no id)')}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{name}: no conversations")
    system = isinstance(turns[0], dict) and turns[0].get("from") == "system"
    for index, turn in enumerate(turns):
        who = "system" if index < system else "gpt" if (index - system) % 2 else "human"
        said = turn.get("value") if isinstance(turn, dict) and turn.get("from") == who else None
        if not isinstance(said, str):
            raise RecordError(f"{name}: turn {index + 1} must be "
                              f'{{"from": "{who}", "value": text}}')
        if who == "gpt" and not said.strip():
            raise RecordError(f"{name}: turn {index + 1} is an empty answer")
        if who != "human" and IMAGE in said:
            raise RecordError(f"{name}: turn {index + 1} is no question, but has an {IMAGE} marker")
    if turns[-1]["from"] != "gpt":
        raise RecordError(f"{name}: the last question has no answer")
    images = record.get("image", [])
    images = images if isinstance(images, list) else [images]
    markers = sum(turn["value"].count(IMAGE) for turn in turns)
    if markers != len(images):
        raise RecordError(f"{name}: {markers} {IMAGE} markers for {len(images)} images; "
                          "write one marker per image")
    return turns, images


def load_sample(record: dict, folder: Path | None, template: str, processor: Processor, *,
                parts: str = "both", max_tokens: int | None = None) -> Sample:
    """Reads, slices and tokenises one record. Image paths are relative to `folder` and stay in it.

    A sample of more than `max_tokens` tokens, or than the language model can read, loses crops,
    never words: the bound on an image's crops falls until it fits. RecordError for a malformed
    record, for a missing, broken or misplaced image, and for a sample that is too long with one
    crop per image.
    """
    turns, images = check_record(record)
    name = f"record {record.get('id', '(no id)')}"
    try:
        if folder is not None:  # the built-in pictures are images themselves
            for image in images:
                if not isinstance(image, str | Picture):
                    raise RecordError(f"an image must be a path, not {type(image).__name__}")
            images = [image if isinstance(image, Picture) else inside(folder, image)
                      for image in images]
        # Pictures that the tower has read already come as they are.
        opened = [image if isinstance(image, Slices) else processor.open(image)
                  for image in images]
        text = encode(turns, template, processor.tokenizer)
    except (ValueError, OSError, TypeError) as error:  # the last for half a surrogate pair
        raise RecordError(f"{name}: {error}") from error
    limit = processor.config.max_crops
    max_tokens = min(filter(None, (max_tokens, processor.context)), default=None)
    while max_tokens is not None:
        grids = [image.grid if isinstance(image, Slices) else
                 processor.grid(*full_size(image), limit) for image in opened]
        length = processor.token_count(text, grids, parts)
        if length <= max_tokens:
            break
        limit = max((columns * rows for columns, rows in grids), default=1) - 1
        if limit == 0 or parts == "global":
            raise RecordError(f"{name}: {length} tokens with the fewest crops, the limit is "
                              f"{max_tokens}; shorten the conversation")
    return Sample(text, [processor.slice(image, limit, parts) for image in opened])


# -------------------------------------------------------------------------------------------- order


class Mixture:
    """Several files as one epoch: file i contributes weights[i] times its length, in an order of
    its own.

    A weight of 2 shows every record twice an epoch, .5 a different half every epoch.
    `records[place]` is the record at a place of the endless order, `len` the records of one epoch.
    `hold_back`: records at the end of the first file that are not in it, but in `held`.
    """

    def __init__(self, files: list[RecordFile | Shards], weights: list[float], seed: int,
                 hold_back: int = 0):
        self.files, self.seed, self.sizes = files, seed, [len(file) for file in files]
        self.sizes[0] = max(1, self.sizes[0] - hold_back)
        self.held = [files[0][index] for index in range(self.sizes[0], len(files[0]))]
        self.counts = [max(1, round(weight * size))
                       for size, weight in zip(self.sizes, weights, strict=True)]
        self.starts = np.cumsum([0, *self.counts])
        self.orders: dict[int, dict[int, np.ndarray]] = {}  # of what is shuffled: turn -> order

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the files are, that a run goes on with the same ones."""
        return {str(path): fingerprint(path) for file in self.files for path in file.paths}

    def __str__(self) -> str:
        """What was found, for the first line of a run."""
        found = [f"{file.path} ({len(file):,} records: {file.form})" for file in self.files]
        rest = f" and {len(found) - 4} more" if len(found) > 4 else ""
        return f"{len(self):,} records an epoch from {', '.join(found[:4])}{rest}"

    def where(self, place: int) -> tuple[RecordFile | Shards, int]:
        """File and index in it of the record at a place."""
        epoch, rest = divmod(place, len(self))
        slot = int(self.order(0, len(self), epoch)[rest])
        which = int(np.searchsorted(self.starts, slot, side="right")) - 1
        file, size = self.files[which], self.sizes[which]
        turn, at = divmod(epoch * self.counts[which] + slot - int(self.starts[which]), size)
        return file, int(self.order(1 + which, size, turn)[at])

    def order(self, what: int, size: int, turn: int) -> np.ndarray:
        """The `turn`-th seeded order of `size` things: int64 [size]. The last two are kept, as a
        step may lie at the border of two; drawing one costs as much as all its records."""
        kept = self.orders.setdefault(what, {})
        if turn not in kept:
            if len(kept) == 2:
                del kept[min(kept)]
            kept[turn] = np.random.default_rng([self.seed, what, turn]).permutation(size)
        return kept[turn]

    def size(self, place: int) -> int:
        file, index = self.where(place)
        return file.size(index)

    def __getitem__(self, place: int) -> dict:
        file, index = self.where(place)
        return file[index]


def open_mixture(specification: list[str], seed: int, hold_back: int = 0) -> Mixture:
    """What `open_records` takes, with optional weights, "a.json" or "b.jsonl:0.5", as one mixture.
    RecordError."""
    files, weights = [], []
    for item in specification:
        path, colon, weight = item.rpartition(":")
        try:
            weights.append(float(weight) if colon else 1.0)
        except ValueError:  # the colon belongs to the path
            path, colon = item, ""
            weights.append(1.0)
        if not 0 < weights[-1] <= 1000:
            raise RecordError(f"{item}: a weight must be above 0 and at most 1000")
        files.append(open_records(path if colon else item))
    return Mixture(files, weights, seed, hold_back)


def open_records(name: str) -> RecordFile | Shards:
    """The records of a JSON, JSONL or parquet file, of a folder's parquet files, or of a dataset,
    hub:owner/name[:subset][:split]. RecordError."""
    path = Path(name)
    if name.startswith("hub:"):
        return Shards(name, download(name))
    if path.is_dir():
        return Shards(name, sorted(path.rglob("*.parquet")))
    return Shards(name, [path]) if path.suffix == ".parquet" else RecordFile(path)


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Share:
    """What one rank does in one step: micro-batches, and what had to be left out."""

    batches: list[Batch] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)      # of the records in them
    skipped: list[str] = field(default_factory=list)  # one line each

    def pin_memory(self) -> "Share":
        return Share([batch.pin_memory() for batch in self.batches], self.ids, self.skipped)


@dataclass(frozen=True)
class Steps(Dataset):
    """Item s: this rank's share of step `first` + s. Every record that can be read is in exactly
    one rank's share."""

    records: Sequence[dict]   # by place: a Mixture, or an endless generator of pictures
    processor: Processor
    parts: str                # which views are made: "global", "local" or "both"
    template: str
    recipe: Recipe            # batch size and bounds of micro-batches
    steps: int                # of the whole run
    folder: Path | None = None        # of the images
    first: int = 0            # steps before it are done
    rank: int = 0
    world: int = 1
    noise: tuple[int, ...] = (0,)     # what training noise is drawn from, besides the place

    def __post_init__(self):
        # A template that does not fit the tokenizer is an error now, that of the next stage, too.
        turns = [{"from": "human", "value": "-"}, {"from": "gpt", "value": "-"}] * 2
        for template in (self.template, self.processor.config.template):
            encode(turns, template, self.processor.tokenizer)

    def __len__(self) -> int:
        return self.steps - self.first

    def places(self, step: int) -> list[int]:
        """This rank's places of a step: all of them sorted by size, dealt out there and back, so
        that no rank waits long for another."""
        batch = self.recipe.batch_size
        places = list(range(step * batch, (step + 1) * batch))
        if self.world > 1 and hasattr(self.records, "size"):
            places.sort(key=self.records.size, reverse=True)
        rounds = [places[at:at + self.world] for at in range(0, batch, self.world)]
        return sorted(turn[self.rank if number % 2 == 0 else -1 - self.rank]
                      for number, turn in enumerate(rounds))

    def __getitem__(self, item: int) -> Share:
        if item >= len(self):
            raise IndexError(f"step {item} of {len(self)}")
        share, samples, tokens = Share(), [], 0
        budget, most = self.recipe.token_budget, self.recipe.micro_batch
        for place in self.places(self.first + item):
            try:
                record = self.records[place]
                sample = load_sample(record, self.folder, self.template, self.processor,
                                     parts=self.parts, max_tokens=self.recipe.max_tokens)
            except RecordError as error:
                share.skipped.append(str(error))
                continue
            grids = [image.grid for image in sample.images]
            length = self.processor.token_count(sample.text, grids, self.parts)
            full = len(samples) == most or (budget is not None and tokens + length > budget)
            if samples and full:
                share.batches.append(self.pack(samples))
                samples, tokens = [], 0
            samples.append(self.processor.with_noise(sample, *self.noise, place))
            tokens += length
            share.ids.append(str(record.get("id", f"at place {place}")))
        if samples:
            share.batches.append(self.pack(samples))
        return share

    def pack(self, samples: list[Sample]) -> Batch:
        """One micro-batch; with several ranks it has an image, a blank one if need be."""
        if self.world > 1 and not any(sample.images for sample in samples):
            samples = [*samples, self.processor.blank(learned=False)]
        return Batch.pack(samples)
