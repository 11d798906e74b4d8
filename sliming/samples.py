"""What the model answers while it learns: a few held-out questions, asked again and again."""

from dataclasses import replace
from pathlib import Path
from textwrap import fill

import torch
from torch import nn

from sliming.chat import encode, without_markers
from sliming.data import Steps, check_record, load_sample
from sliming.explain import raster
from sliming.guard import naming
from sliming.records import RecordError
from sliming.tiny.held_out import held_out
from sliming.watch import say

TOKENS = 48  # of an answer, at most


@torch.no_grad()
def ask_held_out(model: nn.Module, work: Steps, step: int, out: Path) -> None:
    """Asks the first question of each record that the run holds back (of built-in pictures: of
    held-out ones), as the stage shows them: to the log, and to OUT/samples-STEP.png."""
    records = getattr(work.records, "held", None) or [
        held_out(family, index) for index, family in enumerate(("global", "detail") * 2)]
    template, tokenizer, asked = work.template, model.processor.tokenizer, []
    model.eval()
    for record in records:
        try:
            turns, images = check_record(record)
            turns = turns[:2 + (turns[0]["from"] == "system")]
            sample = load_sample({**record, "image": images, "conversations": turns}, work.folder,
                                 template, model.processor, parts=work.parts)
        except RecordError as error:
            say(f"held out, and not to be asked: {error}")
            continue
        prompt = replace(sample, text=encode(turns[:-1], template, tokenizer))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=work.recipe.bf16):
            tokens = list(model.generate(prompt, max_new_tokens=TOKENS, parts=work.parts))
        answer = tokenizer.decode(tokens).strip()
        question, wanted = without_markers(turns[-2]["value"]).strip(), turns[-1]["value"]
        asked.append((sample.images, question, wanted, answer))
        say(f"step {step}: {question!r} is answered {answer!r}, wanted {wanted!r}")
    model.train()
    model.vision.eval()
    if asked:
        draw(asked, f"step {step}", out / f"samples-{step:06d}.png")


def draw(asked: list[tuple], title: str, path: Path) -> None:
    """The pictures in a row, under each its question, what is answered and what is wanted."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, len(asked), figsize=(4 * len(asked), 6), squeeze=False,
                                  layout="constrained")
    figure.suptitle(title)
    for panel, (images, question, wanted, answer) in zip(panels[0], asked, strict=True):
        for image in images[:1]:
            panel.imshow(raster(image.crops, *image.grid) if image.global_view is None
                         else image.global_view.permute(1, 2, 0).numpy())
        text = "\n".join(fill(f"{name} {part}"[:300], 44).replace("$", r"\$") for name, part in (
            ("Question:", question), ("wanted:", wanted), ("answered:", answer)))
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(text, fontsize=9, loc="left")
    with naming(path):
        figure.savefig(path, dpi=80)
    plt.close(figure)
