# An image with dcris that serves the web demo by default; docs/containers.md describes it.
#   docker build -t dcris .
#   docker build -t dcris:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG BASE=docker.io/library/python:3.12-slim-bookworm
FROM ${BASE}

# Where pip finds PyTorch: by default the builds without CUDA. For x86 Linux, those on PyPI have CUDA, and bring its
# libraries, so that the base image needs none.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=web,photos

ENV PATH=/opt/dcris/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# A user without rights. The folder for downloaded models is made here, so that a volume mounted there belongs to it.
RUN useradd --create-home --uid 1000 dcris && install --directory --owner dcris --group dcris /home/dcris/.cache

WORKDIR /tmp/dcris
# First what seldom changes. Without the dependencies of PyTorch: its own index does not have the pinned versions.
COPY constraints.txt ./
RUN python3 -m venv /opt/dcris \
    && pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install -c constraints.txt ".[$EXTRAS]"

USER 1000:1000
ENV HOME=/home/dcris
WORKDIR /home/dcris
EXPOSE 7860
# Of the default command. The model loads first, and downloads if it comes from the Hub.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=9)"]
ENTRYPOINT ["dcris"]
# It ends with a message unless DCRIS_WEB_AUTH has a password: whoever reaches the port could use the model.
CMD ["web", "--host", "0.0.0.0", "--allow-host", "localhost", "--allow-host", "127.0.0.1"]
