"Files that are refused, damaged or hostile: one way of writing, checksums that are looked at, readers with limits"
import errno, json, os, random, re, resource, shutil, signal, struct, subprocess, sys, time, warnings, zipfile
from contextlib import contextmanager
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file
import vavae_nb
from vavae_nb.base import files
from vavae_nb.recipes.config import Config
from vavae_nb.recipes.settings import load_config, override, save_config
from vavae_nb.base.errors import CheckpointError, ConfigError, DataError, VavaeError, WriteError
from vavae_nb.base.files import atomic_write, cache_dir, read_json, sweep_temporary, writing
from vavae_nb.data.images import embedded
from vavae_nb.dit.model import LightningDiT
from vavae_nb.metrics.evaluation import Evaluation
from vavae_nb.metrics.generation import how_drawn
from vavae_nb.metrics.latent_evaluation import open_latents
from vavae_nb.sampling.sets import SampleSet
from vavae_nb.sampling.formats import load_samples
from vavae_nb.tokenizer.shards import extract_shards, shard_files
from vavae_nb.tokenizer.latents import load_latents
from vavae_nb.tokenizer.statistics import record_statistics, save_latent_stats
from vavae_nb.metrics.reference import load_images
from vavae_nb.interop.loading import load_dit, load_tokenizer
from vavae_nb.interop.authors import save_vavae
from vavae_nb.base.tensor_files import load_tensors, save_tensors
from vavae_nb.base.foreign_files import save_torch
from vavae_nb.tokenizer.autoencoder import Autoencoder
from vavae_nb.training.logs import TermsLog

IMAGES = embedded("test").subset(range(30), "thirty")

def tokenizer():
    torch.manual_seed(0)
    return Autoencoder(latent_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32,
                       norm_groups=4)

def transformer():
    return LightningDiT(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)

@pytest.fixture
def shards(tmp_path):
    tok = tokenizer()
    extract_shards(tok, IMAGES, tmp_path/"z", per_shard=15, precision="fp32")
    record_statistics(tok, tmp_path/"z")
    return tok, tmp_path/"z"

def samples(folder): return SampleSet(folder, torch.arange(6) % 3, dict(seed=0), ["a", "b", "c"], per_chunk=3)

@contextmanager
def file_limit(n): # What a full disk is like
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def flip(path, at, bit=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)

# Writing

def zipped(path):
    with zipfile.ZipFile(path, "w") as z, z.open("a.npy", "w", force_zip64=True) as f:
        for _ in range(3): f.write(bytes(20_000))

def drawn(path):
    fig, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).random((50, 50)))
    try: fig.savefig(path)
    finally: plt.close(fig)

def nested(path): # As a cache of pixels is cut to those that could be decoded
    with atomic_write(path) as tmp: tmp.write_bytes(bytes(20_000))

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
WRITERS = dict(
    bytes=("f.txt", lambda p: p.write_bytes(bytes(20_000))),
    numpy=("f.npy", lambda p: np.save(p, np.zeros(9000))),
    zip=("f.npz", zipped),
    mapped=("f.npy", lambda p: np.lib.format.open_memmap(p, "w+", np.uint8, (9000, 3))),
    picture=("f.png", NOISE.save),
    figure=("f.png", drawn),
    safetensors=("f.safetensors", lambda p: save_file({"w": torch.zeros(9000)}, p)),
    nested=("f.npy", nested))

@pytest.mark.parametrize("name, write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_sentence_whoever_writes(name, write, tmp_path):
    path = tmp_path/name
    for before in (None, b"before"):
        if before: path.write_bytes(before)
        with file_limit(8192), pytest.raises(WriteError) as e:
            with atomic_write(path) as tmp: write(tmp)
        assert isinstance(e.value, OSError) and e.value.filename == str(path)
        assert str(e.value).startswith(f"{path} could not be written (") and "MB are free there" in str(e.value)
        assert str(e.value).endswith("make room and call the same command again")
        assert ("the file before is as it was" in str(e.value)) == bool(before)
        assert [p.name for p in tmp_path.iterdir()] == ([name] if before else [])
        assert not before or path.read_bytes() == before

def test_a_full_disk_for_everything_that_a_run_writes(tmp_path):
    tok, model, s = tokenizer(), transformer(), samples(tmp_path/"s")
    tok.set_latent_stats(torch.zeros(4), torch.ones(4), {})
    log = TermsLog(tmp_path/"log.csv", "dit")
    writes = {
        "tokenizer.safetensors": tok.save,
        "dit.safetensors": model.save,
        "vavae.pt": lambda p: save_vavae(tok, p),
        "s/chunks/000000.safetensors": lambda p: s.write(0, np.zeros((3, 32, 32, 3), np.uint8), {}),
        "log.csv": lambda p: log.write(1, 0., {f"term {i}": 1. for i in range(400)}),
        "config.yaml": lambda p: save_config(Config(), p),
        "stats.pt": lambda p: save_latent_stats(p, torch.zeros(1, 900, 1, 1), torch.ones(1, 900, 1, 1))}
    for name,write in writes.items():
        with file_limit(1000), pytest.raises(WriteError) as e:
            write(tmp_path/name)
            pytest.fail(name)
        assert str(e.value).startswith(f"{tmp_path/name} could not be written (")
    assert not [p for p in tmp_path.rglob(".*")]

def test_errors_about_other_files_are_not_blamed_on_the_one_that_is_written(tmp_path):
    NOISE.save(tmp_path/"photo.png")
    (tmp_path/"photo.png").write_bytes((tmp_path/"photo.png").read_bytes()[:500])
    def photo(p): Image.open(tmp_path/"photo.png").convert("L")
    def lost(p): open(tmp_path/"lost.png")
    def mine(p): raise DataError("none of the images could be decoded")
    for error,read in ((OSError, photo), (FileNotFoundError, lost), (DataError, mine)):
        with pytest.raises(error) as e:
            with atomic_write(tmp_path/"f.npy") as tmp: read(tmp)
        assert not isinstance(e.value, WriteError) and "f.npy" not in str(e.value)

def test_what_cannot_be_written_for_other_reasons_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path/"file").write_bytes(b"")
    with pytest.raises(WriteError, match="File exists.*or choose another folder, and call"):
        with atomic_write(tmp_path/"file"/"a.json"): pass
    long = tmp_path/("n"*250) # Its temporary name is too long
    with pytest.raises(WriteError, match=f"{long.name} could not be written .File name too long"):
        with atomic_write(long): pass
    def refuse(*_): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(WriteError, match="Read-only file system") as e:
        with atomic_write(tmp_path/"a.json") as tmp: tmp.write_text("{}", encoding="utf-8")
    assert e.value.errno == errno.EROFS
    monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"file"))
    with pytest.raises(WriteError, match="point VAVAE_NB_CACHE at another folder"): cache_dir("features")

def test_without_locks_files_are_written_and_swept_by_their_age(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None) # As on Windows
    with atomic_write(tmp_path/"a.json") as tmp:
        tmp.write_text("{}", encoding="utf-8")
        assert sweep_temporary(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    left = tmp_path/".a.json.ab12cd34.part.json"
    left.write_bytes(b"")
    assert sweep_temporary(tmp_path) == []
    os.utime(left, (0, 0))
    assert sweep_temporary(tmp_path) == [left]

WINDOWS = """
import sys
sys.modules |= dict(fcntl=None, resource=None)
from vavae_nb.base import errors, files, foreign_files, pretrained, progress, tensor_files, tensors, text
"""
def test_modules_are_imported_where_there_is_no_fcntl():
    r = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr

def test_a_name_is_as_durable_as_what_it_names(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    with atomic_write(tmp_path/"a.json") as tmp: tmp.write_text("{}", encoding="utf-8")
    assert synced == [str(tmp), str(tmp_path)]
    def refuse(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"): raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(files.os, "fsync", refuse)
    with atomic_write(tmp_path/"b.json") as tmp: tmp.write_text("{}", encoding="utf-8") # A file system that refuses
    assert (tmp_path/"b.json").exists()

FULL = """
import shutil, sys
from pathlib import Path
from vavae_nb.data import folders as data
from vavae_nb.base.errors import WriteError
usage = shutil.disk_usage("/")
data.shutil.disk_usage = lambda _: usage._replace(free=10**12) # Filled by somebody else meanwhile
try: data.folder(sys.argv[1], 128)
except WriteError as e: print("refused:", e)
"""
def test_a_disk_that_fills_up_while_pixels_are_mapped_is_no_bus_error(tmp_path):
    disk = tmp_path/"tiny"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (tmp_path/"pictures"/"cat").mkdir(parents=True)
        for i in range(40): NOISE.save(tmp_path/"pictures"/"cat"/f"{i}.png")
        env = os.environ | dict(VAVAE_NB_CACHE=str(disk))
        command = [sys.executable, "-c", FULL, tmp_path/"pictures"]
        r = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
        assert r.returncode == 0 and "refused:" in r.stdout, r.stdout+r.stderr
        assert "pixels.npy could not be written (No space left" in r.stdout, r.stdout+r.stderr
        assert "make room, or point VAVAE_NB_CACHE at another folder, and call" in r.stdout
        assert not [p for p in disk.rglob(".*")]
    finally: subprocess.run(["umount", disk], check=True)

HELD = """
import sys, time
from vavae_nb.base.files import atomic_write
with atomic_write(sys.argv[1]) as tmp:
    tmp.write_bytes(b"half")
    print(tmp, flush=True)
    time.sleep(100)
"""
def test_temporary_files_go_when_their_writer_is_dead_and_no_others(tmp_path):
    command = [sys.executable, "-c", HELD, str(tmp_path/"sub"/"cache.npy")]
    work = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        left = Path(work.stdout.readline().strip())
        os.utime(left, (0, 0))
        assert sweep_temporary(tmp_path, deep=True) == sweep_temporary(tmp_path, age=0, deep=True) == [] # It is locked
    finally:
        work.send_signal(signal.SIGKILL)
        work.wait()
    for name in (".gitignore", ".DS_Store", ".a.part", ".step-00000009.json.x1.json", "b.ab12cd34.part"):
        (left.parent/name).write_bytes(b"")
    (left.parent/".ipynb_checkpoints").mkdir()
    (left.parent/".link.ab12cd34.part").symlink_to(left.parent/".gitignore")
    (left.parent/".tmpA1b2C3").write_bytes(b"safetensors'")
    kept = {*left.parent.iterdir()}-{left, left.parent/".tmpA1b2C3"}
    for p in left.parent.iterdir(): os.utime(p, (0, 0), follow_symlinks=False)
    os.utime(left)
    assert sweep_temporary(tmp_path, deep=True) == [left.parent/".tmpA1b2C3"]  # Ten minutes without a change
    assert sweep_temporary(tmp_path, age=0) == [] and sweep_temporary(tmp_path, age=0, deep=True) == [left]
    assert {*left.parent.iterdir()} == kept
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/".x.ab12cd34.part").write_bytes(b"")
    (tmp_path/"sub"/"linked").symlink_to(tmp_path/"other")
    assert sweep_temporary(tmp_path/"sub", age=0, deep=True) == [] and (tmp_path/"other"/".x.ab12cd34.part").exists()

# Checksums

def test_a_flipped_bit_is_refused_wherever_it_is(shards, tmp_path):
    tok, folder = shards
    tok.save(tmp_path/"tokenizer.safetensors")
    transformer().save(tmp_path/"dit.safetensors", dict(steps=3, tokenizer="x"), ema=transformer().state_dict())
    s = samples(tmp_path/"s")
    s.write(0, np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), dict(seconds=1.))
    opens = {shard_files(folder)[1]: lambda: load_latents(folder, tok),
             tmp_path/"tokenizer.safetensors": lambda: load_tokenizer(tmp_path),
             tmp_path/"dit.safetensors": lambda: load_dit(tmp_path),
             s.chunk(0): lambda: s.read(0)}
    rng = random.Random(0)
    for path,read in opens.items():
        read()
        size, head = path.stat().st_size, 8+int.from_bytes(path.read_bytes()[:8], "little")
        anywhere, in_header = [rng.randrange(size) for _ in range(15)], [rng.randrange(head) for _ in range(15)]
        for at in anywhere+in_header:
            bit = rng.randrange(8)
            flip(path, at, bit)
            with pytest.raises(VavaeError, match=path.name):
                read()
                pytest.fail(f"{path.name}: bit {bit} of byte {at} of {size}")
            flip(path, at, bit)
        read()

def test_a_flipped_shard_is_made_again_and_the_others_stay(shards):
    tok, folder = shards
    first, second = shard_files(folder)
    before, times = [p.read_bytes() for p in (first, second)], first.stat().st_mtime_ns
    flip(second, -700, 3)
    with pytest.raises(DataError, match="not what was written.*vavae_nb.train"): load_latents(folder, tok)
    with pytest.raises(DataError, match="not what was written"): open_latents(folder)
    load_latents(folder, tok, check=False)
    def extract(**kwargs): extract_shards(tok, IMAGES, folder, per_shard=15, precision="fp32", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(check=False)
        extract(share=(0, 2)) # Not this process's
    with pytest.warns(UserWarning, match="shard001.*not what was written.*extracted again"): extract(share=(1, 2))
    assert [p.read_bytes() for p in (first, second)] == before and first.stat().st_mtime_ns == times

def test_the_same_contents_make_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(5.), "a": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor(True),
               "": torch.zeros(0, 2)}
    meta = {"z": 1, "a": "ä"}
    for i in range(8): save_tensors(tmp_path/f"{i}", tensors, meta)
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    got, description = load_tensors(tmp_path/"0")
    assert description == meta and got.keys() == tensors.keys()
    assert all(torch.equal(got[k], v) for k,v in tensors.items())
    save_tensors(tmp_path/"none", tensors, meta, checksum=False)
    assert load_tensors(tmp_path/"none")[1] == meta and b"sha256" not in (tmp_path/"none").read_bytes()
    flip(tmp_path/"0", -1)
    load_tensors(tmp_path/"0", check=False)

# Readers

def header(path, head, data=b""):
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw))+raw+data)
    return path

HEADERS = dict(
    damaged=b'{"__metadata__":{"json":"{',
    deep=b"["*100_000,
    digits=b'{"a":{"dtype":"F32","shape":[1'+b"0"*6000+b'],"data_offsets":[0,4]}}',
    list=b"[]",
    kinds={"__metadata__": {"json": [1]}},
    metadata={"__metadata__": ["json"]},
    json_list={"__metadata__": {"json": "[1]"}},
    json_string={"__metadata__": {"json": '"text"'}},
    json_deep={"__metadata__": {"json": '{"a":'*99_000}},
    json_cut={"__metadata__": {"json": "{"}},
    json_digits={"__metadata__": {"json": '{"step": 1'+"0"*6000+"}"}},
    size={"a": dict(dtype="F32", shape=[2**40, 2**20], data_offsets=[0, 4])})

@pytest.mark.parametrize("head", HEADERS.values(), ids=HEADERS)
def test_headers_of_any_kind(head, tmp_path):
    path = header(tmp_path/"dit.safetensors", head, bytes(4))
    for read in (load_tensors, LightningDiT.load, Autoencoder.load, load_dit, load_tokenizer):
        with pytest.raises(CheckpointError, match="dit.safetensors.*again"): read(path)

def test_descriptions_that_lack_a_part_or_claim_a_giant(tmp_path):
    path, few = tmp_path/"m.safetensors", {"model.x": torch.zeros(2)}
    whole = {f"model.{k}": v for k,v in transformer().state_dict().items()}
    config = transformer().config
    wrong = [dict(hidden_size=10**9), dict(hidden_size=10**30), dict(depth=10**9), dict(input_size=10**9),
             dict(num_classes=10**12), dict(num_heads="two"), dict(depth=None), {"x": 1}]
    giants = [dict(config=config | w, meta={}) for w in wrong]
    for tensors,heads in ((few, [{}, dict(config=3), *giants]), (whole, [dict(config=config, meta=3)])):
        for head in heads:
            save_tensors(path, tensors, dict(kind="LightningDiT") | head)
            with pytest.raises(CheckpointError, match="m.safetensors"): LightningDiT.load(path)
    save_tensors(path, {}, dict(kind="LightningDiT"))
    with pytest.raises(CheckpointError, match="it has: none"): LightningDiT.load(path)
    config = tokenizer().config
    wrong = [dict(ch=10**9), dict(num_res_blocks=10**9), dict(ch_mult=3), dict(ch_mult=[1]*10**4)]
    for head in ({}, dict(config=config), dict(config=config, latent_how=3), *(dict(config=config | w) for w in wrong)):
        save_tensors(path, tokenizer().state_dict(), dict(kind="vavae_nb.tokenizer.autoencoder") | head)
        with pytest.raises(CheckpointError, match="m.safetensors"): Autoencoder.load(path)

def test_shards_that_say_of_themselves_what_cannot_be(shards):
    tok, folder = shards
    path = shard_files(folder)[0]
    t, meta = load_tensors(path)
    t = {k: v.clone() for k,v in t.items()}
    for bad in (dict(n=10**15, per_shard=1), dict(n="30"), dict(world_size=10**9), dict(classes=3), dict(per_shard=0),
                dict(seed=None)):
        save_tensors(path, t, meta | bad)
        for read in (lambda: load_latents(folder, tok), lambda: open_latents(folder)):
            with pytest.raises(DataError, match="shard000.*extract the images again"): read()

def aliases(names, first, line): # Each name stands for several of the one before
    return "\n".join([first, *(line(before, name) for before,name in zip(names, names[1:]))])

def eight(before, name): return f"{name}: &{name} {{{', '.join(f'{k}: *{before}' for k in 'pqrstuvw')}}}"
def merged(before, name): return f"{name}: &{name} {{<<: [{', '.join([f'*{before}']*4)}]}}"

YAMLS = dict(
    aliases=aliases("abcdefghi", "a: &a {x: 1, y: 2}", eight),
    merged=aliases("abcdefghijkl", "a: &a {x: 1}", merged),
    itself="a: &a [*a]",
    depth="a: "+"["*3000,
    digits="seed: 1"+"0"*6000,
    hexadecimal="seed: 0x"+"f"*9000,
    long="a: "+"x"*10**6,
    date="seed: 2001-99-99",
    bytes="seed: !!binary x",
    tag="seed: !!python/object/apply:os.system ['true']",
    list="[1]",
    keys="? {a: 1}\n: 2")
LOADS = """
import sys
from vavae_nb.base.errors import ConfigError
from vavae_nb.recipes.settings import load_config
try: load_config(sys.argv[1])
except ConfigError as e: print('refused:', e)
"""

@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
def test_yaml_that_could_take_for_ever(text, tmp_path):
    (tmp_path/"config.yaml").write_text(text+"\n", encoding="utf-8")
    command = [sys.executable, "-c", LOADS, str(tmp_path/"config.yaml")]
    r = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert r.stdout.startswith(f"refused: {tmp_path/'config.yaml'} "), r.stdout+r.stderr

def test_settings_of_the_command_line_are_read_with_the_same_limits():
    for text in ("{steps: &a 3}, {steps: *a}", "{steps: "+"["*3000, "{steps: 1"+"0"*6000+"}", "{steps: 2001-99-99}"):
        with pytest.raises(ConfigError, match="tokenizer_training.phases, given as"):
            override(Config(), {"tokenizer_training.phases": text})

JSONS = dict(cut="{", deep="["*100_000, deep_dicts='{"a":'*100_000, digits='{"a": 1'+"0"*6000+"}",
             list="[]", number="3", text=b"\xff", long=b'"'+b"x"*2**24+b'"')

@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS)
def test_json_of_any_kind(text, tmp_path):
    path = tmp_path/"sample.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match="sample.json.*; write it again"): read_json(path)
    with pytest.raises(DataError, match="sample.json.*evaluate again"): Evaluation.load(path)
    with pytest.raises(DataError, match="sample.json.*draw the samples again"): how_drawn(tmp_path)
    (tmp_path/"chunks").mkdir()
    (tmp_path/"chunks"/"000000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="sample.json.*delete it and call"): samples(tmp_path)

def test_records_with_parts_of_other_kinds(tmp_path):
    path = tmp_path/"sample.json"
    (tmp_path/"chunks").mkdir()
    (tmp_path/"chunks"/"000000.safetensors").write_bytes(b"")
    for record in (dict(outputs=[]), dict(outputs={"npz": 3}), dict(outputs={"npz": {}}), dict(settings=3)):
        path.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(ConfigError, match="sample.json|other settings"): samples(tmp_path)
    whole = dict(kind="vavae_nb.evaluation", action="generation", about={}, figures=[], omitted=[])
    wrong = (dict(action=1), dict(figures=[3]), dict(figures=[{}]), dict(figures=[dict(metric="fd", value=10**400)]),
             dict(more=1), dict(omitted=[{}]))
    for evaluation in (dict(kind="vavae_nb.evaluation"), *(whole | w for w in wrong)):
        path.write_text(json.dumps(evaluation), encoding="utf-8")
        with pytest.raises(DataError, match="lacks a part of an evaluation"): Evaluation.load(path)
    s = samples(tmp_path/"s")
    pixels = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    for tensors,meta in (({}, {}), ({"images": pixels.float()}, {}),
                         ({"images": pixels, "labels": torch.zeros(2)}, dict(made={})),
                         ({"images": pixels, "labels": torch.zeros(3)}, dict(made=3))):
        save_tensors(s.chunk(0), tensors, dict(settings=s.settings) | meta)
        with pytest.raises(CheckpointError, match="000000.safetensors is no chunk"): s.read(0)

def claiming(path, head, data=b"", method=zipfile.ZIP_STORED):
    raw = b"\x93NUMPY\1\0"+len(head).to_bytes(2, "little")+head.encode()+data
    with zipfile.ZipFile(path, "w", method) as z: z.writestr("arr_0.npy", raw)

def test_npz_files_that_are_not_what_they_say(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path/"whole.npz", arr_0=pixels)
    raw = bytearray((tmp_path/"whole.npz").read_bytes())
    raw[len(raw)//2] ^= 255
    (tmp_path/"flipped.npz").write_bytes(raw)
    np.savez(tmp_path/"objects.npz", arr_0=np.array([{}, 1], object))
    npy = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}\n"
    for name,method in (("huge", zipfile.ZIP_STORED), ("huge_packed", zipfile.ZIP_DEFLATED)):
        claiming(tmp_path/f"{name}.npz", npy % "(10000000, 17000, 17000, 3)", b"", method)
    claiming(tmp_path/"negative.npz", npy % "(-2, -8, 8, 3)", bytes(384))
    claiming(tmp_path/"code.npz", "__import__('os').system('true')\n")
    (tmp_path/"cut.npz").write_bytes(raw[:3000])
    assert np.array_equal(load_samples(tmp_path/"whole.npz")[0], pixels)
    assert len(load_images(tmp_path/"whole.npz")) == 24
    for path in sorted(tmp_path.glob("*.npz")):
        if path.stem == "whole": continue
        for read in (load_samples, load_images):
            with pytest.raises(DataError, match=f"{path.name} is not a whole .npz of plain arrays.*again"): read(path)
    np.savez(tmp_path/"labels.npz", arr_0=pixels, arr_1=np.full(24, 10**12))
    with pytest.raises(DataError, match="whole numbers from 0 to a million"): load_images(tmp_path/"labels.npz")

PLAIN = """
import locale, sys, torch
from pathlib import Path
from vavae_nb.recipes.config import Config
from vavae_nb.recipes.settings import load_config, override, save_config
from vavae_nb.metrics.evaluation import Evaluation
from vavae_nb.sampling.sets import SampleSet
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), "this locale is not plain"
out = Path(sys.argv[1])
cfg = override(Config(), {"data.source": "M\\u00fcller"})
save_config(cfg, out/"config.yaml")
assert load_config(out/"config.yaml") == cfg
for _ in range(2): SampleSet(out/"s", torch.zeros(2, dtype=torch.long), dict(dit="M\\u00fcller"), ["K\\u00e4se"])
e = Evaluation("generation", dict(images="M\\u00fcller"))
e.save(out/"e.json")
assert Evaluation.load(out/"e.json") == e
"""
def test_files_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path/"given.yaml").write_text("data: {source: Müller}\n", encoding="utf-8")
    env = {k: v for k,v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env |= dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    r = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, encoding="utf-8", env=env)
    assert r.returncode == 0, r.stderr

TEXTS = re.compile(r"\.(read_text|write_text)\((?!.*encoding=)|"
                   r"(?<![\w.])open\((?!.*(encoding=|\"r?w?a?\+?b|\"rb|\"wb))")

def test_every_text_file_says_its_encoding():
    package = Path(vavae_nb.__file__).parent
    silent = []
    for path in sorted(package.rglob("*.py")):
        lines = filter(TEXTS.search, path.read_text(encoding="utf-8").splitlines())
        silent += [f"{path}: {line.strip()}" for line in lines if "urlopen" not in line and "def " not in line]
    assert not silent, "\n".join(silent)

def test_a_transformer_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path/"none.pt"))): load_dit("~/none.pt")

def test_a_file_in_the_place_of_the_temporary_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("VAVAE_NB_CACHE", raising=False)
    monkeypatch.setattr(files, "_cache_root", lambda: Path(os.devnull)/"cache")
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    user = files.getpass.getuser() if os.name == "nt" else os.getuid()
    (tmp_path/f"vavae_nb-{user}").write_text("in the way", encoding="utf-8")
    files._temporary_cache.cache_clear()
    with pytest.warns(UserWarning, match="cannot be written"): folder = cache_dir("weights")
    files._temporary_cache.cache_clear()
    assert folder.is_dir() and folder.parent.parent == tmp_path
