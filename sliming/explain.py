"""What the model looked at for a question, as a picture (Fig. 2): crops, router, gates.

Legend: P crops of an image of columns x rows, S crop size, L tokens of the global view.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sliming.inputs import Batch, Sample


@torch.no_grad()
def draw(model: nn.Module, sample: Sample, gamma: float | None, answer: str, path: Path) -> None:
    """Draws of each image: its crops, the local tokens that the router kept, the global gates."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    batch = Batch.pack([sample]).to(model.device)
    visual = model.see(batch, gamma=gamma)
    side, size = model.compression.side, model.processor.crop_size
    count = len(sample.images)
    figure, panels = plt.subplots(count, 3, figsize=(14, 1.2 + 4.6 * count), squeeze=False,
                                  width_ratios=(1, 1, 1.12), layout="constrained")
    question = model.processor.tokenizer.decode(sample.text.question).strip()
    figure.suptitle(f"Question: {question}\nAnswer: {answer}", fontsize=14)
    for (cut, routed, gated), slices, keep, gates in zip(panels, sample.images, visual.keep,
                                                         visual.gates, strict=True):
        columns, rows = slices.grid
        canvas = raster(slices.crops, columns, rows)                        # [rows*S, columns*S, 3]
        cut.imshow(canvas)
        for x in range(1, columns):
            cut.axvline(x * size - 0.5, color="tab:red", linewidth=2)
        for y in range(1, rows):
            cut.axhline(y * size - 0.5, color="tab:red", linewidth=2)
        cut.set_title(f"The image, cut into {columns} x {rows} crops")

        cells = keep.view(rows * side, columns * side).cpu().numpy()        # one per local token
        shade = np.kron(cells, np.ones((size // side, size // side)))       # [rows*S, columns*S]
        shade = np.pad(shade, [(0, canvas.shape[i] - shade.shape[i]) for i in (0, 1)], mode="edge")
        faded = canvas * 0.25 + np.array([70, 70, 90]) * 0.75
        routed.imshow(np.where(shade[..., None] > 0, canvas, faded).astype(np.uint8))
        routed.set_title(f"Router: kept {int(keep.sum())} of {keep.numel()} local tokens")
        handles = [Patch(facecolor=colour, edgecolor="black", label=label)
                   for label, colour in (("kept", "white"), ("dropped", (0.32, 0.32, 0.4)))]
        routed.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2,
                      frameon=False)

        grid = int(len(gates) ** 0.5)
        gated.imshow(slices.global_view.permute(1, 2, 0).numpy(), extent=(0, grid, grid, 0))
        heat = gated.imshow(gates[:, 0].view(grid, grid).cpu().numpy(),     # [L] -> [grid, grid]
                            cmap="viridis", vmin=0, vmax=1, alpha=0.6, extent=(0, grid, grid, 0))
        gated.set_title("Global view: weight of the MLP\n(the rest is the query former's)")
        figure.colorbar(heat, ax=gated, shrink=0.8)
        for panel in (cut, routed, gated):
            panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def raster(crops: Tensor, columns: int, rows: int) -> np.ndarray:
    """Crops uint8 [P, 3, S, S] glued together again: uint8 [rows*S, columns*S, 3]."""
    size = crops.shape[-1]
    grid = crops.view(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2)  # [rows, S, cols, S, 3]
    return grid.reshape(rows * size, columns * size, 3).numpy()
