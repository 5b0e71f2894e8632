from pathlib import Path
def materialize(model, cache, progress=None):
    return Path(model.path).expanduser()
