"Paths, losses, solvers and guidance against the published numbers, and the corners that notebook cells leave out"
import json
from pathlib import Path
import pytest, torch
from vavae_nb.base.errors import ConfigError, VavaeError
from vavae_nb.dit.model import LightningDiT
from vavae_nb.flow.path import FlowLoss, GVPPath, VPPath, direction_loss, gaussian_velocity, paths, sample_times
from vavae_nb.flow.path import velocity_mse
from vavae_nb.flow.sampler import Guided, euler_maruyama, integrate, sample, time_grid
from vavae_nb.base.tensor_files import load_into, load_tensors
from vavae_nb.base.tensors import test_tensor

golden_dir = Path(__file__).parent/"golden"
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@pytest.fixture(scope="module")
def golden(): return load_tensors(golden_dir/"flow.safetensors")[0]

def gen(seed=0, device="cpu"): return torch.Generator(device).manual_seed(seed)

@pytest.mark.parametrize("name", paths)
def test_paths_golden(golden, name):
    path, (x0, x1, t) = paths[name], (golden[k] for k in ("x0", "x1", "t"))
    xt = path.xt(x0, x1, t)
    test_tensor(xt, golden[f"{name}.xt"])
    test_tensor(path.velocity(x0, x1, t), golden[f"{name}.ut"])
    test_tensor(path.score(golden["model_out"], xt, t), golden[f"{name}.score_from_velocity"], rtol=3e-5)

def test_losses_golden(golden):
    test_tensor(velocity_mse(golden["model_out"], golden["linear.ut"]), golden["linear.mse_per_sample"])
    test_tensor(direction_loss(golden["model_out"], golden["linear.ut"]), golden["linear.cos_per_sample"])
    obj = FlowLoss()
    _, _, target = obj.prepare(golden["x1"], x0=golden["x0"], t=golden["t"])
    loss, _ = obj.loss(golden["model_out"], target)
    test_tensor(loss, (golden["linear.mse_per_sample"] + golden["linear.cos_per_sample"]).mean())

@pytest.mark.parametrize("solver", ["euler", "midpoint", "dopri5"])
@pytest.mark.parametrize("shift", [0., .3])
def test_solvers_golden(golden, solver, shift):
    def v(x, t): return torch.einsum("ij,bjhw->bihw", golden["ode.W"], x)*(1+t)
    ts = time_grid(11, shift or 1.)                       # 0 means no shift in the published code
    test_tensor(integrate(v, golden["ode.z0"], ts, solver), golden[f"ode.{solver}.shift{shift}"])

def published(c): # A published configuration in our names
    switch = {k: c.get(f"use_{k}", False) for k in ("swiglu", "rope", "rmsnorm")}
    sizes = {k: v for k, v in c.items() if not k.startswith(("use_", "wo_"))}
    return sizes | switch | dict(qk_norm=c.get("use_qknorm", False), shift=not c.get("wo_shift", False))

@pytest.mark.parametrize("name", ["lightning", "qknorm_noshift", "layernorm_qknorm_rope"])
def test_guidance_golden(name):
    tensors, meta = load_tensors(golden_dir/f"dit_{name}.safetensors")
    c = published(json.loads(meta["config"]))
    model = LightningDiT(**c).eval()
    load_into(model, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}, name)
    null, n_calls = c["num_classes"], []
    x, y = tensors["cfg_x"][:2], tensors["cfg_y"][:2]
    assert (tensors["cfg_y"][2:] == null).all()
    def counted(x, t, y):
        n_calls.append(len(x))
        return model(x, t, y)
    guided = Guided(counted, y, null, 4., (.11, 1.), channels=3)
    with torch.no_grad():
        for t in (.05, .5): test_tensor(guided(x, t), tensors[f"cfg_t{t}"][:2], rtol=2e-5)
    assert n_calls == [2, 4]                              # No unconditional pass at t = 0.05

def test_interval_ends_are_inside():
    x, y = torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.long)
    g = Guided(lambda x, t, y: x, y, 1, 2., (.11, .9))
    t32 = torch.tensor([.11, .9]).tolist()                # Float32 times, as a grid has them: a little less than 0.11
    assert [g.guides(t) for t in (*t32, .1099, .9001)] == [True, True, False, False]

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_prepare_dtypes(dtype):
    z = torch.ones(4, 2, 3, 3, dtype=dtype)
    xt, t, target = FlowLoss().prepare(z, gen())
    assert t.dtype == torch.float32 and xt.dtype == target.dtype == torch.promote_types(dtype, torch.float32)
    loss, _ = FlowLoss().loss(target.to(torch.bfloat16), target)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss < 1e-3

KINDS = [dict(), dict(path=GVPPath(), prediction="noise", times="uniform", direction_weight=.5),
         dict(prediction="score", direction_weight=0.)]
@pytest.mark.parametrize("kw", KINDS, ids=str)
def test_the_loss_is_made_of_its_terms(kw):
    z, obj = torch.randn(8, 4, 2, 2, generator=gen()), FlowLoss(**kw)
    xt, t, target = obj.prepare(z, gen(1))
    for given, again in zip((xt, t, target), obj.prepare(z, gen(1))): assert torch.equal(given, again)
    x0, drawn_t = obj.draw(z.shape, gen(1), z.device)
    for given, again in zip((xt, t, target), obj.prepare(z, x0=x0, t=drawn_t)): assert torch.equal(given, again)
    pred = (xt*t[:, None, None, None]).requires_grad_()
    loss, terms = obj.loss(pred, target, t)
    assert loss.requires_grad and not any(v.requires_grad for v in terms.values())
    test_tensor(loss, terms["flow_mse"] + obj.direction_weight*terms["flow_direction"])

def test_score_loss_is_the_noise_loss():
    z = torch.randn(64, 4, 2, 2, generator=gen())
    noise, score = FlowLoss(prediction="noise"), FlowLoss(prediction="score")
    xt, t, eps = noise.prepare(z, gen(1))
    pred = .3*xt
    a, _ = noise.loss(pred, eps)
    b, _ = score.loss(-pred/(1-t)[:, None, None, None], -eps/(1-t)[:, None, None, None], t)
    test_tensor(b, a, rtol=1e-4)

def test_extreme_times_stay_finite():
    path = VPPath()
    t = sample_times(1000, mean=30., generator=gen(), interval=path.interval())   # sigmoid(30) is 1 in float32
    assert t.max() <= 1-1e-5
    assert path.velocity(torch.ones(1000, 1), torch.ones(1000, 1), t).isfinite().all()

@pytest.mark.parametrize("pred", [torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 1e-20)])
def test_direction_loss_of_nothing(pred):
    v = torch.randn(2, 3, 2, 2, generator=gen())
    v[0, :, 0, 0] = 0                                                             # A target without direction as well
    pred = pred.clone().requires_grad_()
    loss = direction_loss(pred, v)
    loss.sum().backward()
    test_tensor(loss, torch.ones(2))
    assert pred.grad.isfinite().all() and pred.grad[0, :, 0, 0].abs().sum() == 0

def test_sample_labels_and_modes():
    net = torch.nn.Sequential(torch.nn.Dropout()).train()
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, t, y):
            if (y == 2).any(): raise RuntimeError("no such class")
            return self.net(x)
    model, kw = Model(), dict(latent_shape=(2, 3, 3), n_points=3, progress=False)
    assert sample(model, torch.tensor([], dtype=torch.long), null_class=4, **kw).shape == (0, 2, 3, 3)
    assert sample(model, [0, 4], null_class=4, seed=-1, **kw).shape == (2, 2, 3, 3)  # The null class is a label
    with pytest.raises(RuntimeError, match="no such class"): sample(model, [2], null_class=4, **kw)
    assert net.training and torch.is_grad_enabled()                                   # Also after an error

def test_bf16_state_stays_float32():
    conv = torch.nn.Conv2d(2, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        z = sample(lambda x, t, y: conv(x), torch.tensor([0]), (2, 3, 3), null_class=1, n_points=3, cfg_scale=2.,
                   progress=False, device="cpu")
    assert z.dtype == torch.float32

def test_sde_takes_a_generator():
    def v(x, t): return gaussian_velocity(x, t, .5, .5)
    x, ts = torch.zeros(5, 2), time_grid(10, 1., (1e-3, .96))
    a, b, c = (euler_maruyama(v, x, ts, generator=gen(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_errors():
    with pytest.raises(ConfigError, match="cfg channels 0"): Guided(lambda x, t, y: x, torch.tensor([0]), 1, channels=0)
    with pytest.raises(ConfigError, match="unknown prediction"): paths["linear"].interval("flow")
    with pytest.raises(ConfigError, match="unknown solver 'sde'"):
        integrate(lambda x, t: x, torch.ones(1), time_grid(3), "sde")
    with pytest.raises(VavaeError, match="t = 0.2500"):  # Found although it is not among the last steps
        integrate(lambda x, t: x*float("nan") if t == .25 else x, torch.ones(1), time_grid(101, 1.))

@cuda
def test_on_the_gpu():
    z = torch.randn(16, 4, 4, 4, device="cuda")
    for g in (gen(0, "cuda"), gen(0), None):
        xt, t, target = FlowLoss().prepare(z, g)
        loss, _ = FlowLoss().loss(xt, target, t)
        assert loss.is_cuda and loss.isfinite()
    conv = torch.nn.Conv2d(4, 4, 3, padding=1).double()  # In float64, so that only the noise could differ
    model = type("M", (torch.nn.Module,), dict(forward=lambda self, x, t, y: self.conv(x.double()).to(x.dtype)))()
    model.conv = conv
    for solver in ("euler", "dopri5", "sde"):
        kw = dict(latent_shape=(4, 6, 6), null_class=3, n_points=20, solver=solver, cfg_scale=2., progress=False)
        test_tensor(sample(model.cuda(), [0, 1, 2], **kw), sample(model.cpu(), [0, 1, 2], **kw), rtol=1e-3)
