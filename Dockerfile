# A machine with a GPU:  docker build -t ibma . && docker run --gpus all -v "$PWD:/work" -w /work ibma train data.npz --out model.safetensors
# PyTorch and its CUDA come with the base image; the host brings the driver and the NVIDIA container toolkit.
ARG BASE=pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime
FROM ${BASE}

WORKDIR /opt/ibma
COPY pyproject.toml README.md LICENSE ./
COPY ibma ./ibma
# the torch of the base image stays: nothing below asks for another one
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/torch.txt \
 && pip install --no-cache-dir -c /tmp/torch.txt ".[media,explain,selection,tensorboard]"

ENV IBMA_CACHE=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["ibma"]
CMD ["--help"]
