"""ultrazoo: a plugin-based zoo of encoder blocks with readable references and compiled kernels."""

from ultrazoo.hookspecs import PLUGIN_API, hookimpl

__version__ = "0.1.0"
__all__ = ["PLUGIN_API", "__version__", "hookimpl"]
