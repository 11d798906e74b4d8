"""The built-in held-out questions, and how well a model answers them.

Legend: A supervised tokens of a batch, in its order; C vocabulary.
"""

import argparse

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sliming.chat import IGNORE
from sliming.data import load_sample
from sliming.distributed import reduce
from sliming.model import Batch, SliME
from sliming.tiny.pictures import (
    Scene,
    detail_questions,
    generator,
    global_questions,
    record,
    render,
    sample_scene,
)


def held_out_scene(
    family: str, index: int, across_seams: bool = False
) -> tuple[Scene, np.random.Generator]:
    """The large picture behind held-out record `index`, and the stream that draws it and asks."""
    rng = generator("held-out", ("global", "detail").index(family), index)
    return sample_scene(rng, across_seams=across_seams), rng


def held_out(family: str, index: int, across_seams: bool = False) -> dict:
    """Held-out record `index` of the "global" or "detail" family: a question about a picture."""
    scene, rng = held_out_scene(family, index, across_seams)
    pool = global_questions(scene) if family == "global" else detail_questions(scene)
    return record(f"{family}-{index}", render(scene, rng), [pool[rng.integers(len(pool))]])


# ---------------------------------------------------------------------------------------- accuracy

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


def exact(batch: Batch, logits: Tensor) -> list[bool]:
    """Per sample: is every supervised token the argmax of `logits` [A, C]?

    Greedy decoding gives an answer exactly if and only if, with the answer itself as input, every
    one of its tokens is the most probable at its place (by induction over the tokens): one
    forward pass per batch instead of a generation per question.
    """
    supervised = batch.labels != IGNORE
    right = (logits.argmax(-1) == batch.labels[supervised]).tolist()
    counts = [int(part.sum()) for part in supervised.split(batch.lengths)]
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [all(right[end - count:end]) for count, end in zip(counts, ends, strict=True)]


@torch.no_grad()
def held_out_accuracy(
    model: SliME, questions: int, parts: str = "both", across_seams: bool = False,
    batch_size: int = 32, rank: int = 0, world: int = 1,
) -> dict[str, dict]:
    """`questions` of each family in every setting: {name: {accuracy, n, local_tokens}}.

    `local_tokens` is the mean number of local tokens that the language model saw. `parts` "global"
    restricts every setting to the global view, for a model whose compression is not trained yet.
    Of `world` processes each answers every world-th batch; all get the same results.
    """
    model.eval()
    device = model.adapter.w_gate.device
    counts = {name: [0, 0] for name in SETTINGS}  # right answers, local tokens
    starts = [(family, start) for family in ("global", "detail")
              for start in range(0, questions, batch_size)]
    # The random tokens have a seed per batch; the training's own stream goes on as if not used.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for family, start in tqdm(starts[rank::world], desc="held-out questions", unit="batch",
                                  leave=False, disable=rank > 0):
            torch.manual_seed(start)
            records = [held_out(family, index, across_seams)
                       for index in range(start, min(start + batch_size, questions))]
            samples = [load_sample(record, None, "chat", model) for record in records]
            add_batch(counts, model, Batch.pack(samples).to(device), family, parts)
    if world > 1:
        sums = iter(reduce([n for pair in counts.values() for n in pair], torch.device("cpu")))
        counts = {name: (next(sums), next(sums)) for name in counts}
    return {name: {"accuracy": right / questions, "n": questions,
                   "local_tokens": round(tokens / questions, 1)}
            for name, (right, tokens) in counts.items()}


def add_batch(counts: dict[str, list], model: SliME, batch: Batch, family: str, parts: str) -> None:
    """Adds right answers and local tokens of one batch to every setting of its family."""
    features, done = model.vision(batch.views), {}
    for name, (asks, shown, gamma, random_tokens) in SETTINGS.items():
        if asks != family:
            continue
        shown = shown if parts == "both" else parts
        # Without local tokens there is no router, so neither gamma nor chance plays a part.
        setting = (shown, gamma, random_tokens) if shown == "both" else (shown,)
        if setting not in done:
            visual = model.see(batch, shown, gamma, random_tokens, features)
            right = exact(batch, model(batch, visual=visual).logits)
            done[setting] = sum(right), int(visual.keep.sum())
        for place, value in enumerate(done[setting]):
            counts[name][place] += value


def table(results: dict[str, dict]) -> str:
    """The results as lines of text."""
    lines = [f"{'held-out questions':24}{'exact match':>12}{'n':>7}{'local tokens':>14}"]
    lines += [f"{name:24}{100 * row['accuracy']:11.1f}%{row['n']:7}{row['local_tokens']:14}"
              for name, row in results.items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------- a picture to look at


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sliming.tiny.held_out",
        description="Writes a held-out picture and prints what can be asked about it.")
    parser.add_argument("file", help="where to write the picture, e.g. picture.png")
    parser.add_argument("--index", type=int, default=39, help="which one (default: %(default)s)")
    arguments = parser.parse_args()
    scene, rng = held_out_scene("detail", arguments.index)
    render(scene, rng).save(arguments.file)
    for question, answer in global_questions(scene) + detail_questions(scene):
        print(f"{question:40}{answer}")


if __name__ == "__main__":
    main()
