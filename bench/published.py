"""The published formulation of LightningDiT, as the baseline of the scripts beside: the same weights, the paper's way.

Written from the paper and pinned by the golden vectors (tests/test_bench.py): norms in plain operations, a rotation of
queries and of keys each by tables of interleaved cosines and sines, an average of the weights tensor by tensor,
guidance that computes both halves at every step. Everything is a function of one of our models, so the weights are the
same; of its code only the parameters are used (and the patches' order).
"""
from contextlib import nullcontext
import torch, torch.nn.functional as F
from torchdiffeq import odeint
from vavae_nb.dit.model import unpatchify

def rms_norm(norm, x):
    y = x.float()
    return (y*torch.rsqrt(y.pow(2).mean(-1, keepdim=True)+norm.eps)).type_as(x)*norm.weight

def rotate(x, cos, sin): # (b, heads, n, head_dim), and two tables (n, head_dim)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x*cos + torch.stack([-b, a], -1).flatten(-2)*sin

def attention(attn, x, cos, sin):
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def modulated(x, shift, scale): return x*(1+scale.unsqueeze(1))+shift.unsqueeze(1)

def swiglu(mlp, x):
    a, b = mlp.w12(x).chunk(2, -1)
    return mlp.w3(F.silu(a)*b)

def block(b, x, c, cos, sin):
    shift1, scale1, gate1, shift2, scale2, gate2 = b.adaLN_modulation(c).chunk(6, 1)
    x = x + gate1.unsqueeze(1)*attention(b.attn, modulated(rms_norm(b.norm1, x), shift1, scale1), cos, sin)
    return x + gate2.unsqueeze(1)*swiglu(b.mlp, modulated(rms_norm(b.norm2, x), shift2, scale2))

def forward(model, x, t, y, block=block):
    "Velocity, (b, d, h, w), of a LightningDiT with all of the paper's tricks; `block` may be compiled"
    x = model.x_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed
    angle = t[:, None].float()*10000.**-(torch.arange(128, device=x.device)/128)
    c = model.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1)) + model.y_embedder.embedding_table(y)
    for b in model.blocks: x = block(b, x, c, model.feat_rope.freqs_cos, model.feat_rope.freqs_sin)
    last = model.final_layer
    shift, scale = last.adaLN_modulation(c).chunk(2, 1)
    return unpatchify(last.linear(modulated(rms_norm(last.norm_final, x), shift, scale)), model.patch_size)

def losses(out, target):
    "The squared error and the direction loss of each sample"
    return (out-target).square().flatten(1).mean(1), (1-F.cosine_similarity(out, target, dim=1)).flatten(1).mean(1)

@torch.no_grad()
def update_ema(average, model, decay=.9999): # A dictionary of tensors by name
    for name,p in model.named_parameters(): average[name].mul_(decay).add_(p.data, alpha=1-decay)

def guided(model, x, t, y, null_class, scale, start, channels=3, forward=forward):
    "Velocity of a doubled state: both halves at every time, the first channels guided from `start` on"
    half, times = x[:len(x)//2], torch.full((len(x),), t, device=x.device)
    out = forward(model, torch.cat([half, half]), times, torch.cat([y, torch.full_like(y, null_class)]))
    front, rest = out[:, :channels], out[:, channels:]
    cond, uncond = front.chunk(2)
    front = cond if t < start else uncond+scale*(cond-uncond)
    return torch.cat([torch.cat([front, front]), rest], 1)

@torch.no_grad()
def sample(model, y, noise, ts, null_class, scale, start, channels=3):
    "Latents by Euler steps over the times, from a trajectory that is kept whole"
    def velocity(t, x): return guided(model, x, t.item(), y, null_class, scale, start, channels)
    return odeint(velocity, torch.cat([noise, noise]), ts, method="euler")[-1].chunk(2)[0]

def training_step(model, average, opt, xt, t, y, target, block=block, cast=nullcontext):
    "Forward, backward, optimizer and average; the loss as a number, which waits for the device"
    with cast(): out = forward(model, xt, t, y, block)
    mse, cos = losses(out.float(), target)
    loss = mse.mean()+cos.mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    update_ema(average, model)
    return loss.item()
