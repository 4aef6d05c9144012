"""`python -m factorizer`, and so `torchrun -m factorizer`: the command line."""

from factorizer.commands.cli import main

main()
