"""Trains SliME in its three stages.

    python train.py                      all stages of the tiny preset: no network, no data, minutes
    torchrun train.py --stage 1          one stage; then --stage 2, --stage 3
    torchrun --nproc_per_node 8 train.py --stage 1 --preset llama3-8b --data a.json --images images
    python train.py --stage 3 --data records.json extra.jsonl:0.5 --images folder      your records

Each stage starts from the checkpoint of the one before in --out and writes its own beside it. A run
that was interrupted goes on from its last state when the same command is given again.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from sliming.config import STAGES, TrainConfig


def main() -> None:
    config = TrainConfig.from_flags(__doc__)
    wanted = list(STAGES) if config.stage == "all" else [int(config.stage)]

    # torch is loaded when the flags are known to be right.
    import torch.distributed as dist

    from sliming.distributed import is_main, rank_device, start
    from sliming.trainer import train_stage
    device = rank_device()
    sharded = any(config.recipe(stage).shard != "none" for stage in wanted)
    if "WORLD_SIZE" in os.environ and (int(os.environ["WORLD_SIZE"]) > 1 or sharded):
        start(device)  # by torchrun

    stages, folder = wanted, Path(config.out)
    if config.resume == "auto":  # an interrupted run of all stages goes on with the one it was in
        begun = [stage for stage in wanted if list(folder.glob(f"stage{stage}/resume/step-*"))]
        stages = wanted[wanted.index(begun[-1]):] if begun else wanted
    try:
        for stage in stages:
            train_stage(config, stage, device)
            if is_main() and config.eval_questions and config.preset == "tiny":
                evaluate(folder / f"stage{stage}", stage, config.eval_questions, device)
        if is_main():  # all is done: nothing to go on from, no picture to come back to
            for name in ("features", *(f"stage{stage}/resume" for stage in wanted)):
                shutil.rmtree(folder / name, ignore_errors=True)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(folder: Path, stage: int, questions: int, device) -> None:
    """Asks a checkpoint of the tiny preset about held-out pictures, and writes eval.json."""
    from sliming.model import SliME
    from sliming.tiny.held_out import held_out_accuracy, table
    from sliming.watch import say
    model = SliME.from_pretrained(folder).to(device)
    # After stage I only the global view is trained; the later stages answer with everything.
    results = held_out_accuracy(model, questions, "global" if stage == 1 else "both",
                                folder=folder.parent / "features")
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    say(table(results))


if __name__ == "__main__":
    main()
