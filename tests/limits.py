"""Time limits of tests: they end a test that hangs, and none that is slow."""

# Of waiting for a process, a thread or an answer, on a machine with other work.
LIMIT_SECONDS = 900
