"The published formats: checkpoints with the published names and shapes, their numbers, and diffusers both ways"
import collections, json, subprocess, sys, types
from pathlib import Path
import pytest, torch
from vavae_nb.base.errors import CheckpointError, ConfigError, DataError, ShapeError
from vavae_nb.dit.model import LightningDiT, create_dit
from vavae_nb.tokenizer.statistics import save_latent_stats
from vavae_nb.interop.diffusers import config_from_diffusers, config_to_diffusers, diffusers_name
from vavae_nb.interop.diffusers import from_diffusers, to_diffusers
from vavae_nb.interop.authors import lightningdit_config, load_lightningdit, save_lightningdit
from vavae_nb.interop.authors import load_vavae, save_vavae, vavae_config
from vavae_nb.interop.loading import load_dit, load_tokenizer
from vavae_nb.base.tensors import generator, test_tensor as check
from vavae_nb.base.tensor_files import load_tensors, save_tensors
from vavae_nb.base.foreign_files import load_torch
from vavae_nb.tokenizer.autoencoder import Autoencoder

GOLDEN = Path(__file__).parent/"golden"
LISTED = json.loads((GOLDEN/"state_dict_keys.json").read_text(encoding="utf-8"))

def meta(name): return {k: torch.empty(s, device="meta") for k,s in LISTED[name].items()}
def shapes(model): return {k: list(v.shape) for k,v in model.state_dict().items()}

def random_state(name, seed=0):
    "Tensors with the published names and shapes at full size"
    g = generator(seed, name)
    return collections.OrderedDict((k, torch.rand(s, generator=g)*.04-.02) for k,s in LISTED[name].items())

def cheap(*shape): return torch.zeros(1).expand(shape) # Takes no room in a file

def lightning(state, **more):
    "What lies beside the autoencoder in the published Lightning checkpoints, foreign configuration included"
    theirs = types.ModuleType("theirs")
    exec("class Config: pass", theirs.__dict__)
    sys.modules["theirs"] = theirs
    config = theirs.Config()
    config.lr = 1e-4
    rest = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.model.1.weight": cheap(1, 64, 1, 1),
            "loss.discriminator.main.0.weight": cheap(64, 3, 4, 4),
            "foundation_model.model.blocks.0.attn.qkv.weight": cheap(3072, 1024),
            "foundation_model.model.cls_token": cheap(1, 1, 1024), "linear_proj.weight": cheap(1024, 32, 1, 1)}
    whole = {"epoch": 129, "state_dict": collections.OrderedDict(**state, **rest)}
    return whole | {"hyper_parameters": {"config": config}, "callbacks": {theirs.Config: None}} | more

def write(path, contents):
    torch.save(contents, path)
    sys.modules.pop("theirs", None)
    return path

def same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[k], state[k]) for k in own)

def test_vavae_f16d32_at_full_size(tmp_path):
    state = random_state("vavae_f16d32")
    tok = load_vavae(write(tmp_path/"vavae-imagenet256-f16d32-dinov2.pt", lightning(state)))
    same(tok, state)
    with torch.device("meta"): assert tok.config == Autoencoder().config
    unneeded = {"loss": 3, "foundation_model": 2, "linear_proj": 1}
    assert tok.found == dict(loaded=342, unneeded=unneeded, foreign=["theirs.Config"])
    save_vavae(tok, p := tmp_path/"ours.pt")
    again = torch.load(p, weights_only=True)["state_dict"] # As the published code reads it, but for weights_only
    assert {k: list(v.shape) for k,v in again.items()} == LISTED["vavae_f16d32"]
    same(tok, again)

def test_lightningdit_b_at_full_size(tmp_path):
    ema, model = random_state("LightningDiT-B/1"), meta("LightningDiT-B/1")
    model = {f"module._orig_mod.{k}": cheap(*v.shape) for k,v in model.items()} # Of the right shapes, all zero
    opt = {"state": {0: {"exp_avg": cheap(768, 768)}}, "param_groups": [{"lr": 2e-4}]}
    p = write(tmp_path/"lightningdit.pt", {"model": model, "ema": ema, "opt": opt})
    dit = load_lightningdit(p)
    same(dit, ema)
    assert dit.found == dict(loaded=159, which="ema", unneeded=["model", "opt"], foreign=[]) and not dit.training
    with torch.device("meta"): assert dit.config == create_dit("B").config
    assert not load_lightningdit(p, "model").x_embedder.proj.weight.any()
    save_lightningdit(dit, q := tmp_path/"ours.pt")
    again = torch.load(q, weights_only=True)
    assert list(again) == ["model", "ema", "opt"]
    assert q.stat().st_size < p.stat().st_size*1.05 # No second copy for `ema`
    same(dit, again["ema"])
    assert {k: list(v.shape) for k,v in again["model"].items()} == LISTED["LightningDiT-B/1"]

@pytest.mark.parametrize("size", ["XL", "B", "1p6B"])
def test_configurations_of_the_transformers(size):
    name = f"LightningDiT-{size}/1"
    config = lightningdit_config(meta(name))
    with torch.device("meta"):
        assert config == create_dit(size).config and shapes(LightningDiT(**config)) == LISTED[name]

@pytest.mark.parametrize("d", [16, 32, 64])
def test_configurations_of_the_tokenizers(d):
    config = vavae_config(meta(f"vavae_f16d{d}"))
    with torch.device("meta"):
        assert config == Autoencoder(d).config and shapes(Autoencoder(**config)) == LISTED[f"vavae_f16d{d}"]

SWITCHES = [dict(), dict(patch_size=2, learn_sigma=True), dict(swiglu=False, rmsnorm=False), dict(shift=False),
            dict(qk_norm=True, rope=False), dict(mlp_ratio=3.), dict(mlp_ratio=2.7, num_heads=2),
            dict(swiglu=False, mlp_ratio=1.3, num_classes=3)]
@pytest.mark.parametrize("kw", SWITCHES, ids=str)
def test_every_switch_is_read_off(kw):
    sizes = dict(input_size=8, in_channels=6, hidden_size=48, depth=2, num_heads=4)
    with torch.device("meta"): model = LightningDiT(**sizes | kw)
    config = lightningdit_config(model.state_dict())
    with torch.device("meta"): assert shapes(LightningDiT(**config)) == shapes(model)
    assert config | dict(mlp_ratio=None) == model.config | dict(mlp_ratio=None) # Any ratio with its width

def golden_tokenizer():
    t, head = load_tensors(GOLDEN/"autoencoder.safetensors")
    return {k[6:]: v for k,v in t.items() if k.startswith("state.")}, t, json.loads(head["config"])

def test_the_published_tokenizers_numbers(tmp_path):
    state, t, c = golden_tokenizer()
    for contents in (lightning(state), state, {"state_dict": {f"module.{k}": v for k,v in state.items()}}):
        tok = load_vavae(write(tmp_path/"a.ckpt", contents), resolution=c["resolution"])
        with torch.no_grad():
            p = tok.posterior(t["x"])
            y = tok.decode_raw(p.mode())
        check(torch.cat([p.mean, p.logvar], 1), t["moments"])
        check(y, t["reconstruction_of_mode"])
        assert tok.config["attn_resolutions"] == tuple(c["attn_resolutions"])

HEADS = {"lightning": None, "plain_dit": 2, "qknorm_noshift": None, "layernorm_qknorm_rope": None}
@pytest.mark.parametrize("name,heads", HEADS.items())
def test_the_published_transformers_numbers(tmp_path, name, heads):
    t, _ = load_tensors(GOLDEN/f"dit_{name}.safetensors")
    state = {k[6:]: v for k,v in t.items() if k.startswith("state.")}
    wrong = {k: v*0 for k,v in state.items()}
    for contents in ({"ema": state, "model": {f"module.{k}": v for k,v in wrong.items()}, "opt": {}},
                     state,
                     {"model": wrong, "ema": {f"_orig_mod.{k}": v for k,v in state.items()}}):
        model = load_lightningdit(write(tmp_path/"a.pt", contents), num_heads=heads)
        check(model(t["x"], t["t"], t["y"]), t["out"])
    save_lightningdit(model, tmp_path/"b.pt", ema=wrong, opt={"lr": 1})
    check(load_lightningdit(tmp_path/"b.pt", "model", heads)(t["x"], t["t"], t["y"]), t["out"])
    assert not load_lightningdit(tmp_path/"b.pt", num_heads=heads).x_embedder.proj.weight.any()
    assert load_torch(tmp_path/"b.pt")[0]["opt"] == {"lr": 1}

def test_heads_that_no_tensor_tells(tmp_path):
    t, _ = load_tensors(GOLDEN/"dit_plain_dit.safetensors")
    write(tmp_path/"a.pt", {k[6:]: v for k,v in t.items() if k.startswith("state.")})
    with pytest.raises(ConfigError, match="num_heads"): load_lightningdit(tmp_path/"a.pt")

def test_statistics_come_along(tmp_path):
    state, t, c = golden_tokenizer()
    mean, std = torch.arange(4.).view(1, 4, 1, 1), torch.full((1, 4, 1, 1), 2.)
    write(tmp_path/"a.pt", lightning(state))
    save_latent_stats(tmp_path/"latents_stats.pt", mean, std)
    assert load_tokenizer(tmp_path/"a.pt").latent_mean is None
    tok = load_tokenizer(tmp_path/"a.pt", tmp_path/"latents_stats.pt")
    check(tok.latent_mean.flatten(), torch.arange(4.))
    check(tok.encode(t["x"], sample=False), (t["moments"][:,:4]-tok.latent_mean)/2)
    assert tok.latent_stats_source["file"] == "latents_stats.pt" and len(tok.latent_stats_source["sha256"]) == 64
    save_latent_stats(tmp_path/"other.pt", torch.zeros(1, 5, 1, 1), torch.ones(1, 5, 1, 1))
    with pytest.raises(ShapeError, match="latent mean"): load_vavae(tmp_path/"a.pt", tmp_path/"other.pt")
    save_latent_stats(tmp_path/"flat.pt", torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1))
    with pytest.raises(DataError, match="std > 0"): load_vavae(tmp_path/"a.pt", tmp_path/"flat.pt")

# A tensor that is changed (`None`: taken away), and what is said of it
WRONG_VAVAE = {"encoder.mid.attn_1.q.weight": (None, "missing    encoder.mid.attn_1.q.weight"),
               "decoder.conv_out.bias": (torch.zeros(4), "misshapen  decoder.conv_out.bias"),
               "encoder.extra": (torch.zeros(1), "unexpected encoder.extra"),
               "encoder.conv_in.weight": (None, "no 'encoder.conv_in.weight'")}
WRONG_DIT = {"blocks.1.attn.proj.bias": (None, "missing    blocks.1.attn.proj.bias"),
             "final_layer.linear.weight": (torch.zeros(5, 32), "misshapen  final_layer.linear.weight"),
             "blocks.0.more": (torch.zeros(1), "unexpected blocks.0.more"),
             "x_embedder.proj.weight": (None, "no 'x_embedder.proj.weight'")}

def changed(state, name, v):
    rest = {k: o for k,o in state.items() if k != name}
    return rest if v is None else rest | {name: v}

def golden_dit():
    t, _ = load_tensors(GOLDEN/"dit_lightning.safetensors")
    return {k[6:]: v for k,v in t.items() if k.startswith("state.")}

@pytest.mark.parametrize("name", WRONG_VAVAE)
def test_wrong_tensors_of_a_tokenizer_are_named(tmp_path, name):
    (state, *_), (v, message) = golden_tokenizer(), WRONG_VAVAE[name]
    write(tmp_path/"a.pt", lightning(changed(state, name, v)))
    with pytest.raises(CheckpointError, match=message): load_vavae(tmp_path/"a.pt")

@pytest.mark.parametrize("name", WRONG_DIT)
def test_wrong_tensors_of_a_transformer_are_named(tmp_path, name):
    v, message = WRONG_DIT[name]
    write(tmp_path/"d.pt", {"ema": changed(golden_dit(), name, v)})
    with pytest.raises(CheckpointError, match=message): load_lightningdit(tmp_path/"d.pt")

def test_weights_that_are_not_there(tmp_path):
    write(tmp_path/"m.pt", {"model": golden_dit(), "opt": {}})
    with pytest.raises(CheckpointError, match="no 'ema' weights; it has: model, opt"):
        load_lightningdit(tmp_path/"m.pt")
    assert load_dit(tmp_path/"m.pt").found["which"] == "model" # Nothing else to take
    for wrong in ({"epoch": 3}, [1, 2], {"state_dict": {"w": "x"}}):
        write(tmp_path/"w.pt", wrong)
        with pytest.raises(CheckpointError, match="holds no named tensors"): load_tokenizer(tmp_path/"w.pt")
        with pytest.raises(CheckpointError, match="holds no named tensors"): load_dit(tmp_path/"w.pt")

# diffusers

# Attention at the innermost level, as the VA-VAE; in the middle only, as SD-VAE f8d4; at every level
VAVAE = dict(latent_dim=4, ch=32, ch_mult=(1,1,2), num_res_blocks=2, attn_resolutions=(8,), resolution=32)
SD = dict(latent_dim=4, ch=32, ch_mult=(1,2,4,4), num_res_blocks=2, attn_resolutions=(), resolution=32)
OTHER = dict(latent_dim=3, ch=16, ch_mult=(1,2), num_res_blocks=1, attn_resolutions=(16,8), resolution=16,
             norm_groups=8, in_channels=1)

def lively(config, seed=0):
    torch.manual_seed(seed)
    tok = Autoencoder(**config).eval()
    for p in tok.parameters(): # Norms and biases too: nothing is left at 0 or 1
        if p.ndim == 1: torch.nn.init.normal_(p, mean=.5, std=.3)
    return tok

def agree(tok, kl):
    x = torch.rand(2, tok.config["in_channels"], 40, 32, generator=generator(0, "images"))*2-1
    with torch.no_grad():
        p, q = tok.posterior(x), kl.encode(x).latent_dist
        check(q.mean, p.mean, 1e-4)
        check(q.logvar, p.logvar, 1e-4)
        check(kl.decode(p.mean).sample, tok.decode_raw(p.mean), 1e-4)

@pytest.mark.parametrize("config", [VAVAE, SD, OTHER], ids=["vavae", "sd-vae", "other"])
def test_diffusers_both_ways(tmp_path, config):
    diffusers = pytest.importorskip("diffusers")
    tok = lively(config)
    kl = to_diffusers(tok)
    agree(tok, kl)
    for k,safe in (("safe", True), ("bin", False)):
        kl.save_pretrained(tmp_path/k, safe_serialization=safe)
        agree(tok, diffusers.AutoencoderKL.from_pretrained(tmp_path/k).eval())
        back = from_diffusers(tmp_path/k)
        same(back, tok.state_dict())
        assert back.config == tok.config and back.latent_mean is None
    kl.save_pretrained(tmp_path/"pipeline"/"vae")
    same(load_tokenizer(tmp_path/"pipeline"), tok.state_dict())
    theirs = diffusers.AutoencoderKL(**config_to_diffusers(tok)).eval() # Their own random weights
    agree(from_diffusers(theirs).eval(), theirs)

def test_older_attention_names_and_a_model_without_quant_conv(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    tok = lively(SD)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def renamed(k):
        for a,b in old.items(): k = k.replace(f".{a}.", f".{b}.")
        return k
    kl = to_diffusers(tok)
    kl.save_pretrained(tmp_path)
    save_tensors(tmp_path/"diffusion_pytorch_model.safetensors", {renamed(k): v for k,v in kl.state_dict().items()})
    same(from_diffusers(tmp_path), tok.state_dict())
    as_sd3 = dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=.0609, scaling_factor=1.5305)
    plain = diffusers.AutoencoderKL(**config_to_diffusers(tok) | as_sd3).eval()
    got = from_diffusers(plain).eval()
    agree(got, plain)
    check(got.latent_mean, torch.full((1, 4, 1, 1), .0609))
    check(got.latent_std, torch.full((1, 4, 1, 1), 1/1.5305))

def test_statistics_and_scaling_factor():
    diffusers, tok = pytest.importorskip("diffusers"), lively(OTHER)
    x = torch.rand(2, 1, 16, 16, generator=generator(0, "images"))
    for mean, std in (((0.,)*3, (1/.18215,)*3), ((.5,)*3, (2.,)*3), ((.1, -.2, .3), (1., 2., 3.))):
        tok.set_latent_stats(torch.tensor(mean), torch.tensor(std), {})
        kl = to_diffusers(tok)
        c, z = kl.config, kl.encode(x).latent_dist.mean
        if c.latents_mean:
            m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (c.latents_mean, c.latents_std))
            z = (z-m)*c.scaling_factor/s
        else: z = (z-(c.shift_factor or 0))*c.scaling_factor
        check(z, tok.encode(x, sample=False), 1e-4) # What a pipeline of diffusers makes of it
        back = from_diffusers(kl)
        check(back.latent_mean, tok.latent_mean)
        check(back.latent_std, tok.latent_std)

def test_full_sd_vae_and_vavae_have_their_names_in_diffusers():
    diffusers = pytest.importorskip("diffusers")
    sd = dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"]*4,
              up_block_types=["UpDecoderBlock2D"]*4, layers_per_block=2, sample_size=256)
    for config in (config_from_diffusers(sd), vavae_config(meta("vavae_f16d32"))):
        with torch.device("meta"):
            tok = Autoencoder(**config)
            kl = diffusers.AutoencoderKL(**config_to_diffusers(tok))
        assert config_from_diffusers(kl.config) == tok.config
        levels, theirs = len(config["ch_mult"]), kl.state_dict()
        ours = {diffusers_name(k, levels): v for k,v in tok.state_dict().items()}
        assert ours.keys() == theirs.keys() and all(ours[k].squeeze().shape == theirs[k].squeeze().shape for k in ours)
    assert config["ch_mult"] == (1, 1, 2, 2, 4) and kl.config.down_block_types[-1] == "AttnDownEncoderBlock2D"

def test_a_folder_is_read_without_diffusers(tmp_path):
    tok = lively(SD)
    state = {diffusers_name(k, 4): v[:,:,0,0] if "attn" in k and v.ndim == 4 else v for k,v in tok.state_dict().items()}
    config = dict(_class_name="AutoencoderKL", **config_to_diffusers(tok))
    (tmp_path/"config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tensors(tmp_path/"diffusion_pytorch_model.safetensors", state)
    code = f"""
import sys
sys.modules["diffusers"] = None
from vavae_nb.interop.diffusers import from_diffusers, to_diffusers
from vavae_nb.base.errors import ConfigError
tok = from_diffusers({str(tmp_path)!r})
print(tok.fingerprint())
try: to_diffusers(tok)
except ConfigError as e: print(e)
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith(tok.fingerprint()) and "pip install diffusers" in r.stdout

NO_COUNTERPART = [
    (dict(mid_block_add_attention=False), "no attention in the middle"),
    (dict(act_fn="gelu"), "activation gelu"),
    (dict(out_channels=4), "3 channels in and 4 out"),
    (dict(block_out_channels=[32, 48, 64, 64]), "not all multiples"),
    (dict(up_block_types=["AttnUpDecoderBlock2D"]+["UpDecoderBlock2D"]*3), "other levels in the encoder"),
    (dict(down_block_types=["CrossAttnDownBlock2D"]*4), "block type CrossAttnDownBlock2D"),
    (dict(_class_name="AutoencoderDC"), "class AutoencoderDC"),
    (dict(mid_block_add_attention=False, act_fn="gelu"), "no attention.*activation gelu")]
@pytest.mark.parametrize("change,why", NO_COUNTERPART)
def test_what_has_no_counterpart(change, why):
    good = config_to_diffusers(lively(SD))
    with pytest.raises(ConfigError, match=why): config_from_diffusers(good | change)

def test_folders_that_are_not_whole(tmp_path):
    good = config_to_diffusers(lively(SD))
    with pytest.raises(CheckpointError, match="neither config.json nor"): from_diffusers(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(good), encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no weights"): from_diffusers(tmp_path)
    part = {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "more": torch.zeros(1)}
    save_tensors(tmp_path/"diffusion_pytorch_model.safetensors", part)
    with pytest.raises(CheckpointError, match="missing .*\n(.*\n)*.*more"): from_diffusers(tmp_path)
    (tmp_path/"config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not JSON"): from_diffusers(tmp_path)

def test_one_door(tmp_path):
    tok = lively(SD)
    dit = LightningDiT(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    tok.set_latent_stats(torch.zeros(4), torch.ones(4), dict(n=1))
    run = tmp_path/"run"
    tok.save(run/"tokenizer.safetensors")
    dit.save(run/"dit.safetensors")
    for p in (run, run/"tokenizer.safetensors", str(run)): assert load_tokenizer(p).fingerprint() == tok.fingerprint()
    for p in (run, run/"dit.safetensors"): same(load_dit(p), dit.state_dict())
    for load in (load_tokenizer, load_dit):
        with pytest.raises(CheckpointError, match="no file or folder"): load(tmp_path/"none")
        with pytest.raises(CheckpointError, match="holds no t"): load(tmp_path)
    (tmp_path/"x.pt").write_text("hello", encoding="utf-8")
    for load in (load_tokenizer, load_dit):
        with pytest.raises(CheckpointError, match="not a whole torch checkpoint"): load(tmp_path/"x.pt")
