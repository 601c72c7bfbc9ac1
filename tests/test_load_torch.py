"Reading other people's pickles: foreign objects become inert, what could do harm is refused, damage is named"
import argparse, collections, functools, importlib, os, pathlib, pickle, subprocess, sys, types, typing, warnings
import zipfile
import numpy as np, pytest, torch
from vavae_nb.base.errors import CheckpointError, WeightsError
from vavae_nb.base.foreign_files import StandIn, load_torch, read_arrays, read_script

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

def gone():
    for name in ("theirs", "theirs.parts"): del sys.modules[name]

def with_attributes(o, **attributes):
    o.__dict__ = attributes
    return o

def omegaconf_like(m):
    "A tree of nodes with metadata and back references, as OmegaConf pickles itself"
    about = dict(ref_type=typing.Any, object_type=dict, optional=True, element_type=typing.Any)
    def meta(**changed): return with_attributes(m.Metadata(), **about | changed)
    root = m.DictConfig()
    def node(value):
        return with_attributes(m.AnyNode(), _metadata=meta(key="lr", object_type=None), _parent=root, _val=value)
    return with_attributes(root, _metadata=meta(), _parent=None, _content={"lr": node(1e-4), "steps": node(3)})

def lightning(m, extra=None):
    "A checkpoint as Lightning writes it, with foreign objects at every place where real ones have them"
    slots, config = m.Slots(), m.Config()
    slots.a, slots.b = 1, torch.arange(2.)
    config.lr, config.root = 1e-4, pathlib.PurePosixPath("/data")
    config.nested, config.extra = {"deep": [m.Config()]}, extra
    parameters = {"config": config, "omega": omegaconf_like(m), "slots": slots, "reduced": m.Reduced(),
                  "attributes": m.Attributes(a=1, b={"c": 2}), "items": m.Items([1, 2]),
                  "args": argparse.Namespace(lr=1), "default": collections.defaultdict(list, x=[1])}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    weights = collections.OrderedDict(w=torch.arange(6.).reshape(2, 3), b=torch.nn.Parameter(torch.ones(2)))
    return {"epoch": 3, "state_dict": weights, "hyper_parameters": parameters, "optimizer_states": [optimizer],
            "callbacks": {m.Callback: {"best": torch.tensor(2.)}, "ModelCheckpoint{'monitor': None}": {"path": "x"}}}

@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_file_loads_and_nothing_foreign_runs(theirs, tmp_path, zipped):
    torch.save(lightning(theirs), p := tmp_path/"a.ckpt", _use_new_zipfile_serialization=zipped)
    gone()
    with pytest.raises(pickle.UnpicklingError): torch.load(p, weights_only=True)
    before = set(map(str, torch.serialization.get_safe_globals()))
    c, foreign = load_torch(p)
    assert "theirs" not in sys.modules and set(map(str, torch.serialization.get_safe_globals())) == before
    assert c["epoch"] == 3 and torch.equal(c["state_dict"]["w"], torch.arange(6.).reshape(2, 3))
    assert torch.equal(c["state_dict"]["b"], torch.ones(2))
    assert [k for k in c["callbacks"] if isinstance(k, type)][0].__name__ == "Callback"
    h = c["hyper_parameters"]
    assert h["config"].state["lr"] == 1e-4 and isinstance(h["config"].state["nested"]["deep"][0], StandIn)
    assert h["config"].state["root"].args == ("/data",) or h["config"].state["root"].args == ("/", "data")
    assert h["reduced"].args == (1, "two") and h["args"].state == {"lr": 1}
    omega = h["omega"].state
    assert omega["_content"]["lr"].state["_val"] == 1e-4 and omega["_content"]["lr"].state["_parent"] is h["omega"]
    assert h["attributes"] == {"a": 1, "b": {"c": 2}} and h["items"] == [1, 2] and h["default"] == {"x": [1]}
    assert torch.equal(h["slots"].state[1]["b"], torch.arange(2.))
    packages = {n.split(".")[0] for n in foreign}
    assert packages <= {"theirs", "argparse", "builtins", "collections", "pathlib", "typing"}
    assert "theirs.parts.DictConfig" in foreign

class Call:
    "Pickles as a call of `f`, with a state if given"
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call

def attacks(trace):
    "By the names that protocol 2 writes: subprocess was `commands` in Python 2"
    touch, opening = f"touch {trace}", f"open({str(trace)!r}, 'w')"
    return {"posix.system": Call(os.system, touch),
            "builtins.eval": Call(eval, opening),
            "builtins.exec": Call(exec, opening),
            "commands.Popen": Call(subprocess.Popen, touch.split()),
            "functools.partial": Call(functools.partial, os.system, touch),
            "builtins.getattr": Call(getattr, "os", "system"),
            "torch.hub.load": Call(torch.hub.load, "a/b", "c"),
            "importlib.import_module": Call(importlib.import_module, "antigravity")}

@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_leaves_no_trace(theirs, tmp_path, name, zipped):
    trace = tmp_path/"trace"
    evil, config = attacks(trace)[name], theirs.Config()
    config.hidden = [evil]
    places = dict(alone=evil, beside={"state_dict": {"w": torch.ones(1)}, "x": evil},
                  within={"hyper_parameters": config}, argument={"args": Call(theirs.make, evil)},
                  lightning=lightning(theirs, evil))
    for place,contents in places.items():
        torch.save(contents, tmp_path/f"{place}.ckpt", _use_new_zipfile_serialization=zipped)
    gone()
    for place in places:
        with pytest.raises(CheckpointError, match="nothing was run") as e: load_torch(tmp_path/f"{place}.ckpt")
        assert name in str(e.value)
    assert not trace.exists() and "antigravity" not in sys.modules

def with_pickle(path, data):
    "A torch zip file around a pickle written by hand"
    torch.save({}, path)
    with zipfile.ZipFile(path) as z: records = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for n,b in records.items(): z.writestr(n, data if n.endswith("data.pkl") else b)

def calling(module, name, argument):
    text = b"X"+len(argument).to_bytes(4, "little")+argument.encode()
    return f"c{module}\n{name}\n".encode()+text+b"\x85R."

@pytest.mark.parametrize("module,name", [
    ("os", "system"), ("__builtin__", "eval"), ("torch", "hub.os.system"), ("torch.serialization", "os.system"),
    ("sys", "modules"), ("pickle", "loads"), ("_io", "open")])
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
    (tmp_path/"text.pt").write_text("hello", encoding="utf-8")
    (tmp_path/"plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path/"zip.pt", "w") as z: z.writestr("a.txt", "hello")
    for f in ("text", "plain", "zip"):
        with pytest.raises(CheckpointError, match="download it again"): load_torch(tmp_path/f"{f}.pt")
    with pytest.raises(CheckpointError, match="no file"): load_torch(tmp_path)
    with pytest.raises(CheckpointError, match="no file"): load_torch(tmp_path/"none.pt")

def test_what_was_allowed_before_still_is_and_the_file_stays_as_it_is(tmp_path):
    p, half = tmp_path/"a.pt", torch.zeros(2, dtype=torch.bfloat16)
    torch.save({"w": torch.arange(4.), "c": collections.Counter("aab"), "v": half}, p)
    whole = p.read_bytes()
    c, _ = load_torch(p)
    c["w"].add_(1)
    assert p.read_bytes() == whole and torch.equal(load_torch(p)[0]["w"], torch.arange(4.))
    assert c["c"] == {"a": 2, "b": 1} and c["v"].dtype == torch.bfloat16

# Pickles of arrays, and TorchScript

@pytest.mark.parametrize("f,args", [
    (os.system, ("true",)), (eval, ("1",)), (getattr, ("", "join")), (np.fromfile, ("/dev/null",))])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_call_are_refused(tmp_path, f, args, protocol):
    p = tmp_path/"w.ckpt"
    p.write_bytes(pickle.dumps({"a": np.zeros(2), "b": Call(f, *args)}, protocol=protocol))
    with pytest.raises(WeightsError, match="refused to unpickle"): read_arrays(p)

def test_pickle_extension_codes_are_refused(tmp_path): # They reach classes without naming them
    import copyreg
    copyreg.add_extension("posix", "system", 241)
    try:
        p = tmp_path/"w.ckpt"
        p.write_bytes(b"\x80\x02\x82\xf1.")
        with pytest.raises(WeightsError, match="refused"): read_arrays(p)
    finally: copyreg.remove_extension("posix", "system", 241)

@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", b"\x80\x03}q\x00(X"])
def test_damaged_pickles_are_named(tmp_path, data):
    p = tmp_path/"w.ckpt"
    p.write_bytes(data)
    with pytest.raises(WeightsError, match="w.ckpt is not a pickle of numpy arrays"): read_arrays(p)

@pytest.mark.parametrize("f,args", [(os.system, ("true",)), (eval, ("1",)), (torch.load, ("x",))])
def test_scripts_that_call_are_refused(tmp_path, f, args):
    data = pickle.dumps({"a": Call(f, *args)}, protocol=2)
    with zipfile.ZipFile(tmp_path/"s.pt", "w") as z: z.writestr("m/data.pkl", data)
    with pytest.raises(WeightsError, match="refused to unpickle"): read_script(tmp_path/"s.pt")

@pytest.mark.parametrize("data", [b"", b"text", None])
def test_damaged_scripts_are_named(tmp_path, data):
    p = tmp_path/"s.pt"
    if data is None:
        with zipfile.ZipFile(p, "w") as z: z.writestr("m/data.pkl", b"\x80\x02}q")
    else: p.write_bytes(data)
    with pytest.raises(WeightsError, match="s.pt is not a TorchScript file"): read_script(p)

def test_script_tensors_are_those_that_jit_saved(tmp_path):
    inner = torch.nn.Sequential(torch.nn.InstanceNorm2d(4, affine=True))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (1, 3)), inner)
    net.register_buffer("view", torch.arange(12.).view(3, 4).T[1:]) # Strides and an offset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(tmp_path/"s.pt")
    tensors, expected = read_script(tmp_path/"s.pt"), net.state_dict()
    assert sorted(tensors) == sorted(expected) and all(torch.equal(tensors[k], v) for k,v in expected.items())
