"""`factorizer`, `python -m factorizer`, and so `torchrun -m factorizer`: the command line."""

import sys


def main() -> None:
    """Console entry point. Where a library of the extra `seg` is missing it ends with a line that says so."""
    try:
        from factorizer.commands.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        if (error.name or "factorizer").startswith("factorizer"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'factorizer-kernels[seg]'")


if __name__ == "__main__":  # not in a worker that is spawned, which imports this module again
    main()
