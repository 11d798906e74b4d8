"""From records to batches: LLaVA-format files, and the order in which they are seen.

A record is {"id": ..., "image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value": text}, ...]};
a file is a JSON list of them or JSONL, one per line. A bad record raises RecordError with one line that says where and what;
in training it is skipped and counted unless the run is strict.

Batch number s of a run holds the records at places s * batch_size ... of an endless order: every epoch a permutation of
its own, drawn from the seed. So the order is the same for any number of workers and ranks (each rank takes every
world-size-th record of the batch), and training goes on from any step without replaying the ones before.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from sliming.chat import IMAGE, encode
from sliming.model import Batch, Sample, SliME


class RecordError(ValueError):
    """A record or a file of records that cannot be used; the message is one line."""


def read_records(path: str | Path) -> list[dict]:
    """All records of a JSON or JSONL file. Raises RecordError for a missing, empty or broken file, with the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read as text ({error})") from error
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            records = []
            for number, line in lines:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise RecordError(f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})") from error
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno})") from error
    if not records:
        raise RecordError(f"{path}: no records in it")
    return records


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


def load_sample(record: dict, folder: Path | None, template: str, model: SliME) -> Sample:
    """Reads, slices and tokenises one record. Image paths are relative to `folder` and stay inside it.

    Raises RecordError for a malformed record and for a missing, broken or misplaced image.
    """
    turns, images = check_record(record)
    name = f"record {record.get('id', '(no id)')}"
    slices = []
    for image in images:
        if isinstance(image, str):
            path = (folder / image).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise RecordError(f"{name}: image {image} lies outside the image folder {folder}")
            image = path
        elif folder is not None:
            raise RecordError(f"{name}: an image must be a path, not {type(image).__name__}")
        try:
            slices.append(model.slice(image))
        except (ValueError, OSError) as error:
            raise RecordError(f"{name}: {error}") from error
    return Sample(encode(turns, template, model.tokenizer), slices)


@dataclass(frozen=True)
class Order:
    """An endless, seeded order over `size` records: place -> index, a fresh permutation in every epoch."""

    size: int
    seed: int

    def __getitem__(self, place: int) -> int:
        epoch, rest = divmod(place, self.size)
        return int(permutation(self.size, self.seed, epoch)[rest])


@lru_cache(maxsize=2)  # a batch touches one epoch, or two at its border; drawing one costs as much as all its records
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: int64 [size]."""
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclass(frozen=True)
class Batches(Dataset):
    """Batch per step for one rank: item s is (packed batch or None if no record was usable, messages of skipped records)."""

    records: Sequence[dict]     # indexable; an endless generator such as synthetic.TrainingSet needs no order
    order: Order | None
    folder: Path | None         # of the images
    template: str
    model: SliME                # for its slicing rule and tokenizer
    batch_size: int             # records per step over all ranks
    steps: int
    rank: int = 0
    world: int = 1
    strict: bool = False        # raise RecordError instead of skipping

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Batch | None, list[str]]:
        if step >= self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        samples, skipped = [], []
        for place in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world):
            record = self.records[place if self.order is None else self.order[place]]
            try:
                samples.append(load_sample(record, self.folder, self.template, self.model))
            except RecordError as error:
                if self.strict:
                    raise
                skipped.append(str(error))
        return (Batch.pack(samples) if samples else None), skipped
