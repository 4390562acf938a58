"""Socket-activated forwarder for IPv4, IPv6, UNIX and VSOCK sockets."""

__version__ = "0.1.0"


def use_bundle() -> None:
    """Load the modules that every start needs from one file, which the build has made of them.

    That takes half the time: one file is read instead of 24, and importlib has nothing to look for.
    Without the file, or if another version of Python has made it, they are imported as usual. So
    are those after the first that fails: whoever imports it gets to see why.
    """
    import marshal
    import sys
    from _frozen_importlib import ModuleSpec
    from _frozen_importlib_external import MAGIC_NUMBER, SourceFileLoader
    from _imp import _fix_co_filename  # type: ignore[attr-defined]

    folder = __path__[0]
    try:
        with open(f"{folder}/start.{sys.implementation.cache_tag}.bundle", "rb", 0) as file:
            content = file.read()
    except FileNotFoundError:  # pragma: no cover - test_bundle.py runs this in a copy
        return
    if not content.startswith(MAGIC_NUMBER):  # pragma: no cover - the same
        return
    package = sys.modules[__name__]
    modules = marshal.loads(memoryview(content)[len(MAGIC_NUMBER) :])  # noqa: S302 - our own
    for short, code in modules:
        name, path = f"{__name__}.{short}", f"{folder}/{short}.py"
        if name in sys.modules:  # pragma: no cover - the same
            continue
        module = type(package)(name)
        module.__file__ = path
        module.__package__ = __name__
        module.__loader__ = SourceFileLoader(name, path)  # for importlib.reload()
        module.__spec__ = ModuleSpec(name, module.__loader__, origin=path)
        module.__spec__.has_location = True
        _fix_co_filename(code, path)  # for tracebacks and debuggers
        sys.modules[name] = module
        try:
            exec(code, module.__dict__)  # noqa: S102 - as importlib does
        except (ImportError, OSError, MemoryError):  # pragma: no cover - the same
            del sys.modules[name]
            return
        setattr(package, short, module)
