"The files that take longest are shared out first, so that no process is left with one of them at the end"
import sys
from pathlib import Path
sys.path.append(str(Path(__file__).resolve().parent.parent/"tools"))
from other_seed import shift_by_environment

shift_by_environment() # Before any test draws a number

LONGEST = ("test_train", "test_site", "test_sample", "test_resume", "test_published", "test_parallel", "test_recipes", "test_checkpoints", "test_autoencoder", "test_logs")

def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: LONGEST.index(o.path.stem) if o.path.stem in LONGEST else len(LONGEST))
