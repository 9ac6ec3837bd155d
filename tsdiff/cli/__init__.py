"""The command line, `tsdiff`. One file per command; a command is imported only when it is used."""

from tsdiff.cli.app import main

__all__ = ["main"]
