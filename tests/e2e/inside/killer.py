"""Kill the main process of a service again and again, each soon after it was started.

    killer.py UNIT COUNT MOST_MS

Between a start and the kill there are up to MOST_MS ms, drawn at random.
"""

import os
import random
import signal
import subprocess
import sys
import time


def main_pid(unit: str) -> int:
    command = ["systemctl", "show", "--value", "--property=MainPID", unit]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    unit, count, most_ms = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dice, last = random.Random(1), 0
    for _ in range(count):
        while (pid := main_pid(unit)) in (0, last):
            pass
        time.sleep(dice.random() * most_ms / 1000)
        os.kill(pid, signal.SIGKILL)
        last = pid


main()
