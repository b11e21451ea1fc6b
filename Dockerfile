# syntax=docker/dockerfile:1
# docker build --target gpu -t megatron_srpo .       training on H100s, with SGLang in an environment of its own (/opt/sglang)
# docker build --target cpu -t megatron_srpo:cpu .   the laptop's: quick start and tests
# SGLang does not share the trainer's packages: it is spoken to over HTTP, and pins its own torch.

FROM python:3.11-slim-bookworm AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /workspace/megatron_srpo
RUN useradd --create-home --uid 1000 srpo && chown srpo:srpo /workspace/megatron_srpo
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY --chown=srpo:srpo setup.py pyproject.toml README.md LICENSE ./
COPY --chown=srpo:srpo megatron_srpo megatron_srpo
RUN pip install --editable ".[test,tasks]"
COPY --chown=srpo:srpo tools tools
COPY --chown=srpo:srpo examples examples
COPY --chown=srpo:srpo tests tests
USER 1000
ENV OMP_NUM_THREADS=1
CMD ["python", "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml", "logging.dir=/tmp/quickstart"]

FROM nvcr.io/nvidia/pytorch:25.10-py3 AS sglang
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# PIP_CONSTRAINT: the image's pins are for its own torch, and would forbid SGLang's.
RUN python -m venv /opt/sglang && PIP_CONSTRAINT='' /opt/sglang/bin/pip install "sglang[all]==0.5.23"

FROM nvcr.io/nvidia/pytorch:25.10-py3 AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /workspace/megatron_srpo
RUN userdel --remove ubuntu 2>/dev/null || true; useradd --create-home --uid 1000 srpo && chown srpo:srpo /workspace/megatron_srpo
COPY --from=sglang /opt/sglang /opt/sglang
COPY --chown=srpo:srpo setup.py pyproject.toml README.md LICENSE ./
COPY --chown=srpo:srpo megatron_srpo megatron_srpo
# torch, Transformer Engine and apex are the image's: its constraints keep them as they are.
RUN pip install --editable ".[tasks]"
COPY --chown=srpo:srpo tools tools
COPY --chown=srpo:srpo examples examples
COPY --chown=srpo:srpo tests tests
USER 1000
ENV SGLANG_PYTHON=/opt/sglang/bin/python
CMD ["python", "-m", "megatron_srpo", "--help"]
