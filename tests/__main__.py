"""Run a module of the tests that pytest does not collect: `python tests MODULE ARGUMENT...`.

A folder that Python is told to run is the first in which it looks for modules. So this one finds
`kit` and its neighbours as pytest does, which is told in pyproject.toml.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `bench`
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
