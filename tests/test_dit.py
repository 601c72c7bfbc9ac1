"LightningDiT against the published implementation's numbers, and in types and orders that its notebooks leave out"
import copy, json, math
from pathlib import Path
import pytest, torch
from torch import nn
from vavae_nb.base.errors import CheckpointError, ConfigError, LabelError, ShapeError
from vavae_nb.dit.blocks import Rope2d, apply_rope, attend, rope_2d
from vavae_nb.dit.model import LightningDiT, create_dit, drop_labels
from vavae_nb.dit.compiling import _try_step, compile_blocks
from vavae_nb.flow.sampler import sample
from vavae_nb.base.tensors import autocast, check_labels, generator, rel_err, test_tensor
from vavae_nb.base.tensor_files import load_into, load_tensors, save_tensors

GOLDEN = Path(__file__).parent/"golden"
# Off unless the header says so
OURS = dict(use_rope="rope", use_qknorm="qk_norm", use_swiglu="swiglu", use_rmsnorm="rmsnorm")
NAMES = ("lightning", "plain_dit", "qknorm_noshift", "layernorm_qknorm_rope")

def golden(name):
    tensors, head = load_tensors(GOLDEN/f"dit_{name}.safetensors")
    config = json.loads(head["config"])
    switches = {ours: config.pop(theirs, False) for theirs,ours in OURS.items()}
    switches["shift"] = not config.pop("wo_shift", False)
    state = {k.removeprefix("state."): v for k,v in tensors.items() if k.startswith("state.")}
    return config | switches, state, tensors

def small(**kw):
    "A model whose every layer does something: nothing is left at zero"
    torch.manual_seed(0)
    model = LightningDiT(**dict(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10) | kw)
    for p in model.parameters():
        if p.requires_grad and p.ndim > 1: nn.init.normal_(p, std=.2)
    gen = generator(0, "test_dit")
    return model, (torch.randn(4, 4, 8, 8, generator=gen), torch.rand(4, generator=gen), torch.tensor([0, 5, 9, 10]))

@pytest.mark.parametrize("name", NAMES)
def test_equals_published(name):
    config, state, tensors = golden(name)
    model = LightningDiT(**config)
    for k in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"): # Our own tables, before they are overwritten
        if k in state: test_tensor(model.state_dict()[k], state[k], rtol=1e-6)
    load_into(model, state, name)
    test_tensor(model.eval()(tensors["x"], tensors["t"], tensors["y"]), tensors["out"], rtol=1e-5)

@pytest.mark.parametrize("size", ["XL", "B", "1p6B"])
def test_published_names_and_shapes(size):
    want = json.loads((GOLDEN/"state_dict_keys.json").read_text(encoding="utf-8"))[f"LightningDiT-{size}/1"]
    with torch.device("meta"): model = create_dit(size)
    assert {k: list(v.shape) for k,v in model.state_dict().items()} == want

def test_initialisation():
    torch.manual_seed(0)
    model = create_dit("tiny", num_classes=10)
    state = model.state_dict()
    for k,v in state.items():
        if "adaLN" in k or k.startswith("final_layer.linear"): assert not v.any(), k
        elif k.endswith("bias"): assert not v.any(), k
        elif k.startswith(("t_embedder", "y_embedder")): assert abs(v.std()/.02-1) < .1, k
        elif v.ndim == 2 and k.startswith("blocks"): # Xavier's uniform: variance 2 / (in + out)
            assert abs(v.std()*(sum(v.shape)/2)**.5-1) < .05, k
    w = state["x_embedder.proj.weight"].flatten(1)
    assert abs(w.std()*(sum(w.shape)/2)**.5-1) < .05
    assert not model.pos_embed.requires_grad

SWITCHES = [dict(), dict(qk_norm=True), dict(qk_norm=True, rmsnorm=False), dict(shift=False),
            dict(swiglu=False, rope=False, rmsnorm=False), dict(patch_size=2, learn_sigma=True)]
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_bf16_autocast_trains(switches):
    model, args = small(**switches)
    with torch.autocast("cpu", torch.bfloat16): out = model(*args)
    exact = model(*args)
    assert (out-exact).norm()/exact.norm() < .03
    out.float().square().mean().backward()
    for k,p in model.named_parameters():
        if p.requires_grad: assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), k

def test_whole_model_in_bf16():
    model, (x, t, y) = small(qk_norm=True)
    exact = model(x, t, y)
    out = model.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16 and (out-exact).norm()/exact.norm() < .05

def test_rope_is_the_textbook_rotation():
    cos, sin = rope_2d(8, 3)
    x = torch.randn(1, 9, 1, 8, generator=generator(0, "rope"))
    turned, i = apply_rope(x, Rope2d(8, 3)())[0,:,0], 5 # Token 5 of a 3x3 grid: row 1, column 2
    for pair, angle in enumerate((1*1., 1*.01, 2*1., 2*.01)): # theta^(-2k/4) = 1, 1/100
        two, c, s = slice(2*pair, 2*pair+2), math.cos(angle), math.sin(angle)
        a, b = x[0,i,0,two]
        test_tensor(turned[i,two], torch.stack([a*c-b*s, b*c+a*s]), rtol=1e-5)
    test_tensor(cos[i,::2], torch.tensor([1., .01, 2., .02]).cos())

def test_attend_is_softmax_and_keeps_type():
    q, k, v = torch.randn(3, 2, 5, 2, 4, generator=generator(0, "attend"))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k)/2).softmax(-1)
    test_tensor(attend(q, k, v), torch.einsum("bhnm,bmhd->bnhd", weights, v), rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16): assert attend(q, k, v.bfloat16()).dtype == torch.bfloat16

def test_condition_is_each_images_own():
    "An image's answer does not depend on its neighbours in the batch"
    model, (x, t, y) = small()
    out = model(x, t, y)
    for i in range(4): test_tensor(model(x[i:i+1], t[i:i+1], y[i:i+1])[0], out[i], rtol=1e-5)
    assert rel_err(model(x, t.flip(0), y), out) > 1e-3 and rel_err(model(x, t, y.flip(0)), out) > 1e-3

def test_no_randomness_and_no_mode():
    model, args = small()
    before = torch.get_rng_state()
    test_tensor(model.train()(*args), model.eval()(*args), rtol=0.)
    assert torch.equal(before, torch.get_rng_state())

def test_copies_are_independent():
    model, args = small()
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin.final_layer.linear.weight.zero_()
    assert model(*args).any() and not twin(*args).any()

def test_drop_labels():
    y = torch.tensor([1, 2, 3], dtype=torch.int32)
    none, all_ = drop_labels(y, 0., 10), drop_labels(y, 1., 10)
    assert none.tolist() == [1, 2, 3] and all_.tolist() == [10]*3 and none.dtype == all_.dtype == torch.int32

@pytest.mark.parametrize("bad", [-1, 11])
def test_labels_out_of_range(bad):
    model, (x, t, y) = small()
    y[2] = bad
    with pytest.raises(LabelError, match=f"label {bad} at index 2 is outside 0…10"): model(x, t, y)
    check_labels(torch.empty(0, dtype=torch.long), 10)

def test_other_latents():
    model, (x, t, y) = small()
    for other in (x[:,:3], x[...,:4], x[0]):
        with pytest.raises(ShapeError, match="built for"): model(other, t, y)
    with pytest.raises(ShapeError, match="one for each latent"): model(x, t[:,None], y)

IMPOSSIBLE = [(dict(num_heads=3), "not divisible by num_heads 3"), (dict(hidden_size=36), "multiple of 4"),
              (dict(hidden_size=34, rope=False), "multiple of 4"), (dict(patch_size=3), "patch_size 3"),
              (dict(num_classes=0), "num_classes is 0")]
@pytest.mark.parametrize("kw,match", IMPOSSIBLE, ids=str)
def test_impossible_sizes(kw, match):
    with pytest.raises(ConfigError, match=match): small(**kw)

def test_checkpoints(tmp_path):
    model, args = small(qk_norm=True, shift=False)
    path = tmp_path/"m.safetensors"
    model.save(path, dict(latent_mean=[.5]), ema=model.state_dict() | {"final_layer.linear.bias": torch.ones(4)})
    test_tensor(LightningDiT.load(path)(*args), model(*args)+1, rtol=1e-6)
    model.save(path)
    loaded = LightningDiT.load(path)
    assert loaded.meta == {} and loaded.config == model.config
    test_tensor(loaded(*args), model(*args), rtol=0.)
    part = {k: v for k,v in model.state_dict().items() if k != "pos_embed"}
    with pytest.raises(CheckpointError, match="pos_embed"): model.save(path, ema=part)
    test_tensor(LightningDiT.load(path)(*args), model(*args), rtol=0.) # The refused save left the file alone
    save_tensors(path, model.state_dict(), {})
    with pytest.raises(CheckpointError, match="not written by"): LightningDiT.load(path)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_equals_published(name):
    config, state, tensors = golden(name)
    model = LightningDiT(**config)
    load_into(model, state, name)
    x, t, y = (tensors[k].cuda() for k in ("x", "t", "y"))
    test_tensor(model.cuda()(x, t, y), tensors["out"], rtol=1e-4)
    with torch.autocast("cuda", torch.bfloat16): out = model(x, t, y).cpu()
    assert (out-tensors["out"]).norm()/tensors["out"].norm() < .02

@pytest.mark.parametrize("kw", [{}, dict(swiglu=False, rmsnorm=False, rope=False, learn_sigma=True)], ids=str)
def test_nothing_breaks_the_graph(kw): # Traced whole or refused (fullgraph); the backend runs what was traced
    (model, (x, t, y)), plain = small(**kw), small(**kw)[0]
    assert compile_blocks(model.train(), 4, "fp32", "eager") == ""
    for n in (4, 3, 1): torch.testing.assert_close(model(x[:n], t[:n], y[:n]), plain(x[:n], t[:n], y[:n]))
    options = dict(y=y[:3], latent_shape=(4, 8, 8), null_class=10, n_points=5, progress=False,
                   cfg_scale=2., cfg_interval=(.3, .8)) # Guided and not: two sizes of batch
    with torch.no_grad(): torch.testing.assert_close(*(sample(m.eval(), **options) for m in (model, plain)))

@pytest.mark.slow
def test_compiled_equals_eager_in_bf16():
    model, (x, t, y) = small()
    def both():
        model.zero_grad()
        with autocast(x.device, "bf16"): out = model(x, t, y)
        out.float().square().mean().backward()
        return out.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    eager = both()
    assert compile_blocks(model.train(), 4, "bf16") == ""
    (out, grad), (out0, grad0) = both(), eager
    assert rel_err(out, out0) < 1e-3 and rel_err(grad, grad0) < 1e-2 # bf16 is 1e-2 from fp32, in both

def test_a_failing_backward_of_the_trial_leaves_no_gradients():
    model = LightningDiT(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3).train()
    def fail(module, gradients): raise RuntimeError("no memory for the backward pass")
    model.blocks[0].register_full_backward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"): _try_step(model, 2, "fp32")
    assert all(p.grad is None for p in model.parameters())
