"""Black-box suite: everything that can be promised of the program seen from outside.

    pytest tests/blackbox --executable=/lib/systemd/systemd-socket-proxyd --contender=original-252

The executable is a parameter, and the suite runs on the C original too; each intended difference
is written at its test with `differs` and listed at the end of the run.
"""


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("kit.suite")  # once, whoever else asks for it
