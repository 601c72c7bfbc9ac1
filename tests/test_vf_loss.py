"What the cells of 14_tokenizer.vf_loss cannot guard: published numbers in every setting, precision, grids, gradients"
import json
from pathlib import Path
import pytest, torch
from torch.nn import functional as F
from vavae_nb.base.errors import ConfigError, ShapeError
from vavae_nb.base.tensors import generator, test_tensor as check
from vavae_nb.base.tensor_files import load_tensors
from vavae_nb.tokenizer.adversarial import adaptive_weight
from vavae_nb.tokenizer.vf_loss import VFLoss, cosine_loss, distmat_loss

golden, meta = load_tensors(Path(__file__).parent/"golden"/"vf_loss.safetensors")
cases = json.loads(meta["cases"])
randn = lambda *shape, name="": torch.randn(*shape, generator=generator(0, f"{name}{shape}"))

@pytest.mark.parametrize("case", cases)
def test_generator_step_equals_published(case):
    c = {k.removeprefix(f"{case}."): v for k,v in golden.items() if k.startswith(f"{case}.")}
    cfg = cases[case]
    settings = ("cos_weight", "distmat_weight", "cos_margin", "distmat_margin", "vf_weight")
    vf = VFLoss(4, 12, **{k: cfg[k] for k in settings})
    vf.load_state_dict({"proj.weight": c["projection.weight"]})
    x, theta = c["image"], c["encoder.weight"].clone().requires_grad_()
    z = F.conv2d(x, theta, c["encoder.bias"], stride=4, padding=1)
    rec = F.conv_transpose2d(z, c["decoder.weight"], c["decoder.bias"], stride=4)
    nll = ((x-rec).abs()+(x-rec).square().mean((1,2,3), keepdim=True)).sum()/len(x)
    kl = .5*z.square().sum()/len(x)
    loss, terms = vf(z, c["feature"])
    vf_scale = vf.vf_weight*adaptive_weight(nll, loss, theta, 1e8)
    check(vf.proj(z), c["z_projected"])
    ours = dict(vf_loss=loss, vf_weight=vf_scale, nll_loss=nll, kl_loss=kl)
    ours["total_loss"] = nll+cfg["kl_weight"]*kl+c["d_weight"]*c["g_loss"]+vf_scale*loss
    for name,value in ours.items(): check(value, c[name])
    weights = {n: cfg[k] for n,k in (("vf_cos", "cos_weight"), ("vf_distmat", "distmat_weight")) if cfg[k]}
    assert set(terms) == set(weights)
    check(sum(w*terms[n] for n,w in weights.items()), c["vf_loss"])

def test_weights_multiply_their_own_part():
    torch.manual_seed(0)
    z, f, vf = randn(2, 4, 4, 4), randn(2, 8, 4, 4), VFLoss(4, 8, cos_weight=2., distmat_weight=7.)
    loss, t = vf(z, f)
    check(loss, 2*t["vf_cos"]+7*t["vf_distmat"])
    assert not t["vf_cos"].requires_grad and loss.requires_grad

def test_terms_by_hand():
    "Angles of 90° and 0° to the features; features at a right angle, latents parallel"
    f = torch.tensor([[1., 0.], [0., 1.]]).T.view(1, 2, 1, 2)
    z = torch.tensor([[0., 3.], [0., .1]]).T.view(1, 2, 1, 2)
    check(cosine_loss(z, f, .25), torch.tensor(.75/2))
    check(distmat_loss(z, f, .1), torch.tensor(.9*2/4))

def test_relations_stay_within_an_image():
    z, f = randn(3, 5, 2, 4, name="z"), randn(3, 6, 2, 4, name="f")
    check(distmat_loss(z, f), torch.stack([distmat_loss(z[i:i+1], f[i:i+1]) for i in range(3)]).mean())

@pytest.mark.parametrize("block", [7, 20, 39])
@pytest.mark.parametrize("margin", [0., .25])
def test_blocks_give_what_the_whole_matrix_gives(block, margin):
    "Loss and gradients of both maps; and both in a sum with something else, differentiated twice as for a ratio"
    z, f = (randn(2, c, 5, 8, name=name).double().requires_grad_() for c,name in ((5, "z"), (6, "f")))
    whole, blocks = distmat_loss(z, f, margin), distmat_loss(z, f, margin, block)
    check(blocks, whole, rtol=1e-12)
    def gradients(loss, *maps): return torch.autograd.grad(3*loss+z.sum(), maps, retain_graph=True)
    for maps in ((z, f), (z,)):
        for ours,expected in zip(gradients(blocks, *maps), gradients(whole, *maps)): check(ours, expected, rtol=1e-12)
    assert distmat_loss(z.detach(), f.detach(), margin, block) == blocks
    with pytest.raises(ConfigError, match="no second derivative"): torch.autograd.grad(blocks, z, create_graph=True)

@pytest.mark.parametrize("project,width", [("latent", (8, 4)), ("features", (4, 8))])
def test_projection_trains_and_the_vfm_does_not(project, width):
    vf = VFLoss(4, 8, project=project, cos_margin=0, distmat_margin=0)
    z, f = randn(2, 4, 4, 4).requires_grad_(), randn(2, 8, 4, 4).requires_grad_()
    vf(z, f)[0].backward()
    assert vf.proj.weight.shape[:2] == width and list(vf.state_dict()) == ["proj.weight"]
    assert f.grad is None and z.grad.abs().sum() > 0 and vf.proj.weight.grad.abs().sum() > 0

@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (37, 37)])
def test_features_of_another_grid_keep_their_place(grid):
    "A feature map that points one way on the left and another on the right still does after resizing"
    def halves(h, w):
        left = torch.arange(w) < w/2
        return torch.stack([left, ~left]).float().view(1, 2, 1, w).expand(1, 2, h, w)
    vf = VFLoss(2, 2)
    vf.proj.weight.data = torch.eye(2)[:,:,None,None]
    assert vf(halves(8, 8), halves(*grid))[1]["vf_cos"] < 1e-6 # Blurred at the border, but within the margin
    assert vf(halves(8, 8).flip(-1), halves(*grid))[1]["vf_cos"] > .3

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    torch.manual_seed(0)
    vf, z, f = VFLoss(4, 8), randn(2, 4, 4, 4).to(dtype).requires_grad_(), 100*randn(2, 8, 4, 4).to(dtype)
    loss, _ = vf(z, f)
    assert loss.dtype == torch.float32
    check(loss, vf(z.float(), f.float())[0], rtol=1e-6)
    loss.backward()
    assert z.grad.isfinite().all()

def test_double():
    z, f = randn(1, 3, 2, 2).double(), randn(1, 3, 2, 2, name="f").double()
    for loss in (cosine_loss(z, f), distmat_loss(z, f), VFLoss(3, 3).double()(z, f)[0]):
        assert loss.dtype == torch.float64

@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_extreme_lengths_stay_finite(size):
    z, f = (size*randn(1, 4, 3, 3)).requires_grad_(), randn(1, 4, 3, 3, name="f")
    (cosine_loss(z, f, 0.)+distmat_loss(z, f, 0.)).backward()
    assert z.grad.isfinite().all()

def test_adaptive_weight_at_the_encoder_is_a_number():
    z, f, vf = randn(2, 4, 4, 4), randn(2, 8, 4, 4), VFLoss(4, 8, vf_weight=.3, cos_margin=0)
    theta = torch.eye(4)[:,:,None,None].requires_grad_()
    latent = F.conv2d(z, theta)
    loss, _ = vf(latent, f)
    scale = vf.vf_weight*adaptive_weight(latent.square().sum(), loss, theta, 1e8)
    assert scale.ndim == 0 and not scale.requires_grad and scale > 0
    (scale*loss).backward()
    assert theta.grad.isfinite().all() # The graph outlives the ratio

@pytest.mark.parametrize("kw", [dict(cos_weight=-1.), dict(distmat_margin=-.1), dict(vf_weight=-.1)])
def test_negative_settings(kw):
    with pytest.raises(ConfigError, match="negative"): VFLoss(4, 8, **kw)

def test_maps_that_do_not_fit():
    def refuses(message): return pytest.raises(ShapeError, match=message)
    with refuses("height 4 and f has height 5"): distmat_loss(randn(1, 2, 4, 4), randn(1, 2, 5, 4))
    with refuses("batch size 3 and f has batch size 2"): distmat_loss(randn(3, 2, 4, 4), randn(2, 2, 4, 4))
    with refuses("z has 2 channels, but this VFLoss was built for 4"):
        VFLoss(4, 8)(randn(1, 2, 4, 4), randn(1, 8, 4, 4))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    vf, z, f = VFLoss(4, 8), randn(2, 4, 8, 8), randn(2, 8, 16, 16)
    expected = vf(z, f)[0]
    with torch.autocast("cuda", torch.bfloat16): loss, _ = vf.cuda()(z.cuda(), f.cuda())
    check(loss, expected, rtol=1e-3) # cuDNN may use TF32 in the projection
