"""`python -m factorizer`, and so `torchrun -m factorizer`: the command line."""

from factorizer.cli import main

main()
