"Reading other people's pickles: foreign objects become inert, what could do harm is refused and leaves no trace, what is cut short is named"
import argparse, builtins, collections, functools, os, pathlib, pickle, subprocess, sys, types, typing, zipfile
import pytest, torch
from vavae_nb.base.errors import CheckpointError
from vavae_nb.base.foreign_files import StandIn, load_torch

SOURCE = """
import typing
class Config: pass
class Slots:
    __slots__ = ("a", "b")
class Attributes(dict): pass
class Items(list): pass
class Metadata: pass
class AnyNode: pass
class DictConfig: pass
class Callback: pass
def make(*args): raise RuntimeError("foreign code ran")
class Reduced:
    def __reduce__(self): return make, (1, "two")
"""

@pytest.fixture
def theirs(monkeypatch):
    "Somebody's package, gone when the file is read"
    package, module = types.ModuleType("theirs"), types.ModuleType("theirs.parts")
    package.parts = module
    exec(SOURCE, module.__dict__)
    sys.modules.update({"theirs": package, "theirs.parts": module})
    yield module
    for k in ("theirs", "theirs.parts"): sys.modules.pop(k, None)

def gone(): [sys.modules.pop(k) for k in ("theirs", "theirs.parts")]

def omegaconf_like(m):
    "A tree of nodes with metadata and back references, as OmegaConf pickles itself"
    def meta(**kw): o = m.Metadata(); o.__dict__ = dict(ref_type=typing.Any, object_type=dict, optional=True, element_type=typing.Any) | kw; return o
    root = m.DictConfig()
    def node(v): o = m.AnyNode(); o.__dict__ = dict(_metadata=meta(key="lr", object_type=None), _parent=root, _val=v); return o
    root.__dict__ = dict(_metadata=meta(), _parent=None, _content={"lr": node(1e-4), "steps": node(3)})
    return root

def lightning(m, extra=None):
    "A checkpoint as Lightning writes it, with foreign objects at every place where real ones have them"
    s, c = m.Slots(), m.Config()
    s.a, s.b = 1, torch.arange(2.)
    c.lr, c.root, c.nested, c.extra = 1e-4, pathlib.PurePosixPath("/data"), {"deep": [m.Config()]}, extra
    return {"epoch": 3, "state_dict": collections.OrderedDict(w=torch.arange(6.).reshape(2, 3), b=torch.nn.Parameter(torch.ones(2))),
            "hyper_parameters": {"config": c, "omega": omegaconf_like(m), "slots": s, "attributes": m.Attributes(a=1, b={"c": 2}), "items": m.Items([1, 2]),
                                 "reduced": m.Reduced(), "args": argparse.Namespace(lr=1), "default": collections.defaultdict(list, x=[1])},
            "callbacks": {m.Callback: {"best": torch.tensor(2.)}, "ModelCheckpoint{'monitor': None}": {"path": "x"}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}]}

@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_file_loads_and_nothing_foreign_runs(theirs, tmp_path, zipped):
    torch.save(lightning(theirs), p := tmp_path/"a.ckpt", _use_new_zipfile_serialization=zipped)
    gone()
    with pytest.raises(pickle.UnpicklingError): torch.load(p, weights_only=True)
    before = set(map(str, torch.serialization.get_safe_globals()))
    c, foreign = load_torch(p)
    assert "theirs" not in sys.modules and set(map(str, torch.serialization.get_safe_globals())) == before
    assert c["epoch"] == 3 and torch.equal(c["state_dict"]["w"], torch.arange(6.).reshape(2, 3)) and torch.equal(c["state_dict"]["b"], torch.ones(2))
    assert [k for k in c["callbacks"] if isinstance(k, type)][0].__name__ == "Callback"
    h = c["hyper_parameters"]
    assert h["config"].state["lr"] == 1e-4 and isinstance(h["config"].state["nested"]["deep"][0], StandIn)
    assert h["config"].state["root"].args == ("/data",) or h["config"].state["root"].args == ("/", "data")
    assert h["reduced"].args == (1, "two") and h["args"].state == {"lr": 1}
    omega = h["omega"].state
    assert omega["_content"]["lr"].state["_val"] == 1e-4 and omega["_content"]["lr"].state["_parent"] is h["omega"]
    assert h["attributes"] == {"a": 1, "b": {"c": 2}} and h["items"] == [1, 2] and h["default"] == {"x": [1]}
    assert torch.equal(h["slots"].state[1]["b"], torch.arange(2.))
    assert {n.split(".")[0] for n in foreign} <= {"theirs", "argparse", "builtins", "collections", "pathlib", "typing"} and "theirs.parts.DictConfig" in foreign

class Call:
    "Pickles as a call of `f`, with a state if given"
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call

def attacks(trace):
    touch = f"touch {trace}"
    "Names as protocol 2 writes them: subprocess was `commands` in Python 2"
    return {"posix.system": Call(os.system, touch), "builtins.eval": Call(eval, f"open({str(trace)!r}, 'w')"), "builtins.exec": Call(exec, f"open({str(trace)!r}, 'w')"),
            "commands.Popen": Call(subprocess.Popen, touch.split()), "functools.partial": Call(functools.partial, os.system, touch), "builtins.getattr": Call(getattr, "os", "system"),
            "torch.hub.load": Call(torch.hub.load, "a/b", "c"), "importlib.import_module": Call(__import__("importlib").import_module, "antigravity")}

@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_leaves_no_trace(theirs, tmp_path, name, zipped):
    trace, p, evil = tmp_path/"trace", tmp_path/"evil.ckpt", attacks(tmp_path/"trace")[name]
    c = theirs.Config()
    c.hidden = [evil]
    kept = []
    for i,contents in enumerate((evil, {"state_dict": {"w": torch.ones(1)}, "x": evil}, {"hyper_parameters": c}, {"args": Call(theirs.make, evil)}, lightning(theirs, evil))):
        torch.save(contents, q := tmp_path/f"{i}.ckpt", _use_new_zipfile_serialization=zipped); kept.append(q)
    gone()
    for q in kept:
        with pytest.raises(CheckpointError, match="nothing was run") as e: load_torch(q)
        assert name in str(e.value)
    assert not trace.exists() and "antigravity" not in sys.modules

def with_pickle(path, data):
    "A torch zip file around a pickle written by hand"
    torch.save({}, path)
    with zipfile.ZipFile(path) as z: records = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for n,b in records.items(): z.writestr(n, data if n.endswith("data.pkl") else b)

def calling(module, name, arg): return f"c{module}\n{name}\n".encode() + b"X"+len(arg).to_bytes(4, "little")+arg.encode() + b"\x85R."

@pytest.mark.parametrize("module,name", [("os", "system"), ("__builtin__", "eval"), ("torch", "hub.os.system"), ("torch.serialization", "os.system"), ("sys", "modules"), ("pickle", "loads"), ("_io", "open")])
def test_other_spellings_are_refused(tmp_path, module, name):
    command = f"touch {tmp_path/'trace'}"
    with_pickle(p := tmp_path/"a.pt", calling(module, name, command))
    with pytest.raises(CheckpointError, match="nothing was run"): load_torch(p)
    assert not (tmp_path/"trace").exists()

def test_a_foreign_name_that_exists_here_is_not_imported_either(tmp_path):
    command = f"touch {tmp_path/'trace'}"
    for module,name in (("fastcore.xtras", "run"), ("timm", "models.os.system"), ("numpy", "os.system")):
        with_pickle(p := tmp_path/"a.pt", calling(module, name, command))
        c, foreign = load_torch(p)
        assert isinstance(c, StandIn) and c.args == (command,) and foreign == [f"{module}.{name}"]
    assert not (tmp_path/"trace").exists()

def test_newer_pickles_are_refused_too(tmp_path):
    torch.save({"x": Call(os.system, f"touch {tmp_path/'trace'}")}, p := tmp_path/"a.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="torch.save"): load_torch(p)
    assert not (tmp_path/"trace").exists()

@pytest.mark.parametrize("zipped", [True, False])
def test_cut_short_anywhere(tmp_path, zipped):
    torch.save({"w": torch.arange(1000.)}, p := tmp_path/"a.pt", _use_new_zipfile_serialization=zipped)
    whole = p.read_bytes()
    for n in (0, 1, 10, 60, 300, len(whole)//2, len(whole)-1):
        p.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="not a whole torch checkpoint"): load_torch(p)
    p.write_bytes(whole)
    assert torch.equal(load_torch(p)[0]["w"], torch.arange(1000.)) and load_torch(p)[1] == []

def test_what_is_no_checkpoint(tmp_path):
    (tmp_path/"text.pt").write_text("hello", encoding="utf-8"); (tmp_path/"plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path/"zip.pt", "w") as z: z.writestr("a.txt", "hello")
    for f in ("text", "plain", "zip"):
        with pytest.raises(CheckpointError, match="download it again"): load_torch(tmp_path/f"{f}.pt")
    with pytest.raises(CheckpointError, match="no file"): load_torch(tmp_path)
    with pytest.raises(CheckpointError, match="no file"): load_torch(tmp_path/"none.pt")

def test_what_was_allowed_before_still_is_and_the_file_stays_as_it_is(tmp_path):
    torch.save({"w": torch.arange(4.), "c": collections.Counter("aab"), "v": torch.zeros(2, dtype=torch.bfloat16)}, p := tmp_path/"a.pt")
    whole = p.read_bytes()
    c, _ = load_torch(p)
    c["w"].add_(1)
    assert p.read_bytes() == whole and torch.equal(load_torch(p)[0]["w"], torch.arange(4.)) and c["c"] == {"a": 2, "b": 1} and c["v"].dtype == torch.bfloat16
