"""Trains SliME in its three stages.

    python train.py                      all stages of the tiny preset: no network, no data, minutes
    torchrun train.py --stage 1          one stage; then --stage 2, --stage 3
    torchrun --nproc_per_node 8 train.py --stage 1 --preset llama3-8b --data a.json --images images
    python train.py --stage 3 --data records.json extra.jsonl:0.5 --images folder      your records

Each stage starts from the checkpoint of the one before in --out and writes its own beside it. A run
that was interrupted goes on from its last state when the same command is given again.
"""

# Before all others: an early Ctrl-C says nothing.
import sliming.quiet  # noqa: F401  # isort: skip
import shutil
from contextlib import nullcontext
from pathlib import Path

from sliming.config import STAGES, TrainConfig
from sliming.guard import one_line, only_one


@one_line("train.py", resumes=True)
def main() -> None:
    config = TrainConfig.from_flags(__doc__)
    wanted = list(STAGES) if config.stage == "all" else [int(config.stage)]

    # torch is loaded when the flags are known to be right.
    from sliming.checkpoints.states import discard, left_to_do
    from sliming.distributed import end, is_main, rank_device, start
    from sliming.trainer import train_stage
    device, folder = rank_device(), Path(config.out)
    start(device, sharded=any(config.recipe(stage).shard != "none" for stage in wanted))
    with only_one(folder) if is_main() else nullcontext():
        for stage in left_to_do(folder, wanted, config.resume):
            train_stage(config, stage, device)
            if config.eval_questions and config.preset == "tiny":
                from sliming.tiny.held_out import evaluate
                evaluate(folder / f"stage{stage}", stage, config.eval_questions, device)
        discard(folder, wanted)  # all is done: nothing to go on from, no picture to come back to
        shutil.rmtree(folder / "features", ignore_errors=True)
    end()


if __name__ == "__main__":
    main()
