# docker build -t moco-scale .                                            for GPUs
# docker build --build-arg BASE=python:3.12 -t moco-scale-cpu .           for CPUs
# How to run it: docs/install.md.
ARG BASE=pytorch/pytorch:2.14.1-cuda13.0-cudnn9-runtime
FROM ${BASE}

# --compile needs a compiler of C++.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY moco_scale /src/moco_scale
# The base's torch stays where it is new enough. Debian keeps pip out of its Python unless told.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir '/src[remote]' && rm -rf /src

WORKDIR /work
CMD ["moco-scale", "--help"]
