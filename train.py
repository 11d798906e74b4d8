"""Trains SliME in its three stages.

    python train.py                      all stages of the tiny preset: no network, no data, minutes
    torchrun train.py --stage 1          one stage; then --stage 2, --stage 3
    torchrun --nproc_per_node 8 train.py --stage 1 --preset llama3-8b --data a.json --images images
    python train.py --stage 3 --data records.json extra.jsonl:0.5 --images folder      your records

Each stage starts from the checkpoint of the one before in --out and writes its own beside it. A run
that was interrupted goes on from its last state when the same command is given again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before `main` begins says nothing

import json
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
            if is_main() and config.eval_questions and config.preset == "tiny":
                evaluate(folder / f"stage{stage}", stage, config.eval_questions, device)
        discard(folder, wanted)  # all is done: nothing to go on from, no picture to come back to
        shutil.rmtree(folder / "features", ignore_errors=True)
    end()


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
