"""What a laptop waits for: resizing, the tower, a program's start, questions one by one."""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sliming.backbones import PIXEL_MEAN, PIXEL_STD
from sliming.bench.data import SIZE, per_crop
from sliming.bench.timing import medians_ms, picture, show
from sliming.config import PRESETS, STAGES, SliMEConfig, TrainConfig
from sliming.generate import answer_file
from sliming.inputs import Processor
from sliming.model import SliME
from sliming.slicer import Slices, choose_grid
from sliming.tiny.held_out import held_out_scene
from sliming.tiny.pictures import TrainingSet, detail_questions, global_questions, render
from sliming.trainer import one_step, set_up

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------- resizing


def float_views(slices: Slices) -> torch.Tensor:
    """As the tower wants them: float32 [1 + P, 3, S, S]. These lines else run on its device."""
    views = torch.cat([slices.global_view[None], slices.crops]).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return views.div_(255).sub_(mean).div_(std)


def resizing(device: torch.device, out: Path, sizes: tuple = ((1024, 1024), (4000, 3000)),
             repeats: int = 9) -> None:
    """From a decoded picture, and from a JPEG file, to views: the released way and both of ours."""
    released, rows = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE), []
    settings = {"slicing": "official", "global_view": "squash",
                "vision_config": {"image_size": SIZE, "patch_size": 14}, "separator_id": 0}
    ours = {resize: Processor(SliMEConfig(resize=resize, **settings), None)
            for resize in ("pillow", "torch")}
    for width, height in sizes:
        grid = choose_grid(width, height, rule="official")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.jpg"
            picture(width, height).save(path, quality=90)
            for name, source in (("decoded", Image.open(path).convert("RGB")), ("JPEG", path)):
                ways = {"released": lambda source=source, grid=grid: per_crop(
                    source if isinstance(source, Image.Image) else
                    Image.open(source).convert("RGB"), grid, released)}
                ways |= {resize: partial(processor.slice, source)
                         for resize, processor in ours.items()}
                ways["torch, float"] = lambda source=source: float_views(
                    ours["torch"].slice(source))
                times = medians_ms(ways, CPU, repeats, 2)
                apart = (ways["pillow"]().crops.int() - ways["torch"]().crops.int()).abs()
                rows.append([f"{width} x {height}, {name}",
                             *(f"{times[way]:.1f}" for way in ways),
                             *(f"{times['released'] / times[way]:.1f}" for way in list(ways)[1:]),
                             f"{100 * (apart > 0).float().mean():.2f}", int(apart.max())])
    show("milliseconds to views; crops of torch beside Pillow's: values that differ, and by how "
         "much of 255", ["picture", "released way", "pillow", "torch", "torch, float", "released / "
                         "pillow", "/ torch", "/ torch, float", "differ %", "most"], rows)


# --------------------------------------------------------------------------------------- the tower


def features(device: torch.device, out: Path, steps: int = 10) -> None:
    """A step of each stage of the tiny preset, on new pictures and on features of known ones."""
    rows = []
    for stage in STAGES:
        runs, seconds = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
            for name, pool in (("pixels", 0), ("features", 8)):
                with redirect_stdout(None):
                    run = set_up(TrainConfig(init_from=folder, out=f"{folder}/{name}", pool=pool,
                                             max_steps=steps + 4), stage, CPU)
                runs[name] = partial(step, run, iter(range(steps + 4)))
            seconds = medians_ms(runs, CPU, steps, 2)
        rows.append([f"stage {stage}", *(f"{seconds[name]:.0f}" for name in runs),
                     f"{seconds['features'] / seconds['pixels']:.2f}"])
    show("milliseconds of a step", ["", "pixels", "features", "ratio"], rows)


def step(run, numbers) -> None:
    one_step(run, next(run.shares), next(numbers), 0.0)
    run.optimizer.step()
    run.optimizer.zero_grad()


# --------------------------------------------------------------------------------------- answering


def answers(device: torch.device, out: Path, checkpoint: str | None = None,
            questions: int = 64) -> None:
    """Questions a second to a checkpoint of the tiny preset, a trained one if its answers are to
    have their true length: one by one, and from a file in batches."""
    torch.manual_seed(0)
    model = (SliME.from_pretrained(checkpoint) if checkpoint else
             SliME.from_backbones(PRESETS["tiny"].model)).eval()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, most in (("one question a picture", 1), ("all questions of a picture", 99)):
            asked = []
            for index in range(questions):
                scene, rng = held_out_scene(index)
                render(scene, rng).save(folder / f"{index}.png")
                asked += [{"question_id": f"{index} {words}", "image": f"{index}.png",
                           "text": words} for words, _ in (detail_questions(scene)
                                                           + global_questions(scene))[:most]]
            asked = asked[:questions]
            (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))

            def in_batches(size: int) -> None:
                (folder / "answers.jsonl").unlink(missing_ok=True)
                answer_file(model, folder / "questions.jsonl", folder, folder / "answers.jsonl",
                            size, max_new_tokens=8)

            times = medians_ms({
                "alone": lambda asked=asked: [model.answer(folder / one["image"], one["text"],
                                                           max_new_tokens=8) for one in asked],
                "batches": partial(in_batches, 16)}, CPU, 3, 1)
            rows.append([title, *(f"{1e3 * len(asked) / ms:.1f}" for ms in times.values()),
                         f"{times['alone'] / times['batches']:.2f}"])
    show("questions a second", ["", "one by one", "batches of 16", "ratio"], rows)


def starting(device: torch.device, out: Path, repeats: int = 3) -> None:
    """Seconds of whole processes: a program's help, and the answer to one question."""
    rows, root = [], Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(f"{folder}/model")
        TrainingSet(3)[0]["image"].save(f"{folder}/a.png")
        ask = ["sample.py", "--checkpoint", f"{folder}/model", "--image", f"{folder}/a.png",
               "--max-new-tokens", "3", "--prompt", "How many bars are there?"]
        for words in (["train.py", "--help"], ["sample.py", "--help"], ask):
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                subprocess.run([sys.executable, *words], cwd=root, check=True, capture_output=True)
                seconds.append(time.perf_counter() - began)
            name = " ".join(words[:2]) if len(words) == 2 else "sample.py, one question"
            rows.append([name, f"{sorted(seconds)[repeats // 2]:.2f}"])
    show("seconds", ["", ""], rows)
