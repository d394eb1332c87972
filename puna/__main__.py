"""`python -m puna`: the command line."""

from puna.cli.app import main

if __name__ == "__main__":
    main()
