"""ultrazoo: a plugin-based zoo of encoder blocks with readable references and compiled kernels."""

from ultrazoo.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl"]
