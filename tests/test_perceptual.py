"LPIPS against the published implementation on the published weights, and what the notebook's cells cannot guard"
import copy, warnings
import pytest, torch
from torch import nn
from vavae_nb.base.errors import ShapeError
from vavae_nb.base.pretrained import lpips_tensors
from vavae_nb.base.tensors import autocast, generator, test_tensor as check
from vavae_nb.tokenizer.perceptual import LPIPS, ConvStages, unit_channels

def pair(*size, b=2):
    g = generator(1, "perceptual")
    x = torch.rand(b, 3, *size, generator=g)*2-1
    return x, (x + .3*torch.randn(x.shape, generator=g)).clamp(-1, 1)

def published(net):
    "The `lpips` package's network and heads, with our convolutions (its own would be a download)"
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ref = lpips.LPIPS(net=dict(vgg16="vgg", alexnet="alex")[net], pnet_rand=True, verbose=False)
    t = lpips_tensors(net)
    convs = [m for m in ref.net.modules() if isinstance(m, nn.Conv2d)]
    for i,c in enumerate(convs): c.load_state_dict(dict(weight=t[f"conv.{i}.weight"], bias=t[f"conv.{i}.bias"]))
    assert f"conv.{len(convs)}.weight" not in t
    return ref

@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_equals_the_published(net):
    ours,ref = LPIPS(net),published(net)
    for k,w in enumerate(ours.heads): # The heads are the package's own
        assert torch.equal(w, ref.lins[k].model[-1].weight)
    for size in ((32, 32), (48, 77)):
        x, y = pair(*size)
        theirs, stages = ref(x, y, retPerLayer=True)
        check(ours(x, y), theirs)
        for a,b in zip(ours.terms(x, y), stages): check(a, b)
    x, y = (o.double() for o in pair(48, 77)) # Gradients in float64: in fp32 rounding decides which of two equal pixels
    y.requires_grad_()                        # a max-pooling takes, and the gradient goes there
    check(*(torch.autograd.grad(m.double()(x, y).sum(), y)[0] for m in (ours, ref)), rtol=1e-6)

def toy(net="vgg16", width=2):
    "Random tensors of the right names, `width` channels throughout"
    g,kernels = generator(2, "toy"), (3,)*13 if net == "vgg16" else (11, 5, 3, 3, 3)
    t = {f"head.{k}.weight": torch.rand(1, width, 1, 1, generator=g) for k in range(5)}
    for i,k in enumerate(kernels):
        t[f"conv.{i}.weight"] = torch.randn(width, width if i else 3, k, k, generator=g)
        t[f"conv.{i}.bias"] = torch.ones(width)
    return t

@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_min_size_is_exact(net):
    for slices in range(1, 6):
        m = LPIPS(net, slices, tensors=toy(net)); n = m.features.min_size
        assert m(*pair(n, n)).shape == (2, 1, 1, 1)
        assert m.features(pair(n, n)[0])[-1].shape[-1] == 1
        if n > 1:
            for size in ((n-1, n), (n, n-1)):
                with pytest.raises(ShapeError, match=f"at least {n} pixels"): m(*pair(*size))
            with pytest.raises((RuntimeError, ZeroDivisionError)): # The limit is the network's, not ours
                x = pair(n-1, n-1)[0]
                for stage in m.features.stages: x = stage(x)

def test_gradient_goes_to_either_side_but_not_the_weights():
    m = LPIPS(tensors=toy()); x,y = pair(16, 16)
    m.train() # Nothing in it has a training mode
    gx, = torch.autograd.grad(m(x.requires_grad_(), y).sum(), x)
    assert gx.abs().sum() > 0 and m.targets(x)[0].requires_grad is False
    with pytest.raises(RuntimeError, match="does not require grad"): m(m.targets(x), y).sum().backward()
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == 0

def test_black_and_equal_images_have_finite_gradients():
    m = LPIPS(tensors={k: (v if "weight" in k else v*0) for k,v in toy().items()})
    x = m.features.shift.expand(1, 3, 16, 16).clone() # Zero after scaling: every feature is zero
    assert all(not f.any() for f in m.features(x))
    y = x.clone().requires_grad_()
    d = m(pair(16, 16, b=1)[0], y); d.backward()
    assert d.isfinite().all() and y.grad.isfinite().all()
    z = pair(16, 16)[0].requires_grad_(); d = m(z.detach(), z); d.sum().backward()
    assert not d.any() and not z.grad.any()

def test_bf16_input_and_autocast_give_fp32():
    m = LPIPS(); x,y = pair(32, 32); full = m(x, y)
    assert m(x.bfloat16(), y.bfloat16()).dtype == torch.float32 # A decoder under autocast hands over bf16
    with autocast(x.device, "bf16"):
        half = m(m.targets(x), y)
        head = m([unit_channels(f) for f in m.features(x)], [unit_channels(f) for f in m.features(y)])
    assert half.dtype == torch.float32 and torch.equal(half, head)
    check(half, full, rtol=2e-2)

def test_heads_are_fp32_under_autocast():
    m = LPIPS(slices=1); x,y = pair(8, 8)
    fx,fy = m.units(x),m.units(y)
    with autocast(x.device, "bf16"): inside = m(fx, fy)
    assert torch.equal(inside, m(fx, fy))

def test_copies_and_state_dict():
    m = LPIPS(slices=2, tensors=toy()); c = copy.deepcopy(m); x,y = pair(8, 8)
    assert torch.equal(c(x, y), m(x, y)) and c.features.stages[0][0].weight is not m.features.stages[0][0].weight
    other = LPIPS(slices=2, tensors={k: v+1 for k,v in toy().items()})
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x, y), m(x, y))

def test_targets_of_another_batch_are_refused():
    m = LPIPS(slices=2, tensors=toy()); x,y = pair(8, 8)
    with pytest.raises(ShapeError, match="one shape"): m(m.targets(x[:1]), y) # It would broadcast
    with pytest.raises(ShapeError, match="one shape"): m(LPIPS(slices=1, tensors=toy()).targets(x), y)

def test_dims():
    assert ConvStages("alexnet").dims == [64, 192, 384, 256, 256]
