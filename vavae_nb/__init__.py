__version__ = "0.1.0"

import os, signal, sys

_parent = os.getppid() # Whoever started this process; asked later, it may be gone

def _end_quietly(*_): os._exit(128+signal.SIGINT)

# Ctrl-C while `python -m vavae_nb.…` still imports: there is nothing to say yet; `commands.user_errors` takes over
_run = sys.orig_argv[sys.orig_argv.index("-m")+1:][:1] if "-m" in sys.orig_argv and sys.argv[:1] == ["-m"] else []
if _run and _run[0].startswith("vavae_nb.") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_quietly)
