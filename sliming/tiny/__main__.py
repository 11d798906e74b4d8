"""`python -m sliming.tiny`: a built-in picture to look at, or the stand-ins made anew."""

from pathlib import Path

from sliming.config import NATURAL, SEED, Parser
from sliming.guard import one_line


@one_line("sliming.tiny")
def main() -> None:
    parser = Parser(prog="python -m sliming.tiny",
                    description="The tiny preset's pictures and stand-ins.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--picture", type=Path, metavar="FILE",
                      help="write a held-out picture and print what can be asked about it")
    what.add_argument("--pretrain", type=Path, metavar="FOLDER",
                      help="train the vision tower and the language model again (three quarters of "
                           "an hour on a core) and write them to FOLDER/vision and FOLDER/llm")
    parser.add_argument("--index", type=NATURAL, default=316, help="which picture (default: 316)")
    parser.add_argument("--seed", type=SEED, default=0, help="of --pretrain (default: 0)")
    arguments = parser.parse_args()
    if arguments.pretrain:
        from sliming.tiny.pretrain import pretrain
        pretrain(arguments.pretrain, arguments.seed)
        return
    from sliming.tiny.held_out import held_out_scene
    from sliming.tiny.pictures import detail_questions, global_questions, render
    scene, rng = held_out_scene(arguments.index)
    render(scene, rng).save(arguments.picture)
    for question, answer in global_questions(scene) + detail_questions(scene):
        print(f"{question:40}{answer}")


if __name__ == "__main__":
    main()
