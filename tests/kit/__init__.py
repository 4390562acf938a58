"""What the tests share: the program under test, its peers and its surroundings, traffic.

Code for a single suite is in that suite's folder, and is imported by the folder's name: `from
cases.pairs import …`. Both work because tests/ is in the path: in pytest by `pythonpath` in
pyproject.toml, otherwise by `python tests MODULE`, which runs tests/__main__.py.
"""
