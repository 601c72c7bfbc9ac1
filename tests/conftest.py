"The files that take longest are shared out first, so that no process is left with one of them at the end"
LONGEST = ("test_train", "test_site", "test_sample", "test_resume", "test_published", "test_parallel", "test_recipes", "test_checkpoints", "test_autoencoder", "test_logs")

def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: LONGEST.index(o.path.stem) if o.path.stem in LONGEST else len(LONGEST))
