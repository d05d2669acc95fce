"""The contract of the two ends: frames, messages, codecs, limits and errors.

It knows neither HTTP nor models; SPEC.md, beside this file, says the same to other languages.
Names are imported from the modules themselves, so that reading the settings costs no torch:

- `protocol.errors`: every refusal, as one tree
- `protocol.plan`, `protocol.messages`: what travels as JSON
- `protocol.frames`, `protocol.header`, `protocol.codecs`: what travels as bytes
- `protocol.limits`: the bounds of a frame
- `protocol.traffic`: what the bytes at the socket were for
- `protocol.seeds`, `protocol.wire`
"""
