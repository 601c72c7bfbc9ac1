__version__ = "0.1.0"

import os, signal, sys

def _end_quietly(*_): os._exit(128+signal.SIGINT)

# Ctrl-C while `python -m vavae_nb.…` still imports: there is nothing to say yet; `commands.user_errors` takes over
_starting = sys.argv[:1] == ["-m"]
if _starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, _end_quietly)
