"""Package metadata. The folder ``kernels/`` holds the import package ``dfn_kernels``; tool settings: pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxscript", "onnxruntime"]
NOTEBOOK = ["nbclient", "ipykernel"]
TEST = [
    "pytest>=8",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "nvidia-ml-py",
    "ruff",
    "mypy",
    "scipy",  # writes and reads the .mat files of SBD
    "pycocotools",
    *NOTEBOOK,  # the notebook of examples/ is executed by a test
    *EXPORT,  # ONNX Runtime is the second opinion on exported networks
]

VERSION: dict[str, str] = {}
exec(Path(__file__).with_name("dfn_fast").joinpath("version.py").read_text(encoding="utf-8"), VERSION)

setup(
    name="dfn-fast",
    version=VERSION["__version__"],
    description="Discriminative Feature Network for semantic segmentation, with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    entry_points={"console_scripts": ["dfn = dfn_fast.__main__:script"]},
    package_data={"dfn_fast": ["py.typed"], "dfn_kernels": ["py.typed"]},
    packages=[*find_packages(include=["dfn_fast", "dfn_fast.*"]), *find_packages("kernels")],
    package_dir={"dfn_kernels": "kernels/dfn_kernels"},
    install_requires=[
        "torch>=2.7",
        'triton; platform_system == "Linux"',
        "numpy",
        "opencv-python",
        "pillow",  # the only one of the image libraries here that reads and writes palette PNG
        "matplotlib",
        "tqdm",
        "safetensors",
    ],
    extras_require={
        "test": TEST,
        "sbd": ["scipy"],
        "coco": ["pycocotools"],
        "export": EXPORT,
        "tensorboard": ["tensorboard"],
        "docs": ["mkdocs-material"],
        "notebook": NOTEBOOK,
    },
)
