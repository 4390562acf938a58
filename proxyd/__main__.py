"""`python -m proxyd` is the command itself."""

import _signal  # type: ignore[import-not-found]
import sys

if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # no KeyboardInterrupt, ever

from proxyd.cli import main

sys.exit(main())
