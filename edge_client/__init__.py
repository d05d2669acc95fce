"""The device: its data, the phases of a round, and the way to the server."""

from importlib import metadata

try:
    __version__ = metadata.version("sfprompt")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
