"Latent shards: refusals, statistics, resuming, ranks, full disks"
import collections, json, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from vavae_nb.base.errors import CheckpointError, DataError, VavaeError
from vavae_nb.data.images import embedded
from vavae_nb.tokenizer.latents import Latents, load_latents
from vavae_nb.tokenizer.statistics import describe_folder, latent_statistics, record_statistics
from vavae_nb.tokenizer.statistics import load_latent_stats, save_latent_stats
from vavae_nb.tokenizer import shards
from vavae_nb.tokenizer.shards import extract_shards, open_shard, shard_files, shard_ranges
from vavae_nb.base.tensors import generator, test_tensor
from vavae_nb.base.tensor_files import load_tensors, save_tensors
from vavae_nb.tokenizer.autoencoder import Autoencoder

def tokenizer(seed=0, d=4):
    torch.manual_seed(seed)
    small = dict(ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, norm_groups=4)
    return Autoencoder(latent_dim=d, ch=8, **small)

IMAGES = embedded("test").subset(range(50), "fifty")
def extract(tok, folder, **kw): return extract_shards(tok, IMAGES, folder, **dict(per_shard=20, precision="fp32") | kw)
def joined(folder, key="latents"): return torch.cat([open_shard(p)[0][key] for p in shard_files(folder)])

@pytest.fixture
def made(tmp_path):
    "A tokenizer with statistics, and the shards it made"
    tok = tokenizer()
    extract(tok, tmp_path/"z")
    record_statistics(tok, tmp_path/"z")
    return tok, tmp_path/"z"

@pytest.mark.parametrize("world, batch, per", [(1, 7, 20), (2, 100, 20), (3, 10, 4)])
def test_latents_do_not_depend_on_ranks_batches_and_shards(made, tmp_path, world, batch, per):
    tok, folder = made
    for rank in reversed(range(world)):
        extract(tok, tmp_path/"w", rank=rank, world_size=world, batch_size=batch, per_shard=per)
    assert {p.name for p in shard_files(tmp_path/"w")} == set(shard_ranges(50, per, world))
    for k in ("latents", "latents_flip"): test_tensor(joined(tmp_path/"w", k), joined(folder, k))
    assert joined(tmp_path/"w", "labels").tolist() == IMAGES.labels.tolist()

def test_flips_and_images_have_noise_of_their_own(made):
    tok, folder = made
    with torch.no_grad(): p, q = (tok.eval().posterior(IMAGES.batch(slice(None), f)) for f in (False, True))
    u = torch.stack([(joined(folder)-p.mean)/p.std, (joined(folder, "latents_flip")-q.mean)/q.std]).flatten(2)
    corr = torch.corrcoef(u.flatten(0, 1)).fill_diagonal_(0)
    assert corr.abs().max() < 6/256**.5 and abs(u.std()-1) < 5/(2*u.numel())**.5 # 256 numbers each

@pytest.mark.parametrize("n", [0, 13, 2])
def test_statistics_are_numpys(tmp_path, n):
    g, parts = torch.Generator().manual_seed(1), []
    for s,k in enumerate((5, 1, 14)): # Uneven shards, a mean far from 0
        spread, centre = (torch.tensor(v).view(3, 1, 1) for v in ([.01, 1, 30], [1000., 0, -5]))
        z = torch.randn(2, k, 3, 4, 4, generator=g)*spread+centre
        tensors = dict(latents=z[0], latents_flip=z[1], labels=torch.zeros(k, dtype=torch.long))
        save_tensors(tmp_path/f"latents_rank00_shard{s:03d}.safetensors", tensors)
        parts.append(z[0])
    mean, std, source = latent_statistics(tmp_path, n, seed=3)
    z = torch.cat(parts).double().numpy()
    if n: z = z[np.sort(torch.randperm(20, generator=generator(3, "stats"))[:n].numpy())]
    assert source["n"] == len(z)
    np.testing.assert_allclose(mean.flatten().numpy(), z.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.flatten().numpy(), z.std((0, 2, 3), ddof=1), rtol=1e-6)

def test_statistics_are_recorded_and_read_back_without_pickles(made):
    tok, folder = made
    got = torch.load(folder/"latents_stats.pt", weights_only=True)
    assert set(got) == {"mean", "std"} and got["mean"].shape == got["std"].shape == (1, 4, 1, 1)
    test_tensor(got["std"], tok.latent_std)
    about = json.loads((folder/"latents.json").read_text(encoding="utf-8"))
    assert about["tokenizer"] == tok.fingerprint() and about["versions"]["torch"] == torch.__version__
    assert about["statistics"]["data_fingerprint"] == IMAGES.fingerprint
    tok.save(folder.parent/"tok.safetensors")
    again = Autoencoder.load(folder.parent/"tok.safetensors") # Statistics travel with it
    assert torch.equal(load_latents(folder, again).batch([3, 40]), load_latents(folder, tok).batch([3, 40]))

def test_batches_are_the_normalised_rows(made):
    tok, folder = made
    latents, raw = load_latents(folder, tok), torch.stack([joined(folder), joined(folder, "latents_flip")], 1)
    i, flip = torch.randperm(50), torch.rand(50) < .5
    want = tok.normalise(raw[i, flip.long()])
    assert torch.equal(latents.batch(i, flip), want)
    assert torch.equal(latents.batch(slice(3, 9), True), tok.normalise(raw[3:9, 1]))
    assert torch.equal(latents.labels, torch.as_tensor(IMAGES.labels)) and latents.classes == IMAGES.classes
    in_memory = Latents.of(tok.normalise(raw.flatten(0, 1)).view_as(raw), latents.labels)
    assert torch.equal(in_memory.batch(i, flip), want) and in_memory.shape == latents.shape
    with pytest.raises(IndexError): latents.batch([50])

def rewrite(path, change):
    t, meta = load_tensors(path)
    t = {k: v.clone() for k,v in t.items()}
    change(t, meta)
    save_tensors(path, t, meta)

def drop(t, m): del t["latents_flip"]
def double(t, m): t["latents"] = t["latents"].double()
def integers(t, m): t["latents_flip"] = t["latents_flip"].to(torch.int8)
def fewer(t, m): t["labels"] = t["labels"][1:]
def channels(t, m):
    for k in ("latents", "latents_flip"): t[k] = t[k][:, :3]
def smaller(t, m):
    for k in ("latents", "latents_flip"): t[k] = t[k][..., :4]
def label(t, m): t["labels"][0] = 10
def negative(t, m): t["labels"][0] = -1
def floats(t, m): t["labels"] = t["labels"].float()
def stranger(t, m): m["tokenizer"] = "0"*16
def seed(t, m): m["seed"] = 9

@pytest.mark.parametrize("change, message", [
    (drop, "lacks latents_flip"), (double, "float64"), (integers, "int8"), (fewer, r"labels \(19,\)"),
    (channels, "3 channels"), (smaller, "but the shards before it"), (label, "names 10 classes"),
    (negative, "from -1"), (floats, "whole numbers"), (stranger, "encode the images again"),
    (seed, "different extractions")])
def test_a_wrong_shard_is_refused(made, change, message):
    tok, folder = made
    rewrite(shard_files(folder)[1], change)
    with pytest.raises(VavaeError, match=message): load_latents(folder, tok)

@pytest.mark.parametrize("keep", [0, 7, 3000])
def test_a_shard_cut_short_is_refused(made, keep):
    tok, folder = made
    p = shard_files(folder)[0]
    p.write_bytes(p.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"): load_latents(folder, tok)

def test_what_does_not_belong_together_is_refused(made):
    tok, folder = made
    with pytest.raises(CheckpointError, match="encode the images again"): load_latents(folder, tokenizer(1))
    with pytest.raises(DataError, match="no shards"): load_latents(folder.parent, tok)
    for give in (record_statistics, describe_folder):
        with pytest.raises(CheckpointError, match="encode the images again"): give(tokenizer(1), folder)
    bare = tokenizer() # The same weights without statistics
    with pytest.raises(CheckpointError, match="no latent statistics"): load_latents(folder, bare)
    bare.set_latent_stats(tok.latent_mean*1.5, tok.latent_std*1.5, {})
    with pytest.raises(CheckpointError, match="are not the tokenizer's"): load_latents(folder, bare)
    save_latent_stats(folder/"latents_stats.pt", tok.latent_mean, tok.latent_std*float("nan"))
    with pytest.raises(CheckpointError, match="differ by nan"): load_latents(folder, tok)
    save_latent_stats(folder/"latents_stats.pt", torch.zeros(1, 6, 1, 1), torch.ones(1, 6, 1, 1))
    with pytest.raises(CheckpointError, match="6 channels"): load_latents(folder, tok)
    describe_folder(tok, folder)
    shard_files(folder)[0].unlink()
    with pytest.raises(DataError, match="lacks 1 of 3 shards"): load_latents(folder, tok)

@pytest.mark.parametrize("content, message", [
    (b"", "torch checkpoint"), (b"PK\x03\x04", "torch checkpoint"),
    ({"mean": torch.zeros(1, 4, 1, 1)}, "does not hold"), ([1, 2], "does not hold"),
    ({"mean": torch.zeros(4), "std": torch.ones(4)}, "does not hold")])
def test_bad_statistics_files(tmp_path, content, message):
    p = tmp_path/"latents_stats.pt"
    p.write_bytes(content) if isinstance(content, bytes) else torch.save(content, p)
    with pytest.raises(CheckpointError, match=message): load_latent_stats(p)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_published_shards_load_with_a_warning(made, tmp_path, dtype):
    tok, folder = made
    for p in shard_files(folder): # As the authors write them: strings in the header that say nothing of the tokenizer
        t = {k: v.to(dtype) if v.is_floating_point() else v for k,v in load_file(p).items()}
        (tmp_path/"p").mkdir(exist_ok=True)
        save_file(t, tmp_path/"p"/p.name, metadata={"total_size": "20", "dtype": str(dtype)})
    with pytest.warns(UserWarning, match="3 of 3 shards .* could not be checked"):
        latents = load_latents(tmp_path/"p", tok)
    z = latents.batch(slice(None))
    assert z.dtype == torch.float32
    rounding = {torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 1e-2}
    test_tensor(z, load_latents(folder, tok).batch(slice(None)), rtol=rounding[dtype])

def test_another_extraction_in_the_folder_is_refused_or_replaced(made):
    tok, folder = made
    for kw in (dict(seed=1), dict(per_shard=10), dict(world_size=2)):
        with pytest.raises(CheckpointError, match=f"{list(kw)[0]} is"): extract(tok, folder, **kw)
    with pytest.raises(CheckpointError, match="tokenizer is"): extract(tokenizer(1), folder)
    extract(tok, folder, per_shard=50, replace=True)
    assert [p.name for p in shard_files(folder)] == ["latents_rank00_shard000.safetensors"]
    assert len(load_latents(folder, tok)) == 50

def test_the_work_goes_on_where_it_stopped(made):
    tok, folder = made
    before = {p: p.read_bytes() for p in shard_files(folder)}
    lost = list(before)[1:]
    lost[0].unlink()
    lost[1].write_bytes(before[lost[1]][:-9])
    (folder/".latents_rank00_shard002.safetensors.x.safetensors").write_bytes(b"left over")
    with pytest.warns(UserWarning, match="is extracted again"): extract(tok, folder)
    assert {p: p.read_bytes() for p in shard_files(folder)} == before and not list(folder.glob(".*"))

FULL = """
import resource, sys, torch
sys.path.insert(0, {here!r})
from test_latents import extract, tokenizer
from vavae_nb.base.errors import WriteError
tok = tokenizer()
extract(tok, {out!r}, per_shard=10, world_size=2, rank=0)        # 20 kB of latents a shard
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
try: extract(tok, {out!r}, per_shard=10, world_size=2, rank=1)
except WriteError as e: print("refused:", e)
"""
def test_a_full_disk_leaves_whole_shards_and_says_so(tmp_path):
    code = FULL.format(here=str(Path(__file__).parent), out=str(tmp_path/"z"))
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert "refused:" in r.stdout and "could not be written" in r.stdout and "make room" in r.stdout, r.stdout+r.stderr
    whole = shard_files(tmp_path/"z")
    assert len(whole) == 3 and all(open_shard(p) for p in whole) and not list((tmp_path/"z").glob(".*"))

def test_too_little_room_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: collections.namedtuple("U", "total used free")(1, 1, 1000))
    with pytest.raises(DataError, match="make room"): extract(tokenizer(), tmp_path/"z")
    assert not list((tmp_path/"z").iterdir())

def test_the_bar_counts_images_and_names_the_process(tmp_path, monkeypatch):
    class Bar(list):
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def update(self, n): self.append(n)
    bar, titles = Bar(), []
    monkeypatch.setattr(shards, "progress", lambda desc, **kw: titles.append(desc) or bar)
    extract(tokenizer(), tmp_path, rank=1, world_size=2, share=(1, 2), per_shard=10, batch_size=4)
    assert titles == ["encoding, process 3 of 4"] and bar == [4, 4, 2]

def test_another_process_may_sweep_first(tmp_path):
    shards._sweep(SimpleNamespace(glob=lambda pattern: [tmp_path/"gone"]), ["shard"], everything=False)
