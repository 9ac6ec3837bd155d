"""`python -m tsdiff`: the command line."""

from tsdiff.cli import main

main()
