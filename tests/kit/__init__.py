"""What tests are made of, each idea once: the program under test, its neighbours, traffic.

What makes sense in one suite only lies beside it, and is imported by that folder's name: `from
cases.pairs import …`. Both are found because this folder's parent is in the path: for pytest by
`pythonpath` in pyproject.toml, for all else by `python tests MODULE`, which is tests/__main__.py.
"""
