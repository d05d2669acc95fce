"""The server: runs and rounds on one plane, the frozen body's forward and backward on the other."""

from importlib import metadata

try:
    __version__ = metadata.version("sfprompt")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
