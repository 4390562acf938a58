"""Black-box suite: everything that is promised of the program as seen from outside.

    pytest tests/blackbox --executable=/lib/systemd/systemd-socket-proxyd --contender=original-252

The executable is a parameter, and the suite runs on the C original too; each intended difference
is marked at its test with `differs` and listed at the end of the run.
"""


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("kit.suite")  # imports it once, even if another suite did already
