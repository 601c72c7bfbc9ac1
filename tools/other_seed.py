"""Another seed for everything random, by $OTHER_SEED: what holds for the seeds in notebooks and tests only does not hold.

Every whole number that seeds a generator of Python, numpy or torch becomes another one: equal seeds stay equal,
different ones different.
So it is in this process and in the Python processes that it starts, so that what both of them draw stays the same.
"""
import os, random
from pathlib import Path

CHILDREN = str(Path(__file__).resolve().parent/"in_children")


def shift_seeds(
    by:int, # 0: nothing is changed
):
    "Replace the ways to seed a generator by ones that seed it otherwise"
    if not by: return
    import numpy as np, torch # Which may shift them already: see in_children
    if hasattr(random, "seeds_shifted"): return # A second time would undo the first
    random.seeds_shifted = True
    mask = by*0x9E3779B1 & 0x7FFFFFFF
    other = lambda seed: seed ^ mask if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) else seed

    def shifted(f): return lambda seed=None, *args, **kw: f(other(seed), *args, **kw)

    class Generator(torch.Generator):
        def manual_seed(self, seed): return super().manual_seed(other(seed))

    class Philox(np.random.Philox):
        def __init__(self, *args, key=None, **kw): super().__init__(*args, key=other(key), **kw)

    class RandomState(np.random.RandomState):
        def __init__(self, seed=None): super().__init__(other(seed))

    class Random(random.Random):
        def __new__(cls, seed=None): return super().__new__(cls)
        def __init__(self, seed=None): super().__init__(other(seed))

    torch.Generator, np.random.Philox, np.random.RandomState, random.Random = Generator, Philox, RandomState, Random
    torch.manual_seed = torch.random.manual_seed = shifted(torch.manual_seed)
    np.random.default_rng, np.random.seed, random.seed = map(shifted, (np.random.default_rng, np.random.seed, random.seed))


def shift_by_environment():
    "By $OTHER_SEED, here and in children"
    by = int(os.environ.get("OTHER_SEED") or 0)
    shift_seeds(by)
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]
    if by and CHILDREN not in folders: os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *folders])
