"""Features of the built-in pictures, made once.

The vision tower is frozen: what it says of a picture never changes. Pictures that are seen more
than once (those of a training's pool, those of the evaluation after every stage) are read by the
tower once, and what it said is kept in a file.

Legend: N pictures, V different views of all of them, P crops of one, L patches per view, Dv vision
width.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sliming.config import STAGES, TrainConfig
from sliming.distributed import barrier, is_main, rank_and_world
from sliming.guard import checksum, in_turn
from sliming.model import SliME
from sliming.slicer import Slices
from sliming.tiny.pictures import TrainingSet, record
from sliming.watch import say

BATCH = 32  # pictures that the tower reads at once


class Features(Sequence):
    """What the tower says of N pictures: item i is `Slices` with features in the place of pixels.

    They lie in `folder`, float32 [V, L, Dv], and are read one picture at a time. Equal views, a
    third of the crops is blank paper, are there once. The file is named by `name` and by all that
    its content depends on. Who comes first makes it, other ranks and runs wait for it; a damaged
    one is made anew.
    """

    def __init__(self, folder: Path, name: str, pictures: Iterable[Image.Image], model: SliME,
                 parts: str):
        c = model.config
        content = hashlib.sha256(repr((parts, c.vision_config, c.slicing, c.global_view, c.max_side,
                                       c.max_crops, c.resize)).encode())
        for tensor in model.vision.state_dict().values():
            content.update(tensor.float().cpu().numpy().tobytes())
        self.path = folder / f"{name}-{content.hexdigest()[:16]}.f32"
        self.parts = parts
        self.shape = -1, model.processor.num_patches, len(model.adapter.w_gate)  # V, L, Dv
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(self.path.with_suffix(".lock")):
            if not self.read():
                self.make(pictures, model)
                self.read()
        views = (parts != "local") + (parts != "global") * self.grids.prod(1)  # [N]
        self.starts = np.concatenate([[0], views.cumsum()])                    # [N + 1]

    def read(self) -> bool:
        """Reads the index; False where file and index are not there, or not as they were made."""
        try:
            with np.load(self.path.with_suffix(".npz")) as found:
                self.grids, self.places = found["grids"], found["places"]      # [N, 2], [all views]
                if found["checksum"] == checksum(self.path):
                    return True
        except FileNotFoundError:
            return False
        except Exception:  # there is no end to what numpy makes of a damaged file
            pass
        say(f"{self.path} is damaged, and made anew", everyone=True)
        return False

    @torch.no_grad()
    def make(self, pictures: Iterable[Image.Image], model: SliME) -> None:
        """Writes the file and, last, its index: the pictures' grids, every view's place in it."""
        handle, temporary = tempfile.mkstemp(dir=self.path.parent)
        grids, places, known = [], [], {}  # known: pixels -> place
        pictures = iter(tqdm(pictures, self.path.stem.rpartition("-")[0], unit="picture",
                             leave=False, disable=not is_main()))
        with os.fdopen(handle, "wb") as file:
            while some := list(islice(pictures, BATCH)):
                new = []
                for slices in (model.processor.slice(one, None, self.parts) for one in some):
                    grids.append(slices.grid)
                    views = [] if slices.global_view is None else [slices.global_view]
                    for view in [*views, *(() if slices.crops is None else slices.crops)]:
                        pixels = hashlib.blake2b(view.numpy().tobytes()).digest()
                        if pixels not in known:
                            known[pixels] = len(known)
                            new.append(view)
                        places.append(known[pixels])
                if new:
                    features = model.vision(torch.stack(new).to(model.vision.mean.device))
                    file.write(features.float().cpu().numpy().tobytes())
        os.replace(temporary, self.path)
        with open(temporary, "wb") as file:
            grids = np.array(grids, np.int64).reshape(-1, 2)
            np.savez(file, grids=grids, places=places, checksum=checksum(self.path))
        os.replace(temporary, self.path.with_suffix(".npz"))

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: int) -> Slices:
        start, end = self.starts[index:index + 2]
        kept = np.memmap(self.path, np.float32, "r").reshape(self.shape)       # [V, L, Dv]
        views = torch.from_numpy(kept[self.places[start:end]])                 # [1 + P, L, Dv]
        whole = self.parts != "local"
        return Slices(views[0] if whole else None,
                      views[int(whole):] if self.parts != "global" else None,
                      tuple(self.grids[index].tolist()))


@dataclass(frozen=True)
class Pool:
    """`TrainingSet`'s records with features in the place of their pictures, which are dealt out to
    `parts`."""

    records: TrainingSet
    parts: list[Features]

    def place(self, index: int) -> tuple[Features, int]:
        """The part that a record's picture is in, and where there."""
        place, part = divmod(index % self.records.pool, len(self.parts))
        return self.parts[part], place

    def size(self, index: int) -> int:
        """Crops of a record's picture, by which the ranks' shares are made alike."""
        part, place = self.place(index)
        return int(part.grids[place].prod())

    def __getitem__(self, index: int) -> dict:
        (scene, rng), (part, place) = self.records.scene(index), self.place(index)
        return record(f"train-{self.records.stage}-{index}", part[place],
                      self.records.turns(scene, rng, index))


def training_set(config: TrainConfig, stage: int, model: SliME,
                 device: torch.device) -> TrainingSet | Pool:
    """A stage's built-in records; from a pool where the stage would come back to its pictures."""
    recipe, parts = config.recipe(stage), STAGES[stage].parts
    shown = (recipe.steps or 0) * recipe.batch_size
    # A bound on tokens cuts pictures anew.
    if not 0 < recipe.pool < shown or recipe.max_tokens is not None:
        return TrainingSet(stage, config.seed)
    records = TrainingSet(stage, config.seed, recipe.pool)
    if recipe.shard != "none":  # a tower that is divided runs within the model only
        return records
    folder, (rank, world) = Path(config.out) / "features", rank_and_world()

    def part(number: int) -> Features:
        pictures = (records[index]["image"] for index in range(number, recipe.pool, world))
        return Features(folder, f"stage{stage}-seed{config.seed}-{recipe.pool}-pictures-{number}-"
                        f"of-{world}", pictures, model, parts)

    own = part(rank)  # each rank makes one
    barrier()
    return Pool(records, [own if number == rank else part(number) for number in range(world)])
