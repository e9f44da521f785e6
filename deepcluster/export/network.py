"""The trained model for elsewhere: as this package reads it, or as ONNX."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from deepcluster import __version__
from deepcluster.classifier import Classifier
from deepcluster.export.task import Task

LARGEST = 2**31 - 1  # bytes of one protocol buffer
OUTPUTS = ("features", "probabilities", "cluster")


def model(task: Task) -> str:
    """A copy of RUN/model, checked by loading it."""
    classifier = _classifier(task)
    classifier.save(task.new)
    return f"the model, for DeepCluster.from_pretrained, with {len(classifier.steps)} edits"


def onnx(task: Task) -> str:
    """`images` (B, C, H, W) float32 in [0, 1], or vectors (B, D) -> `features`, `probabilities` (B, K'), `cluster`.

    B is free. Metadata: names (JSON list by id), junk (JSON list of ids), shape (JSON list of C, H, W), version.

    Raises:
        ValueError: the extra is not installed, the backbone is an ONNX file itself, or the model is larger than such a
            file can be.
    """
    try:
        import onnx as library
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'deepcluster[onnx]'") from None

    classifier = _classifier(task)
    if classifier.spec.backbone.startswith("onnx:"):
        raise ValueError(
            "the backbone of this run is an ONNX file, which cannot go into another one; use --format model, or "
            "--format npy for the features"
        )
    shape = classifier.spec.shape
    if sum(tensor.nbytes for tensor in classifier.state_dict().values()) > LARGEST:
        raise ValueError("the model is larger than the 2 GB an ONNX file can hold; use --format model")
    with _quiet():
        program: Any = torch.onnx.export(
            classifier,
            (torch.rand(2, *shape),),
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    made = program.model_proto
    if made.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise RuntimeError("the batch size got fixed in the ONNX model")
    about = {"names": classifier.names, "junk": sorted(classifier.junk), "shape": shape}
    facts = {**{key: json.dumps(value) for key, value in about.items()}, "version": __version__}
    library.helper.set_model_props(made, facts)
    library.checker.check_model(made)
    task.new.write_bytes(made.SerializeToString())
    return f"the model for ONNX, images {tuple(shape)} -> {', '.join(OUTPUTS)}"


def _classifier(task: Task) -> Classifier:
    return Classifier.load(task.run / "model", torch.device("cpu")).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter remarks on its own workings, by warnings and by logging."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
