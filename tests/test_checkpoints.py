"Checkpoints under fire: kills, full disks, damage; the lock against a crowd; signals and the status that they leave"
import errno, fcntl, json, math, resource, shutil, subprocess, sys, warnings
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
from vavae_nb.base import checkpoints
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.base.errors import CheckpointError, ConfigError, VavaeError
from vavae_nb.base.stopping import RunLock

def state(step, n=1000): return {"w": torch.full((n,), float(step)), "opt": [{"step": step}]}
def names(c): return sorted(p.name for p in c.folder.iterdir())
def tensors(c, step): return c.files.tensors(step, c.files.info(step))
def whole(c): return sorted([c.files.json(s).name for s in c.steps()] + [tensors(c, s).name for s in c.steps()])

def forking(script, *args):
    "Run a script that imports once, forks what it kills, and prints what it saw as JSON"
    command = [sys.executable, "-c", script, *map(str, args)]
    r = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])

KILLS = """
import json, os, random, signal, sys, time, torch
from vavae_nb.base.checkpoints import Checkpoints
torch.set_num_threads(1) # The threads of OpenMP do not survive a fork, and a child would wait for them
folder, kills = sys.argv[1], int(sys.argv[2])
c, seen, rng = Checkpoints(folder), [], random.Random()
for _ in range(kills):
    r, w = os.pipe()
    start = c.newest()
    if not (child := os.fork()):
        step = start[0] if start else 0
        while True:
            step += 1
            c.save(step, {"w": torch.full((2_000_000,), float(step)), "step": step}, score=1/step)
            os.write(w, step.to_bytes(4, "big"))
    os.close(w)
    told = os.read(r, 4)                            # The first is written
    time.sleep(rng.uniform(0, .3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(r, 4): told = more
    os.close(r)
    stray = sum(".safetensors" in n or n[0] == "." for n in os.listdir(folder)) - len(c.steps())
    step, state = c.newest()
    is_whole = bool((state["w"] == step).all()) and state["step"] == step
    seen.append((int.from_bytes(told, "big"), step, is_whole, stray))
print(json.dumps(seen))
"""

@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_while_saving(tmp_path, kills):
    seen = forking(KILLS, tmp_path/"run", kills)
    assert len(seen) == kills
    for told,step,is_whole,_ in seen: # It may be killed before it can say that it is done
        assert is_whole and step in (told, told+1), seen
    if kills > 3: assert any(stray for *_,stray in seen), "no kill came in the middle of a write"
    c = Checkpoints(tmp_path/"run")
    c.save(10_000, state(10_000))
    assert names(c) == whole(c) and len(c.steps()) == 2 # Nothing is left of any kill (the last but one was the best)

@contextmanager
def file_limit(n):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def refused(c, step, n, reason):
    before = names(c)
    with pytest.raises(VavaeError) as e: c.save(step, state(step, n))
    for part in (reason, f"checkpoint of step {step} could not be written", f"takes {4*n/1e6:,.1f} MB",
                 f"step {c.steps()[-1]} is whole", "same command again"):
        assert part in str(e.value)
    assert names(c) == before == whole(c)

def test_a_limit_on_the_size_of_files(tmp_path):
    c = Checkpoints(tmp_path)
    for step in (1, 2): c.save(step, state(step))
    with file_limit(200_000):
        refused(c, 3, 100_000, "File too large")
        refused(c, 2, 100_000, "File too large") # The same step anew: the old one stays
    assert torch.equal(c.newest()[1]["w"], state(2)["w"])
    c.save(3, state(3, 100_000))
    assert c.steps() == [2, 3]

def test_a_full_disk(tmp_path, monkeypatch):
    disk = tmp_path/"tiny"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        c = Checkpoints(disk/"run")
        for step in (1, 2): c.save(step, state(step, 250_000))
        refused(c, 3, 400_000, "No space left") # Seen before the write
        usage = shutil.disk_usage(disk)         # Filled by someone else meanwhile:
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
        refused(c, 3, 400_000, "No space left")
        c.save(3, state(3, 200_000))
        assert c.steps() == [2, 3]
    finally: subprocess.run(["umount", disk], check=True)

@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_the_last_small_file(tmp_path, monkeypatch, code):
    c = Checkpoints(tmp_path)
    c.save(1, state(1))
    def full(path): raise OSError(code, "Disk quota exceeded")
    monkeypatch.setattr(checkpoints, "atomic_write", full)
    refused(c, 2, 1000, "Disk quota exceeded")

def quietly(f):
    "The result and the warnings"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return f(), [str(o.message) for o in caught]

def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

def test_every_byte_of_the_json_and_any_of_the_data(tmp_path):
    c = Checkpoints(tmp_path)
    for step in (1, 2): c.save(step, state(step), score=.5)
    js, data = c.files.json(2), tensors(c, 2)
    places = [(js, i) for i in range(js.stat().st_size)]
    places += [(data, i) for i in (0, 7, 8, 20, 150, 300, -4000, -1)]
    fell_back = 0
    for path,place in places:
        flip(path, place)
        for get in (c.newest, c.best):
            (step, got), said = quietly(get)
            assert torch.equal(got["w"], state(step)["w"]) and got["opt"] == state(step)["opt"]
            if get == c.best: continue
            assert path == js or step == 1
            if step == 2: continue
            assert len(said) == 1 and "step-00000002" in said[0] and "step 1 is used instead" in said[0]
            fell_back += 1
        flip(path, place)
    assert fell_back > 100 # Most of the JSON is the hash

def test_files_that_are_cut_or_gone(tmp_path):
    c = Checkpoints(tmp_path)
    for step in (1, 2): c.save(step, state(step), score=.5)
    js, data = c.files.json(2), tensors(c, 2)
    whole_js, whole_data = js.read_bytes(), data.read_bytes()
    bad = [(whole_js, whole_data[:-1]), (whole_js, b""), (whole_js, None)]
    bad += [(text, whole_data) for text in (b"", b"[]", b"{}")]
    for bad_js,bad_data in bad:
        js.write_bytes(bad_js)
        data.unlink() if bad_data is None else data.write_bytes(bad_data)
        with pytest.warns(UserWarning, match="step-00000002.*step 1 is used instead"): assert c.newest()[0] == 1
    js.write_bytes(whole_js)
    data.write_bytes(whole_data)
    for p in tmp_path.glob("*.safetensors"): p.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is whole: .*step-00000002.*step-00000001.*start anew"): c.newest()
    c.save(1, state(1))
    assert c.newest()[0] == 1 and c.steps() == [1] # What comes after a step that is saved is not its future

def test_what_is_not_finite_is_not_written(tmp_path):
    c = Checkpoints(tmp_path)
    c.save(1, state(1))
    for v in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(CheckpointError, match=r"ema\.b is not finite at step 2: .*step 1 is whole"):
                c.save(2, {"a": torch.ones(2), "ema": {"b": torch.tensor([1., v]).to(dtype)}})
    assert names(c) == whole(c) and c.steps() == [1]
    c.save(2, state(2), score=math.nan)
    assert c.best() is None # Not finite, so not the best

def test_tensors_survive_by_value(tmp_path):
    x = torch.randn(2, 3, 4, 5)
    given = {"bf16": x.bfloat16(), "f16": x.half(), "f64": x.double(), "scalar": torch.tensor(3.5),
             "count": torch.tensor(7), "empty": torch.zeros(0, 4), "flags": x > 0, "rng": torch.get_rng_state(),
             "channels_last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(0, 3), "row": x[1],
             "expanded": x[:1, :1].expand(3, 3, 4, 5), "tied": x, "parameter": torch.nn.Parameter(x.clone())}
    numbers = [0.1, -1e-300, 2**70, True, None, "ü", float("inf")]
    c = Checkpoints(tmp_path)
    c.save(0, {"a.b": given, "a": {"b.c": given}, "numbers": numbers, "none": {}, "empty": []})
    _, got = c.newest()
    for there in (got["a.b"], got["a"]["b.c"]):
        assert there.keys() == given.keys()
        for k,v in given.items():
            assert there[k].dtype == v.dtype and there[k].shape == v.shape and torch.equal(there[k], v), k
    assert repr(got["numbers"]) == repr(numbers) and got["none"] == {} and got["empty"] == []
    if (maps := Path("/proc/self/maps")).exists(): # Owned: rotation may delete the file
        assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    assert oct(tensors(c, 0).stat().st_mode)[-3:] == "644"

def test_rotation_and_finish(tmp_path):
    c = Checkpoints(tmp_path/"a", keep=3)
    for i,score in enumerate([5, 1, 1, 4, None, math.nan, 3], 1): c.save(i, state(i), score)
    assert c.steps() == [3, 5, 6, 7] and c.best()[0] == 3 # Of equal ones the newest
    c.save(8, state(8), .5)
    c.finish()
    assert not c.folder.exists() # The best was the last
    c.finish()
    assert c.newest() is None and c.steps() == []
    for i,score in enumerate([1, 2], 1): c.save(i, state(i), score)
    (c.folder/"notes.txt").write_text("not ours", encoding="utf-8")
    (c.folder/"step-x.json").write_text("nor this", encoding="utf-8")
    for left in (".tmpA1b2C3", ".step-00000009.json.x1.json", "step-00000009.safetensors",
                 "step-00000001-0123abcd.safetensors"):
        (c.folder/left).write_text("of a killed writer", encoding="utf-8")
    c.finish()
    assert names(c) == sorted([*whole(c), "notes.txt", "step-x.json"]) and c.steps() == [1]

def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.; see to it that only one process"):
        with RunLock(tmp_path/"run"): assert (tmp_path/"run"/"run.lock").exists()
    assert not list((tmp_path/"run").iterdir())

@pytest.mark.parametrize("code, words", [(errno.ENOSYS, "not implemented"), (errno.EOPNOTSUPP, "not supported")])
def test_other_words_for_no_locks(tmp_path, monkeypatch, code, words):
    def no_locks(*_): raise OSError(code, words)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=f"cannot be locked .{words}."), RunLock(tmp_path/"run"): pass
    assert not list((tmp_path/"run").iterdir())

def test_a_lock_follows_no_link(tmp_path):
    (tmp_path/"precious").write_text("not to be emptied", encoding="utf-8")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"run.lock").symlink_to(tmp_path/"precious")
    with pytest.raises(ConfigError, match="is a symbolic link to"): RunLock(tmp_path/"run").__enter__()
    assert (tmp_path/"precious").read_text(encoding="utf-8") == "not to be emptied"

def test_a_folder_that_cannot_be_locked_or_made(tmp_path):
    (tmp_path/"file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written .Not a directory.; give another folder"):
        RunLock(tmp_path/"file"/"run").__enter__()

SIGNALS = """
import json, os, signal, sys, time
from pathlib import Path
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.base.stopping import RunLock, StopSignals
from vavae_nb.base.commands import user_errors
from vavae_nb.base.errors import ConfigError
root = Path(sys.argv[1])

usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}

def tick():
    print("worker", os.getpid(), flush=True)
    for _ in range(3000):
        time.sleep(.02)
        print("tick", flush=True)

def wait_and_save(name, stop):
    print("ready", flush=True)
    while not stop.signum: time.sleep(.01)
    if name.endswith("twice"):
        print("saving", flush=True)
        time.sleep(60)
    Checkpoints(root/name).save(7, {"step": 7})

def main(name):
    for fd in (1, 2): os.dup2(os.open(root/f"{name}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
    for s,handler in usual.items(): signal.signal(s, signal.SIG_IGN if "ignored" in name else handler)
    with user_errors("call the same command again"), RunLock(root/name), StopSignals() as stop:
        if name.startswith("worker") and not os.fork(): tick()
        if name.startswith("deferred"):
            with stop.deferred(): wait_and_save(name, stop)
        else:
            print("ready", flush=True)
            time.sleep(.3 if "ignored" in name else 60)

def soon(condition):
    end = time.time()+60
    while time.time() < end:
        if condition(): return True
        time.sleep(.01)
    return False

def read(path): return path.read_text(encoding="utf-8") if path.exists() else ""

def until(name, word):
    if soon(lambda: word in read(root/f"{name}.txt")): return read(root/f"{name}.txt")
    raise TimeoutError(f"{name}: {read(root/f'{name}.txt')}")

def run_and_leave(name):
    for s in (signal.SIGHUP, signal.SIGQUIT): signal.signal(s, signal.SIG_DFL)
    code = 0
    try: main(name)
    except SystemExit as e: code = e.code
    if name == "term": sys.exit(code) # As a command ends; the others save torch's second of leave-taking
    os._exit(code)

def signal_worker():
    worker = int(until("worker", "worker").split("worker ")[1].split()[0])
    def ticks(): return read(root/"worker.txt").count("tick")
    def silent():
        before = ticks()
        time.sleep(1)
        return before == ticks()
    os.kill(worker, signal.SIGINT)
    heard = ticks()+1 # One may be on its way
    assert soon(lambda: ticks() > heard), "Ctrl-C is for the parent to answer"
    os.kill(worker, signal.SIGTERM)
    assert soon(silent), "SIGTERM ends a worker"

def status(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

got = {}
term, interrupt, hup = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
for name,signals in {"term": [term], "int": [interrupt], "hup": [hup], "ignored": [hup, interrupt, term],
                     "deferred-term": [term], "deferred-int": [interrupt], "deferred-hup": [hup],
                     "deferred-twice": [term, interrupt], "worker": [term]}.items():
    child = os.fork()
    if not child: run_and_leave(name)
    until(name, "ready")
    if name == "worker": signal_worker()
    for i,s in enumerate(signals):
        if i and "twice" in name: until(name, "saving")
        os.kill(child, s)
    got[name] = [status(child), until(name, ""), Checkpoints(root/name).steps(), (root/name/"run.lock").exists()]

def hold_lock():
    with RunLock(root/"lock"):
        if not os.fork():
            os.setsid()
            Path(root, "orphan").write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(60)
    os._exit(0)

child = os.fork()                                                               # Killed, but for its worker
if not child: hold_lock()
assert soon(lambda: read(root/"orphan"))
got["second"] = "was let in"
try: RunLock(root/"lock").__enter__()
except ConfigError as e: got["second"] = str(e).replace(str(child), "THE CHILD")
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
with RunLock(root/"lock"): got["after"] = "let in"
os.kill(int(read(root/"orphan")), signal.SIGKILL)

def crowd(): # Takes the lock twenty times; a marker shows whether somebody else has it
    had = 0
    while had < 20:
        try:
            with RunLock(root/"crowd"):
                os.close(os.open(root/"marker", os.O_CREAT | os.O_EXCL))
                time.sleep(.001)
                os.unlink(root/"marker")
                had += 1
        except ConfigError: time.sleep(.0005)
    os._exit(0)

children = []
for _ in range(5):
    child = os.fork()
    if not child: crowd()
    children.append(child)
got["crowd"] = [status(child) for child in children]
print(json.dumps(got))
"""

ENDS = { # Status, and what was said
    "term": (143, "stopped by SIGTERM; call the same command again"), "int": (130, "stopped by SIGINT; call"),
    "hup": (129, "stopped by SIGHUP; call"), "worker": (143, "SIGTERM; call"), "ignored": (0, ""),
    "deferred-hup": (129, "SIGHUP: saving"), "deferred-int": (130, "SIGINT: saving"),
    "deferred-term": (143, "SIGTERM: saving a checkpoint and stopping; Ctrl-C to stop at once"),
    "deferred-twice": (130, "stopped by SIGINT")}

def test_signals_and_locks(tmp_path):
    got = forking(SIGNALS, tmp_path)
    for name,(status,said) in ENDS.items():
        code, text, steps, locked = got[name]
        assert code == status and said in text and "Traceback" not in text and not locked, (name, got[name])
        assert steps == ([7] if name in ("deferred-term", "deferred-int", "deferred-hup") else []), name
    assert "is being written by process THE CHILD on " in got["second"] and got["after"] == "let in"
    assert got["crowd"] == [0]*5

TERMINAL = """
import json, os, pty, signal, sys, time
from pathlib import Path
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.base.stopping import StopSignals
from vavae_nb.base.commands import user_errors
root = Path(sys.argv[1])

def main(): # A loop with a progress bar, such as a training
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with user_errors("call the same command again"), StopSignals() as stop, stop.deferred():
        while not stop.signum:
            (root/"ready").touch()
            time.sleep(.05)
        for step in range(20): print("step", step, file=sys.stderr, flush=True)
        Checkpoints(root/"run").save(20, {"step": 20})

child, terminal = pty.fork()
if not child:
    code = 0
    try: main()
    except SystemExit as e: code = e.code
    except BaseException: code = 99
    os._exit(code)
while not (root/"ready").exists(): time.sleep(.01)
os.close(terminal) # As a window is closed
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Checkpoints(root/"run").steps()]))
"""

def test_a_closed_terminal_saves_and_stops(tmp_path): assert forking(TERMINAL, tmp_path) == [129, [20]]

LOST = """
import json, os, signal, sys, weakref
from vavae_nb.base.stopping import StopSignals
from vavae_nb.base.errors import Stopped
signal.signal(signal.SIGTERM, signal.SIG_DFL)
sys.unraisablehook = lambda what: None
class Destroyed:
    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)
class Referred: pass
def by_a_destructor(): Destroyed()
def by_a_weak_reference():
    referred = Referred()
    reference = weakref.ref(referred, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del referred
got = []
for send in (by_a_destructor, by_a_weak_reference):
    with StopSignals() as stop:
        try:
            send()
            got.append("swallowed")
        except Stopped: got.append("raised")
        try:
            stop.check()
            got.append("forgotten")
        except Stopped as e: got.append(str(e))
print(json.dumps(got))
"""

def test_a_signal_that_python_swallows_is_not_forgotten(tmp_path):
    got = forking(LOST, tmp_path)
    assert got[1::2] == ["SIGTERM"]*2 and set(got[::2]) <= {"swallowed", "raised"}

def test_finishing_twice_changes_nothing(tmp_path):
    c = Checkpoints(tmp_path, keep=2)
    for i,score in enumerate([3, 1, 2], 1): c.save(i, state(i), score)
    for _ in range(2):
        c.finish(3)
        assert c.steps() == [2] # The best, which is not the last
    c.finish(2)
    assert not c.folder.exists()

def test_a_lock_on_a_disk_that_fails_hides_no_error(tmp_path, monkeypatch):
    def fails(*_): raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(VavaeError, match="what really happened"):
        with RunLock(tmp_path/"run"):
            monkeypatch.setattr(Path, "unlink", fails)
            raise VavaeError("what really happened")

def test_hostile_json_is_a_checkpoint_that_is_passed_over(tmp_path):
    c = Checkpoints(tmp_path)
    c.save(1, state(1))
    for text in ("["*100_000, "{\"step\": "+"9"*6000+"}", "[]", "null", "{\"step\": 2}", "\xff"):
        c.files.json(2).write_text(text, encoding="utf-8")
        with pytest.warns(UserWarning, match="step-00000002.json.*step 1 is used instead"): assert c.newest()[0] == 1
