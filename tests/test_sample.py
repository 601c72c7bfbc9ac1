"The sample command: what it makes, what it refuses, and that neither a kill nor the number of processes changes a byte"
import json, os, signal, subprocess, sys
import numpy as np, pytest, torch, vavae_nb
from PIL import Image
from together import dying
from vavae_nb.recipes.config import Config
from vavae_nb.recipes.settings import override, save_config
from vavae_nb.base.errors import DataError
from vavae_nb.dit.model import LightningDiT
from vavae_nb.sampling.drawing import generate_images
from vavae_nb.sampling.formats import load_samples
from vavae_nb.sampling.sets import versions
from vavae_nb.tokenizer.statistics import save_latent_stats
from vavae_nb.interop.authors import save_lightningdit, save_vavae
from vavae_nb.sample import main
from vavae_nb.tokenizer.autoencoder import Autoencoder

CLASSES = ["cat", "a dog", "7"]
STATS = torch.tensor([.1, -.2, .3, 0.]), torch.tensor([1., 2., .5, 1.5])

def randomised(module):
    for p in module.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.12)
    return module

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder of small networks with random weights, and the same two in the published form"
    d, threads = tmp_path_factory.mktemp("sample"), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tok = randomised(Autoencoder(latent_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                                 resolution=16, norm_groups=32))
    model = randomised(LightningDiT(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3))
    tok.set_latent_stats(*STATS, dict(n=0))
    tok.save(d/"tokenizer.safetensors")
    ema = {k: v*1.1 if v.is_floating_point() and "embed" not in k else v for k,v in model.state_dict().items()}
    model.save(d/"dit.safetensors", dict(tokenizer=tok.fingerprint(), classes=CLASSES), ema=ema)
    save_vavae(tok, d/"vavae.pt")
    save_lightningdit(model, d/"lightningdit.pt", ema)
    save_latent_stats(d/"latents_stats.pt", *(s.reshape(1, 4, 1, 1) for s in STATS))
    settings = {"sampling.n": 12, "sampling.points": 6, "sampling.cfg_scale": 2., "precision": "fp32", "device": "cpu",
                "seed": 3}
    save_config(override(Config(), settings), d/"config.yaml")
    yield d
    torch.set_num_threads(threads)

@pytest.fixture
def sample(run, capsys):
    "The command in this process: status, output, errors"
    def f(**kw):
        status, given = 0, {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k,v in kw.items()}
        try: main(**dict(run=str(run)) | given)
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return f

def start(run, out, *args, python=(sys.executable, "-m", "vavae_nb.sample"), **env):
    command = [*python, "--run", run, "--out", out, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)

def read_record(folder): return json.loads((folder/"sample.json").read_text(encoding="utf-8"))

def done(p):
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0, out+err
    return out

def test_what_a_run_makes(run, sample, tmp_path):
    status, out, err = sample(out=tmp_path/"s", format=["npz", "folder", "grid"], classes="7,cat, 1")
    assert status == 0, err
    x, y = load_samples(tmp_path/"s"/"samples.npz")
    assert x.shape == (12, 16, 16, 3) and y.tolist() == [2, 0, 1]*4
    model, tok = LightningDiT.load(run/"dit.safetensors", "ema"), Autoencoder.load(run/"tokenizer.safetensors")
    sampling = override(Config(), {"sampling.points": 6, "sampling.cfg_scale": 2.}).sampling
    def generate(**kw):
        return generate_images(model, tok, torch.from_numpy(y), sampling, seed=3, precision="fp32", progress=False, **kw)
    assert np.array_equal(x, generate())
    assert not np.array_equal(x, generate(guided=False))
    assert np.abs(generate(batch_size=1).astype(int)-x).max() <= 1
    assert np.array_equal(np.asarray(Image.open(tmp_path/"s"/"images"/"000005-0001-a_dog.png")), x[5])
    record = read_record(tmp_path/"s")
    assert record["settings"]["seed"] == 3 and record["settings"]["classes"] == "7,cat, 1"
    assert record["made"][0]["images"] == 12 and record["outputs"].keys() == {"npz", "folder", "grid"}
    assert str(tmp_path/"s"/"samples.png") in out

def test_a_repeated_call_does_nothing_and_a_damaged_npz_is_made_again(run, sample, tmp_path):
    assert sample(out=tmp_path/"s")[0] == 0
    def times(): return {p: p.stat().st_mtime_ns for p in (tmp_path/"s").rglob("*")}
    npz, before = tmp_path/"s"/"samples.npz", times()
    whole = npz.read_bytes()
    assert sample(out=tmp_path/"s")[0] == 0 and before == times()
    npz.write_bytes(whole[:1000])
    assert sample(out=tmp_path/"s")[0] == 0 and npz.read_bytes() == whole

def test_neither_a_kill_nor_the_number_of_processes_changes_a_byte(run, sample, tmp_path):
    args = ("-n", 20, "--chunk", 4, "--points", 60, "--batch-size", 2, "--format", "npz")
    kw = dict(n=20, chunk=4, points=60, batch_size=2, format=["npz"])
    assert sample(out=tmp_path/"whole", **kw)[0] == 0
    p = start(run, tmp_path/"killed", *args, python=dying("vavae_nb.sample", 3, "chunks"))
    first = tmp_path/"killed"/"chunks"/"000000.safetensors"
    p.communicate() # Two of five chunks are whole
    assert p.returncode == -signal.SIGKILL and not (tmp_path/"killed"/"samples.npz").exists()
    kept = first.stat().st_mtime_ns
    assert sample(out=tmp_path/"killed", **kw)[0] == 0
    assert first.stat().st_mtime_ns == kept
    said = [done(q) for q in [start(run, tmp_path/"two", *args, RANK=str(r), WORLD_SIZE="2") for r in (0, 1)]]
    assert any("made: " in s for s in said)
    assert sorted({c["rank"] for c in read_record(tmp_path/"two")["made"]}) == ["0 of 2", "1 of 2"]
    whole = (tmp_path/"whole"/"samples.npz").read_bytes()
    for other in ("killed", "two"): assert (tmp_path/other/"samples.npz").read_bytes() == whole, other

def test_published_checkpoints_give_the_same_images(run, sample, tmp_path):
    files = dict(run=None, dit=run/"lightningdit.pt", tokenizer=run/"vavae.pt", latent_stats=run/"latents_stats.pt")
    settings = dict(seed=3, n=12, points=6, cfg_scale=2., precision="fp32", device="cpu", format=["npz"])
    status, out, err = sample(**files, **settings, out=tmp_path/"published")
    assert status == 0 and "does not say which tokenizer" in out, err
    assert sample(out=tmp_path/"ours", format=["npz"])[0] == 0
    assert sample(out=tmp_path/"trained", format=["npz"], weights="model")[0] == 0
    x, y, z = (load_samples(tmp_path/k/"samples.npz")[0] for k in ("published", "ours", "trained"))
    assert np.array_equal(x, y) and not np.array_equal(x, z)
    _, _, err = sample(**files, **settings, out=tmp_path/"named", classes="cat")
    assert "cat" in err
    _, _, err = sample(**files | dict(latent_stats=None), **settings, out=tmp_path/"raw")
    assert "give --latent-stats" in err

def test_a_preset_and_what_overrides_it(run, sample, tmp_path):
    assert sample(out=tmp_path/"s", preset="paper-800ep", points=5, set=[["sampling.shift=0.5"]], n=3)[0] == 0
    s = read_record(tmp_path/"s")["settings"]
    assert (s["cfg_scale"], s["cfg_interval"], s["cfg_channels"]) == (6.7, [.125, 1.], 3)
    assert (s["points"], s["shift"], s["n"]) == (5, .5, 3)

@pytest.mark.parametrize("kw, message", [
    (dict(run="nowhere"), "no run folder at nowhere"),
    (dict(run=None), "give --run RUN_FOLDER"),
    (dict(dit="none.pt"), "no file at none.pt"),
    (dict(classes="dog"), "did you mean 'a dog'"),
    (dict(classes="0,3"), "class 3 is outside 0…2"),
    (dict(n=0), "0 images"),
    (dict(n=-4), "-4 images"),
    (dict(solver="eulre"), "did you mean 'euler'"),
    (dict(points=1), "at least 2"),
    (dict(preset="paper"), "unknown preset 'paper'"),
    (dict(cfg_interval="1,0"), "reversed"),
    (dict(shift=0.), "above 0"),
    (dict(cfg_channels=-1), "at least 1"),
    (dict(set=[["dit_training.path=linaer"]]), "did you mean 'linear'"),
    (dict(set=[["sampling.n"]]), "--set takes path=value"),
    (dict(batch_size=0), "at least 1"),
    (dict(chunk=0), "at least 1"),
    (dict(rank=2, world_size=2), "rank 2 of 2"),
    (dict(device="tpu9"), "device 'tpu9'"),
    (dict(precision="fp8"), "precision 'fp8'")])
def test_bad_settings(kw, message, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = sample(**dict(out=tmp_path/"s") | kw)
    assert status == 2 and message in err and not (tmp_path/"s"/"chunks").exists(), err

def test_folders_and_files_that_do_not_belong(run, sample, tmp_path):
    def refused(message, **kw):
        status, _, err = sample(**kw)
        assert status == 2 and message in err, err
    assert sample(out=tmp_path/"s", n=4)[0] == 0
    refused("seed is 3 there and 4 now", out=tmp_path/"s", n=4, seed=4)
    refused("cfg_scale is 2.0 there and 3.0 now, n is 4 there and 5 now", out=tmp_path/"s", n=5, cfg_scale=3.)
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"thesis.tex").touch()
    refused("is not empty and holds no samples", out=tmp_path/"full")
    other = randomised(Autoencoder.load(run/"tokenizer.safetensors"))
    other.set_latent_stats(*STATS, dict(n=0))
    other.save(tmp_path/"other.safetensors")
    refused("was trained on latents of tokenizer", tokenizer=tmp_path/"other.safetensors", out=tmp_path/"x")
    save_latent_stats(tmp_path/"stats.pt", *(s.reshape(1, 4, 1, 1)+.5 for s in STATS))
    refused("differs from the statistics", latent_stats=tmp_path/"stats.pt", out=tmp_path/"x")
    chunk, npz = tmp_path/"s"/"chunks"/"000000.safetensors", tmp_path/"s"/"samples.npz"
    chunk.write_bytes(chunk.read_bytes()[:500])
    npz.unlink()
    refused("000000.safetensors and call the same command again", out=tmp_path/"s", n=4)
    chunk.unlink()
    assert sample(out=tmp_path/"s", n=4)[0] == 0 and npz.exists()
    (tmp_path/"s"/"sample.json").write_text("{", encoding="utf-8")
    refused("is damaged", out=tmp_path/"s", n=4)

def test_images_that_are_not_numbers_are_refused(run, sample, tmp_path):
    model = LightningDiT.load(run/"dit.safetensors", "ema")
    with torch.no_grad(): model.final_layer.linear.weight.fill_(torch.nan)
    model.save(tmp_path/"dit.safetensors", model.meta, ema=model.state_dict())
    status, _, err = sample(dit=tmp_path/"dit.safetensors", out=tmp_path/"s")
    assert status == 2 and "stopped being finite" in err

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)

@pytest.mark.parametrize("arrays, message", [
    (dict(arr_0=IMAGES.astype(float)), "float64"),
    (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "uint8 of shape"),
    (dict(images=IMAGES), "no array 'arr_0'"),
    (dict(arr_0=IMAGES, labels=np.zeros(3, int)), "2 images but 3 labels"),
    (dict(arr_0=np.array([{}], object)), "plain arrays")])
def test_unusable_npz(arrays, message, tmp_path):
    np.savez(tmp_path/"x.npz", **arrays)
    with pytest.raises(DataError, match=message): load_samples(tmp_path/"x.npz")

def test_options_with_dashes_and_no_torch_for_help():
    def python(*args): return subprocess.run([sys.executable, *args], capture_output=True, encoding="utf-8")
    code = "import sys, vavae_nb.sample; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    r = python("-c", code)
    assert r.stdout.strip() == "[]", r.stderr
    r = python("-m", "vavae_nb.sample", "--cfg-scale", "two")
    assert r.returncode == 2 and "argument --cfg-scale: invalid float value" in r.stderr
    r = python("-m", "vavae_nb.sample", "--run", "x", "--format", "gif")
    assert r.returncode == 2 and "invalid choice: 'gif'" in r.stderr

def test_the_commit_of_a_foreign_repository_is_not_ours(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(vavae_nb, "__file__", str(tmp_path/"__init__.py"))
    (tmp_path/"__init__.py").touch()
    assert versions(torch.device("cpu"))["commit"] == ""
    subprocess.run([*git, "add", "__init__.py"], check=True)
    assert versions(torch.device("cpu"))["commit"].endswith("+changes")
