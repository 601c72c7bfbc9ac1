"Measures of sets of images: what the cells of 43_metrics.distribution cannot guard"
import json, math
import numpy as np, pytest, torch
from vavae_nb.base.errors import DataError
from vavae_nb.metrics.distribution import (fd_infinity, inception_score, kid, per_class_fd, precision_recall,
                                           sampling_error)
from vavae_nb.metrics.quality import FeatureStats, Measure, frechet_distance
from vavae_nb.base.tensors import generator

def randn(*size, what="x"): return torch.randn(*size, generator=generator(0, what), dtype=torch.float64)
def features(): return 1.1*randn(230, 40, what="samples")+.2, randn(310, 40, what="reference")
OF = dict(extractor="net:abc", name="data:def")

@pytest.mark.parametrize("size,subsets", [(100, 7), (230, 2)])
def test_kid_is_that_of_torch_fidelity(size, subsets):
    theirs = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    a,b = features()
    expected = theirs(a, b, kid_subsets=subsets, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
                      kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1., rng_seed=2020, verbose=False)
    m = kid(a, b, **OF, subsets=subsets, subset_size=size)
    assert m.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert m.settings["subset_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)
    of_floats = kid(a.float().numpy(), b.float().numpy(), **OF, subsets=subsets, subset_size=size)
    assert of_floats.value == pytest.approx(m.value, rel=1e-4)

@pytest.mark.parametrize("chunk", [64, 100, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_torch_fidelity(k, chunk):
    theirs = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    a,b = features()
    expected = theirs(a, b, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    p,r = precision_recall(a, b, **OF, k=k, chunk=chunk)
    assert 0 < p.value < 1 and 0 < r.value < 1
    assert (p.value, r.value) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert (p.n, p.n_reference, p.settings, r.metric) == (230, 310, dict(k=k), "recall")

@pytest.mark.parametrize("scale,offset", [(1., 0.), (1., 1e4), (1e-3, 1.)])
@pytest.mark.parametrize("chunk", [32, 1024])
def test_ties_and_near_ties_are_decided_in_float64(chunk, scale, offset):
    "On a lattice many features lie exactly on a ball's edge, where fp32 cannot say on which side; so do copies"
    g = generator(0, "lattice")
    a,b = (scale*torch.randint(0, 5, (150, 3), generator=g).double()+offset for _ in range(2))
    a[:20] = b[:20]
    def distances(u, v): return (u[:,None]-v).square().sum(2)
    def radius(f): return distances(f, f).kthvalue(4).values
    precision = (distances(a, b) <= radius(b)).any(1).double().mean().item()
    recall = (distances(a, b) <= radius(a)[:,None]).any(0).double().mean().item()
    assert tuple(m.value for m in precision_recall(a, b, **OF, chunk=chunk)) == (precision, recall)

def test_inception_score_is_that_of_torch_fidelity_and_of_adm():
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    z = 3*randn(1037, 12, what="logits")
    expected = theirs(z, splits=10, shuffle=True, rng_seed=2020)
    m = inception_score(z, "net:abc", "torch-fidelity")
    assert m.value == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert m.settings["split_std"] == pytest.approx(expected["inception_score_std"], rel=1e-6)
    z = 3*randn(7000, 12, what="logits")
    adm = [] # As published: consecutive parts of 5,000, probabilities rather than their logarithms
    for part in z.split(5000):
        p = part.softmax(1).numpy()
        adm.append(np.exp((p*(np.log(p)-np.log(p.mean(0)))).sum(1).mean()))
    m = inception_score(z, "net:abc")
    assert m.value == pytest.approx(np.mean(adm), rel=1e-9)
    assert (m.settings["number"], m.settings["split_size"], m.reference) == (2, 5000, "none")
    assert math.isfinite(inception_score(1e4*z[:100], "net:abc").value) # Probabilities of zero

def test_memory_does_not_grow_with_the_product_of_the_sets():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): self.largest = max(self.largest, out.numel())
            return out
    a,b = randn(3000, 4, what="samples"), randn(2000, 4, what="reference")
    with Watch() as w: precision_recall(a, b, **OF, chunk=128)
    assert 128*128 <= w.largest <= 3000*2*3 # Six candidates a row

def test_copies_of_the_reference_have_full_precision():
    a,b = features()
    p,_ = precision_recall(b[:100]+0, b, **OF)
    assert p.value == 1 and p.standard_error == 0

@pytest.mark.parametrize("scale,shift", [(1.3, .2), (1., 0.)])
def test_error_bars_are_the_spread_of_fresh_samples(scale, shift):
    "KID's and the Fréchet distance's, away from the reference and at it"
    b = randn(400, 8, what="reference")
    stats = FeatureStats.of(b)
    draws = [scale*randn(200, 8, what=f"fresh {i}")+shift for i in range(60)]
    def fd_of(f): return frechet_distance(FeatureStats.of(f), stats)
    measured = [kid(f, b, **OF, subsets=10, subset_size=100) for f in draws]
    for values,bars in (([m.value for m in measured], [m.standard_error for m in measured]),
                        ([fd_of(f) for f in draws], [sampling_error(fd_of, f) for f in draws[:15]])):
        assert .7 < np.mean(bars)/np.std(values, ddof=1) < 1.8

def test_extrapolation_is_repeatable_and_removes_most_of_the_bias():
    stats = FeatureStats.from_moments(torch.zeros(10), torch.eye(10), 10**6)
    sets = [randn(400, 10, what=f"set {i}") for i in range(20)] # The true distance is 0
    m = fd_infinity(sets[0], stats, **OF, points=5, repeats=3)
    assert m == fd_infinity(sets[0], stats, **OF, points=5, repeats=3) == Measure(**json.loads(json.dumps(m.to_dict())))
    assert (m.metric, m.n, m.settings["smallest"]) == ("fd_infinity", 400, 200)
    plain = np.mean([frechet_distance(FeatureStats.of(f), stats) for f in sets])
    assert abs(np.mean([fd_infinity(f, stats, **OF, points=5).value for f in sets])) < .3*plain

def test_classes_are_measured_one_by_one():
    a,b = features()
    y,z = torch.arange(230)%3, np.arange(310)%3
    out = per_class_fd(a, y, b, z, **OF, note="guided", metric="fid")
    m = out[1]
    assert list(out) == [0, 1, 2] and (m.n, m.n_reference, m.metric, m.note) == (77, 103, "fid", "class 1; guided")
    assert out[2].value == frechet_distance(FeatureStats.of(a[y == 2]), FeatureStats.of(b[z == 2]))
    one_each = torch.arange(230)
    with pytest.raises(DataError, match="at least 2"): per_class_fd(a, one_each, b[:230], one_each, **OF)
