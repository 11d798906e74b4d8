"""The model card of a checkpoint: what a stranger wants to know before downloading it."""

import json
from dataclasses import asdict
from pathlib import Path

from sliming.checkpoints import files
from sliming.config import SliMEConfig
from sliming.guard import plain


def write(folder: Path, config: SliMEConfig, source: Path | None, options: dict | None) -> None:
    """Writes README.md into a checkpoint's folder, unless there is one.

    `source`: the folder that the model came from; its train_config.json and eval.json say what it
    learned from, and how well. `options`: `license` (an identifier of the hub's; unknown), `data`
    (a list of names) and `evaluation` ({name: number}) where these say nothing.
    """
    known = {"license", "data", "evaluation"}
    if wrong := set(options or ()) - known:
        raise ValueError(f"a model card takes {', '.join(sorted(known))}, not {', '.join(wrong)}")
    if (folder / "README.md").exists():
        return
    given = {"license": "unknown", **(options or {})}
    run, scores = (read(source, name) for name in ("train_config.json", "eval.json"))
    data = given.get("data") or run.get("data") or (["the built-in pictures"] if run else [])
    scores = given.get("evaluation") or {name: f"{100 * row['accuracy']:.1f} % of {row['n']}"
                                         for name, row in scores.items()}
    bases = [name for name in (config.llm, config.vision) if name.count("/") == 1]
    settings = [(name, value) for name, value in asdict(config).items()
                if name not in ("vision_config", "llm_config")]
    name = "/".join(folder.parts[-2:])
    front = {"license": given["license"], "library_name": "sliming",
             "pipeline_tag": "image-text-to-text", "base_model": bases}
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]),
        f"# {folder.name}",
        f"SliME, a vision-language model for high-resolution images (arXiv 2406.08487), of "
        f"{config.vision} and {config.llm}.",
        f'```python\nfrom sliming import SliME\n\nmodel = SliME.from_pretrained("{name}")\n'
        'print(model.answer("picture.png", "What is shown?"))\n```',
        "## Data\n\n" + ("\n".join(f"* {plain(str(each))}" for each in data) or "Not stated."),
        "## Evaluation\n\n" + (table("held-out questions", "result", scores.items())
                               if scores else "Not stated."),
        "## Settings\n\n" + table("field", "value", settings)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def read(folder: Path | None, name: str) -> dict:
    """A JSON file of the folder; {} where there is none."""
    there = folder is not None and (folder / name).is_file()
    return files.read_json(folder / name) if there else {}


def table(left: str, right: str, rows) -> str:
    lines = [f"| {plain(str(a))} | {plain(str(b))} |" for a, b in rows]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])
