"""Where a model is that a user names, and what a directory is that holds none."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import as_path, read_json
from jaxprune.models.registry import PRESETS

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # as the Hub names them: owner/name
_POINTER = b"version https://git-lfs"


def existing_directory(directory: object, *, download: bool = False) -> pathlib.Path:
    """The path of a model directory.

    Args:
        directory: a path; a folder of the Hub's cache, whose newest snapshot is taken; or a
            repository's name, "owner/name", which is looked for in that cache.
        download: fetch a repository that is not there from the Hub.

    Raises:
        UserError: when it is no directory.
    """
    path = as_path(directory, "The model's directory")
    if path.is_dir():
        return _snapshot(path)
    if path.exists():
        raise UserError(f"{path} is a file; expected the directory of a model.")
    if directory in PRESETS:
        raise UserError(
            f"{directory} is a model's published sizes, without weights: `jaxprune cost` knows it "
            "by this name. Expected the directory of a model."
        )
    if not isinstance(directory, str) or not _REPOSITORY.fullmatch(directory):
        raise UserError(f"{path} does not exist; expected the directory of a model.")
    return _from_hub(directory, download=download)


def _snapshot(path: pathlib.Path) -> pathlib.Path:
    """What a folder of the Hub's cache points to, any other folder as it is."""
    snapshots = path / "snapshots"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = [one for one in snapshots.iterdir() if one.is_dir()]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"{path} is a folder of the Hub's cache with {len(found)} snapshots; name one of those in "
        f"{snapshots}."
    )


def _from_hub(name: str, *, download: bool) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, local_files_only=not download))
    except Exception as error:  # of the network, the Hub, or the cache
        if download:
            raise UserError(f"{name} cannot be fetched from the Hub ({error}).") from None
        raise UserError(
            f"{name} is no directory here, and the Hub's local cache does not hold it; download "
            "it first, or pass download=True (--download)."
        ) from None


@contextlib.contextmanager
def explained(*directories: pathlib.Path | None) -> Iterator[None]:
    """A context whose `UserError` says what a directory is, where it is known to be no model.

    Whatever check fails first on such a directory, its message would be beside the point.
    """
    try:
        yield
    except UserError:
        for directory in directories:
            told = what_it_is(directory) if directory is not None else None
            if told:
                raise UserError(told) from None
        raise


def what_it_is(directory: pathlib.Path) -> str | None:
    """What a directory holds instead of a whole model, and what to do; None: nothing known."""
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        unfinished = [
            path
            for place in (directory, directory / ".cache" / "huggingface" / "download",
                          directory.parent.parent / "blobs")
            for path in place.glob("*.incomplete")
        ]  # fmt: skip
    except OSError:
        return None
    made = [directory / part for part in ("model", "adapter", "llava-lora")]
    made = [path for path in made if path.is_dir()]
    if (directory / "checkpoints" / "run.json").is_file() and made:
        way = "name that" if made[0].name == "model" else "give it as adapter= (--adapter)"
        return f"{directory} is the directory of a training run, which made {made[0]}; {way}."
    names = {path.name for path in files}
    pointers = [path.name for path in files if _starts_with(path, _POINTER)]
    if pointers:
        return (
            f"{pointers[0]} in {directory} is a Git LFS pointer, not the file itself; run "
            "`git lfs pull` there."
        )
    fields = _fields(directory / "config.json")
    quantised = fields.get("quantization_config")
    if isinstance(quantised, dict) or {"quant_config.json", "quantize_config.json"} & names:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        return (
            f"{directory} holds quantised weights ({kind or 'of some kind'}), which are not "
            "supported; get the model as it was before, in 16 or 32 bits."
        )
    if unfinished:
        return f"The download of {directory} was interrupted ({unfinished[0].name}); finish it."
    needed = (".safetensors", ".bin", ".json", ".model")
    empty = [path.name for path in files if path.suffix in needed and not path.stat().st_size]
    if empty:
        return f"{empty[0]} in {directory} is empty; download it again."
    if any(name.endswith(".gguf") for name in names):
        return f"{directory} holds GGUF files, which are not supported; get the safetensors."
    return None


def _starts_with(path: pathlib.Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def _fields(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}
