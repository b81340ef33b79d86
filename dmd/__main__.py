"""`python -m dmd`: the command line."""

import sys

from dmd.cli import main
from dmd.device import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
