"Image and set metrics: what the cells of 41_metrics.quality cannot guard"
import json, math
from dataclasses import FrozenInstanceError
import numpy as np, pytest, torch
from scipy.linalg import sqrtm
from vavae_nb.base.errors import DataError, ShapeError
from vavae_nb.metrics.quality import (FeatureStats, Measure, fd, frechet_distance, nearest_neighbours, psnr,
                                      reconstruction_metrics, ssim)
from vavae_nb.metrics.reference import StoredStats
from vavae_nb.base.tensors import generator, test_tensor

def rand(*size, what="x"): return torch.rand(*size, generator=generator(0, what))*2-1
def randn(*size, what="x"): return torch.randn(*size, generator=generator(0, what), dtype=torch.float64)
def pair(*size): return rand(*size), (rand(*size)+.3*rand(*size, what="noise")).clamp(-1, 1)

@pytest.mark.parametrize("size", [(2, 3, 24, 37), (1, 1, 11, 11)])
@pytest.mark.parametrize("signed", [True, False])
def test_ssim_is_that_of_scikit_image(size, signed):
    metrics = pytest.importorskip("skimage.metrics")
    x,y = pair(*size)
    u,v = (x,y) if signed else ((x+1)/2, (y+1)/2)
    options = dict(data_range=2. if signed else 1., channel_axis=0, gaussian_weights=True, sigma=1.5,
                   use_sample_covariance=False)
    expected = [metrics.structural_similarity(a.double().numpy(), b.double().numpy(), **options) for a,b in zip(u, v)]
    test_tensor(ssim(x, y, signed=signed, border=False), torch.tensor(expected), rtol=0, atol=1e-4)

def test_ssim_and_psnr_are_those_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    for size in ((2, 3, 24, 37), (3, 3, 32, 32), (1, 1, 11, 11)):
        x,y = pair(*size)
        theirs = image.structural_similarity_index_measure
        signed = theirs(y, x, data_range=(-1., 1.), reduction="none").view(-1)
        unsigned = theirs((y+1)/2, (x+1)/2, data_range=1., reduction="none").view(-1)
        decibels = image.peak_signal_noise_ratio(y, x, data_range=(-1., 1.), dim=(1, 2, 3), reduction="none")
        test_tensor(ssim(x, y), signed, rtol=0, atol=1e-4)
        test_tensor(ssim(x, y, signed=False), unsigned, rtol=0, atol=1e-4)
        test_tensor(psnr(x, y), decibels, rtol=1e-4)

def test_psnr_is_that_of_scikit_image_in_either_range():
    metrics = pytest.importorskip("skimage.metrics")
    x,y = pair(2, 3, 16, 16)
    expected = [metrics.peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.) for a,b in zip((x+1)/2, (y+1)/2)]
    test_tensor(psnr(x, y), torch.tensor(expected), rtol=1e-5)

def test_metrics_are_float32_under_autocast_and_for_bf16():
    x,y = pair(2, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16): s,p = ssim(x, y), psnr(x, y)
    assert torch.equal(s, ssim(x, y)) and torch.equal(p, psnr(x, y))
    x,y = x.bfloat16(), y.bfloat16()
    assert torch.equal(ssim(x, y), ssim(x.float(), y.float()))
    test_tensor(ssim(x, x), torch.ones(2), rtol=1e-6)

def test_reconstructions_are_clamped_and_originals_are_not():
    x = rand(2, 3, 16, 16)
    assert reconstruction_metrics(x, x*1e3)["psnr"] == psnr(x, (x*1e3).clamp(-1, 1)).mean().item()
    with pytest.raises(DataError, match="rescale or clamp"): reconstruction_metrics(x*255, x)
    with pytest.raises(DataError, match="floats"): psnr((x*127).to(torch.int8), (x*127).to(torch.int8))
    with pytest.raises(ShapeError): psnr(x[:0], x[:0])

def test_frechet_is_the_form_with_sqrtm():
    a,b = (FeatureStats.of(randn(400, 24, what=w)@randn(24, 24, what=w+"mix")+m) for w,m in (("a", 0), ("b", .5)))
    root = np.trace(sqrtm(a.cov.numpy()@b.cov.numpy()).real)
    expected = (a.mean-b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2*root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)

def test_frechet_is_that_of_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    f,g = randn(500, 24, what="f")@randn(24, 24, what="mix"), randn(300, 24, what="g").exp()
    a,b = fid.fid_features_to_statistics(f),fid.fid_features_to_statistics(g)
    expected = fid.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(FeatureStats.of(f), FeatureStats.of(g)) == pytest.approx(expected, rel=1e-6)

@pytest.mark.parametrize("n,m", [(20, 30), (50, 400), (400, 20)])
def test_frechet_of_fewer_samples_than_dimensions(n, m):
    "With the reference's root known exactly, the nuclear norm is that of the centred samples themselves"
    f,s = randn(n, 60, what="f"), torch.linspace(0, 2, 60, dtype=torch.float64) # Of which one direction is empty
    a,b = FeatureStats.of(f), FeatureStats.from_moments(torch.ones(60), torch.diag(s.square()), m)
    nuclear_norm = torch.linalg.svdvals((f-f.mean(0))*s/(n-1)**.5).sum()
    expected = (a.mean-1).square().sum()+a.cov.trace()+s.square().sum()-2*nuclear_norm
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-7) == frechet_distance(b, a)

def test_frechet_does_not_see_empty_dimensions():
    "An isometry into many more dimensions than samples changes nothing"
    f,g = randn(60, 10, what="f"), 2*randn(40, 10, what="g")+1
    Q = torch.linalg.qr(randn(150, 10, what="Q")).Q
    small,large = (frechet_distance(*(FeatureStats.of(o) for o in p)) for p in ((f, g), (f@Q.T, g@Q.T)))
    assert large == pytest.approx(small, rel=1e-9)

def test_frechet_of_constant_features_is_the_distance_of_the_means():
    a,b = (FeatureStats.of(torch.full((5, 4), v)) for v in (0., 1.5))
    assert frechet_distance(a, b) == pytest.approx(4*1.5**2)

def test_stats_of_odd_batches():
    f = randn(30, 5)
    s = FeatureStats()
    for part in (f[:0], f[:1], f[1:1], f[1:20], f[20:]): s.update(part)
    assert s.n == 30
    test_tensor(s.cov, f.T.cov(), rtol=1e-12)
    before = FeatureStats.of(f[:10])
    cov,mean = before.cov.clone(), before.mean.clone()
    merged = FeatureStats().merge(before).merge(FeatureStats()).merge(FeatureStats.of(f[10:]))
    test_tensor(merged.cov, f.T.cov(), rtol=1e-12)
    assert torch.equal(before.cov, cov) and torch.equal(before.mean, mean) and before.n == 10 # It was left alone

@pytest.mark.parametrize("convert", [lambda f: f.numpy(), lambda f: f.half(), lambda f: f.float().requires_grad_()])
def test_stats_take_arrays_and_half_precision(convert):
    s = FeatureStats.of(convert(randn(50, 3).half().double()))
    assert s.mean.dtype == s.cov.dtype == torch.float64 and not s.mean.requires_grad
    test_tensor(s.mean, randn(50, 3).half().double().mean(0), rtol=1e-12)

def test_what_cannot_be_counted_is_refused():
    s = FeatureStats.of(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"\(n, 4\)"): s.update(torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="4 and 5"): s.merge(FeatureStats.of(torch.zeros(3, 5)))
    with pytest.raises(DataError, match="infinite"): s.update(torch.full((1, 4), math.inf))
    assert s.n == 3 # Unchanged by what it refused
    with pytest.raises(DataError, match="got 0"): frechet_distance(FeatureStats(), s)
    stored = StoredStats(torch.zeros(5), torch.eye(5)) # Of nobody knows how many images
    with pytest.raises(ShapeError, match="4 and 5 dimensions"): frechet_distance(s, stored)

def test_a_measure_carries_its_origin():
    s = FeatureStats.of(randn(20, 3))
    m = fd(s, FeatureStats.of(randn(40, 3, what="ref")), extractor="net:abc", name="data:def")
    d = json.loads(json.dumps(m.to_dict()))
    assert Measure(**d) == m
    assert (d["n"], d["n_reference"], d["extractor"], d["reference"]) == (20, 40, "net:abc", "data:def")
    old = {k: v for k,v in d.items() if k not in ("standard_error", "settings")} # As runs of earlier versions wrote it
    assert Measure(**old).standard_error is None
    assert str(Measure(**d | dict(value=1.5, standard_error=.25))) == "fd 1.5 ± 0.25 (n=20)"
    with pytest.raises(FrozenInstanceError): m.value = 0.
    with pytest.raises(DataError, match="its reference"): fd(s, s, extractor="net:abc", name="")
    with pytest.raises(DataError, match="number of samples"): Measure("fd", 1., 0, "net:abc", "data:def")

@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_neighbours_are_those_of_the_whole_matrix(chunk):
    a,b = randn(20, 6, what="a")+1e4, randn(33, 6, what="b")+1e4
    full = (a[:,None]-b[None]).norm(dim=-1).sort(1)
    d,i = nearest_neighbours(a, b, k=3, chunk=chunk)
    assert torch.equal(i, full.indices[:,:3])
    test_tensor(d, full.values[:,:3], rtol=1e-6)
    own = (b[:,None]-b[None]).norm(dim=-1).fill_diagonal_(math.inf).argmin(1)
    assert torch.equal(nearest_neighbours(b, b, leave_one_out=True, chunk=chunk)[1][:,0], own)
    with pytest.raises(ShapeError, match="33 neighbours"): nearest_neighbours(b, b, k=33, leave_one_out=True)
    with pytest.raises(ShapeError, match="with itself"): nearest_neighbours(a, b, leave_one_out=True)
