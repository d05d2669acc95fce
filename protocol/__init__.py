"""The contract between devices and server: messages, frames, codecs, limits and errors.

It imports neither HTTP libraries nor models. SPEC.md in this folder specifies the same contract
for other languages. Import names from the modules themselves: plans, messages and errors then load
without torch.

- `protocol.errors`: all errors, as one tree
- `protocol.plan`, `protocol.messages`, `protocol.base`: what crosses the wire as JSON
- `protocol.frames`, `protocol.header`, `protocol.codecs`: what crosses the wire as bytes
- `protocol.wire`, `protocol.limits`: version, headers and paths; the limits of a frame
- `protocol.traffic`: bytes at the socket, by purpose
- `protocol.presets`, `protocol.seeds`, `protocol.tls`
- `protocol.command`: version and errors of the commands of both ends
"""
