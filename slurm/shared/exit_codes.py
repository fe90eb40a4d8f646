"""Exit codes of ranks, of the batch script's handler and of the command line, from sysexits.h."""

EXIT_INTERNAL = 70  # EX_SOFTWARE: the command line met an error that nobody has foreseen
EXIT_HUNG = 70  # EX_SOFTWARE, of a rank: its watchdog ended it
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved if it could; the same again continues
EXIT_REQUEUE_ME = 76  # EX_PROTOCOL, of the handler: it has no `scontrol`, the shell has to requeue
