"""The tensors of a checkpoint directory, by name, without reading them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxprune.errors import UserError, first_line
from jaxprune.files import as_path, read_json

FLOATS = ("float64", "float32", "float16", "bfloat16")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk; `read()` returns it as a numpy array of its own dtype."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def stored_tensors(directory: pathlib.Path) -> list[StoredTensor]:
    """Every tensor of a directory, from the files that `transformers` 5 would take.

    These are the first of model.safetensors, the shards of its index, pytorch_model.bin, the
    shards of its index. Of shards everything counts that is in them, whatever the index says,
    and of two with a tensor of one name the later one.

    Raises:
        UserError: for a directory without weights, a missing shard, or a broken file.
    """
    for suffix, open_file in ((".safetensors", _open_safetensors), (".bin", _open_bin)):
        paths = _weight_files(directory, suffix)
        if paths:
            found = {tensor.key: tensor for path in paths for tensor in open_file(path)}
            return list(found.values())
    raise UserError(
        f"{directory} has no weights; expected model.safetensors, sharded safetensors with "
        "their index, or pytorch_model.bin."
    )


def open_tensors(path: pathlib.Path) -> Iterator[StoredTensor]:
    """The tensors of a single file."""
    return _open_bin(path) if path.suffix == ".bin" else _open_safetensors(path)


def _weight_files(directory: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    single, index = directory / f"{stem}{suffix}", directory / f"{stem}{suffix}.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no 'weight_map'; download it again.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        inside = pathlib.PurePath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"{index} points outside its directory ({name!r}); refused.")
        if not as_path(directory / name, "A shard").exists():
            raise UserError(f"{directory} lacks the shard {name} that its index names.")
    return [directory / name for name in names]


def _open_safetensors(path: pathlib.Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  safe_open is no dict
            headers = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); download it again."
        ) from None
    for key, (shape, dtype) in headers.items():
        yield StoredTensor(key, shape, _DTYPES.get(dtype, dtype), _safetensor_reader(path, key))


def _safetensor_reader(path: pathlib.Path, key: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # Opened anew for every tensor: a file kept mapped counts as memory, page by page.
        with safe_open(path, framework="np") as file:
            tensor: np.ndarray = file.get_tensor(key)
            return tensor

    return read


def _open_bin(path: pathlib.Path) -> Iterator[StoredTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch pickle, which is read through torch's weights-only loader "
            "alone; install torch, or convert the file to safetensors."
        ) from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a broken or unsafe pickle
        raise UserError(
            f"torch's weights-only loader refuses {path} ({first_line(error)})."
        ) from None

    def reader(tensor: "torch.Tensor") -> Callable[[], np.ndarray]:
        if tensor.dtype == torch.bfloat16:
            return lambda: tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return lambda: tensor.contiguous().numpy()

    for name in ("state_dict", "model_state_dict"):  # how training loops wrap their weights
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path} holds no plain dict of tensors; expected a state dict.")
    for key, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield StoredTensor(key, tuple(tensor.shape), dtype, reader(tensor))
