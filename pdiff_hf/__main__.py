"""The scripts, from an installed package: `python -m pdiff_hf train`, `accelerate launch -m pdiff_hf train`."""

import importlib
import sys

COMMANDS = {
    "train": "train",
    "collect": "collect",
    "generate": "generate",
    "evaluate": "evaluate",
    "push": "push_to_hub",
    "app": "app",
}


def main() -> None:
    """Runs the command that comes first, with the rest of the arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m pdiff_hf {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    command = sys.argv[1]
    sys.argv[:2] = [f"python -m pdiff_hf {command}"]
    importlib.import_module(f"pdiff_hf.scripts.{COMMANDS[command]}").main()


if __name__ == "__main__":
    main()
