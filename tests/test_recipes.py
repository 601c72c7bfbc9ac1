"Recipes: what the paper's rows differ in, small forms that train, and the command line that lists and plans them"
import subprocess, sys
import pytest, torch
from vavae_nb.recipes.settings import differences, load_config, override, save_config
from vavae_nb.recipes.config import flat
from vavae_nb.base.errors import ConfigError, WeightsError
from vavae_nb.training.networks import build_dit, build_tokenizer
from vavae_nb.training.costs import device_hours, paper_rate, plan
from vavae_nb.recipes.paper import recipe, recipes
from vavae_nb.training.stages import run_stages

NAMES = [k.removeprefix("imagenet256-") for k in recipes if k.startswith("imagenet256-")]

def command(*args):
    r = subprocess.run([sys.executable, "-m", "vavae_nb.train", *args], capture_output=True, encoding="utf-8")
    return r.returncode, r.stdout, r.stderr

def test_every_row_and_curve_is_there():
    for row in ("Table 2", "Table 4", "Table 5", "Table 1, row 1", "Table 1, row 10", "Table 3", "Fig. 4a", "Fig. 4b",
                "Fig. 4c"):
        assert any(row in r.source for r in recipes.values()), row
    table2 = [k for k,r in recipes.items() if k.startswith("imagenet256") and r.source.startswith("Table 2")]
    assert len(table2) == 27 and all(recipes[k].expect["gFID"] for k in table2)
    assert {k.split("-")[1] for k in table2} == {"f16d16", "f16d32", "f16d64"}
    assert {k.split("-")[2] for k in table2} == {"none", "mae", "dinov2"}
    assert len([k for k in NAMES if k.startswith("table1")]) == 10
    for size in ("b", "l", "xl", "1p0b", "1p6b"):
        for epochs in (64, 80, 160, 800):
            assert recipe(f"imagenet256-lightningdit-{size}-{epochs}ep").dit_training.steps == epochs*1250
    assert len([k for k in recipes if k.startswith("cifar10-")]) == len(NAMES)

@pytest.mark.parametrize("name, change", [
    ("f16d32-none-b", {"foundation.name": "none"}), ("f16d32-sam-b", {"foundation.name": "sam"}),
    ("f16d32-clip-b", {"foundation.name": "clip"}), ("f16d64-dinov2-b", {"tokenizer.latent_dim": 64}),
    ("f16d32-dinov2-xl", {"dit.size": "XL"}), ("f16d32-dinov2-nomcos-b", {"vf.cos_weight": 0.}),
    ("f16d32-dinov2-nomdms-b", {"vf.distmat_weight": 0.}),
    ("f16d32-dinov2-nomargin-b", {"vf.cos_margin": 0., "vf.distmat_margin": 0.})])
def test_a_row_differs_in_what_it_is_about(name, change):
    base, row = recipe("imagenet256-f16d32-dinov2-b"), recipe(f"imagenet256-{name}")
    assert {k: v for k,(_, v) in differences(base, row).items() if k != "recipe"} == change

def test_the_first_row_is_the_original_dit():
    c = recipe("imagenet256-table1-01-dit")
    d, t = c.dit, c.dit_training
    assert (d.size, d.patch_size, d.swiglu, d.rmsnorm, d.rope, d.learn_sigma) == ("XL", 2, False, False, False, True)
    assert (t.path, t.steps, t.batch_size, t.lr) == ("ddpm", 400_000, 256, 1e-4)
    assert (t.betas, t.ema, t.weight_decay) == ((.9, .999), .9999, 0.)
    assert (c.tokenizer.latent_dim, len(c.tokenizer.ch_mult), c.tokenizer.normalize) == (4, 4, "0.18215")
    assert c.tokenizer_training.steps == 0

def test_sizes_on_the_meta_device():
    for name, millions, tokens in (("lightningdit-xl-64ep", 675.2, 256), ("lightningdit-b-64ep", 130.2, 256),
                                   ("table1-01-dit", 675.1, 256)):
        p = plan(recipe(f"imagenet256-{name}"))
        assert abs(p["dit"]["parameters"]/1e6-millions) < 1 and p["dit"]["tokens"] == tokens
    hours = device_hours(plan(recipe("imagenet256-lightningdit-xl-64ep")), paper_rate())
    assert abs(hours["dit"]-80_000*1024/284/3600) < .1
    different = {(c.tokenizer, c.dit, c.data): c for c in map(recipe, recipes)}
    for c in different.values(): # Both networks of each recipe can be built
        with torch.device("meta"):
            build_tokenizer(c)
            build_dit(c, 10, depth=1)

def test_phases_survive_the_file(tmp_path):
    c = recipe("imagenet256-lightningdit-xl-800ep")
    save_config(c, tmp_path/"config.yaml")
    assert load_config(tmp_path/"config.yaml") == c
    assert override(c, {"tokenizer_training.phases": ""}).tokenizer_training.phases == ()
    for bad in ("{steps: x}", "{stepps: 1}", "3", "{steps: ["):
        with pytest.raises(ConfigError): override(c, {"tokenizer_training.phases": bad})

SMALL = {"device": "cpu", "tokenizer.ch": 16, "tokenizer.norm_groups": 8, "tokenizer_training.lpips_slices": 1,
         "tokenizer_training.batch_size": 8, "dit.depth": 1, "dit.hidden_size": 32, "dit.num_heads": 2,
         "dit_training.batch_size": 8, "data.limit": 60, "sampling.n": 10, "sampling.points": 3,
         "evaluation.extractors": "alexnet", "evaluation.images": 20, "evaluation.tsne_points": 20}

def short(name, **more):
    from vavae_nb.train import configuration
    return override(configuration(name, steps=4), SMALL | more)

def test_phases_and_late_uniform_times_train(tmp_path):
    cfg = short("cifar10-lightningdit-b-800ep")
    assert [p.steps for p in cfg.tokenizer_training.phases] == [1, 1] and cfg.dit_training.uniform_from == 2
    run = run_stages(cfg, tmp_path/"run")
    log = (tmp_path/"run"/"log.csv").read_text(encoding="utf-8")
    assert "tokenizer,6," in log # Steps go on through the phases
    assert run.tokenizer().latent_std.unique().numel() > 1

def test_the_original_dit_trains_on_a_published_tokenizer(tmp_path):
    "Table 1's first row in small: DDPM on latents of a given tokenizer, scaled by one factor"
    from vavae_nb.interop.authors import save_vavae
    cfg = short("cifar10-table1-01-dit")
    with torch.random.fork_rng(): tok = build_tokenizer(cfg)
    save_vavae(tok, tmp_path/"vae.pt")
    given = {"tokenizer.weights": str(tmp_path/"vae.pt"), "tokenizer_training.steps": 0,
             "tokenizer.normalize": "0.18215"}
    run = run_stages(override(cfg, given), tmp_path/"run")
    own = run.tokenizer().state_dict()
    assert all(torch.equal(v, own[k].cpu()) for k,v in tok.state_dict().items())
    assert torch.allclose(run.tokenizer().latent_std.cpu(), torch.full((1, 4, 1, 1), 1/.18215))
    assert not run.tokenizer().latent_mean.any()
    assert "vlb" in (tmp_path/"run"/"log.csv").read_text(encoding="utf-8")

@pytest.mark.parametrize("changes, message", [
    ({"dit_training.path": "ddpm", "sampling.solver": "ddpm"}, "learn_sigma"),
    ({"dit_training.path": "ddpm", "dit.learn_sigma": True}, "solver"),
    ({"tokenizer_training.steps": 0}, "tokenizer.weights"), ({"tokenizer.weights": "nowhere.pt"}, "nowhere.pt"),
    ({"tokenizer.normalize": "chanel"}, "did you mean 'channel'"),
    ({"data.source": ""}, "give --data"), ({"data.cache": "maybe"}, "cache")])
def test_settings_that_do_not_fit_each_other(changes, message, tmp_path):
    cfg = override(short("smoke"), changes)
    with pytest.raises((ConfigError, RuntimeError), match=message): run_stages(cfg, tmp_path/"run")

def test_a_tokenizer_of_another_shape_is_refused(tmp_path):
    cfg = short("smoke", **{"tokenizer.latent_dim": 4})
    build_tokenizer(override(cfg, {"tokenizer.latent_dim": 8})).save(tmp_path/"tok.safetensors")
    given = {"tokenizer.weights": str(tmp_path/"tok.safetensors"), "tokenizer_training.steps": 0}
    with pytest.raises(ConfigError, match="is f4d8, but the configuration says f4d4"):
        run_stages(override(cfg, given), tmp_path/"run")

def test_list_and_dry_run():
    code, out, err = command("--recipe", "list")
    assert code == 0 and all(name in out for name in recipes), err
    code, out, err = command("--recipe", "imagenet256-lightningdit-xl-64ep", "--dry-run", "--device", "cpu")
    assert code == 0, err
    for word in ("675.3 M parameters", "256 tokens", "GFLOPs", "memory", "one H800", "this machine", "gFID 5.14",
                 "phases", "cfg_channels: 3"):
        assert word in out, word
    code, out, err = command("--recipe", "imagenet256-lightningdit-xl-64ep", "--device", "cpu")
    assert code == 2 and "give --data FOLDER" in err

@pytest.mark.parametrize("value", [None, False, True])
def test_a_blank_or_a_boolean_is_no_text(value):
    with pytest.raises(ConfigError, match="saving.wandb takes a str .*'' where there is none"):
        override(recipe("tiny"), {"saving.wandb": value})
    assert override(recipe("tiny"), {"saving.wandb": ""}).saving.wandb == ""
