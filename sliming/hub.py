"""Data as it lies on the hub: records in parquet files, their images inside, and datasets by name.

  a row            `conversations`, `messages` or `texts`; `image` or `images`; perhaps an `id`
  a parquet file   laid out anew once, for reading in any order
  hub:owner/name   its parquet files, found and downloaded by huggingface_hub

A parquet file is compressed by groups of rows, a hundred or a thousand with their images, and one
record costs its whole group. So the first time what a row holds is written into a file of the
user's cache: a line of JSON, and the bytes of its images behind it. From then on a record is one
read at a place that an index gives. Neither file is ever in memory as a whole; pyarrow is loaded
for the first time only.
"""

import fnmatch
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from sliming.chat import IMAGE
from sliming.guard import in_turn, naming, open_file
from sliming.records import RecordError, cached, parse

FORMS = {"conversations": "LLaVA's conversations", "messages": "messages",
         "texts": "texts of user and assistant"}
INSTALL = 'pip install pyarrow, or pip install -e ".[hub]"'


class Picture(BytesIO):
    """An image that came inside a record; `name` says which, for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


# --------------------------------------------------------------------------------------- one record


def form_of(record: object) -> str:
    """In which of FORMS a record says what is said; "" for none."""
    return next((form for form in FORMS if isinstance(record, dict) and form in record), "")


def as_llava(record: object) -> object:
    """A record of any of FORMS in LLaVA's; what is wrong with it stays for `data.check_record`.

    Of the other two forms, images that no marker places stand before the first question.
    """
    form = form_of(record)
    if not form:
        return record
    images, turns = images_of(record), record[form]
    if form != "conversations" and isinstance(turns, list):
        turns = [new for turn in turns for new in llava_turns(turn, form)]
        asked = [turn for turn in turns if turn["from"] == "human"]
        if asked and not any(IMAGE in str(turn["value"]) for turn in asked):
            asked[0]["value"] = f"{IMAGE}\n" * len(images) + str(asked[0]["value"])
    return {"id": record.get("id", "(no id)"), "image": images, "conversations": turns}


def images_of(record: dict) -> list:
    """What a record gives as its image or images."""
    images = record.get("images") if record.get("image") is None else record["image"]
    return images if isinstance(images, list) else [] if images is None else [images]


def llava_turns(said: object, form: str) -> list[dict]:
    """A message, or a text of user and assistant, as LLaVA's turns."""
    said = said if isinstance(said, dict) else {}
    if form == "texts":
        return [{"from": "human", "value": said.get("user")},
                {"from": "gpt", "value": said.get("assistant")}]
    role = said.get("role")
    return [{"from": {"user": "human", "assistant": "gpt"}.get(role, role),
             "value": words(said.get("content"))}]


def words(content: object) -> object:
    """The content of a message: text, or parts of {"type": "text", "text": ..} and images."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    return "".join(IMAGE + "\n" if part.get("type") == "image" else str(part.get("text") or "")
                   for part in content)


# ------------------------------------------------------------------------------------------ parquet


class ParquetFile(Sequence):
    """The records of one parquet file. RecordError for one that cannot be read, or has other
    columns."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open_file(self.path) as file:
                stat = os.fstat(file.fileno())
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
        stamp = [stat.st_size, stat.st_mtime_ns]
        self.rows, self.places = cached(self.path, "rows"), cached(self.path, "rows.npy")
        index = self.opened(stamp)
        if index is None:
            self.rows.parent.mkdir(parents=True, exist_ok=True)
            with in_turn(self.rows.with_name("rows.lock")):  # of several ranks one writes it
                index = self.opened(stamp)
                if index is None:
                    self.unpack(stamp)
                    index = self.opened(stamp)
        self.index = index  # int64 [n + 1, 2]: where a record begins, and where its images do

    def opened(self, stamp: list[int]) -> np.ndarray | None:
        """The index of a file of that size and time, mapped into memory; None where there is none,
        or it is not whole."""
        try:
            index = np.load(self.places, mmap_mode="r", allow_pickle=False)
            whole = index[0].tolist() == stamp and index[-1, 1] == self.rows.stat().st_size
            return index[1:] if whole else None
        except Exception:  # there is no end to what can be wrong with it, and it is made anew
            return None

    def unpack(self, stamp: list[int]) -> None:
        """Writes rows and index, in one go each."""
        cache, index, at = self.rows.parent, array("q", stamp), 0
        with naming(cache), tempfile.TemporaryDirectory(prefix=".rows-", dir=cache) as new:
            with open(f"{new}/rows", "wb") as file:
                for number, row in enumerate(rows_of(self.path)):
                    head, images = layout(row, f"{self.path.name}:{number}")
                    index.extend([at, at + len(head)])
                    at += file.write(head) + sum(map(file.write, images))
            if at == 0:
                raise RecordError(f"{self.path}: no records in it")
            index.extend([at, at])
            np.save(f"{new}/index.npy", np.array(index).reshape(-1, 2))
            self.places.unlink(missing_ok=True)
            os.replace(f"{new}/rows", self.rows)
            os.replace(f"{new}/index.npy", self.places)

    def __reduce__(self) -> tuple:
        """A worker that is handed the file opens it anew."""
        return ParquetFile, (self.path,)

    def __len__(self) -> int:
        return len(self.index) - 1

    def size(self, index: int) -> int:
        """Bytes of a record without its images: what its text is worth before it is read."""
        start, images = self.index[index]
        return int(images - start)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        (start, images), (stop, _) = self.index[index:index + 2].tolist()
        with open_file(self.rows) as file:
            file.seek(start)
            record, rest = parse(file.read(images - start), self.path, 0), BytesIO(
                file.read(stop - images))
        record["image"] = [Picture(rest.read(image), f"image {number}")
                           if isinstance(image, int) else image
                           for number, image in enumerate(record["image"], 1)]
        return record


class Shards(Sequence):
    """Parquet files end to end, as one file of records."""

    def __init__(self, path: str, paths: list[Path]):
        if not paths:
            raise RecordError(f"{path}: no .parquet file in this folder")
        self.path, self.paths = path, paths
        self.files = [ParquetFile(each) for each in paths]
        self.starts = np.cumsum([0, *map(len, self.files)])

    def __reduce__(self) -> tuple:
        return Shards, (self.path, self.paths)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def form(self) -> str:
        """How its first record says what is said."""
        return FORMS[form_of(self[0])]

    def where(self, index: int) -> tuple[ParquetFile, int]:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.files[which], index - int(self.starts[which])

    def size(self, index: int) -> int:
        file, index = self.where(index)
        return file.size(index)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, index = self.where(index)
        return file[index]


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a parquet file, of the columns that are known, a few at a time. RecordError."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise RecordError(f"{path}: reading parquet needs pyarrow: {INSTALL}") from error
    try:
        with open_file(path) as source:
            file = parquet.ParquetFile(source)
            columns = file.schema_arrow.names
            if not set(FORMS) & set(columns):
                raise RecordError(f"{path}: its columns are {', '.join(columns)}; a record needs "
                                  f"{', '.join(FORMS)} (one of them), and image or images")
            wanted = [name for name in columns if name in ("id", "image", "images", *FORMS)]
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(64, row_groups=[group], columns=wanted):
                    yield from batch.to_pylist()
    except RecordError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"{path}: cannot be read as parquet ({reason}); download it "
                          "again") from error


def layout(row: dict, name: str) -> tuple[bytes, list[bytes]]:
    """A row as a line of JSON, in which an embedded image is its number of bytes, and these."""
    form = form_of(row)
    images = [image.get("bytes") or image.get("path") if isinstance(image, dict) else image
              for image in images_of(row)]
    record = {"id": name if row.get("id") is None else row["id"], form: row[form],
              "image": [len(image) if isinstance(image, bytes) else str(image) for image in images]}
    return (json.dumps(record, default=str) + "\n").encode(), [
        image for image in images if isinstance(image, bytes)]


# --------------------------------------------------------------------------------- datasets by name


def download(name: str) -> list[Path]:
    """The parquet files of hub:owner/name[:subset][:split], downloaded where they are not yet.
    RecordError for what is not there, with what is."""
    from huggingface_hub import HfApi, hf_hub_download
    repository, *asked = name.removeprefix("hub:").split(":")
    try:
        info = HfApi().dataset_info(repository)
        parts = parts_of(info)
        files = parts[choose(name, asked, list(parts))]
        return [Path(hf_hub_download(repository, file, repo_type="dataset", revision=info.sha))
                for file in files]
    except RecordError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecordError(f"{name}: not to be had from the hub ({reason}); check the name, log in "
                          "with hf auth login, or give a folder of parquet files") from error


def parts_of(info) -> dict[tuple[str, str], list[str]]:
    """The parquet files of a dataset by (subset, split): as its card says, else by their names,
    SUBSET/SPLIT-00000-of-00001.parquet or SUBSET/SPLIT/0000.parquet."""
    files = sorted(each.rfilename for each in info.siblings if each.rfilename.endswith(".parquet"))
    parts: dict[tuple[str, str], list[str]] = {}
    for subset in (info.card_data.get("configs") if info.card_data else None) or ():
        for part in subset.get("data_files") or ():
            if isinstance(part, dict):
                paths = part["path"] if isinstance(part["path"], list) else [part["path"]]
                found = [file for path in paths for file in fnmatch.filter(files, path)]
                if found:
                    parts[subset["config_name"], part["split"]] = found
    if not parts:
        for file in files:
            *folders, stem = file.removesuffix(".parquet").split("/")
            split = re.match(r"[^\W\d_]*", stem)[0] or (folders.pop() if folders else "train")
            subset = "/".join(folder for folder in folders if folder != "data") or "default"
            parts.setdefault((subset, split), []).append(file)
    return parts


def choose(name: str, asked: list[str], parts: list[tuple[str, str]]) -> tuple[str, str]:
    """The (subset, split) that is meant: what is not said is the only one, "default" or "train"."""
    left = [part for part in parts if all(word in part for word in asked)]
    for place, usual in ((0, "default"), (1, "train")):
        left = [part for part in left if part[place] == usual] or left
        if len({part[place] for part in left}) != 1:
            there = ", ".join(f"{subset}:{split}" for subset, split in (left or parts)[:20])
            raise RecordError(f"{name}: {'say which' if left else 'there is no such part'}, as "
                              "hub:owner/name:subset:split; there is "
                              f"{there or 'no parquet file at all'}")
    return left[0]
