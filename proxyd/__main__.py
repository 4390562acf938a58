"""`python -m proxyd` runs the command."""

import _signal  # type: ignore[import-not-found]
import sys

if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # no KeyboardInterrupt, ever

if not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # the current folder, which may contain an errno.py

from proxyd.cli import main

sys.exit(main())
