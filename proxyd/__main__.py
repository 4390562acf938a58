"""`python -m proxyd` is the command itself."""

import sys

from proxyd.cli import main

sys.exit(main())
