"""The vectors of the protocol, laid out by hand after SPEC.md, without the package.

So they are a second opinion on it and not its echo.
"""
