"""`python -m quadapt`: the command line, where no script is on the path."""

from quadapt.cli import main

if __name__ == "__main__":
    main()
