"""The `higgs` command, also `python -m higgs`: one subcommand for each piece of work beside train.py and infer.py."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from higgs.cli import fail, show_warning
from higgs.data import tokenize_command
from higgs.errors import UserError
from higgs.eval import command as evaluate_command
from higgs.train import compare


def main(arguments: Sequence[str] | None = None) -> None:
    """A user's mistake is one sentence on standard error and exit status 2, without a traceback."""
    parser = argparse.ArgumentParser(prog="higgs", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (tokenize_command, evaluate_command, compare):
        module.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            options.run(options)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
