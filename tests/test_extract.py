"`python -m vavae_nb.extract`: processes, kills, corrupt images, where the statistics go"
import os, random, signal, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image
from together import dying
from vavae_nb.data import folders as data
from vavae_nb.data.images import embedded
from vavae_nb.extract import main
from vavae_nb.tokenizer.latents import load_latents
from vavae_nb.tokenizer.shards import open_shard, shard_files
from vavae_nb.tokenizer.statistics import save_latent_stats
from vavae_nb.interop.authors import save_vavae
from vavae_nb.base.tensor_files import load_tensors
from vavae_nb.base.tensors import test_tensor
from vavae_nb.tokenizer.autoencoder import Autoencoder

@pytest.fixture
def work(tmp_path, monkeypatch):
    "A folder of 90 images of three classes, and a tokenizer"
    monkeypatch.chdir(tmp_path)
    for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"): monkeypatch.delenv(k, raising=False)
    images = embedded("test")
    for i in range(90):
        p = tmp_path/"pets"/"abc"[i//30]/f"{i:02d}.png"
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[i]).resize((40+i % 7, 36)).save(p)
    torch.manual_seed(0)
    small = dict(ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, norm_groups=4)
    Autoencoder(latent_dim=4, ch=8, **small).save(tmp_path/"tok.safetensors", dict(steps=7))
    return tmp_path

COMMON = dict(tokenizer="tok.safetensors", data="pets", per_shard=10, device="cpu", precision="fp32")
def extract(**kw):
    main(**COMMON | dict(out="z") | kw)

def start(*args, env=None, python=(sys.executable, "-m", "vavae_nb.extract"), **kw):
    options = [f"--{k.replace('_', '-')}={v}" for k,v in (COMMON | kw).items()]
    return subprocess.Popen([*python, *options, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8", env=os.environ | (env or {}))

def refused(capsys, **kw):
    with pytest.raises(SystemExit) as e: extract(**kw)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "\nerror: " in err
    return err

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}

def test_shards_of_a_folder_with_a_corrupt_image(work, capsys):
    (work/"pets"/"a"/"03.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="03.png could not be decoded"): extract()
    said = capsys.readouterr().out
    assert "1 images could not be decoded" in said and "89 of 89" not in said
    sizes = [len(open_shard(p)[0]["labels"]) for p in shard_files(work/"z")]
    assert sizes == [9]+[10]*8 and open_shard(shard_files(work/"z")[0])[1]["skipped"] == [3]
    tok = Autoencoder.load(work/"tok.safetensors")
    assert load_tensors(work/"tok.safetensors")[1]["meta"] == {"steps": 7} and tok.latent_stats_source["n"] == 89
    latents = load_latents(work/"z", tok)
    assert np.bincount(latents.labels).tolist() == [29, 30, 30]
    lazy = data.lazy_folder(work/"pets", 32) # Aligned: the image at 4 is the latent at 3
    with torch.no_grad(): p = tok.eval().posterior(lazy.batch([4, 89]))
    u = (tok.denormalise(latents.batch([3, 88]))-p.mean)/p.std
    assert u.abs().max() < 6 and .8 < u.std() < 1.2 # Of 512 normal numbers

def test_each_image_is_decoded_once_for_both_flips(work, monkeypatch):
    crop, seen = data.center_crop, []
    monkeypatch.setattr(data, "center_crop", lambda im, size: seen.append(im.filename) or crop(im, size))
    extract()
    assert len(seen) == len(set(seen)) == 90

def test_statistics_are_kept_unless_asked_for(work, capsys):
    extract(stats_n=20, seed=5)
    first = Autoencoder.load("tok.safetensors")
    assert first.latent_stats_source["n"] == 20 and first.latent_stats_source["seed"] == 5
    before = (work/"tok.safetensors").read_bytes()
    extract(out="again", seed=5)
    extract(out="again", seed=5, stats_only=True)
    assert (work/"tok.safetensors").read_bytes() == before
    assert (work/"again/latents_stats.pt").read_bytes() == (work/"z/latents_stats.pt").read_bytes()
    load_latents(work/"again", first)
    extract(out="again", seed=5, stats_n=0, stats_only=True, new_stats=True)
    assert Autoencoder.load("tok.safetensors").latent_stats_source["n"] == 90

def test_a_published_checkpoint_gets_a_tokenizer_file_beside_the_shards(work):
    tok = Autoencoder(latent_dim=4, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32)
    save_vavae(tok, "vavae.pt")
    kw = dict(tokenizer="vavae.pt", size=32)
    extract(**kw)
    beside = Autoencoder.load("z/tokenizer.safetensors")
    assert beside.latent_stats_source["n"] == 90
    assert all(torch.equal(a, b) for a,b in zip(beside.state_dict().values(), tok.state_dict().values()))
    load_latents(work/"z", beside)
    save_latent_stats("given.pt", torch.full((1, 4, 1, 1), .5), torch.full((1, 4, 1, 1), 2.))
    extract(**kw, out="y", latent_stats="given.pt")
    assert Autoencoder.load("y/tokenizer.safetensors").latent_std.flatten().tolist() == [2.]*4

def test_two_processes_at_once(work):
    extract(out="one")
    both = [start("--out", "two", env=dict(RANK=str(r), WORLD_SIZE="2")) for r in (0, 1)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    names = [f"latents_rank{r:02d}_shard{s:03d}.safetensors" for r in (0, 1) for s in range(5)]
    assert [p.name for p in shard_files("two")] == names
    one, two = (load_latents(work/d, Autoencoder.load("tok.safetensors")) for d in ("one", "two"))
    for flip in (False, True): test_tensor(two.batch(slice(None), flip), one.batch(slice(None), flip))
    assert torch.equal(one.labels, two.labels) and "statistics in two" in "".join(out for out,_ in said)

@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_continued_gives_the_same_bytes(work, kills):
    chance, how = random.Random(0), dict(per_shard=2, batch_size=2)
    p = start("--out", "unbroken", **how) # A process as the others: bits depend on threads, here set by other tests
    assert p.wait() == 0, p.communicate()
    for k in range(kills):
        if k % 3 == 0: # In the middle of a write, whatever the machine is doing
            p = start("--out", "z", python=dying("vavae_nb.extract", chance.randint(1, 5), "latents_rank"), **how)
            p.communicate()
            assert k or p.returncode == -signal.SIGKILL and 0 <= len(shard_files("z")) < 5
            continue
        p, n, until = start("--out", "z", **how), len(shard_files("z")), time.time()+120 # At any moment
        while p.poll() is None and len(shard_files("z")) == n and time.time() < until: time.sleep(.001)
        time.sleep(chance.random()*.02)
        p.send_signal(signal.SIGKILL); p.wait(); p.communicate()
    p = start("--out", "z", **how)
    assert p.wait() == 0, p.communicate()
    assert contents(work/"z") == contents(work/"unbroken") and not list((work/"z").glob(".*"))

def test_bad_input(work, capsys):
    extract()
    wrong = [(dict(seed=1), "seed is 0 there and 1 now"), (dict(tokenizer="none.pt"), "none.pt"),
             (dict(data="nowhere"), "no folder at nowhere"), (dict(rank=2, world_size=2), "ranks are 0 to 1"),
             (dict(device="cuda:9"), "CUDA devices"), (dict(data="embedded", size=64), "--size 64"),
             (dict(size=33, out="y"), "multiples of 4"), (dict(precision="fp8"), "fp8"),
             (dict(per_shard=0), "at least 1"), (dict(stats_only=True, out="empty"), "no shards")]
    for kw,message in wrong: assert message in refused(capsys, **kw)

def test_the_module_needs_no_torch():
    code = "import sys, vavae_nb.extract; print([m for m in ('torch', 'numpy', 'fastai') if m in sys.modules])"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert r.stdout.strip() == "[]", r.stdout+r.stderr
