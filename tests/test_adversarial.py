"What the cells of 12_tokenizer.adversarial cannot guard: golden losses, precision, numerics at the edges"
from pathlib import Path
import pytest, torch
from torch import nn
from vavae_nb.base.errors import ShapeError
from vavae_nb.base.tensor_files import load_tensors
from vavae_nb.base.tensors import rel_err, test_tensor as check
from vavae_nb.tokenizer.adversarial import PatchGAN, adaptive_weight, once_differentiated
from vavae_nb.tokenizer.adversarial import generator_loss, hinge_d_loss, vanilla_d_loss

golden, _ = load_tensors(Path(__file__).parent/"golden"/"vf_loss.safetensors")

def test_d_losses_equal_published():
    real, fake = golden["hinge.real"], golden["hinge.fake"]
    check(hinge_d_loss(real, fake), golden["hinge.loss"], rtol=1e-5)
    check(vanilla_d_loss(real, fake), golden["vanilla.loss"], rtol=1e-5)

def test_losses_are_not_symmetric():
    "Swapping real and fake must change the loss, and the generator must raise the logits of its images"
    real, fake = torch.tensor([3., 2.]), torch.tensor([-3., -2.])
    assert hinge_d_loss(real, fake) == 0 < hinge_d_loss(fake, real)
    assert vanilla_d_loss(real, fake) < vanilla_d_loss(fake, real)
    fake.requires_grad_(); generator_loss(fake).backward()
    assert (fake.grad < 0).all()

@pytest.mark.parametrize("n,size", [(1, 6), (2, 12), (3, 24)])
def test_smallest_image(n, size):
    net = PatchGAN(ndf=4, n_layers=n)
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(ShapeError, match=f"needs {size} px"): net(torch.zeros(2, 3, size, size-1))

@pytest.mark.parametrize("h,w", [(33, 47), (64, 40)])
def test_map_size_of_any_image(h, w):
    assert PatchGAN(ndf=4, n_layers=2)(torch.zeros(1, 3, h, w)).shape[2:] == (h//4-2, w//4-2)

def test_adaptive_weight_by_hand():
    w = torch.tensor([3., 4.], requires_grad=True)
    ref, loss = (w*torch.tensor([6., 8.])).sum(), (w*torch.tensor([0., 2.])).sum() # Gradient norms 10 and 2
    check(adaptive_weight(ref, loss, w, 1e4, eps=0.), torch.tensor(5.))
    check(adaptive_weight(ref, loss, w, 1e4, eps=3.), torch.tensor(2.))
    check(adaptive_weight(ref, loss, w, 4.), torch.tensor(4.))
    check(adaptive_weight(ref, loss*0, w, 1e8), torch.tensor(10/1e-4), rtol=1e-6) # No gradient: finite
    (ref+loss).backward()                                                         # The graph was kept
    assert w.grad.tolist() == [6., 10.]

def test_adaptive_weight_of_half_precision_does_not_overflow():
    w = torch.ones(64, dtype=torch.float16, requires_grad=True)
    weight = adaptive_weight((w*2000).sum(), (w*1000).sum(), w, 1e4) # ‖∇‖² = 64·2000² is past fp16's 65504
    assert weight.dtype == torch.float32
    check(weight, torch.tensor(2.), rtol=1e-3)

def test_once_differentiated_equals_autograd_through_a_nonlinear_loss():
    net = nn.Conv2d(2, 3, 3, padding=1); z = torch.randn(2, 2, 8, 8)
    def loss_fn(y): return (y.tanh()**3).mean()+y.abs().sqrt().sum()
    direct, tangent = loss_fn(net(z)), once_differentiated(loss_fn, net(z))
    assert direct.item() == tangent.item()
    ours, plain = (torch.autograd.grad(3*loss, net.parameters()) for loss in (tangent, direct))
    for a,b in zip(ours, plain): assert rel_err(a, b) < 1e-5

def test_once_differentiated_without_grad():
    "In evaluation nothing is to be differentiated: the value must still be right"
    def loss_fn(y): return y.square().sum(), {"n": y.sum()}
    with torch.inference_mode(): loss, n = once_differentiated(loss_fn, torch.tensor([1., 2.]))
    assert loss.item() == 5 and not loss.requires_grad and n["n"].item() == 3

def test_once_differentiated_under_autocast():
    net = nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(1, 3, 8, 8)); loss = once_differentiated(lambda y: y.float().square().mean(), y)
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().sum() > 0
