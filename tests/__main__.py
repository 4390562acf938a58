"""Run a module of the tests that pytest does not collect: `python tests MODULE ARGUMENT...`.

Python searches a folder that it runs for modules first, so `kit` and its neighbours are found here.
For pytest, pyproject.toml says so.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `bench`
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
