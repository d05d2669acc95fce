"""The contract between devices and server: messages, frames, codecs, limits and errors.

It imports no HTTP library and no model. SPEC.md in this folder specifies the same contract for
other languages. Import names from the modules, so that plans, messages and errors load without
torch.

- `protocol.errors`: all errors, as one tree
- `protocol.plan`, `protocol.messages`, `protocol.base`: the JSON messages
- `protocol.frames`, `protocol.header`, `protocol.codecs`: the binary frames
- `protocol.wire`, `protocol.limits`: version, headers and paths; the limits of a frame
- `protocol.traffic`: bytes at the socket, by purpose
- `protocol.presets`, `protocol.seeds`, `protocol.tls`
- `protocol.command`: version and errors of the commands of both ends
"""
