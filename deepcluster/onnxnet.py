"""A network in an ONNX file, run by onnxruntime: images in, features out, nothing to train (extra ``onnx``).

Its bytes are a buffer, so that a model holds them like any weights. Such a file is a graph of known operators, no
code; one that keeps its weights in other files is refused, since those could be any file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FREE = "export it with a free batch size, in torch.onnx.export: dynamic_axes={INPUT: {0: 'batch'}}"


class OnnxNet(nn.Module):
    """Images (B, 3, H, W), normalised -> features (B, dim); a map (B, dim, h, w) is averaged. Gives no gradient.

    Attributes:
        model: uint8 bytes of the file, none until they are loaded.
        dim: width of the features.
        size: pixels a side; None where the file takes any.
        channels: of the images.
    """

    def __init__(self, data: bytes = b"", dim: int = 0):
        super().__init__()
        self.model: Tensor
        self.register_buffer(
            "model", torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NOTHING.clone()
        )
        self.dim, self.channels = dim, 3
        self.size: int | None = None
        self._session: Any = None
        if data:
            self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def _open(self) -> Any:
        """The session of these bytes, checked when it is made.

        Raises:
            ValueError: they are no network that gives features of this width.
        """
        if self._session is None:
            self._session = _session(self.model.cpu().numpy().tobytes())
            self.channels, self.size = _input(self._session)
            side = self.size or 224
            wide = self._run(np.zeros((2, self.channels, side, side), np.float32)).shape[1]
            if self.dim not in (0, wide):
                raise ValueError(f"the ONNX network gives {wide} features, not {self.dim}")
            self.dim = wide
        return self._session

    def _run(self, images: np.ndarray) -> Tensor:
        try:
            out = self._session.run(None, {self._session.get_inputs()[0].name: images})[0]
        except Exception as error:  # onnxruntime has kinds of its own
            shape, reason = "x".join(map(str, images.shape[1:])), " ".join(str(error).split())[:120]
            raise ValueError(
                f"the ONNX network does not work on {shape} images: {reason}; see its --image-size"
            ) from error
        if not isinstance(out, np.ndarray) or out.dtype.kind != "f" or out.ndim not in (2, 4):
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise ValueError(
                f"the ONNX network gives {got}; export one that gives float features (B, D) or (B, D, h, w)"
            )
        features = torch.from_numpy(out.astype(np.float32))
        return features.mean((2, 3)) if features.ndim == 4 else features

    def forward(self, images: Tensor) -> Tensor:
        self._open()
        return self._run(images.detach().float().cpu().numpy()).to(images.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "model")
        if isinstance(saved, Tensor) and saved.dtype == torch.uint8 and saved.ndim == 1:
            self.model, self._session = saved.detach().clone().to(self.model.device), None
        super()._load_from_state_dict(state_dict, prefix, *rest)


_NOTHING = torch.zeros(0, dtype=torch.uint8)


def read(file: Path) -> OnnxNet:
    """The network in a file.

    Raises:
        ValueError: no such file, or it cannot serve as a backbone; says what to do.
    """
    if not file.is_file():
        raise ValueError(f"no ONNX file {file}; give one that is on this machine")
    try:
        return OnnxNet(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _session(data: bytes) -> Any:
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'deepcluster[onnx]'") from None
    try:
        found = onnx.load_from_string(data)
    except Exception as error:  # protobuf's own kinds
        raise ValueError("it is no ONNX file, or a damaged one") from error
    if any(one.data_location == onnx.TensorProto.EXTERNAL for one in _tensors(found, onnx.TensorProto)):
        raise ValueError("its weights lie in other files; make one file of them: onnx.save(onnx.load(FILE), NEW)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot open it: {' '.join(str(error).split())[:150]}") from error
    if len(outputs := [one.name for one in session.get_outputs()]) != 1:
        what = f"onnx.utils.extract_model(FILE, NEW, [{session.get_inputs()[0].name!r}], [{outputs[0]!r}])"
        raise ValueError(f"it has several outputs ({', '.join(outputs)[:100]}); keep the features only: {what}")
    return session


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """Every tensor in a protocol buffer, however deep."""
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                yield from _tensors(one, kind)


def _input(session: Any) -> tuple[int, int | None]:
    """Channels, and pixels a side or None for any, of the images a network takes."""
    given = session.get_inputs()
    shape = list(given[0].shape)
    fixed = [one if isinstance(one, int) and one > 0 else None for one in shape]
    if len(given) != 1 or len(shape) != 4 or given[0].type != "tensor(float)":
        raise ValueError(f"it takes {len(given)} inputs, the first {given[0].type} {shape}; it must take float images "
                         "(B, C, H, W) only")  # fmt: skip
    if fixed[0] is not None:
        raise ValueError(f"its batch is fixed at {fixed[0]}; {FREE}")
    if fixed[1] not in (1, 3, None) or fixed[2] != fixed[3]:
        raise ValueError(f"it takes images {shape}; it must take square ones of 1 or 3 channels, channels first")
    return fixed[1] or 3, fixed[2]
