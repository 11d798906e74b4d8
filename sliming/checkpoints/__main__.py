"""`python -m sliming.checkpoints`: checkpoints in other forms."""

from pathlib import Path

from sliming.config import Parser
from sliming.guard import one_line


@one_line("sliming.checkpoints")
def main() -> None:
    parser = Parser(prog="python -m sliming.checkpoints", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", nargs=2, metavar=("CHECKPOINT", "FOLDER"),
                      help="a checkpoint with LoRA adapters, written with plain weights")
    what.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"),
                      help="a checkpoint under the released models' names, for the released code")
    arguments = parser.parse_args()
    source, target = arguments.merge or arguments.export
    from sliming.checkpoints import released
    from sliming.model import SliME
    folder = Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something already: choose another folder")
    model = SliME.from_pretrained(source)
    model.save_pretrained(folder) if arguments.merge else released.export(model, folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
