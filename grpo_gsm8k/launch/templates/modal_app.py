"""A model on Modal: vLLM's OpenAI-compatible server on a GPU that is rented only while somebody asks.

Written by `grpo-gsm8k export --modal`. Once:

    uvx modal==1.6.4 setup                                                       # this machine's Modal token
    uvx modal==1.6.4 secret create grpo-model-key VLLM_API_KEY=$(openssl rand -hex 32)
    uvx modal==1.6.4 run modal_app.py                                            # uploads ./model to the volume
    uvx modal==1.6.4 deploy modal_app.py                                         # prints the address

Nobody without the key gets an answer, and with PROXY_AUTH nobody without a proxy token of your workspace even starts
the GPU. `modal_client.py` sends both. GET /health answers once the model is loaded.
"""

import subprocess
from pathlib import Path

import modal

# ---- settings
NAME = "grpo-model"  # of the app, and of the model in requests
SECRET = "grpo-model-key"  # a Modal secret with VLLM_API_KEY
VOLUME = "grpo-model-weights"
MODEL = ""  # a name on the Hugging Face hub; empty: ./model, uploaded
REVISION = ""  # of a hub model
HUB_SECRET = ""  # a Modal secret with HF_TOKEN, for a gated model on the hub
GPU = "L4"
GPUS = 1
DTYPE = "auto"
MAX_MODEL_LEN = 0  # 0: as long as the model's context
SCALEDOWN_S = 300  # idle seconds after which the GPU is given back
MOST_CONTAINERS = 1
PROXY_AUTH = True
VLLM = "0.32.0"
TRANSFORMERS = "5.19.0"
# ---- end of settings

PORT = 8000
UPLOADED = "/weights/model"

image = (
    modal.Image.from_registry("nvidia/cuda:13.0.1-devel-ubuntu24.04", add_python="3.12")
    .entrypoint([])  # the image's own prints a banner
    .uv_pip_install(f"vllm=={VLLM}", f"transformers=={TRANSFORMERS}")
    .env({"HF_HOME": "/weights/hub", "VLLM_CACHE_ROOT": "/weights/vllm"})  # kept on the volume: a faster next start
)
app = modal.App(NAME)
weights = modal.Volume.from_name(VOLUME, create_if_missing=True)
secrets = [modal.Secret.from_name(SECRET, required_keys=["VLLM_API_KEY"])]
if HUB_SECRET:
    secrets.append(modal.Secret.from_name(HUB_SECRET, required_keys=["HF_TOKEN"]))


def command() -> list[str]:
    """The server's command line. vLLM reads the key from VLLM_API_KEY, so no process list shows it."""
    words = ["vllm", "serve", MODEL or UPLOADED]
    words += ["--served-model-name", NAME, "--host", "0.0.0.0", "--port", str(PORT)]
    words += ["--dtype", DTYPE, "--tensor-parallel-size", str(GPUS)]
    words += ["--generation-config", "vllm"]  # a request's own settings, not defaults from the model's folder
    words += ["--revision", REVISION] if REVISION else []
    words += ["--max-model-len", str(MAX_MODEL_LEN)] if MAX_MODEL_LEN else []
    return words


@app.function(
    image=image,
    gpu=f"{GPU}:{GPUS}",
    volumes={"/weights": weights},
    secrets=secrets,
    min_containers=0,
    max_containers=MOST_CONTAINERS,
    scaledown_window=SCALEDOWN_S,
    timeout=3600,  # of one request
)
@modal.concurrent(max_inputs=64)
@modal.web_server(port=PORT, startup_timeout=1200, requires_proxy_auth=PROXY_AUTH)
def serve() -> None:
    """Start vLLM; Modal forwards requests once the port answers."""
    subprocess.Popen(command())


@app.local_entrypoint()
def upload() -> None:
    """Put ./model on the volume: `modal run modal_app.py`."""
    if MODEL:
        print(f"{MODEL} comes from the hub; there is nothing to upload")
        return
    folder = Path(__file__).resolve().parent / "model"
    with weights.batch_upload(force=True) as batch:
        batch.put_directory(folder, "/model")
    print(f"{folder} is on the volume {VOLUME}; now: modal deploy modal_app.py")
