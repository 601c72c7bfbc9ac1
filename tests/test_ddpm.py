"The original DiT's objective and samplers: golden numbers, closed forms, diffusers' scheduler, and corners"
import json, math
from functools import partial
from pathlib import Path
import pytest, torch
from vavae_nb.base.errors import ConfigError, LabelError, ShapeError, VavaeError
from vavae_nb.dit.model import LightningDiT
from vavae_nb.flow.ddpm import DDPMLoss, NoiseSchedule, ddim_step, ddpm_sample, ddpm_step, discretised_nll
from vavae_nb.flow.ddpm import gaussian_output, linear_schedule, log_variance, normal_kl, posterior_mean
from vavae_nb.flow.ddpm import predicted_data, respaced, variational_bits
from vavae_nb.flow.sampler import Guided
from vavae_nb.base.tensor_files import load_into, load_tensors
from vavae_nb.base.tensors import test_tensor

f64 = torch.float64
schedule = linear_schedule()
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def gen(seed=0, device="cpu"): return torch.Generator(device).manual_seed(seed)

@pytest.fixture(scope="module")
def golden():
    "The published DiT with a learnt sigma: tensors, and the model filled with them"
    path = Path(__file__).parent/"golden/dit_plain_dit.safetensors"
    tensors, meta = load_tensors(path)
    c = json.loads(meta["config"])
    model = LightningDiT(**c, swiglu=False, rope=False, rmsnorm=False).eval()
    load_into(model, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}, path)
    return tensors, model

def test_both_halves_of_the_golden_dit(golden):
    tensors, model = golden
    with torch.no_grad(): out = model(tensors["x"], tensors["t"], tensors["y"], return_sigma=True)
    assert out.shape == (4, 12, 8, 8)
    test_tensor(out[:, :6], tensors["out"], rtol=2e-5)
    assert (out[:, 6:]-out[:, :6]).abs().max() > 1e-3

def test_guidance_with_a_variance(golden):
    "Guided noise in the first channels, conditional noise and variance in the others"
    tensors, model = golden
    x, y = tensors["x"][:2], torch.tensor([1, 2])
    with torch.no_grad():
        c, u = (model(x, torch.full((2,), 500.), o, return_sigma=True) for o in (y, torch.full((2,), 10)))
        for channels in (None, 3, 6, 7):
            got, n = Guided(model, y, 10, 4., (0, 999), channels, learnt_sigma=True)(x, 500.), min(channels or 6, 6)
            test_tensor(got[:, :n], (u + 4*(c-u))[:, :n], rtol=1e-4)
            test_tensor(got[:, n:], c[:, n:], rtol=1e-5)

def test_the_golden_dit_trains_and_samples(golden):
    tensors, model = golden
    obj = DDPMLoss()
    xt, t, target = obj.prepare(tensors["x"], gen())
    loss, terms = obj.loss(model(xt, t, tensors["y"], return_sigma=True), target, t)
    loss.backward()
    grad = model.final_layer.linear.weight.grad.unflatten(0, (4, 12))   # (patch, channel, width)
    assert loss.isfinite() and (grad[:, :6] != 0).any() and (grad[:, 6:] != 0).any()
    model.zero_grad()
    kw = dict(latent_shape=(6, 8, 8), null_class=10, n_steps=5, cfg_scale=2., progress=False)
    for method in ("ddpm", "ddim"):
        def draw(y, **more): return ddpm_sample(model, y, method=method, **kw, **more)
        z = draw([1, 2, 10, 3, 4])
        for b in (1, 2): test_tensor(draw([1, 2, 10, 3, 4], batch_size=b), z, rtol=1e-4)
        test_tensor(draw([3, 4], first_index=3), z[3:], rtol=1e-4)

@pytest.mark.parametrize("n", [2, 10, 250, 1000])
def test_posterior_is_bayes(n):
    few = respaced(schedule, n)
    x1, xt = torch.randn(2, n, generator=gen(), dtype=f64)
    t = few.steps
    c = few.coefs(t, xt)
    test_tensor(c.a**2, schedule.alpha_bar[t], rtol=1e-12)
    test_tensor((1-c.beta).cumprod(0), schedule.alpha_bar[t], rtol=1e-10)
    got, precision = posterior_mean(x1, xt, t, few), (1/c.s_prev**2 + (1-c.beta)/c.beta)[1:]
    weighted = c.a_prev*x1/c.s_prev**2 + (1-c.beta).sqrt()*xt/c.beta
    test_tensor(got[1:], weighted[1:]/precision, rtol=1e-9)
    test_tensor(c.log_var.exp()[1:], 1/precision, rtol=1e-9)
    test_tensor(got[0], x1[0])
    assert c.log_var[0] == c.log_var[1]

def test_range_of_the_variance():
    v = torch.tensor([-1., 0., 1., 3.], dtype=f64)
    got = log_variance(v, torch.full((4,), 20), schedule)
    c = schedule.coefs(20, v)
    test_tensor(got[[0, 2]], torch.cat([c.log_var, c.beta.log()]))
    test_tensor(got[1], got[[0, 2]].mean())
    assert got[3] > got[2]                                               # Not clipped

@pytest.mark.parametrize("mean,std", [(.8, .5), (0., .1), (-.3, 1.)])
def test_floors_of_the_loss(mean, std):
    "A perfect model of Gaussian data: both terms are at their closed forms, and any change makes them larger"
    obj, g = DDPMLoss(), gen()
    x1 = mean + std*torch.randn(3000, 2, 4, 4, generator=g)
    for t in (2, 40, 400):
        xt, tt, target = obj.prepare(x1, g, t=torch.full((3000,), float(t)))
        c = schedule.coefs(t, torch.zeros((), dtype=f64))
        D, out = c.a**2*std**2 + c.s**2, gaussian_output(xt, tt, mean, std)
        _, terms = obj.loss(out, target, tt)
        test_tensor(terms["ddpm_mse"], (c.a**2*std**2/D).squeeze(), rtol=.02)
        log_var = (c.beta*(D-c.beta)/((1-c.beta)*D)).log()
        test_tensor(terms["ddpm_vlb"], (.5*(log_var-c.log_var)/math.log(2)).squeeze(), rtol=.03, atol=2e-6)
        eps, v = out.chunk(2, 1)
        assert obj.loss(torch.cat([eps+.1, v], 1), target, tt)[1]["ddpm_mse"] > terms["ddpm_mse"]
        if t > 100: continue                                              # There the ends of the range nearly agree
        for dv in (-1, 1): assert obj.loss(torch.cat([eps, v+dv], 1), target, tt)[1]["ddpm_vlb"] > terms["ddpm_vlb"]

def test_the_bound_is_the_code_length():
    "Sum of the terms, on a respaced schedule too, equals the code length of the data in bins of 2/255"
    few, std, g = respaced(schedule, 100), .15, gen()
    x1 = std*torch.randn(64, 1, 16, 16, generator=g, dtype=f64)
    total = torch.zeros(64, dtype=f64)
    for t in few.steps.tolist():
        tt, x0 = torch.full((64,), t), torch.randn(x1.shape, generator=g, dtype=f64)
        noise, v = gaussian_output(few.xt(x0, x1, tt), tt, 0., std, few).chunk(2, 1)
        total += variational_bits(noise, v, x0, x1, tt, few)
    squares = .5*x1.square().mean((1, 2, 3))/std**2
    own = .5*math.log2(2*math.pi*std**2) + math.log2(255/2) + squares/math.log(2) # Code length of these images
    off = total-own
    error = off.std()/64**.5
    assert error < .03 and abs(off.mean()) < 5*error+1e-3

def test_gradients_are_apart():
    obj = DDPMLoss()
    x1 = torch.randn(6, 3, 4, 4, generator=gen())
    for t in (torch.zeros(6), torch.arange(6)*150.):                      # Step 0 has a likelihood
        xt, _, target = obj.prepare(x1, gen(), t=t)
        pred = torch.randn(6, 6, 4, 4, generator=gen(1), requires_grad=True)
        loss, terms = obj.loss(pred, target, t)
        grad, = torch.autograd.grad(loss, pred)
        test_tensor(grad[:, :3], 2*(pred[:, :3]-target[:, 0])/x1.numel())
        assert grad[:, 3:].isfinite().all() and not any(o.requires_grad for o in terms.values())

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, f64])
def test_prepare(dtype):
    x1 = torch.randn(4000, 1, 1, 1, generator=gen()).to(dtype)
    xt, t, target = DDPMLoss().prepare(x1, gen())
    assert t.dtype == torch.float32 and (t == t.floor()).all()
    assert t.min() < 5 and t.max() > 994 and abs(t.mean()-499.5) < 20
    assert target.shape == (4000, 2, 1, 1, 1) and xt.dtype == torch.promote_types(dtype, torch.float32)
    c = schedule.coefs(t, xt)
    test_tensor(xt, c.a*target[:, 1] + c.s*target[:, 0])
    loss, _ = DDPMLoss().loss(torch.zeros(4000, 2, 1, 1).to(dtype), target, t)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.isfinite()

def test_discretised_nll():
    bins = torch.linspace(-1, 1, 256, dtype=f64)
    for mean, sigma in ((0., .005), (.99, .3), (-3., 1.)):
        p = (-discretised_nll(bins, torch.full_like(bins, mean), torch.full_like(bins, 2*math.log(sigma)))).exp()
        assert abs(p.sum()-1) < 1e-8
    x, far = torch.tensor([-7., 7., .5]), torch.tensor([-90., 90., .5])    # Open outer bins: far out is perfect
    test_tensor(discretised_nll(x, far, torch.zeros(3))[:2], torch.zeros(2), atol=1e-6)
    (a, c), (b, e) = torch.randn(2, 2, 50, generator=gen(), dtype=f64)
    N = torch.distributions.Normal
    test_tensor(normal_kl(a, 2*b, c, 2*e), torch.distributions.kl_divergence(N(a, b.exp()), N(c, e.exp())), rtol=1e-12)

def test_respacing_spreads_as_published():
    "The published rule: round(i·(n-1)/(k-1)), both ends kept"
    for k in (2, 7, 50, 100, 250, 999, 1000):
        steps, stride = respaced(schedule, k).steps.tolist(), 999/(k-1)
        assert steps == [round(i*stride) for i in range(k)] and len(set(steps)) == k
    assert respaced(schedule, 10).coefs(1, torch.zeros(1)).a.isnan()       # A step not visited cannot be used unseen

def model(x, t, y, return_sigma, sched, mean=.8, std=.5): return gaussian_output(x, t, mean, std, sched)

@pytest.mark.parametrize("kw", [dict(), dict(method="ddim"), dict(method="ddim", eta=1.)])
@pytest.mark.parametrize("n", [100, 1000])
def test_samplers_reach_the_gaussian(kw, n):
    m, y = partial(model, sched=respaced(schedule, n)), torch.zeros(100, dtype=torch.long)
    z = ddpm_sample(m, y, (1, 16, 16), null_class=1, n_steps=n, progress=False, **kw)
    short = 5/n if kw else 0                                               # DDIM narrows at first order, ancestral not
    assert abs(z.mean()-.8) < .03 and -.025-short < z.std()/.5-1 < .025 and z.dtype == torch.float32

def test_ddim_is_the_probability_flow():
    x, err = torch.linspace(-2, 2, 5, dtype=f64).reshape(-1, 1), []
    c = schedule.coefs(999, x)
    exact = .8 + (x-.8*c.a)*.5/(c.a**2*.25+c.s**2).sqrt()
    for n in (250, 1000):
        few, z = respaced(schedule, n), x
        for t in few.steps.flip(0).tolist(): z = ddim_step(gaussian_output(z, t, .8, .5, few), z, t, 0., few)
        err.append((z-exact).abs().max().item())
    assert err[1] < 4e-3 and 3.3 < err[0]/err[1] < 4.5                     # First order

def test_ancestral_is_ddim_with_all_noise():
    few = respaced(schedule, 50)
    x, z, out = torch.randn(3, 2, 4, generator=gen(), dtype=f64).split([1, 1, 1])
    x, z, noise = x[0], z[0], out[0]
    for t in few.steps[[1, 20, 49]].tolist():
        a = ddpm_step(torch.cat([noise, -torch.ones_like(noise)], 1), x, t, z, few) # v = -1: the posterior's variance
        b = ddim_step(torch.cat([noise, noise], 1), x, t, z, few, eta=1.)
        test_tensor(a, b, rtol=1e-10)

def test_diffusers_agrees():
    diffusers = pytest.importorskip("diffusers")
    betas = dict(beta_start=1e-4, beta_end=.02, beta_schedule="linear", clip_sample=False)
    theirs = diffusers.DDPMScheduler(1000, variance_type="learned_range", **betas)
    test_tensor(schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-5)
    g = gen()
    x, out = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 8, 8, generator=g)
    for t in (0, 1, 17, 500, 999):
        test_tensor(schedule.xt(x, out[:, :4], t), theirs.add_noise(out[:, :4], x, torch.tensor([t, t])), rtol=1e-5)
        got = theirs.step(out, t, x, generator=gen(t))
        noise, v = out.chunk(2, 1)
        test_tensor(predicted_data(noise, x, t, schedule), got.pred_original_sample, rtol=1e-4)
        if t: test_tensor(log_variance(v, t, schedule), theirs._get_variance(t, predicted_variance=v), rtol=1e-3)
        z = torch.randn(x.shape, generator=gen(t))
        test_tensor(ddpm_step(out, x, t, z, schedule), got.prev_sample, rtol=1e-3)
    ddim = diffusers.DDIMScheduler(1000, set_alpha_to_one=True, timestep_spacing="leading", **betas)
    ddim.set_timesteps(250)                                                 # Its integers are 0, 4, 8, …, 996
    few = NoiseSchedule(schedule.alpha_bar, ddim.timesteps.flip(0).long())
    for t in (0, 4, 500, 996):
        test_tensor(ddim_step(out, x, t, 0., few), ddim.step(out[:, :4], t, x).prev_sample, rtol=1e-4)

def test_interval_is_in_times_from_noise_to_data():
    rows = []
    def m(x, t, y, return_sigma):
        rows.append((t[0].item(), len(x)))
        return torch.cat([x, x], 1)
    ddpm_sample(m, [0], (1, 2, 2), null_class=1, n_steps=1000, cfg_scale=2., cfg_interval=(.25, .9), progress=False)
    guided = [t for t, n in rows if n == 2]
    assert (max(guided), min(guided)) == (749, 100) and len(guided) == 650

def twice(x, t, y, return_sigma): return torch.cat([x, x], 1)
def once(x, t, y, return_sigma): return x
def broken(x, t, y, return_sigma): return torch.cat([x, x], 1)*(float("nan") if t[0] < 900 else 1)
velocity_model = LightningDiT(4, 2, 2, 16, 1, 2, num_classes=3)

def draw(net, y=[0], n_steps=4, **kw):
    return ddpm_sample(net, y, latent_shape=(2, 4, 4), null_class=3, n_steps=n_steps, progress=False, **kw)

REFUSED = [(ConfigError, f"n_steps is {n}.*2 to 1000", twice, dict(n_steps=n)) for n in (1, 0, 1001)] + [
    (ConfigError, "unknown method 'ddpn'; did you mean 'ddpm'", twice, dict(method="ddpn")),
    (ConfigError, "eta -1", twice, dict(eta=-1)),
    (ConfigError, r"\(1.0, 0.1\) is reversed", twice, dict(cfg_interval=(1., .1))),
    (LabelError, "label 5", twice, dict(y=[5])),
    (ShapeError, "learn_sigma=True", once, {}),
    (ConfigError, "learn_sigma=True", velocity_model, {}),
    (VavaeError, "stopped being finite at t = 666", broken, {})]
@pytest.mark.parametrize("error,match,net,kw", REFUSED)
def test_what_cannot_be_sampled(error, match, net, kw):
    with pytest.raises(error, match=match): draw(net, **kw)

def test_errors():
    assert draw(twice, torch.tensor([], dtype=torch.long)).shape == (0, 2, 4, 4)
    with pytest.raises(ConfigError, match="1 steps make no schedule"): NoiseSchedule(torch.tensor([.5]))
    obj = DDPMLoss()
    _, t, target = obj.prepare(torch.zeros(2, 4, 3, 3), gen())
    with pytest.raises(ShapeError, match="DDPM needs twice the channels"): obj.loss(torch.zeros(2, 4, 3, 3), target, t)

@cuda
def test_on_the_gpu():
    net = torch.nn.Conv2d(4, 8, 3, padding=1).double()                      # So that only the noise could differ
    class M(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, t, y, return_sigma): return self.net(x.double()).to(x.dtype)
    obj, z = DDPMLoss(), torch.randn(8, 4, 6, 6, device="cuda")
    for g in (gen(0, "cuda"), gen(0), None):
        xt, t, target = obj.prepare(z, g)
        assert xt.is_cuda and t.is_cuda and obj.loss(torch.cat([xt, xt], 1), target, t)[0].isfinite()
    kw = dict(latent_shape=(4, 6, 6), null_class=3, n_steps=20, cfg_scale=2., progress=False)
    for method in ("ddpm", "ddim"):
        on_gpu = ddpm_sample(M().cuda(), [0, 1, 2], method=method, **kw)
        test_tensor(on_gpu, ddpm_sample(M().cpu(), [0, 1, 2], method=method, **kw), rtol=1e-3)
