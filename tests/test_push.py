"""What ``--push_to_hub`` uploads, to a hub that takes it."""

import base64
import http.server
import json
import threading

import pytest
from servers import Server
from words import assert_same, sdxl_word, word

from ti_jax.config import TrainConfig, resolve
from ti_jax.embeddings import Embedding
from ti_jax.training import run_folder
from ti_jax.training.hub import in_all_formats, open_repository

METADATA = {"base_model": "org/model", "steps": "500", "initializer_token": "toy"}


@pytest.fixture
def hub(monkeypatch):
    """The files that a hub has been sent, by name, for ``me/cat``."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = {}
            if self.path == "/api/repos/create":
                answer = {"url": "http://localhost/me/cat"}
            elif self.path == "/api/validate-yaml":
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": "http://localhost/me/cat/commit/1", "commitOid": "1" * 40}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = Server(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://localhost:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_is_uploaded_with_all_formats(hub, tmp_path):
    pytest.importorskip("torch", reason="AUTOMATIC1111's .pt needs PyTorch")
    embedding = word(2, token="<cat-toy>", metadata=METADATA)
    run_folder.save_embedding(embedding, tmp_path)
    run_folder.save_embedding(embedding, tmp_path, 5)
    (tmp_path / "samples").mkdir()
    kept = ("overview.png", "progress.png", "samples/overview-04.png", "report.html", "scores.json")
    for name in (*kept, "config.yaml", "metrics.jsonl", "samples/notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    config = resolve(
        TrainConfig(
            pretrained_model_name_or_path="org/model", train_data_dir="cat", placeholder_token="<cat-toy>",
            initializer_token="toy", output_dir=str(tmp_path), push_to_hub=True, hub_model_id="me/cat",
            hub_token="hf_x",
        )
    )  # fmt: skip
    open_repository(config)(tmp_path, embedding)
    words = ("learned_embeds.safetensors", "learned_embeds-steps-5.safetensors")
    named = ("cat-toy.safetensors", "cat-toy.pt", "cat-toy.png")
    assert set(hub) == {*kept, *words, *named, "README.md"}
    assert all(hub[name] == name.encode() for name in kept)
    card = hub["README.md"].decode()
    assert "| ComfyUI | `models/embeddings/` | `embedding:cat-toy` |" in card
    for name in (*words, *named):
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(hub[name])
        found = Embedding.load(tmp_path / "down" / name, token="<cat-toy>")
        assert found.vectors["text_encoder"].tobytes() == embedding.vectors["text_encoder"].tobytes()


def test_formats_of_sdxl_and_of_models_that_nobody_else_knows(tmp_path):
    embedding = sdxl_word(2)
    (name,) = files = in_all_formats(embedding)
    assert name.endswith(".safetensors")
    (tmp_path / name).write_bytes(files[name])
    assert_same(Embedding.load(tmp_path / name, token=embedding.token), embedding)
    assert in_all_formats(Embedding("<me>", {"text_encoder": [[1.0] * 64]})) == {}
