"""Trains and asks the arms: one process, one thread, one row per arm and seed.

First the vision tower reads all pictures, once for all arms. Then seed 0 of every arm with each of
`Setting.rates`; the rate that answers questions about validation pictures best is the arm's. Then
seed 1 of all arms with it, seed 2, and so on. Stages that arms have in common are trained once. A
row is written when it is done, so a run that was killed goes on with what is missing.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import connection, get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sliming.backbones import TINY
from sliming.config import PRESETS, STAGES, Preset, Recipe, Stage, TrainConfig
from sliming.data import load_sample
from sliming.generate import exact_match
from sliming.guard import InputError, naming, only_one
from sliming.inputs import Batch
from sliming.lab.arms import ARMS, Arm, Turn
from sliming.model import SliME
from sliming.records import resume
from sliming.tiny.features import Features
from sliming.tiny.pictures import (
    Scene,
    TrainingSet,
    detail_questions,
    generator,
    global_questions,
    record,
    render,
    sample_scene,
)
from sliming.trainer import train_stage

FAMILIES = ("global", "detail")
CHUNK = 128   # pictures of one file of features
ASKED = 32    # questions at a time
PROBES = 12   # times that a schedule's losses with each view are taken
WATCHED = ("default", "joined", "e2e")


@dataclass(frozen=True)
class Setting:
    """What all arms of a folder have in common."""

    steps: tuple[int, int, int] = (160, 140, 90)           # of lessons 1, 2, 3
    pictures: tuple[int, int, int] = (1024, 1024, 1024)    # of each lesson
    small: tuple[float, float, float] = (0.9, 0.3, 0.15)   # share of pictures of one crop
    grids: tuple[tuple[int, int], ...] = ((3, 2), (2, 3))  # of the others: columns, rows
    batch: int = 8
    numbers: int = 10                                      # 10 and up, that are printed
    across_seams: bool = False
    rates: tuple[float, ...] = (1.5, 2.25)                 # times the tiny preset's
    validation: int = 128                                  # pictures, with two questions each
    test: int = 256


QUICK = Setting(steps=(70, 70, 50), pictures=(256, 256, 256), rates=(2.0,), test=64)


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    seed: int
    rate: float  # of learning, times the tiny preset's

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}, rate {self.rate}"


# ----------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """What the tower says of the pictures of one split: "lesson1" to "lesson3", "validation",
    "test". Read in files of `CHUNK`, so that many processes can make them."""

    folder: Path
    setting: Setting
    split: str

    @property
    def count(self) -> int:
        s, lesson = self.setting, self.split.removeprefix("lesson")
        return s.pictures[int(lesson) - 1] if lesson.isdigit() else getattr(s, self.split)

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The picture's facts, and the stream that draws it."""
        s, lesson, small = self.setting, self.split.removeprefix("lesson"), False
        if lesson.isdigit():
            rng = generator("train", int(lesson), 0, index)
            small = rng.random() < s.small[int(lesson) - 1]
        else:
            rng = generator("held-out", len(FAMILIES) + (self.split == "test"), index)
        scene = sample_scene(rng, small, s.across_seams, s.grids)
        # Fewer numbers are printed: what is to be learned, a word for each, is less.
        items = [replace(item, number=10 + item.number % s.numbers) for item in scene.items]
        return replace(scene, items=tuple(items)), rng

    @cache  # noqa: B019 (a handful of objects, which live as long as the process)
    def features(self, chunk: int) -> Features:
        """Made where they are not there yet."""
        places = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))
        return Features(self.folder / "features", f"{self.split}-{chunk}-of-{self.count}",
                        (render(*self.scene(place)) for place in places), untrained(), "both")

    def __getitem__(self, index: int):
        return self.features(index // CHUNK)[index % CHUNK]


@cache
def untrained() -> SliME:
    return SliME.from_backbones(PRESETS["tiny"].model).eval()


class Records:
    """What a turn learns from, by place: the same records for every schedule, in another order.

    The pictures are those of the folder; their order, and what is said of them, are the seed's.
    """

    def __init__(self, folder: Path, setting: Setting, arm: Arm, turn: Turn, seed: int):
        self.seed = seed
        self.words = {n: TrainingSet(n, pool=setting.pictures[n - 1], detail=arm.detail)
                      for n in turn.lessons}
        self.pictures = {n: Pictures(folder, setting, f"lesson{n}") for n in turn.lessons}
        self.order = []  # of (lesson, picture, number of the record)
        for n in turn.lessons:
            count, pool = setting.steps[n - 1] * setting.batch, setting.pictures[n - 1]
            rng = np.random.default_rng([seed, n])
            epochs = [rng.permutation(pool) for _ in range(math.ceil(count / pool))]
            self.order += [(n, int(picture), number) for number, picture
                           in enumerate(np.concatenate(epochs)[:count])]
        if len(turn.lessons) > 1:
            np.random.default_rng([seed, *turn.lessons]).shuffle(self.order)

    def __getitem__(self, place: int) -> dict:
        n, picture, number = self.order[place]
        scene, rng = self.pictures[n].scene(picture)
        turns = self.words[n].turns(scene, rng, self.seed * 2**20 + number)
        return record(f"lesson {n}, {number}", self.pictures[n][picture], turns)


# ---------------------------------------------------------------------------------------- questions


def questions(pictures: Pictures, family: str, start: int, end: int) -> list[dict]:
    """One question of a family about each of some pictures."""
    records = []
    for index in range(start, end):
        scene, _ = pictures.scene(index)
        pool = global_questions(scene) if family == "global" else detail_questions(scene)
        rng = generator("held-out", len(FAMILIES) + 2, index, FAMILIES.index(family))
        records.append(record(f"{family}-{index}", pictures[index],
                              [pool[rng.integers(len(pool))]]))
    return records


def pack(records: list[dict], model: SliME) -> Batch:
    return Batch.pack([load_sample(one, None, "chat", model.processor) for one in records])


@torch.no_grad()
def ask(model: SliME, pictures: Pictures, views: tuple[str, ...]) -> dict:
    """Right answers, {family/view: "0110..", a digit per picture}; of the first of `views` also the
    mean number of an image's tokens, and the mean loss."""
    model.eval()
    right = {f"{family}/{view}": "" for family in FAMILIES for view in views}
    tokens, losses = 0, []
    for family in FAMILIES:
        for start in range(0, pictures.count, ASKED):
            torch.manual_seed(start)  # of tokens at random
            end = min(start + ASKED, pictures.count)
            batch = pack(questions(pictures, family, start, end), model).to(model.device)
            whole, crops = model.encode(batch)
            for view in views:
                seen = {"both": (whole, crops), "global": (whole, crops[:0]),
                        "local": (whole[:0], crops)}[view]
                visual = model.see(batch, view, features=seen)
                output = model(batch, visual=visual)
                answers = exact_match(batch, output.logits)
                right[f"{family}/{view}"] += "".join(str(int(answer)) for answer in answers)
                if view == views[0]:
                    losses.append(float(output.loss))
                    tokens += visual.whole.shape[:2].numel()
                    tokens += sum(int(keep.sum()) for keep in visual.keep)
    return {"right": right, "tokens": round(tokens / (len(FAMILIES) * pictures.count), 2),
            "asked_loss": round(sum(losses) / len(losses), 5)}


def watched(kind: type[SliME], probe: Batch, every: int, curve: list[dict]) -> type[SliME]:
    """The model, which now and then in training says its loss on the same questions with each
    view."""
    count = 0

    class Watched(kind):
        def forward(self, batch: Batch, **options):
            nonlocal count
            if self.training:
                if count % every == 0:
                    self.eval()
                    row = {"step": count}
                    with torch.no_grad():
                        for view in ("both", "global", "local"):
                            row[view] = round(float(super().forward(probe, parts=view).loss), 4)
                    curve.append(row)
                    self.train()
                    self.vision.eval()
                count += 1
            return super().forward(batch, **options)

    return Watched


# --------------------------------------------------------------------------------------- one job


def train_and_ask(folder: Path, setting: Setting, job: Job, device: str = "cpu") -> dict:
    """The row of one training."""
    arm, rate = ARMS[job.arm], job.rate
    steps = [sum(setting.steps[n - 1] for n in turn.lessons) for turn in arm.turns]
    # This process knows the arm's stages in the place of the paper's.
    STAGES.clear()
    STAGES.update({n: Stage(turn.parts, "plain" if turn.lessons == (1,) else None, turn.trained)
                   for n, turn in enumerate(arm.turns, 1)})
    recipes = {n: Recipe(setting.batch, rate * (1e-3 if "llm" in turn.trained else 2e-3),
                         rate * 1e-3, steps[n - 1]) for n, turn in enumerate(arm.turns, 1)}
    PRESETS["lab"] = Preset(replace(PRESETS["tiny"].model, **arm.settings), recipes)
    kind, curve = arm.kind, []
    kind.steps = sum(steps)
    if job.arm in WATCHED and job.seed == 0:
        asked = Pictures(folder, setting, "validation")
        probe = pack([one for family in FAMILIES for one in
                      questions(asked, family, 0, min(12, asked.count))],
                     untrained()).to(device)
        kind = watched(kind, probe, max(1, sum(steps) // PROBES), curve)
    out = Path(tempfile.mkdtemp(prefix=f"{job.arm}-", dir=folder / "work"))
    shared = folder / "work" / f"begun-{job.seed}-{rate}"  # stages I and II of all `late` arms
    # Where losses are watched, all of it is trained.
    done = take_over(shared, out) if arm.late and kind is arm.kind else 0
    curves = []
    for n, turn in enumerate(arm.turns, 1):
        if n > done:
            config = TrainConfig(preset="lab", out=str(out), seed=job.seed, save_every=2**31,
                                 workers=0)
            train_stage(config, n, torch.device(device), kind,
                        Records(folder, setting, arm, turn, job.seed))
        if arm.late and n == 2 and not shared.exists():
            hand_on(out, shared)
        curves += resume(out / f"stage{n}" / "metrics.jsonl")
    model = arm.kind.from_pretrained(out / f"stage{len(arm.turns)}").to(device)
    shutil.rmtree(out)
    took = [row["tokens"] / row["tokens_per_second"] for row in curves]
    row = asdict(job) | ask(model, Pictures(folder, setting, "test"), arm.asked) | {
        "ms_per_step": round(1000 * sum(took) / len(took), 1),
        "memory_gb": curves[-1]["memory_gb"], "curve": curve,
        "loss": [round(row["loss"], 4) for row in curves]}
    if job.seed == 0:
        said = ask(model, Pictures(folder, setting, "validation"), arm.asked[:1])
        row["validation_loss"] = said["asked_loss"]
    return row


def take_over(shared: Path, out: Path) -> int:
    """Copies stages that another arm has trained, if it has: how many. That arm may have another
    gamma."""
    if not shared.exists():
        return 0
    shutil.copytree(shared, out, dirs_exist_ok=True)
    path = out / "stage2" / "config.json"
    gamma = {"gamma": PRESETS["lab"].model.gamma}
    path.write_text(json.dumps(json.loads(path.read_text()) | gamma))
    return 2


def hand_on(out: Path, shared: Path) -> None:
    """Leaves the first two stages for others: all of it appears at once."""
    copy = Path(tempfile.mkdtemp(dir=shared.parent))
    for stage in ("stage1", "stage2"):
        shutil.copytree(out / stage, copy / stage)
    try:
        copy.rename(shared)
    except OSError:  # another arm was as fast
        shutil.rmtree(copy)


def make(folder: Path, setting: Setting, split: str, chunk: int) -> dict:
    Pictures(folder, setting, split).features(chunk)
    return {}


# ---------------------------------------------------------------------------------------- all jobs


def in_child(pipe: connection.Connection, log: Path, task: Callable, arguments: tuple) -> None:
    """Runs one task; what it prints goes to a file. Ends when the parent does."""
    done = threading.Event()

    def follow() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):
            if not done.is_set():  # else this process ends by itself, and leaves nothing behind
                os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    with open(log, "w") as file:
        sys.stdout = sys.stderr = file
        try:
            result = task(*arguments)
            done.set()
            pipe.send(result)
        except Exception:
            traceback.print_exc()


def parallel(following: Callable[[], tuple | None], jobs: int) -> Iterator[tuple]:
    """Runs tasks (key, log, function, arguments) in `jobs` processes, each forked from one that has
    torch loaded: yields (key, result), None where it failed. `following` gives the next task, or
    None where there is none just now."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sliming.lab.run"])
    running = {}
    try:
        while True:
            while len(running) < jobs and (task := following()) is not None:
                key, *rest = task
                here, there = context.Pipe()
                process = context.Process(target=in_child, args=(there, *rest), daemon=True)
                process.start()
                there.close()
                running[here] = key, process
            if not running:
                return
            for pipe in connection.wait(list(running)):
                key, process = running.pop(pipe)
                try:
                    result = pipe.recv()
                except EOFError:
                    result = None
                pipe.close()
                process.join()
                yield key, result
    finally:
        for _, process in running.values():
            process.terminate()


@dataclass
class Plan:
    """What is done, what runs, and what comes next."""

    setting: Setting
    arms: list[str]
    seeds: int
    rows: list[dict]
    begun: set[Job] = field(default_factory=set)

    def wanted(self) -> list[Job]:
        """All trainings whose rate is known, the most valuable first."""
        rates = {arm: chosen_rate(self.rows, arm, self.setting.rates) for arm in self.arms}
        return ([Job(arm, 0, rate) for arm in self.arms for rate in self.setting.rates]
                + [Job(arm, seed, rates[arm]) for seed in range(1, self.seeds)
                   for arm in self.arms if rates[arm] is not None])

    def following(self) -> Job | None:
        begun = {Job(row["arm"], row["seed"], row["rate"]) for row in self.rows} | self.begun
        for job in self.wanted():
            if job not in begun:
                self.begun.add(job)
                return job


def chosen_rate(rows: list[dict], arm: str, rates: Sequence[float]) -> float | None:
    """The arm's learning rate: that whose seed 0 has the least loss on questions about validation
    pictures; None while they are not all tried."""
    losses = {row["rate"]: row["validation_loss"] for row in rows
              if row["arm"] == arm and row["seed"] == 0}
    return min(losses, key=losses.get) if len(losses) == len(rates) else None


def run(folder: Path, setting: Setting, arms: list[str], seeds: int, jobs: int,
        device: str = "cpu") -> None:
    """Trains and asks what is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        same_setting(folder, setting)
        shutil.rmtree(folder / "work", ignore_errors=True)  # of a run that was killed
        (folder / "work").mkdir()
        read_pictures(folder, setting, jobs)
        results, failed = folder / "results.jsonl", []
        plan = Plan(setting, arms, seeds, resume(results))

        def following():
            job = plan.following()
            log = folder / "work" / f"{job.name}.log" if job else None
            return job and (job, log, train_and_ask, (folder, setting, job, device))

        total = len(arms) * (len(setting.rates) + seeds - 1)
        before = {Job(row["arm"], row["seed"], row["rate"]) for row in plan.rows}
        with (naming(results), open(results, "a") as file,
              tqdm(total=total, initial=len(before & set(plan.wanted())), unit="training") as bar):
            for job, row in parallel(following, jobs):
                if row is None:
                    failed.append(job)
                    continue
                file.write(json.dumps(row) + "\n")
                file.flush()
                plan.rows.append(row)
                bar.update()
    if failed:
        names = "; ".join(job.name for job in failed)
        raise InputError(f"{len(failed)} trainings failed ({names}): {folder / 'work'} has what "
                         "they said; the same command tries again")


def same_setting(folder: Path, setting: Setting) -> None:
    """Rows of one folder are of one setting and of one tiny preset, its stand-ins' weights
    included. InputError for others."""
    path, own = folder / "setting.json", json.loads(json.dumps(asdict(setting)))
    preset = json.dumps(asdict(PRESETS["tiny"].model), sort_keys=True).encode()
    weights = [(TINY / part / "model.safetensors").read_bytes() for part in ("vision", "llm")]
    own["preset"] = hashlib.sha256(b"".join([preset, *weights])).hexdigest()[:12]
    if path.exists():
        there = json.loads(path.read_text())
        if there.pop("preset", None) != own.pop("preset"):
            raise InputError(f"{folder} holds results of another tiny preset, or of other weights "
                             "of its stand-ins: give another --out")
        if there != own:
            raise InputError(f"{folder} holds results of another setting (see setting.json): give "
                             "another --out, or the same flags as before")
    elif (folder / "results.jsonl").exists():
        raise InputError(f"{folder} has results, but no setting.json that says of what: give "
                         "another --out")
    else:
        path.write_text(json.dumps(own, indent=2) + "\n")


def read_pictures(folder: Path, setting: Setting, jobs: int) -> None:
    """The tower reads all pictures, many files at a time."""
    tasks = []
    for split in ("lesson1", "lesson2", "lesson3", "validation", "test"):
        for chunk in range(math.ceil(Pictures(folder, setting, split).count / CHUNK)):
            if not list((folder / "features").glob(f"{split}-{chunk}-of-*.npz")):
                tasks.append(((split, chunk), folder / "work" / f"{split}-{chunk}.log", make,
                              (folder, setting, split, chunk)))
    queue = iter(tasks)
    for key, result in tqdm(parallel(lambda: next(queue, None), jobs), total=len(tasks),
                            desc="pictures", unit="file", disable=not tasks):
        if result is None:
            raise InputError(f"the pictures {key[0]}-{key[1]} could not be read: see "
                             f"{folder / 'work'}")
