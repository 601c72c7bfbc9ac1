"How processes of this machine find each other, and how a test starts one that does not depend on who started the tests"
import signal, socket, sys
from pathlib import Path

def together(n):
    "The environment that n processes share; each adds its RANK"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    return dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

def usual_signals():
    "For `preexec_fn`, or after a fork: no signal is ignored, as for a command at a terminal; under `nohup`, after `&` and in some CI systems a child inherits that some are"
    for s in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM): signal.signal(s, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

def dying(module, nth, part):
    "How Python runs a command that kills itself in the middle of its work: at its nth rename onto a path with `part` in it"
    here = str(Path(__file__).parent)
    code = f"import runpy, sys; sys.path.append({here!r}); import together; together.kill_at_rename({nth}, {part!r}); sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code]

def kill_at_rename(nth, part):
    "SIGKILL to this process in place of its nth `os.replace` onto a path that holds `part`: what was written has no name yet"
    import os
    count, replace = [0], os.replace
    def counting(a, b):
        if part in str(b):
            count[0] += 1
            if count[0] == nth: os.kill(os.getpid(), signal.SIGKILL)
        return replace(a, b)
    os.replace = counting
