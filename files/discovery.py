"""Modules that register themselves when they are imported: being in a folder is enough to be found."""

import pkgutil
from importlib import import_module


def import_folder(package: str) -> tuple[str, ...]:
    """Import every module that lies in a package's folder; those of packages inside it are left alone.

    Args:
        package: full dotted name of the package.

    Returns:
        full dotted names of the modules, sorted.
    """
    folder = import_module(package)
    names = sorted(f"{package}.{module.name}" for module in pkgutil.iter_modules(folder.__path__) if not module.ispkg)
    for name in names:
        import_module(name)
    return tuple(names)
