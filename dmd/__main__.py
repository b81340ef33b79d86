"""`python -m dmd`: the command line."""

import sys

from dmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
