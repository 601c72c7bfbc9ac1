"Uniformity of latents: what the cells of 42_metrics.uniformity cannot guard"
import json
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from scipy.stats import gaussian_kde
from threadpoolctl import threadpool_info
from vavae_nb.base.errors import DataError, ShapeError
from vavae_nb.metrics.uniformity import (density_cv, gini, kde_at_points, knn_distance_cv, latent_vectors,
                                         normalised_entropy, plot_density, tsne_2d, uniformity)
from vavae_nb.base.tensors import generator, test_tensor

def randn(*size, what="x", **kw): return torch.randn(*size, generator=generator(0, what), **kw)

@pytest.mark.parametrize("d,chunk", [(1, 1024), (2, 7), (3, 50)])
def test_kde_is_that_of_scipy(d, chunk):
    mixed = randn(50, d, dtype=torch.float64)@randn(d, d, what="mix", dtype=torch.float64)
    x = mixed*torch.tensor([1e-3, 1., 1e3], dtype=torch.float64)[:d] + 1e3
    expected = torch.from_numpy(gaussian_kde(x.T.numpy())(x.T.numpy()))
    assert (kde_at_points(x, chunk)/expected-1).abs().max() < 1e-6

@pytest.mark.parametrize("bad", [torch.zeros(10, 2), torch.eye(2), torch.full((10, 2), float("nan"))])
def test_kde_refuses_what_has_no_density(bad):
    with pytest.raises(DataError, match="singular"): kde_at_points(bad)

def test_one_position_of_each_image():
    "Each vector is one that its image holds, each image is taken once, and all positions are used"
    N,h,w = 400, 2, 3
    image = torch.arange(N).view(-1, 1, 1).expand(N, h, w)
    position = torch.arange(h*w).view(1, h, w).expand(N, h, w)
    z = torch.stack([image, position], 1).float()
    v = latent_vectors(z, N, generator(0, "v"))
    def raw(channel, n): # Undo the normalisation
        x = v[:,channel]
        return ((x-x.min())/(x.max()-x.min())*(n-1)).round().long()
    assert torch.equal(raw(0, N).sort().values, torch.arange(N))
    counts = raw(1, h*w).bincount()
    assert len(counts) == h*w and counts.min() > N/(h*w)/2
    assert not torch.equal(v, latent_vectors(z, N, generator(1, "v")))

def test_vectors_of_half_precision_are_float32():
    v = latent_vectors(randn(50, 4, 2, 2).bfloat16(), 20, generator(0, "v"))
    assert v.dtype == torch.float32 and v.shape == (20, 4)
    for n in (1, 51):
        with pytest.raises(DataError, match="between 2 and the 50"): latent_vectors(randn(50, 4, 2, 2), n)

def test_measures_of_random_densities():
    p = randn(60, dtype=torch.float64).exp()
    q = p.numpy()
    assert density_cv(p) == pytest.approx(q.std()/q.mean())
    assert gini(p) == pytest.approx(np.abs(q[:,None]-q).sum()/(2*len(q)**2*q.mean()))
    assert normalised_entropy(p) == pytest.approx(-(q/q.sum()*np.log2(q/q.sum())).sum()/np.log2(len(q)))
    for f in (density_cv, gini, normalised_entropy):
        assert f(1e6*p) == pytest.approx(f(p)) and f(p.flip(0)) == pytest.approx(f(p)) # Neither scale nor order counts
        for bad in (torch.zeros(5), torch.tensor([1., float("nan")]), torch.ones(1)):
            with pytest.raises(DataError): f(bad)

def test_uniformity_is_repeatable_and_its_runs_are_independent():
    z = randn(150, 4, 2, 2)
    u = uniformity(z, n=100, runs=2, seed=3)
    assert u == json.loads(json.dumps(u)) == uniformity(z, n=100, runs=2, seed=3)
    one,two = (uniformity(z, n=100, runs=1, seed=s) for s in (3, 4))
    assert one["gini_std"] is None and one["gini"] != two["gini"]
    for k in ("density_cv", "gini", "normalised_entropy", "knn_distance_cv"):
        assert u[k] == pytest.approx((one[k]+two[k])/2) and u[k+"_std"] == pytest.approx(abs(one[k]-two[k])/2**.5)
    assert (u["n"], u["runs"], u["seed"], u["perplexity"], u["protocol"]) == (100, 2, 3, 30., "quick variant")
    with pytest.raises(DataError, match="runs=0"): uniformity(z, n=100, runs=0)

def test_the_published_protocol_is_the_default(monkeypatch):
    seen = []
    def tsne_2d(v, seed, perplexity):
        seen.append((tuple(v.shape), seed, perplexity))
        return v[:, :2]
    monkeypatch.setattr("vavae_nb.metrics.uniformity.tsne_2d", tsne_2d)
    monkeypatch.setattr("vavae_nb.metrics.uniformity.kde_at_points", lambda y: torch.ones(len(y)))
    monkeypatch.setattr("vavae_nb.metrics.uniformity.knn_distance_cv", lambda v: 0.)
    u = uniformity(randn(10001, 4, 2, 2))
    assert sorted(seen) == [((10000, 4), run, 30.) for run in range(10)] # Side by side, in any order
    assert (u["protocol"], u["density_cv"], u["density_cv_std"]) == ("as published", 0., 0.)
    assert u["tsne"].startswith("scikit-learn")

def test_tsne_gives_the_threads_back():
    def threads(): return {t["filepath"]: t["num_threads"] for t in threadpool_info()}
    before = threads()
    tsne_2d(randn(100, 3), 0)
    assert before == {k: n for k,n in threads().items() if k in before}
    with pytest.raises(ShapeError): tsne_2d(randn(100, 3, 1), 0)

@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_distance_is_that_of_the_whole_matrix(chunk):
    x = randn(40, 5, dtype=torch.float64)
    d = (x[:,None]-x[None]).norm(dim=-1).sort(1).values[:,3]
    assert knn_distance_cv(x, k=3, chunk=chunk) == pytest.approx((d.std(correction=0)/d.mean()).item())
    with pytest.raises(DataError, match="all zero"): knn_distance_cv(torch.ones(10, 2))

def test_plot_draws_where_it_is_told():
    y = randn(30, 2)
    _,ax = plt.subplots()
    assert plot_density(y, kde_at_points(y), ax) is ax
    assert plot_density(y, kde_at_points(y)) is not ax
    assert len(ax.collections[0].get_offsets()) == 30
    plt.close("all")
