"""Trains SliME in its three stages.

    python train.py                                  all three stages of the tiny preset: no network, no data, minutes
    torchrun train.py --stage 1                      one stage; then --stage 2, --stage 3
    torchrun --nproc_per_node 8 train.py --stage 1 --preset llama3-8b --data pretrain.json --images images
    python train.py --stage 3 --data records.json extra.jsonl:0.5 --images folder      your own LLaVA-format records

Each stage starts from the checkpoint of the one before in --out and writes its own beside it. A run that was interrupted
goes on from its last state when the same command is given again.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import HfArgumentParser

from sliming.evaluation.run import held_out_accuracy, table
from sliming.config import PRESETS
from sliming.qformer import ATTENTION
from sliming.trainer import STAGES, TrainConfig, is_main, say, train_stage


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with this file's docstring as it stands, and every flag's default."""


def main() -> None:
    parser = HfArgumentParser(TrainConfig, prog="train.py", description=__doc__, formatter_class=HelpFormatter)
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {' '.join(unknown)}; --help lists them")
    if config.preset not in PRESETS:
        parser.error(f"unknown preset {config.preset!r}; there are {', '.join(PRESETS)}")
    if config.stage not in ("all", *map(str, STAGES)):
        parser.error(f"unknown stage {config.stage!r}; use 1, 2, 3 or all")
    if config.stage == "all" and config.init_from:
        parser.error("--init-from says where one stage starts: name the stage with --stage")
    for name, known in (("attention", ATTENTION), ("resume", ("auto", "never")), ("adapter_schedule", ("together", "alternate"))):
        if getattr(config, name) not in known:
            parser.error(f"--{name} must be one of {', '.join(known)}, not {getattr(config, name)!r}")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    stages = list(STAGES) if config.stage == "all" else [int(config.stage)]
    shared = int(os.environ.get("WORLD_SIZE", 0)) > 1 or any(config.recipe(stage).shard != "none" for stage in stages)
    if "WORLD_SIZE" in os.environ and shared and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # started by torchrun
    wanted = stages
    if config.resume == "auto":  # an interrupted run of all stages goes on with the one that it was in
        begun = [stage for stage in stages if list(Path(config.out).glob(f"stage{stage}/resume/step-*"))]
        stages = stages[stages.index(begun[-1]):] if begun else stages
    try:
        for stage in stages:
            model = train_stage(config, stage, device)
            if is_main() and config.eval_questions and config.preset == "tiny":
                # After stage I only the global view is trained; the later stages answer with everything.
                parts = STAGES[stage].parts if stage == 1 else "both"
                results = held_out_accuracy(model, config.eval_questions, parts)
                path = Path(config.out) / f"stage{stage}" / "eval.json"
                path.write_text(json.dumps(results, indent=2) + "\n")
                say(table(results))
        for stage in wanted if is_main() else ():  # all is done: nothing to go on from
            shutil.rmtree(Path(config.out) / f"stage{stage}" / "resume", ignore_errors=True)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
