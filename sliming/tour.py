"""`python -m sliming.tour`: one image and one question through the model, a step at a time.

    image -> slicer -> tower -> adapter, compression -> router -> language model -> answer

Each step is called by hand here, as `SliME.forward` calls it, prints the shape of what it made, and
is drawn into one picture. Read beside it the file that the printed line names.

Legend: P crops, S crop size, L patches of a view, Dv vision width, Nq queries per crop, D model
width, M = P Nq local tokens, K kept of them, N words, T tokens that the language model reads.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sliming.chat import IMAGE_TOKEN
from sliming.config import PRESETS, Parser
from sliming.explain import raster
from sliming.guard import naming, one_line
from sliming.inputs import Batch
from sliming.model import SliME, Visual, stitch
from sliming.router import relevance, route


@torch.no_grad()
def tour(model: SliME, image: str | Path | Image.Image, question: str, path: Path) -> str:
    """Prints the steps and draws them into `path`; the answer. ValueError, OSError for an image
    that cannot be read."""
    c = model.config

    # 1. The image becomes a global view and a grid of crops; the question becomes tokens.
    sample = model.processor.ask(image, question)
    slices, text = sample.images[0], sample.text
    columns, rows = slices.grid
    tell("slicer", "the whole image, squeezed into one view", slices.global_view)
    tell("slicer", f"cut into {columns} x {rows} crops", slices.crops)
    tell("chat", "the question in its template, -200 where the image goes", torch.tensor(text.ids))

    # 2. The frozen tower reads every view by itself.
    patches = model.vision(torch.cat([slices.global_view[None], slices.crops]))  # [1+P, L, Dv]
    tell("backbones", "the tower's features, a vector per patch of a view", patches)

    # 3. The global view keeps all its tokens, mixed by a gate from an MLP and a query former.
    whole, gates = model.adapter(patches[:1])                                  # [1, L, D] [1, L, 2]
    tell("moe_adapter", "the global view's tokens", whole[0])
    tell("moe_adapter", "weights of MLP and query former", gates[0])

    # 4. A few queries condense each crop; its tokens are joined into one raster.
    condensed = model.compression(patches[1:])                                 # [P, Nq, Dv]
    tell("qformer", "each crop, condensed by a few queries", condensed)
    local = stitch(model.adapter.mlp(condensed), slices.grid)                  # [M, D]
    tell("model", "the crops' tokens as one raster", local)

    # 5. The router keeps those that concern the question.
    asked = model.llm.get_input_embeddings()(torch.tensor(text.question))      # [Q, D]
    scores = relevance(local, asked, c.router_score)                           # [M]
    keep = route(local, asked, c.gamma, score=c.router_score, temperature=c.router_temperature)
    tell("router", "how much each local token concerns the question", scores)
    tell("router", f"kept at gamma {c.gamma}", local[keep])

    # 6. Words, global view, separator and kept tokens, in one row; the model says what comes next.
    visual = Visual(whole, gates, [local], [keep])
    row, _, lengths = model.embed(Batch.pack([sample]), visual)                # [T, D]
    tell("model", "what the language model reads", row)
    logits = model.llm.get_output_embeddings()(model.decode(row, lengths)[-1])  # [C]
    tell("model", "how probable each token is to begin the answer", logits)
    answer = model.answer(image, question)
    print(f"\n{question}\n{answer}")

    shade = {"patches": colours(patches[0]).view(*2 * [side(patches)], 3),
             "local": on_grid(colours(local), slices.grid),
             "scores": on_grid(scores[:, None], slices.grid)[..., 0],
             "kept": on_grid(keep[:, None].float(), slices.grid)[..., 0],
             "gates": gates[0, :, 0].view(*2 * [side(patches)])}
    kinds = ["words"] * text.ids.index(IMAGE_TOKEN) + ["global view"] * len(whole[0])
    kinds += ["separator"] + ["kept local tokens"] * int(keep.sum())
    kinds += ["words"] * (len(row) - len(kinds))
    best = logits.softmax(-1).topk(5)
    first = {repr(model.processor.tokenizer.decode([token])): float(p)
             for p, token in zip(best.values, best.indices.tolist(), strict=True)}
    draw(slices, shade, kinds, first, f"{question}  {answer}", path)
    return answer


def tell(file: str, what: str, made: Tensor) -> None:
    print(f"{file + '.py':16}{str(list(made.shape)):20}{what}")


def side(tokens: Tensor) -> int:
    return int(tokens.shape[-2] ** 0.5)


def colours(tokens: Tensor) -> Tensor:
    """Tokens [N, D] by their three main directions as red, green and blue: [N, 3] in 0 .. 1."""
    centred = tokens.float() - tokens.float().mean(0)
    main = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T   # [N, 3]
    low, high = main.quantile(0.02, 0), main.quantile(0.98, 0)
    return ((main - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)


def on_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """A value per local token, in raster order, [M, v] -> [rows * g, columns * g, v]."""
    columns, rows = grid
    g = int((len(values) / (columns * rows)) ** 0.5)
    return values.view(rows * g, columns * g, -1)


def draw(slices, shade: dict[str, Tensor], kinds: list[str], first: dict[str, float], title: str,
         path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(18, 9), layout="constrained")
    figure.suptitle(title, fontsize=15)
    columns, rows = slices.grid
    canvas, size = raster(slices.crops, columns, rows), slices.crops.shape[-1]
    pictures = [("1  slicer: the global view", slices.global_view.permute(1, 2, 0), {}),
                (f"1  slicer: {columns} x {rows} crops", canvas, {}),
                ("2  tower: patches of the global view", shade["patches"], {}),
                ("3  adapter: weight of the MLP", shade["gates"], {"vmin": 0, "vmax": 1}),
                ("4  compression: local tokens", shade["local"], {}),
                ("5  router: relevance, dropped ones pale", shade["scores"],
                 {"alpha": shade["kept"].numpy() * 0.7 + 0.3})]
    for panel, (name, picture, options) in zip(panels.flat[:6], pictures, strict=True):
        panel.imshow(np.asarray(picture), **options)
        panel.set(title=name, xticks=[], yticks=[])
    for x in range(1, columns):
        panels[0, 1].axvline(x * size - 0.5, color="tab:red", linewidth=2)
    for y in range(1, rows):
        panels[0, 1].axhline(y * size - 0.5, color="tab:red", linewidth=2)

    names = list(dict.fromkeys(kinds))
    wide = int(np.ceil(len(kinds) ** 0.5))
    strip = np.full(wide * wide, np.nan)
    strip[:len(kinds)] = [names.index(kind) for kind in kinds]
    shown = panels[1, 2].imshow(strip.reshape(wide, wide), cmap="tab10", vmin=0, vmax=9)
    for name in names:
        panels[1, 2].plot([], [], "s", color=shown.cmap(names.index(name) / 9),
                          label=f"{kinds.count(name)} {name}")
    panels[1, 2].set(title=f"6  the language model reads {len(kinds)} tokens", xticks=[], yticks=[])
    panels[1, 2].legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    panels[1, 3].barh(list(first)[::-1], list(first.values())[::-1])
    panels[1, 3].set(title="6  how the answer begins", xlabel="probability", xlim=(0, 1))
    with naming(path):
        figure.savefig(path, dpi=80)
    plt.close(figure)


@one_line("sliming.tour")
def main() -> None:
    parser = Parser(prog="python -m sliming.tour", description="One image and one question through "
                    "the model, a step at a time: shapes, and a picture of each step.")
    parser.add_argument("--image", type=Path, help="(default: a held-out picture of the package)")
    parser.add_argument("--prompt", default="What number is on the red bar?", help="the question")
    parser.add_argument("--checkpoint", help="folder or hub id (default: the newest in out/, else "
                        "the tiny preset, untrained)")
    parser.add_argument("--out", type=Path, default=Path("tour.png"), help="the picture to draw")
    arguments = parser.parse_args()

    from sliming.checkpoints.files import newest
    from sliming.tiny.held_out import held_out_scene
    from sliming.tiny.pictures import render
    try:
        model = SliME.from_pretrained(arguments.checkpoint or newest(Path("out")))
    except FileNotFoundError:
        if arguments.checkpoint:
            raise
        print("No checkpoint in out/: this is the tiny preset untrained, and its answer a guess. "
              "Train it with: python train.py\n")
        torch.manual_seed(0)
        model = SliME.from_backbones(PRESETS["tiny"].model).eval()
    tour(model, arguments.image or render(*held_out_scene(134)), arguments.prompt,
         arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
