"""`python -m quadapt`: the command line, where no script is on the path."""

from quadapt.cli import main

main()
