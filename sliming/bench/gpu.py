"""All that a GPU can tell, in one command of at most eighteen minutes. Each part is a process of
its own with a time limit, and its output is in OUT when it ends, whatever those after it do.

    kernels      the compiled kernels' tests
    attention    copy bandwidth, the best SDPA, FlexAttention, the released way
    train        stages I, II, III and LoRA on 8B shapes, compiled, too: tokens/s, MFU, memory
    sharded      the same as the presets divide it, in a process group (NCCL) of one
    inference    crops/s, time to the first token, tokens/s for one and several questions
    precision    bfloat16 beside float32 logits at positions beyond 2,000
    tiny         the tiny preset's three stages in float32 and in bfloat16, with accuracies
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from sliming.bench.memory import LANGUAGE_MODELS
from sliming.bench.timing import device_line, show
from sliming.distributed import materialise

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
PARTS = {  # seconds at most, command; {out} is the folder
    "kernels": (240, [PYTHON, "-m", "pytest", "-q", "-k", "not interpreter and not kernels_compile",
                      "tests/test_fused_attention.py"]),
    "attention": (220, [PYTHON, "-m", "sliming.bench", "--what", "attention", "--out", "{out}"]),
    "train": (240, [PYTHON, "-m", "sliming.bench", "--what", "train"]),
    "sharded": (120, [PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "1",
                      "-m", "sliming.bench", "--what", "train"]),
    "inference": (60, [PYTHON, "-m", "sliming.bench", "--what", "inference"]),
    "precision": (30, [PYTHON, "-m", "sliming.bench.gpu"]),
    "tiny": (90, [PYTHON, "train.py", "--out", "{out}/tiny", "--resume", "never"]),
    "tiny-bf16": (90, [PYTHON, "train.py", "--out", "{out}/tiny-bf16", "--resume", "never",
                       "--bf16"]),
}


def gpu(device: torch.device, out: Path, parts: dict = PARTS) -> None:
    """Runs every part, keeps its output in OUT/NAME.txt and what became of it in OUT/gpu.json."""
    if device.type != "cuda":
        raise ValueError("--what gpu needs a CUDA device, and there is none; the other subjects "
                         "run on a CPU")
    run_parts(out, parts, device_line(device))


def run_parts(out: Path, parts: dict, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results = {"device": device, "parts": {}}
    for name, (limit, command) in parts.items():
        began = time.perf_counter()
        command = [word.replace("{out}", str(out)) for word in command]
        with open(out / f"{name}.txt", "w", encoding="utf-8") as log:
            try:
                code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                      timeout=limit, env={**os.environ, "PYTHONUNBUFFERED": "1",
                                           "SLIMING_TEST_GPU": "1"})
                end = "done" if code.returncode == 0 else f"exit {code.returncode}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {limit} s"
        results["parts"][name] = {"end": end, "seconds": round(time.perf_counter() - began, 1)}
        (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name}: {end}; {out / name}.txt", flush=True)
    for name in ("tiny", "tiny-bf16"):
        found = out / name / "stage3" / "eval.json"
        if found.is_file():
            rows = json.loads(found.read_text()).items()
            show(f"{name}: exact match after stage III", ["held-out questions", "exact match"],
                 [[setting, f"{100 * row['accuracy']:.1f} %"] for setting, row in rows])
    show(device, ["part", "end", "seconds"],
         [[name, row["end"], row["seconds"]] for name, row in results["parts"].items()])


def precision(device: torch.device, layers: int = 4, tokens: int = 4096) -> None:
    """How far bfloat16 logits of a packed Llama at 8B shapes are from float32 ones."""
    from sliming.backbones import Segments, build_llm, cast
    config = {**LANGUAGE_MODELS["llama3-8b"].to_dict(), "num_hidden_layers": layers}
    torch.manual_seed(0)
    exact = build_llm(config)
    materialise(exact, device)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
        ids = torch.randint(config["vocab_size"], (1, tokens), device=device)
        segments = Segments([tokens], device)
        expected = exact(ids, segments=segments).logits[0, 2000:]
        got = cast(exact, torch.bfloat16)(ids, segments=segments).logits[0, 2000:].float()
    worst = ((got - expected).norm() / expected.norm()).item()
    print(f"bfloat16 logits at positions 2,000 to {tokens:,}: {100 * worst:.1f} % from float32")


if __name__ == "__main__":
    from sliming.distributed import rank_device
    precision(rank_device())
