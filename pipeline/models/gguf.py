"""GGUF checkpoints, converted once to an ordinary model folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.cache import Progress, build_once, content_key
from accrete.pipeline.models.saving import save_model_folder

PACKAGES = ("gguf", "tokenizers", "transformers")


def convert_gguf(
    source: str, gguf_file: str, revision: str | None, cache: Path, progress: Progress
) -> Path:
    """An ordinary folder of a GGUF checkpoint; made once and kept in the cache.

    Args:
        source: Folder or hub id that holds the file.
        gguf_file: Name of the file in it.
        revision: Hub revision.
        cache: Cache folder.
        progress: Told what takes time.

    Raises:
        ModelError: The file is missing or transformers cannot read it.
    """
    folder = Path(source).expanduser()
    identity: dict[str, object] = {"source": source, "file": gguf_file, "revision": revision}
    if folder.is_dir():
        file = folder / gguf_file
        if not file.is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
            raise ModelError(
                f"model.gguf_file {gguf_file}: there is no such file in {folder}. GGUF files "
                f"there: {found}."
            )
        state = file.stat()
        # Hashing gigabytes at every start would take longer than loading them.
        identity |= {
            "source": str(folder.resolve()),
            "bytes": state.st_size,
            "time": state.st_mtime_ns,
        }
        source = str(folder)
    key = content_key(identity, files=[Path(__file__)], packages=PACKAGES)
    target = cache / "models" / f"gguf-{Path(gguf_file).stem}-{key}"
    return build_once(
        target, partial(write_folder, source, gguf_file, revision, progress), progress
    )


def write_folder(
    source: str, gguf_file: str, revision: str | None, progress: Progress, out: Path
) -> None:
    """Write configuration, weights and tokenizer of a GGUF checkpoint into a folder.

    The weights are written in fp32, which holds the dequantized values exactly; in bf16 or fp16
    they would be rounded once more.

    Args:
        source: Folder or hub id that holds the file.
        gguf_file: Name of the file in it.
        revision: Hub revision.
        progress: Told what takes time.
        out: Existing folder.

    Raises:
        ModelError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(f"Converting {gguf_file} to an ordinary model folder (once) ...")
    where = {"gguf_file": gguf_file} | ({"revision": revision} if revision else {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where)
    except Exception as error:  # a cut file raises struct.error, an odd one KeyError, ...
        raise ModelError(
            f"{source}/{gguf_file}: transformers cannot read it: {type(error).__name__}: {error}. "
            "It must be a GGUF file of an architecture that transformers supports."
        ) from error
    settings = loaded.config
    # The loaded model still counts as quantized, which forbids saving it: a fresh one does not.
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    settings.dtype = torch.float32
    plain = type(loaded)(settings).to(torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    save_model_folder(plain, tokenizer, out)
