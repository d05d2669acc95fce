"""The engine of the split plane: one frozen body, many devices, one batch after the other.

A job comes in through `jobs.Engine`, becomes a task, waits in the `schedule`, is joined with others
of its kind by the `executor`, and goes back to its asker through the `completions`.
"""
