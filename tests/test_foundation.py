"vavae_nb.tokenizer.foundation: what its notebook cannot guard"
import json, numpy as np, pytest, torch
from safetensors.torch import save_file
from torch import nn
from vavae_nb.base import pretrained
from vavae_nb.base.errors import ConfigError, DataError, WeightsError
from vavae_nb.base.pretrained import packaged_file, timm_network
from vavae_nb.base.tensors import generator, rel_err, test_tensor
from vavae_nb.tokenizer import foundation
from vavae_nb.tokenizer.foundation import FoundationModel, cached_features, fast_precision, foundation_cost, paper_vfms

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"cache"))

class Noise:
    "Ten images of noise"
    def __init__(self, n=10, fingerprint="noise", gain=1., fail_at=None):
        self.x = torch.rand(n, 3, 32, 32, generator=generator(0, "images"))*2-1
        self.fingerprint, self.gain, self.fail_at, self.asked = fingerprint, gain, fail_at, 0
    def __len__(self): return len(self.x)
    def batch(self, indices, flip):
        if self.fail_at in indices: raise OSError("disk pulled out")
        self.asked += len(indices)
        x = self.x[indices]*self.gain
        return x.flip(-1) if flip else x

@pytest.mark.parametrize("name,grid,size", [("test_vit", 8, 128), ("eva02_tiny_patch14_224", 8, 112),
                                            ("test_convnext", 8, 128), ("test_resnet", 8, 128)])
def test_families_give_the_grid(name, grid, size):
    vfm = FoundationModel(name, grid, weights="random")
    y = vfm(torch.zeros(2, 3, 40, 40))
    assert (vfm.image_size, tuple(y.shape)) == (size, (2, vfm.channels, grid, grid))
    assert not any(p.requires_grad for p in vfm.parameters())
    half = vfm.to(torch.bfloat16)(torch.zeros(2, 3, 40, 40))
    assert half.dtype == torch.bfloat16 and rel_err(half, y) < .1

# Blocks, width, prefix tokens, patch, channels of the features
full = dict(dinov2=(24, 1024, 1, 14, 1024), mae=(24, 1024, 1, 16, 1024), sam=(24, 1024, 0, 16, 256),
            clip=(24, 1024, 1, 14, 1024))

@pytest.mark.parametrize("name", full)
def test_the_papers_models_at_full_architecture(name): # On the meta device: every shape, no numbers
    depth, width, prefix, patch, channels = full[name]
    with torch.device("meta"): vfm = FoundationModel(name, 16, weights="random")
    net, x = vfm.net, torch.zeros(1, 3, 256, 256, device="meta")
    assert (vfm.name, len(net.blocks)) == (paper_vfms[name], depth)
    assert net.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert (vfm.image_size, vfm.channels, vfm.layer) == (16*patch, channels, depth-1)
    assert getattr(net, "num_prefix_tokens", 0) == prefix
    for dtype in (torch.float32, torch.bfloat16):
        y = vfm.to(dtype)(x)
        assert (y.shape, y.dtype, y.requires_grad) == ((1, channels, 16, 16), dtype, False)
    assert 303e6 < sum(p.numel() for p in net.parameters()) < 309e6

@pytest.mark.parametrize("name,grid", [("dinov2", 8), ("mae", 32), ("sam", 8), ("sam", 32), ("clip", 32)])
def test_any_latent_grid_at_full_architecture(name, grid):
    c, (depth, width, prefix, patch, channels) = foundation_cost(name, grid), full[name]
    assert (c["image_size"], c["channels"]) == (grid*patch, channels)
    n = grid**2+prefix
    if name != "sam": assert c["flops"] == 2*depth*(12*n*width**2+2*n**2*width)+2*grid**2*3*patch**2*width

@pytest.mark.slow
@pytest.mark.parametrize("name", full)
def test_the_papers_models_with_numbers(name): # 1.2 GB each, one at a time
    vfm = FoundationModel(name, 16, weights="random")
    x = torch.rand(2, 3, 256, 256, generator=generator(0, "x"))*2-1
    y = vfm(x)
    assert y.shape == (2, full[name][4], 16, 16) and y.isfinite().all() and y.std() > .1
    half = vfm.to(torch.bfloat16)(x[:1])
    assert half.dtype == torch.bfloat16 and 0 < (half.float()-y[:1]).norm() < .03*y[:1].norm()

@pytest.mark.network
@pytest.mark.parametrize("name", paper_vfms)
def test_real_weights_from_the_hub(name, request, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE: pytest.skip(f"{name}: HF_HUB_OFFLINE is set")
    try: pretrained._reachable(hub.constants.ENDPOINT)
    except WeightsError as e: pytest.skip(f"{name}: no network ({e})")
    if "network" not in request.config.getoption("-m"): pytest.skip(f"{name}: downloads 1.2 GB; run pytest -m network")
    vfm = FoundationModel(name, 16)
    x = torch.rand(1, 3, 256, 256, generator=generator(0, "x"))*2-1
    y, none = vfm(x), FoundationModel(name, 16, normalize="none")
    assert y.shape == (1, full[name][4], 16, 16) and y.isfinite().all()
    assert "hub" in vfm.provenance and none.weights_sha256 == vfm.weights_sha256
    assert rel_err(none(x), y) > 1e-2
    del none
    assert rel_err(FoundationModel(name, 16, weights="random")(x), y) > .1

def test_names_of_the_papers_models():
    def refuses(message, error=ConfigError): return pytest.raises(error, match=message)
    with refuses("unknown timm model 'dino'; the paper's models are dinov2, mae, sam, clip"): FoundationModel("dino")
    with refuses("did you mean 'vit_small_patch14_dinov2'"): FoundationModel("vit_smal_patch14_dinov2")
    with refuses("there is no file", WeightsError): FoundationModel("dinov2", 16, weights="nowhere.safetensors")

def test_sam_is_what_timm_computes(): # No prefix, a neck, positions resampled at each call
    vfm = FoundationModel("samvit_base_patch16", 8, weights="random")
    vfm.net.pos_embed.normal_(generator=generator(0, "positions")) # Drawn as zeros, which would not show where they are
    x = torch.rand(1, 3, 128, 128, generator=generator(0, "x"))*2-1
    test_tensor(vfm(x), vfm.net.forward_features((x-vfm.mean)/vfm.std), rtol=1e-5)

def test_a_transformer_is_what_timm_computes_at_that_size(tmp_path):
    "Position embeddings resampled once, or by timm in every step"
    drawn, _ = timm_network("test_vit", "random")
    save_file(drawn.state_dict(), tmp_path/"vit.safetensors")
    vfm = FoundationModel("test_vit", 6, weights=tmp_path/"vit.safetensors", normalize="none")
    dynamic, _ = timm_network("test_vit", tmp_path/"vit.safetensors", dynamic_img_size=True)
    x = torch.rand(2, 3, 96, 96, generator=generator(0, "x"))*2-1
    with torch.no_grad(): tokens = dynamic.forward_features(x)
    assert dynamic.num_prefix_tokens > 0 and drawn.pos_embed.shape[1] != vfm.net.pos_embed.shape[1]
    test_tensor(vfm(x), tokens[:, dynamic.num_prefix_tokens:].transpose(1, 2).reshape(2, -1, 6, 6), rtol=1e-5)

def test_normalisation_is_the_models_or_none():
    x = torch.rand(2, 3, 128, 128, generator=generator(0, "x"))*2-1
    own, none = (FoundationModel("resnet18", weights="random", normalize=n) for n in ("model", "none"))
    cfg, layer = none.net.pretrained_cfg, none.layer
    scaled = ((x+1)/2-torch.tensor(cfg["mean"]).view(3, 1, 1))/torch.tensor(cfg["std"]).view(3, 1, 1)
    test_tensor(none(scaled), own(x), rtol=1e-5)
    assert rel_err(none(x), own(x)) > 1e-2 and own.key != none.key and layer == own.layer

def test_the_key_knows_the_file_not_its_place(tmp_path):
    p = pretrained._packaged["efficientnet_lite0"]
    copy = tmp_path/"mine.pth"; copy.write_bytes(packaged_file(p["package"], p["file"], p["sha256"]).read_bytes())
    a, b = FoundationModel(), FoundationModel("tf_efficientnet_lite0", weights=copy)
    assert a.key == b.key and a.key != FoundationModel(layer=-1).key and json.loads(a.key)["weights"] == p["sha256"]
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(a(x), b(x))
    key = a.key
    assert a.double()(x).dtype == torch.float64 and a.key != key

class Crooked(nn.Module):
    "Defines a batch norm after a convolution and uses it before"
    feature_info, weights_sha256 = [dict(reduction=1)], "none"
    pretrained_cfg = dict(mean=(.5,)*3, std=(.5,)*3, architecture="crooked")
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.running_var.fill_(9.); self.norm.running_mean.fill_(1.)
    def forward_intermediates(self, x, **kwargs): return [self.conv(self.norm(x))]

def test_a_network_that_cannot_be_folded_is_left_alone(monkeypatch):
    net = Crooked().eval().requires_grad_(False)
    monkeypatch.setattr(foundation, "timm_network", lambda *a: (net, "made here"))
    vfm = FoundationModel("crooked", 4)
    x = torch.rand(1, 3, 4, 4)
    assert vfm.net is net
    torch.testing.assert_close(vfm(x), net.conv(net.norm(x)))

def test_a_network_off_the_grid_is_refused(monkeypatch):
    class Off(Crooked):
        def forward_intermediates(self, x, **kwargs): return [x[..., 1:]]
    monkeypatch.setattr(foundation, "timm_network", lambda *a: (Off().eval(), "made here"))
    with pytest.raises(ConfigError, match="not a grid of 4"): FoundationModel("off", 4)

def test_features_are_computed_once_and_whole(tmp_path):
    vfm, images = FoundationModel("test_resnet", weights="random"), Noise()
    y = cached_features(vfm, images, batch_size=4, precision="fp32")
    assert (y.shape, y.dtype, images.asked) == ((10, 2, vfm.channels, 8, 8), np.float16, 20) and not y.flags.writeable
    for k,flip in enumerate((False, True)):
        test_tensor(torch.tensor(y[:, k]), vfm(images.batch(np.arange(10), flip)), rtol=1e-3)
    images.asked = 0
    assert np.array_equal(y, cached_features(vfm, images, batch_size=3, precision="fp32")) and images.asked == 0
    for other in (Noise(fingerprint="other"), Noise(n=9)): # Other images, other files
        cached_features(vfm, other, precision="fp32")
        assert other.asked == 2*len(other)
    cached_features(FoundationModel("test_resnet", weights="random", layer=-1), images, precision="fp32")
    assert images.asked == 20
    images.asked = 0
    fast = cached_features(vfm, images, precision="bf16")
    assert images.asked == 20
    assert 0 < rel_err(torch.tensor(fast), torch.tensor(y)) < .1

def test_a_killed_computation_leaves_nothing(tmp_path):
    vfm = FoundationModel("test_resnet", weights="random")
    with pytest.raises(OSError, match="pulled out"):
        cached_features(vfm, Noise(fail_at=7), batch_size=4, precision="fp32")
    assert list((tmp_path/"cache"/"features").iterdir()) == []
    assert cached_features(vfm, Noise(), batch_size=4, precision="fp32").shape[0] == 10

def test_features_that_float16_cannot_hold_are_refused(monkeypatch):
    net = Crooked().eval()
    monkeypatch.setattr(foundation, "timm_network", lambda *a: (net, "made here"))
    with pytest.raises(DataError, match="not finite in float16, in images 0 to 9"):
        cached_features(FoundationModel("crooked", 4), Noise(gain=1e8), precision="fp32")

def test_auto_takes_bf16_only_where_it_is_exact_enough(monkeypatch):
    vfm, x = FoundationModel("test_resnet", weights="random"), Noise().x
    monkeypatch.setattr(foundation, "has_bf16", lambda device: True)
    assert (fast_precision(vfm, x, tol=1.), fast_precision(vfm, x, tol=0.)) == ("bf16", "fp32")
    monkeypatch.setattr(foundation, "has_bf16", lambda device: False)
    assert fast_precision(vfm, x, tol=1.) == "fp32"

def test_a_learner_computes_features_in_its_steps(monkeypatch):
    "Of the flipped images, in their own precision, never in vain"
    from vavae_nb.base import tensors
    from vavae_nb.recipes.config import TokenizerTraining, VF
    from vavae_nb.data.batches import Batches
    from vavae_nb.data.images import embedded
    from vavae_nb.tokenizer.autoencoder import Autoencoder
    from vavae_nb.training.callbacks import fit_steps
    from vavae_nb.training.tokenizer import tokenizer_learner
    seen, images = [], embedded("train").subset(range(16))
    class Seen(FoundationModel):
        def forward(self, x):
            seen.append((x, torch.is_autocast_enabled("cpu")))
            return super().forward(x)
    vfm = Seen("test_resnet", weights="random")
    def run(weight=.1, precision="auto"):
        small = dict(ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=32, norm_groups=4)
        tok = Autoencoder(latent_dim=4, ch=8, **small)
        learn = tokenizer_learner(tok, images, vfm, valid=images, vf=VF(weight=weight), precision=precision,
                                  training=TokenizerTraining(steps=2, batch_size=8, lpips_weight=0., disc_weight=0.))
        seen.clear()
        fit_steps(learn, 2)
        return learn
    monkeypatch.setattr(tensors, "has_bf16", lambda device: True) # The training's autocast is on, the features' is not
    monkeypatch.setattr(foundation, "has_bf16", lambda device: False)
    learn = run()
    assert [on for _,on in seen] == [False, False] and "vf_cos" in learn.loss_func.terms
    batches = Batches(16, lambda i, flip: (images.batch(i, flip),), 8, seed=0)
    for (x,_),(expected,) in zip(seen, batches): torch.testing.assert_close(x, expected)
    run(precision="bf16")
    assert [on for _,on in seen] == [True, True]
    run(weight=0.)
    assert not seen

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_gives_the_cpus_features():
    vfm, images = FoundationModel(), Noise()
    cpu = cached_features(vfm, images, precision="fp32").copy()
    images.fingerprint = "on cuda"
    test_tensor(torch.tensor(cached_features(vfm.cuda(), images, precision="fp32")), torch.tensor(cpu), rtol=1e-2)

def test_a_fold_that_gives_nan_is_not_taken(monkeypatch):
    def fold(net):
        for p in net.parameters(): p.data.fill_(float("nan"))
        return net
    monkeypatch.setattr(foundation, "fold_batchnorm", fold)
    vfm = FoundationModel("test_resnet", 8, weights="random")
    assert vfm(torch.zeros(1, 3, 32, 32)).isfinite().all()
