"""The paper's claims, asked again in miniature.

    python -m sliming.lab                                    what can be tried
    python -m sliming.lab run --out lab --quick              a first look: one seed, fewer steps
    python -m sliming.lab run --out lab --seeds 5            all arms; the same command goes on
    python -m sliming.lab report --out lab                   tables and pictures of what is there
"""

import os
from pathlib import Path

from sliming.config import COUNT, PROCESSES, Help, Parser
from sliming.guard import InputError, one_line


@one_line("sliming.lab", resumes=True)
def main() -> None:
    parser = Parser(prog="python -m sliming.lab", description=__doc__, formatter_class=Help)
    ways = parser.add_subparsers(dest="way")
    run = ways.add_parser("run", formatter_class=Help, help="train and ask arms")
    report = ways.add_parser("report", formatter_class=Help, help="tables and pictures")
    for way in (run, report):
        way.add_argument("--out", type=Path, default=Path("lab"), help="folder of the results")
    run.add_argument("--arms", nargs="+", metavar="ARM", help="some instead of all")
    run.add_argument("--seeds", type=COUNT, default=5, help="trainings of each arm")
    run.add_argument("--jobs", type=PROCESSES, default=os.cpu_count(),
                     help="trainings at a time, a core each")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                     help="cuda: all trainings share one GPU")
    run.add_argument("--quick", action="store_true", help="one seed, fewer steps, no choice of "
                     "learning rates")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"  # every training has a core of its own
    from sliming.lab.arms import ARMS
    if arguments.way is None:
        for name, arm in ARMS.items():
            print(f"{name:14}{arm.about}")
        return
    if arguments.way == "report":
        from sliming.lab.report import report
        report(arguments.out)
        return
    from sliming.lab import run as lab
    unknown = sorted(set(arguments.arms or ()) - set(ARMS))
    if unknown:
        raise InputError(f"no arm {', '.join(unknown)}; `python -m sliming.lab` lists them")
    setting, seeds = (lab.QUICK, 1) if arguments.quick else (lab.Setting(), arguments.seeds)
    lab.run(arguments.out, setting, arguments.arms or list(ARMS), seeds, arguments.jobs,
            arguments.device)


if __name__ == "__main__":
    main()
