"""The engine of the split plane: runs bodies for many devices, in batches.

`Engine.submit` takes a job; a `JobHandler` makes tasks of it, the `Schedule` queues them, the
`Worker` runs them in batches, and the `CompletionQueue` delivers the results.
"""
