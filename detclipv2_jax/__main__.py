"""The command `detclip`, with one subcommand per task.

    detclip train|evaluate|detect|export|page|prepare [options]

`python -m detclipv2_jax` is the same command. Each subcommand has its own `--help`.
"""

import importlib
import sys

# Subcommand: (module, what it does). A module is imported on use: each needs other packages.
COMMANDS = {
    "prepare": ("prepare", "turn annotated images into records that training reads"),
    "train": ("main", "pre-train or fine-tune a detector"),
    "evaluate": ("evaluate", "measure a checkpoint on LVIS and on datasets in COCO's format"),
    "detect": ("detect", "find named things in images, folders of images and videos"),
    "export": ("export", "write a checkpoint's model as files for other programs"),
    "page": ("page", "open a local web page to try a checkpoint"),
}


def usage() -> str:
    """Return the help text of `detclip`."""
    rows = "\n".join(f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items())
    return (
        f"usage: detclip COMMAND [options]\n\ncommands:\n{rows}\n\n"
        "Run `detclip COMMAND --help` for the options of a command."
    )


def main() -> int:
    """Run the subcommand that the command line names; return its exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command {arguments[0]!r}.\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"detclipv2_jax.{COMMANDS[arguments[0]][0]}")
    sys.argv = [f"detclip {arguments[0]}", *arguments[1:]]
    return module.main()


if __name__ == "__main__":
    sys.exit(main())
