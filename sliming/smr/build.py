"""SMR, the paper's training set of science and mathematical reasoning, from its public sources
(Sec. 2.4, Appendix B).

    python -m sliming.smr build SOURCE RAW_FOLDER --out smr.jsonl [--exclude FILE ...]
    python -m sliming.smr stats smr.jsonl [--plot smr.png]       Figure 4, and the paper's counts

    sources.py  ->  Candidate  ->  filters.py, by worker processes  ->  smr.jsonl
                                                                    ->  smr.dropped.jsonl

`build` appends one source's records in LLaVA's format, image paths relative to --root (the folder
above RAW_FOLDER), and writes each record that it drops, with the reason, to smr.dropped.jsonl. Ids
that the file already has are left as they are, so a build that was cut short goes on where it was,
and the result is that of one which was not. It does not depend on the number of workers either.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from sliming.chat import IMAGE
from sliming.config import COUNT, PROCESSES, SEED, Parser
from sliming.data import check_record
from sliming.guard import deaf, naming, one_line, only_one
from sliming.records import RecordError, lines, mend
from sliming.smr.candidates import Candidate, Drop, Selection
from sliming.smr.filters import REASONS, Excluded, Look, hash64, judge_text, look_at, unrelated
from sliming.smr.sources import SOURCES, check
from sliming.smr.statistics import lengths, plot, table

CHUNK = 64           # candidates that a worker judges at a time
REMEMBERED = 8192    # images whose check is kept: questions about one image stand close together

# ---------------------------------------------------------------------------------------- workers

Text = tuple[str, Drop | None]                                # the final answer, why it is dropped
Judged = tuple[Candidate | Drop, str, Drop | None, Look | None]          # and what its image shows


def judge(chunk: list[Candidate | Drop], images: list[str]) -> tuple[list[Text], dict[str, Look]]:
    """A worker's job: the texts of a chunk, and those of its images that no chunk before had."""
    return [judge_text(item) for item in chunk], {image: look_at(image) for image in images}


def end_with_parent() -> None:
    """A worker ends when the process that started it does, also one that was killed."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    deaf()
    threading.Thread(target=wait, daemon=True).start()


def image_of(item: Candidate | Drop) -> str:
    return str(item.image) if isinstance(item, Candidate) and item.image else ""


def judged(candidates: Iterable[Candidate | Drop], workers: int) -> Iterator[Judged]:
    """(candidate, answer, drop, look) in the order of `candidates`, judged by `workers` processes
    (1: in this one). Few chunks are under way at any time, and an image that many questions share
    is looked at once."""
    def resolve(chunk: list, future: Future) -> Iterator[Judged]:
        judgements, new = future.result()
        looks.update(new)
        for item, (answer, drop) in zip(chunk, judgements, strict=True):
            yield item, answer, drop, looks.get(image_of(item))
        while len(looks) > limit:
            known.discard(looks.popitem(last=False)[0])

    ahead = 3 * workers  # chunks under way; what they may need is never among the oldest looks
    limit = REMEMBERED + 2 * CHUNK * (ahead + 2)
    items, looks, known, waiting = iter(candidates), OrderedDict(), set(), deque()
    pool = (ProcessPoolExecutor(workers, initializer=end_with_parent) if workers > 1
            else ThreadPoolExecutor(1))
    try:
        while chunk := list(islice(items, CHUNK)):
            names = dict.fromkeys(filter(None, map(image_of, chunk)))
            for name in names:
                if name in looks:
                    looks.move_to_end(name)  # it will be wanted when this chunk is resolved
            fresh = [name for name in names if name not in known]
            known.update(fresh)
            waiting.append((chunk, pool.submit(judge, chunk, fresh)))
            if len(waiting) > ahead:
                yield from resolve(*waiting.popleft())
        while waiting:
            yield from resolve(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not judge what is under way


# ------------------------------------------------------------------------------------- the result


class Ledger:
    """The file of records and that of dropped ones: what they had, and what is added."""

    def __init__(self, out: Path, source: str, root: Path):
        self.source, self.root = source, root
        self.count, self.dropped = Counter(built=0, kept=0, stale=0), Counter()
        self.names, self.contents = set(), set()  # hashes of this build's records
        paths = out, out.with_suffix(".dropped.jsonl")
        for path in paths:
            mend(path)
        self.before = {hash64(row["id"]) for row in self.rows(paths[0])}
        self.dropped_before = Counter(hash64(self.line(row)) for row in self.rows(paths[1]))
        self.records, self.drops = (open(path, "ab") for path in paths)

    @staticmethod
    def rows(path: Path) -> Iterator[dict]:
        for number, row in lines(path) if path.exists() else ():
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise RecordError(f"{path}, line {number}: not a file that this command builds (a "
                                  "line without an id)")
            yield row

    @staticmethod
    def line(row: dict) -> bytes:
        # Half a surrogate pair has no UTF-8; as \ud800 it is JSON.
        return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"

    def close(self) -> None:
        self.records.close()
        self.drops.close()

    def verdict(self, item: Candidate, answer: str, look: Look | None,
                excluded: Excluded) -> tuple[str, str]:
        """(reason, detail) against a candidate whose text is good; ("", "") if it is taken."""
        if look and look.reason:
            return look.reason, look.detail
        if look and (detail := unrelated(item, look)):
            return "unrelated", detail
        if (found := excluded.holds(item, look))[0]:
            return found
        content = hash64(f"{look.pixels if look else 0}\n{item.prompt}\n{answer}")
        if content in self.contents:
            return "duplicate", "of an earlier record's image, question and answer"
        if hash64(item.id) in self.names:
            return "duplicate", "of an earlier record's id"
        self.contents.add(content)
        return "", ""

    def take(self, item: Candidate, answer: str) -> None:
        """Writes a record in LLaVA's format, unless the file has it."""
        name = hash64(item.id)
        self.names.add(name)
        if name in self.before:
            self.count["kept"] += 1
            return
        mark, image = "", {}
        if item.image:
            mark, image = f"{IMAGE}\n", {"image": item.image.relative_to(self.root).as_posix()}
        record = {"id": item.id, **image, "conversations": [
            {"from": "human", "value": mark + item.prompt}, {"from": "gpt", "value": answer}]}
        check_record(record)
        self.records.write(self.line(record))
        self.count["built"] += 1

    def drop(self, drop: Drop) -> None:
        """Writes a dropped record, unless the file has it."""
        name = hash64(drop.id)
        self.dropped[drop.reason] += 1
        self.count["stale"] += name in self.before and name not in self.names
        image = os.path.relpath(drop.image, self.root) if drop.image else ""
        line = self.line({"id": drop.id, "source": self.source, "reason": drop.reason,
                          "image": image, "detail": drop.detail.replace(f"{self.root}/", "")})
        if self.dropped_before[hash64(line)] > 0:
            self.dropped_before[hash64(line)] -= 1
        else:
            self.drops.write(line)


def build(source: str, folder: Path, out: Path, *, root: Path | None = None,
          exclude: Iterable[Path] = (), selection: Selection | None = None, workers: int = 1,
          say: bool = False) -> dict:
    """Appends the records of `source` to `out`, and the dropped ones to its .dropped.jsonl.

    Returns {"built": new records, "kept": records that `out` had, "stale": records that it has and
    this build would drop (it was built with less excluded), "dropped" and "passed over": {reason:
    count}}. RecordError for a folder or file of another kind; what was built before it is kept.
    """
    selection = check(source, folder, selection or Selection())
    folder, root = folder.resolve(), (root or folder.resolve().parent).resolve()
    if not folder.is_relative_to(root):
        raise RecordError(f"{folder}: not below --root {root}")
    if out.is_dir() or not out.parent.is_dir():
        raise RecordError(f"{out}: --out must be a file in a folder that exists")
    excluded, broken = Excluded(), []
    for path in exclude:
        excluded.add(path)
    if say:
        print(*excluded.said, sep="\n", end="\n" if excluded.said else "", file=sys.stderr)

    def until_broken() -> Iterator[Candidate | Drop]:
        try:
            yield from tqdm(SOURCES[source].read(folder, selection), desc=source, unit="record",
                            mininterval=1 if sys.stderr.isatty() else 10, disable=not say)
        except RecordError as error:
            broken.append(error)  # raised when everything before it is written

    with only_one(out), naming(out):
        ledger = Ledger(out, source, root)
        try:
            for item, answer, drop, look in judged(until_broken(), workers):
                if drop is None:
                    reason, detail = ledger.verdict(item, answer, look, excluded)
                    drop = Drop(item.id, reason, detail, image_of(item)) if reason else None
                if drop is None:
                    ledger.take(item, answer)
                else:
                    ledger.drop(drop)
        finally:
            ledger.close()
    if broken:
        raise broken[0]
    return {**ledger.count, "dropped": dict(ledger.dropped),
            "passed over": dict(selection.passed_over)}


# ------------------------------------------------------------------------------- the command line


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m sliming.smr", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="append a source's records to a file")
    make.add_argument("source", choices=SOURCES)
    make.add_argument("folder", type=Path, help="where the source was unpacked")
    make.add_argument("--out", type=Path, required=True,
                      help="JSONL; dropped records go to OUT.dropped.jsonl beside it")
    make.add_argument("--root", type=Path,
                      help="image paths are relative to it; default: the folder above FOLDER")
    make.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="FILE",
                      help="evaluation questions, JSON or JSONL, their images beside them")
    make.add_argument("--splits", type=lambda text: tuple(text.split(",")), default=(),
                      metavar="A,B", help="instead of the training splits")
    make.add_argument("--count", type=COUNT, help="dvqa: how many reasoning questions "
                      f"(default {Selection.count})")
    make.add_argument("--seed", type=SEED, help="of dvqa's choice and textbookqa's prompts")
    make.add_argument("--machine", action="store_true",
                      help="chartqa: machine-written questions too")
    make.add_argument("--text-only", action="store_true",
                      help="scienceqa: questions without an image too")
    make.add_argument("--workers", type=PROCESSES, default=os.cpu_count() or 1,
                      help="processes (default %(default)s)")
    show = commands.add_parser("stats", help="counts beside the paper's, lengths as in Figure 4")
    show.add_argument("file", type=Path)
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw Figure 4")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    if args.command == "stats":
        found = lengths(args.file)
        print(table(found))
        if args.plot:
            plot(found, args.plot)
        return
    own = {"count": ("dvqa",), "seed": ("dvqa", "textbookqa"), "machine": ("chartqa",),
           "text_only": ("scienceqa",)}
    given = {name: vars(args)[name] for name in own if vars(args)[name] not in (None, False)}
    for name in given:
        if args.source not in own[name]:
            raise RecordError(f"--{name.replace('_', '-')} changes nothing for {args.source}: it "
                              f"is of {' and '.join(own[name])}")
    result = build(args.source, args.folder, args.out, root=args.root, exclude=args.exclude,
                   selection=Selection(splits=args.splits, **given), workers=args.workers, say=True)
    sums = [sum(result[title].values()) for title in ("dropped", "passed over")]
    print(f"{args.source}: {result['built']:,} built, {result['kept']:,} were there, "
          f"{sums[0]:,} dropped, {sums[1]:,} not selected")
    for reason, number in result["dropped"].items():
        print(f"  dropped: {number:,}  {reason} ({REASONS[reason]})")
    for reason, number in result["passed over"].items():
        print(f"  passed over: {number:,}  {reason}")
    if result["stale"]:
        raise RecordError(f"{args.out} holds {result['stale']:,} records that this command drops; "
                          "delete it and build again")


@one_line("sliming.smr", resumes=True)
def main() -> None:
    try:
        run(arguments())
    except BrokenProcessPool as error:
        raise RecordError(str(error)) from error
