"""The version of the package, for its top level, its command line and its wheel."""

__version__ = "0.1.0"
