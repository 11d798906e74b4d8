"""Answering: the vision tower, the first token, tokens after it, memory, and the tokens that an
image costs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from PIL import Image
from transformers import AutoTokenizer

from sliming.backbones import TINY, cast
from sliming.bench.memory import on_paper
from sliming.bench.timing import median_ms, picture, show
from sliming.config import PRESETS
from sliming.distributed import choose_dtype, materialise
from sliming.inputs import Batch, Sample
from sliming.model import SliME
from sliming.slicer import slice_image
from sliming.watch import peak_memory

QUESTION = "What number is on the red bar?"


def eight_billion(layers: int, device: torch.device) -> SliME:
    """SliME-Llama3-8B's shapes with random weights, tower and language model cut to `layers`. Texts
    are read with the tiny preset's tokenizer, whose ids are all in the vocabulary."""
    torch.manual_seed(0)
    model = cast(on_paper("llama3-8b", AutoTokenizer.from_pretrained(TINY / "llm"), layers),
                 choose_dtype(None, device))
    materialise(model, device)
    with torch.no_grad():
        for parameter in model.parameters():  # matrices; norms and biases
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return model.eval()


def first_and_rest(model: SliME, sample: Sample, answers: int, repeats: int) -> Iterator[float]:
    """Median seconds to the first token, and of all after it; one more answer warms up."""
    seconds = []
    for _ in range(1 + repeats):
        began, tokens = perf_counter(), model.generate(sample, max_new_tokens=answers)
        next(tokens)                                   # a token on the host: the device has done it
        middle = perf_counter()
        list(tokens)
        seconds.append((middle - began, perf_counter() - middle))
    return map(median, zip(*seconds[1:], strict=True))


def one_answer(model: SliME, image: Image.Image, answers: int, time: partial) -> list[str]:
    """Crops, views/s in the tower, seconds to the first token, tokens/s after it, peak GB."""
    sample = model.processor.ask(image, QUESTION)
    batch = Batch.pack([sample]).to(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    views = 1 + len(batch.crops)
    tower = time(lambda: model.encode(batch))
    first, rest = first_and_rest(model, sample, answers, time.keywords["repeats"])
    return [str(views - 1), f"{1e3 * views / tower:.1f}", f"{first:.3f}",
            f"{(answers - 1) / rest:.1f}", f"{peak_memory(model.device):.2f}"]


def eight_answers(model: SliME, answers: int, time: Callable) -> list[str]:
    """Tokens/s of all together, one by one and at once; their ratio. The language model alone."""
    prompts = [model.processor.ask(None, " ".join([QUESTION] * (1 + i))) for i in range(8)]
    alone = time(lambda: [list(model.generate(one, max_new_tokens=answers)) for one in prompts])
    at_once = time(lambda: model.generate_batch(prompts, max_new_tokens=answers))
    rates = [f"{1e3 * len(prompts) * answers / ms:.1f}" for ms in (alone, at_once)]
    return [*rates, f"{alone / at_once:.2f}"]


@torch.no_grad()
def visual_tokens(model: SliME, image: Image.Image, rule: str) -> list[str]:
    """Crops by a grid rule, tokens without compression, tokens kept at three gammas, the cut."""
    cut = slice_image(image, rule=rule, global_view="squash", crop_size=model.processor.crop_size)
    sample = replace(model.processor.ask(image, QUESTION), images=[cut])
    batch = Batch.pack([sample]).to(model.device)
    features, whole = model.encode(batch), model.adapter.num_tokens
    kept = [whole + 1 + int(model.see(batch, gamma=gamma, features=features).keep[0].sum())
            for gamma in (1.0, 0.75, 0.5)]
    tiling = (1 + len(cut.crops)) * whole
    return [str(len(cut.crops)), str(tiling), *map(str, kept), f"{tiling / kept[1]:.1f}"]


def inference(device: torch.device, out: Path, models: dict[str, Callable[[], SliME]] | None = None,
              answers: int = 17) -> None:
    """`models`: name -> builder, by default the tiny preset and the 8B shapes of two layers."""
    models = models or {
        "tiny preset": lambda: SliME.from_backbones(PRESETS["tiny"].model).to(device).eval(),
        "8B shapes, 2 layers": lambda: eight_billion(2, device)}
    alone, together, counts = [], [], []
    for name, build in models.items():                 # the smaller first: a process's peak grows
        model = build()
        model.end_ids = set()                          # no answer ends early
        size = model.processor.crop_size
        full = size == 336
        repeats, warmup = (20, 3) if device.type == "cuda" else (1, 1) if full else (3, 1)
        time = partial(median_ms, device=device, repeats=repeats, warmup=warmup)
        for side in (1024, 2016) if full else (2 * size, 3 * size):
            image, label = picture(side, side), [name, f"{side} x {side}"]
            alone.append(label + one_answer(model, image, answers, time))
            counts += [[*label, rule, *visual_tokens(model, image, rule)]
                       for rule in (("paper", "official") if full else ("paper",))]
        together.append([name, *eight_answers(model, answers, time)])
        del model
    memory = "peak GB" if device.type == "cuda" else "peak GB, process so far"
    show("one question about one image, greedy; the first token includes encoding the image",
         ["model", "image", "crops", "views/s in the tower", "first token s", "tokens/s after it",
          memory], alone)
    show(f"8 questions without an image, {answers} tokens of answer each: tokens/s of all together",
         ["model", "one by one", "generate_batch", "ratio"], together)
    show("visual tokens, global view and separator included; weights are not trained, so what the "
         "router keeps\nat a gamma shows the size of the cut, not what a trained model would keep",
         ["model", "image", "grid rule", "crops", "uncompressed tiling", "gamma 1", "0.75", "0.5",
          "tiling / 0.75"], counts)
