"""The model inside lmms-eval: found through its plugin mechanism, run on a task on this disk."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sliming.model import SliME

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("no lmms-eval here: pip install sliming[eval]", allow_module_level=True)

from sliming.evaluation.lmms import SliMEForLmmsEval  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = """
task: local_numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function local_numbers.visual
doc_to_text: "{{{{question}}}}\\nAnswer the question using a single word or phrase."
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 5
  temperature: 0
  num_beams: 1
process_results: !function local_numbers.results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")] if doc["image"] else []

def results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """Five questions, one of them without an image."""
    made = []
    for number in range(5):
        seeded, size = torch.Generator().manual_seed(number), (60 + 30 * number, 90, 3)
        noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=seeded)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number}.png")
        made.append({"question": f"Which number follows {number}?", "answer": "?",
                     "image": str(tmp_path / f"{number}.png") if number else ""})
    return made


def test_lmms_eval_finds_and_runs_the_installed_package(checkpoint, rows, tmp_path):
    model = SliME.from_pretrained(checkpoint)
    form = "Answer the question using a single word or phrase."
    answers = [model.answer(row["image"] or None, f"{row['question']}\n{form}", max_new_tokens=5)
               for row in rows]
    for row, answer in list(zip(rows, answers, strict=True))[:3]:
        row["answer"] = answer  # so that three of five are right
    tasks, source, installed = (tmp_path / name for name in ("tasks", "source", "installed"))
    tasks.mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tasks / "local_numbers.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    (tasks / "local_numbers.py").write_text(FUNCTIONS)
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "sliming", source / "sliming",
                    ignore=shutil.ignore_patterns("__pycache__"))

    def command(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1",
                               "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1",
                               "CUDA_VISIBLE_DEVICES": ""})

    made = command("pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target",
                   installed, source)
    assert made.returncode == 0, made.stderr
    done = command("lmms_eval", "--model", "sliming", "--model_args", f"pretrained={checkpoint}",
                   "--tasks", "local_numbers", "--include_path", tasks, "--batch_size", 2,
                   "--output_path", tmp_path / "results", "--log_samples")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = (tmp_path / "results").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["local_numbers"]
    assert scores["exact,none"] == pytest.approx(0.6)
    (samples,) = (tmp_path / "results").rglob("*samples_local_numbers.jsonl")
    said = {}
    for line in map(json.loads, samples.read_text().splitlines()):
        found = line["filtered_resps"]
        said[line["doc_id"]] = found[0] if isinstance(found, list) else found
    assert [said[place] for place in range(5)] == answers


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def plugin(checkpoint, rows) -> SliMEForLmmsEval:
    plugin = SliMEForLmmsEval(str(checkpoint), batch_size="3", device="cpu")
    plugin.task_dict = {"task": {"test": rows}}
    return plugin


def visual(row: dict) -> list:
    return [[Image.open(row["image"])]] if row["image"] else None


def test_generation_options(plugin, rows):
    def requests(**options) -> list:
        return [request(row["question"], options, visual, place, "task", "test")
                for place, row in enumerate(rows)]
    greedy = plugin.generate_until(requests(max_new_tokens=6))
    assert greedy == [plugin.model.answer(row["image"] or None, row["question"], max_new_tokens=6)
                      for row in rows]
    stop = max(greedy, key=len)[1:3]
    assert plugin.generate_until(requests(max_new_tokens=6, until=[stop])) == \
        [text.split(stop)[0] for text in greedy]
    mixed = [*requests(max_new_tokens=1)[:2], *requests(max_new_tokens=6)[2:]]
    assert plugin.generate_until(mixed)[2:] == greedy[2:]
    torch.manual_seed(0)
    drawn = plugin.generate_until(requests(max_new_tokens=6, temperature=5.0, do_sample=True))
    assert drawn != greedy and len(drawn) == 5
    with pytest.raises(ValueError, match="no beam search"):
        plugin.generate_until(requests(num_beams=4))
    with pytest.raises(ValueError, match="without video"):
        plugin.sample("Q", ["film.mp4"])


def test_markers_in_the_context_place_the_images(plugin):
    image = Image.new("RGB", (50, 40))

    def asked(text: str) -> list[int]:
        return plugin.model.processor.prompt([{"from": "human", "value": text}], [image]).text.ids

    assert plugin.sample("Here: <image> What?", [image]).text.ids == asked("Here: <image> What?")
    assert plugin.sample("What?", [image]).text.ids == asked("<image>\nWhat?")
    assert plugin.sample("<image>\nWhat?", [image, image]).text.ids.count(-200) == 2


def test_the_smallest_loss_is_what_the_model_would_say(plugin, rows):
    row = rows[2]
    said = plugin.model.answer(row["image"], row["question"], max_new_tokens=30)
    targets = [said, "zebra", lambda document: document["question"]]
    results = plugin.loglikelihood([request(row["question"], target, visual, 2, "task", "test")
                                    for target in targets])
    losses, greedy = zip(*results, strict=True)
    assert min(losses) == losses[0] and greedy == (True, False, False)
    ((alone, _),) = plugin.loglikelihood([request("", said)])
    assert alone > losses[0]


def test_several_rounds(plugin, rows):
    def next_round(document, previous_output, round_idx, previous_round_info):
        context = f"{document['question']} Again, {round_idx}?"
        return visual(document), context, round_idx == 2, previous_output, None
    (result,) = plugin.generate_until_multi_round([request(
        rows[1]["question"], {"max_new_tokens": 4}, visual, next_round, 1, "task", "test")])
    questions = (rows[1]["question"], f"{rows[1]['question']} Again, 1?")
    assert result == [plugin.model.answer(rows[1]["image"], question, max_new_tokens=4)
                      for question in questions]
