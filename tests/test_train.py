"The command line: a whole run in small, bad input, repeatability"
import json, os, subprocess, sys
import numpy as np, pytest
from PIL import Image
from vavae_nb.recipes.settings import load_config
from vavae_nb.base.errors import VavaeError
from vavae_nb.data.images import embedded

SMALL = ["--recipe", "smoke", "--device", "cpu", "--set", "tokenizer.ch=16", "tokenizer.latent_dim=4",
         "tokenizer_training.lpips_slices=1", "dit.depth=1", "evaluation.extractors=alexnet", "evaluation.images=40"]

def train(*args, **kw):
    command = [sys.executable, "-m", "vavae_nb.train", *map(str, args)]
    r = subprocess.run(command, capture_output=True, encoding="utf-8", **kw)
    return r.returncode, r.stdout, r.stderr

def refused(*args, cwd=None):
    code, out, err = train(*args, cwd=cwd)
    assert code == 2, out+err
    assert "\nerror: " in err
    assert "Traceback" not in err
    return err

@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "A folder of two classes of odd sizes and modes, with one corrupt file"
    root, images = tmp_path_factory.mktemp("data")/"pets", embedded("test")
    for i in range(60):
        im = Image.fromarray(images.pixels[i]).resize((40+i % 7, 36))
        if i % 5 == 0: im = im.convert("L")
        if i % 7 == 0: im = im.convert("RGBA")
        p = root/("cats", "dogs")[i % 2]/f"{i:02d}.png"
        p.parent.mkdir(parents=True, exist_ok=True)
        im.save(p)
    (root/"cats"/"broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    return root

@pytest.fixture(scope="module")
def run(pets, tmp_path_factory):
    "A run on that folder"
    out = tmp_path_factory.mktemp("runs")/"pets"
    code, text, err = train("--data", pets, "--out", out, *SMALL)
    assert code == 0, err
    return out, text, err

def test_run_on_a_folder(run):
    out, text, err = run
    pictures = [f"{name}.png" for name in ("reconstructions", "samples", "curves", "tsne", "nearest")]
    latents = "latents/latents_rank00_shard000.safetensors", "latents/latents_stats.pt"
    models, tables = ("tokenizer.safetensors", "dit.safetensors"), ("config.yaml", "log.csv", "metrics.json")
    for f in (*models, *latents, "samples.npz", *tables, *pictures): assert (out/f).stat().st_size > 0, f
    assert "broken.jpg" in err and "1 of 61 images could not be decoded" in err
    x = np.load(out/"samples.npz")
    assert x["arr_0"].shape == (20, 32, 32, 3) and x["arr_0"].dtype == np.uint8 and set(x["labels"]) == {0, 1}
    m = json.loads((out/"metrics.json").read_text(encoding="utf-8"))
    assert all(np.isfinite(f["value"]) and f["n"] and f["extractor"] and f["reference"] for f in m["generation"]["fd"])
    assert {f["against"] for f in m["generation"]["fd"]} == {"train", "test"}
    assert load_config(out/"config.yaml").data.source.endswith("pets")

def test_done_stages_are_not_done_again_and_metrics_repeat(run, pets, tmp_path):
    out, _, _ = run
    times = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    code, text, err = train("--data", pets, "--out", out, *SMALL)
    assert code == 0 and text.count("done before") == 5, text+err
    assert times == {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    code, _, err = train("--recipe", out/"config.yaml", "--out", tmp_path/"again")
    assert code == 0, err
    a, b = (json.loads((d/"metrics.json").read_text(encoding="utf-8")) for d in (out, tmp_path/"again"))
    for m in (a, b): del m["seconds"], m["provenance"]["commit"] # Somebody may commit meanwhile
    assert a == b

def test_another_configuration_is_refused(run, pets):
    err = refused("--data", pets, "--out", run[0], "--seed", 7, *SMALL)
    assert "seed is 0 there and 7 now" in err

def test_one_stage_alone(run, pets):
    out = run[0]
    before = (out/"dit.safetensors").read_bytes()
    code, text, err = train("--data", pets, "--out", out, "--stage", "evaluate", "--force", *SMALL)
    assert code == 0 and text.count("done before") == 0, err
    assert (out/"dit.safetensors").read_bytes() == before
    err = refused("--data", pets, "--out", out.parent/"fresh", "--stage", "dit", *SMALL)
    assert "run the stage 'tokenizer' first" in err

def test_a_damaged_checkpoint_is_named(run, pets):
    p = run[0]/"dit.safetensors"
    whole = p.read_bytes()
    try:
        p.write_bytes(whole[:len(whole)//2])
        err = refused("--data", pets, "--out", run[0], "--stage", "sample", "--force", *SMALL)
        assert "is not a whole safetensors file" in err
    finally: p.write_bytes(whole)

@pytest.mark.parametrize("args, message", [
    (["--recipe", "tinny"], "did you mean 'tiny'"),
    (["--recipe", "none.yaml"], "no configuration at none.yaml"),
    (["--set", "vf.wieght=1"], "did you mean 'vf.weight'"),
    (["--set", "vf.weight=a lot"], "vf.weight takes"),
    (["--set", "vf.weight"], "--set takes path=value"),
    (["--set", "flow.points=3"], "unknown setting"),
    (["--data", "nowhere"], "no folder at nowhere"),
])
def test_bad_arguments(args, message, tmp_path):
    assert message in refused("--recipe", "smoke", *args, "--out", tmp_path/"run", cwd=tmp_path)

@pytest.mark.parametrize("settings, message", [
    (dict(data="."), "no class folders"),
    (dict(device="cuda:7"), "CUDA devices"),
    (dict(vf="resnet_of_dreams"), "resnet_of_dreams"),
    (dict(settings={"tokenizer.ch": "21"}), "norm_groups"),
    (dict(settings={"tokenizer.start": "warm"}), "tokenizer.start"),
    (dict(settings={"dit.hidden_size": "130"}), "hidden_size 130"),
    (dict(settings={"dit.size": "gigantic"}), "gigantic"),
    (dict(settings={"dit_training.path": "linaer"}), "did you mean 'linear'"),
    (dict(settings={"sampling.solver": "eulre"}), "did you mean 'euler'"),
    (dict(settings={"dit_training.schedule": "step"}), "dit_training.schedule"),
    (dict(settings={"dit_training.path": "ddpm", "sampling.solver": "ddim", "dit.learn_sigma": "true",
                    "dit_training.uniform_from": "2"}), "set dit_training.uniform_from=0"),
    (dict(settings={"evaluation.extractors": "alexnett"}), "did you mean 'alexnet'"),
])
def test_what_does_not_fit_is_refused_before_training(settings, message, tmp_path, monkeypatch):
    from vavae_nb.train import configuration
    from vavae_nb.training.stages import run_stages
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VavaeError, match=message): run_stages(configuration("smoke", **settings), tmp_path/"run")
    assert not (tmp_path/"run"/"tokenizer.safetensors").exists()

def test_training_that_diverges_stops_with_advice(tmp_path):
    wild = [f"tokenizer_training.{s}" for s in ("lr=1e30", "clip=0", "steps=20")]
    err = refused(*SMALL, *wild, "--vf", "none", "--out", tmp_path/"run")
    assert "Lower the learning rate" in err or "not finite" in err

@pytest.mark.slow
def test_the_tiny_recipe_reaches_its_quality(tmp_path):
    "The main job, whole: about ten minutes; bounds with room for another machine's rounding"
    code, text, err = train("--out", tmp_path/"tiny")
    assert code == 0, err
    m = json.loads((tmp_path/"tiny"/"metrics.json").read_text(encoding="utf-8"))
    rows = {(f["network"], f["images"], f["against"]): f["value"] for f in m["generation"]["fd"]}
    assert m["reconstruction"]["psnr"] > 28
    assert rows["efficientnet_lite0", "samples_unguided", "train"] < 566
    assert rows["efficientnet_lite0", "samples", "train"] < rows["efficientnet_lite0", "samples_unguided", "train"]
    assert rows["alexnet", "samples", "test"] < rows["alexnet", "samples_unguided", "test"]

@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path):
    env = os.environ | dict(CXX="false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    code, text, err = train("--out", tmp_path/"run", *SMALL, "compile=true", env=env)
    assert code == 0, text+err
    assert "torch.compile failed" in err and (tmp_path/"run"/"metrics.json").exists()
