"""Trains SliME in its three stages.

    python train.py                                  all three stages of the tiny preset: no network, no data, minutes
    torchrun train.py --stage 1                      one stage; then --stage 2, --stage 3
    torchrun --nproc_per_node 8 train.py --stage 1   on eight GPUs
    python train.py --stage 3 --data records.json --images folder      on your own LLaVA-format records

Each stage starts from the checkpoint of the one before in --out and writes its own beside it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import HfArgumentParser

from sliming.data import RecordError
from sliming.evaluate import held_out_accuracy, table
from sliming.model import CheckpointError
from sliming.trainer import PRESETS, STAGES, TrainConfig, is_main, say, train_stage


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

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun on several ranks
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        for stage in STAGES if config.stage == "all" else [int(config.stage)]:
            model = train_stage(config, stage, device)
            if is_main() and config.eval_questions:
                # After stage I only the global view is trained; the later stages answer with everything.
                parts = STAGES[stage].parts if stage == 1 else "both"
                results = held_out_accuracy(model, config.eval_questions, parts)
                path = Path(config.out) / f"stage{stage}" / "eval.json"
                path.write_text(json.dumps(results, indent=2) + "\n")
                say(table(results))
    except (RecordError, CheckpointError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
