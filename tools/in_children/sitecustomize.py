"""Python reads this when it starts, where the folder is on PYTHONPATH: a child of a test shifts its seeds, too.

It does so (tools/other_seed.py) when torch has been imported, and imports nothing itself: whether a command needs
torch is among what is tested.
"""
import importlib.util, sys
from pathlib import Path


class AfterTorch:
    "Finds torch as the others would, and shifts the seeds once it is there"
    def find_spec(self, name, path=None, target=None):
        if name != "torch": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        run = spec.loader.exec_module
        def run_and_shift(module):
            run(module)
            sys.path.append(str(Path(__file__).resolve().parent.parent))
            from other_seed import shift_by_environment
            shift_by_environment()
        spec.loader.exec_module = run_and_shift
        return spec


sys.meta_path.insert(0, AfterTorch())
