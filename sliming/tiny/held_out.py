"""The built-in held-out questions, and how well a model answers them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sliming import watch
from sliming.data import load_sample
from sliming.distributed import rank_and_world, reduce
from sliming.generate import exact_match
from sliming.inputs import Batch
from sliming.model import SliME
from sliming.slicer import Slices
from sliming.tiny import pictures
from sliming.tiny.features import Features

FAMILIES = ("global", "detail")


def held_out_scene(index: int, across_seams: bool = False
                   ) -> tuple[pictures.Scene, np.random.Generator]:
    """Held-out picture `index`, a large one, and the stream that draws it, then chooses what is
    asked about the whole."""
    rng = pictures.generator("held-out", 0, index)
    return pictures.sample_scene(rng, across_seams=across_seams), rng


def held_out(family: str, index: int, across_seams: bool = False,
             image: Image.Image | Slices | None = None) -> dict:
    """Held-out record `index` of the "global" or "detail" family: a question about that picture.
    `image`: what to show of it, if there already."""
    scene, rng = held_out_scene(index, across_seams)
    if image is None or family == "global":  # whose question the picture's stream draws behind it
        picture = pictures.render(scene, rng)
        image = picture if image is None else image
    if family == "global":
        pool = pictures.global_questions(scene)
    else:
        rng, pool = pictures.generator("held-out", 0, index, 1), pictures.detail_questions(scene)
    return pictures.record(f"{family}-{index}", image, [pool[rng.integers(len(pool))]])


# ----------------------------------------------------------------------------------------- accuracy

# name: (family of questions, parts shown, gamma or None for the model's own,
#        any tokens instead of the router's)
SETTINGS = {
    "global": ("global", "both", None, False),
    "global_gamma_1": ("global", "both", 1.0, False),
    "global_gamma_025": ("global", "both", 0.25, False),
    "detail": ("detail", "both", None, False),
    "detail_gamma_1": ("detail", "both", 1.0, False),
    "detail_gamma_025": ("detail", "both", 0.25, False),
    "detail_random_025": ("detail", "both", 0.25, True),
    "detail_without_local": ("detail", "global", None, False),
}


# What each stage can answer: after stage I the global view alone is trained. The router's share is
# asked when all is.
ASKED = {1: ("global", "detail"), 2: ("global", "detail", "detail_without_local"),
         3: tuple(SETTINGS)}


@torch.no_grad()
def held_out_accuracy(model: SliME, questions: int, parts: str = "both",
                      across_seams: bool = False, batch_size: int = 32, rank: int = 0,
                      world: int = 1, folder: Path | None = None,
                      names: tuple[str, ...] = tuple(SETTINGS)) -> dict[str, dict]:
    """`questions` of each family, about the same pictures, in the settings of some `names`:
    {name: {accuracy, n, local_tokens}}.

    `local_tokens` is the mean number of local tokens that the language model saw. `parts` "global"
    restricts every setting to the global view, for a model whose compression is not trained yet.
    Of `world` processes each answers every world-th batch; all get the same results. `folder`: the
    pictures' features are kept in it, for whoever asks about them again.
    """
    model.eval()
    device = model.device
    counts = {name: [0, 0] for name in names}  # right answers, local tokens
    starts, known = range(0, questions, batch_size)[rank::world], None
    own = [i for start in starts for i in range(start, min(start + batch_size, questions))]
    if folder is not None:
        images = (pictures.render(*held_out_scene(i, across_seams)) for i in own)
        name = f"held-out-{questions}-pictures-{rank}-of-{world}{'-across-seams' * across_seams}"
        known = Features(folder, name, images, model, parts)

    def show(index: int) -> Slices:
        if known is not None:
            return known[own.index(index)]
        picture = pictures.render(*held_out_scene(index, across_seams))
        return model.processor.slice(picture, None, parts)

    # The random tokens have a seed per batch; the training's own stream goes on as if not used.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for start in tqdm(starts, desc="held-out questions", unit="batch",
                          leave=False, disable=rank > 0):
            shown = {i: show(i) for i in range(start, min(start + batch_size, questions))}
            features = None
            for family in FAMILIES:
                torch.manual_seed(start)
                samples = [load_sample(held_out(family, i, across_seams, image), None, "chat",
                                       model.processor, parts=parts) for i, image in shown.items()]
                batch = Batch.pack(samples).to(device)
                features = model.encode(batch, parts) if features is None else features
                add_batch(counts, model, batch, features, family, parts)
    if world > 1:
        sums = iter(reduce([n for pair in counts.values() for n in pair], torch.device("cpu")))
        counts = {name: (next(sums), next(sums)) for name in counts}
    return {name: {"accuracy": right / questions, "n": questions,
                   "local_tokens": round(tokens / questions, 1)}
            for name, (right, tokens) in counts.items()}


def add_batch(counts: dict[str, list], model: SliME, batch: Batch,
              features: tuple[torch.Tensor, torch.Tensor], family: str, parts: str) -> None:
    """Adds right answers and local tokens of one batch to every setting of its family; `features`
    as of `model.encode`."""
    done = {}
    for name in counts:
        asks, shown, gamma, random_tokens = SETTINGS[name]
        if asks != family:
            continue
        shown = shown if parts == "both" else parts
        # Without local tokens there is no router, so neither gamma nor chance plays a part.
        setting = (shown, gamma, random_tokens) if shown == "both" else (shown,)
        if setting not in done:
            views, crops = features
            seen = (views, crops if shown == "both" else crops[:0])
            visual = model.see(batch, shown, gamma, random_tokens, seen)
            right = exact_match(batch, model(batch, visual=visual).logits)
            done[setting] = sum(right), sum(int(keep.sum()) for keep in visual.keep)
        for place, value in enumerate(done[setting]):
            counts[name][place] += value


def evaluate(folder: Path, stage: int, questions: int, device: torch.device) -> None:
    """Asks the checkpoint that a stage has left in `folder` about held-out pictures, which the
    ranks share, and writes eval.json there."""
    model, (rank, world) = SliME.from_pretrained(folder).to(device), rank_and_world()
    results = held_out_accuracy(model, questions, "global" if stage == 1 else "both", rank=rank,
                                world=world, folder=folder.parent / "features", names=ASKED[stage])
    if rank == 0:
        (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
        watch.say(table(results))


def table(results: dict[str, dict]) -> str:
    """The results as lines of text."""
    return watch.table(["held-out questions", "exact match", "n", "local tokens"],
                       [[name, f"{100 * row['accuracy']:.1f} %", row["n"], row["local_tokens"]]
                        for name, row in results.items()])
