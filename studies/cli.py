"""The command line, in two stages: the first word picks a module, which alone builds its parser.

So `ditbench --help` and the reports start without torch, and one command's libraries do not slow another.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

COMMANDS = {
    "train": "train one method at one seed",
    "compare": "train and evaluate several methods under one budget, and write the report",
    "ablate": "try settings of a method, as a grid or as a search, and write the report",
    "evaluate": "evaluate a run's EMA backbone again, under its own or another protocol, or score anybody's images",
    "analyze": "analyse what the blocks of runs represent: alignment, linear probes, pictures of components",
    "sample": "generate images from a run, as PNG files or one .npz",
    "report": "write the report of a study from its records",
    "claims": "judge the claims of the papers by the records of studies",
    "check-reference": "say whether a run lies where runs of other seeds and machines lie",
    "sync": "rebuild MLflow from the records of a study",
    "diff": "show what differs between two runs, and whether they may be compared",
    "overhead": "show what each method costs: parameters, GFLOPs, teachers, encoders; with --measure time and memory",
    "methods": "list the methods there are",
    "prepare": "build the caches of a config ahead of time, or train an autoencoder",
    "doctor": "show device, versions, and which weights are present",
}
"""Commands, in the order of the help."""


def usage() -> str:
    """The help of `ditbench` itself."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: ditbench COMMAND [--help] [--debug] [--offline] ...\n\n"
        "Compares training methods for diffusion transformers head to head.\n\n"
        f"commands:\n{listed}\n\n"
        "ditbench COMMAND --help shows a command's options; --debug shows the trace of an error;\n"
        "--offline never tries the network for weights and data sets that are not on this machine."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 something failed, 2 the input was wrong, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if "--offline" in words:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the hub's library, here and in every process started from here
    words = [word for word in words if word not in ("--debug", "--offline")]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    from harness.errors import StorageError, UserError, one_line

    # Of several processes that a launcher such as torchrun started, the first alone prints.
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Read when torch is loaded: its C++ warnings are about our code, not about the user's.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"command {words[0]!r} is not known: there are {', '.join(COMMANDS)}")
        module = importlib.import_module(f"studies.commands.{words[0].replace('-', '_')}")
        return module.main(words[1:])
    except (UserError, StorageError) as error:
        if debug:
            traceback.print_exc()
        if rank == 0:
            print(f"ditbench: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(
            "ditbench: interrupted; run again, train, compare, ablate go on from the last checkpoint", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
