"""Finding a model: embedded, in a folder, on a hub (a small one of our own, over HTTP), in the hub's cache."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import children
import pytest
import servers

from ti_jax.config import ASSETS
from ti_jax.errors import InputError
from ti_jax.weights.config_files import read_component_config
from ti_jax.weights.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER_COMMIT = "f" * 40

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
XL_INDEX = INDEX | {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
CONFIGS = ["scheduler/scheduler_config.json", *(f"{name}/config.json" for name in ("text_encoder", "unet", "vae"))]
TOKENIZER = [f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json")]
TOKENIZER += ["tokenizer/vocab.json"]
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
OTHER = [
    "README.md",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.ckpt",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/openvino_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
]
SAFETENSORS = [f"{name}.safetensors" for name in WEIGHTS]
FP16 = [f"{name}.fp16.safetensors" for name in WEIGHTS]
PICKLES = ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
READ = ["model_index.json", *CONFIGS, *TOKENIZER]


class Hub(servers.Server):
    """As much of the Hugging Face Hub as answers for `repositories`: {id: [file names]}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, list[str]] = {}
        self.index: dict = INDEX
        self.gated: set[str] = set()
        self.down = False
        self.tokens: set[str] = set()  # that open the gated repositories
        self.failing: Callable[[HubHandler], None] | None = None  # answers in place of the hub
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        if self.server.failing:
            return self.server.failing(self)
        hub, path = self.server, self.path.split("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository, files = f"{owner}/{name}", hub.repositories.get(f"{owner}/{name}")
        if hub.down:
            return self.send(503, b"down")
        if files is None:
            return self.send(404 if self.headers.get("authorization") else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[1:2] and rest[1] not in ("main", "old", COMMIT, OLDER_COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit = OLDER_COMMIT if rest[1:2] and rest[1] in ("old", OLDER_COMMIT) else COMMIT
        if is_api and rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": file, "size": len(self.content(file)), "oid": "0" * 40} for file in files
            ]
            return self.send(200, json.dumps(listing).encode())
        if is_api:
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.send(200, json.dumps(info | {"private": False, "tags": [], "downloads": 0}).encode())
        if repository in hub.gated and self.headers.get("authorization") not in hub.tokens:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        content = self.content("/".join(rest[2:]))
        return self.send(200, content, {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": commit})

    def content(self, file: str) -> bytes:
        return json.dumps(self.server.index).encode() if file == "model_index.json" else b"{}"

    def send(self, status: int, content: bytes, headers: dict | None = None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# What of it takes long to import and does not read the environment.
MODULES = (
    "ti_jax.weights.hub",
    "httpx2",
    "httpcore2",
    "httpx",
    "httpcore",
    "anyio",
    "h11",
    "truststore",
    "yaml",
    "filelock",
)
MODULES += ("tqdm.auto", "fsspec", "hf_xet", "tempfile", "shutil")
SCRIPT = """
import sys
assert "huggingface_hub" not in sys.modules
from ti_jax.errors import InputError
from ti_jax.weights.hub import resolve
try:
    print(resolve(*(argument or None for argument in sys.argv[1:])))
except InputError as error:
    print("InputError:", error)
"""


@pytest.fixture(scope="module")
def script():
    """Resolve in a process of its own, as its environment counts when huggingface_hub is imported."""
    with children.forked(SCRIPT, *MODULES) as run:
        yield run


@pytest.fixture
def run(hub, script, tmp_path):
    """``run(repo_id, ...)``: the line that a process says which resolves it."""

    def resolve_there(repo_id: str, revision="", variant="", token="", **environment: str) -> str:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "*"} | environment
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        done = script([repo_id, revision, variant, token], os.environ | environment)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 1
        return lines[0]

    return resolve_there


def files_in(folder: str | Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# -- folders


def test_embedded_default_and_folders(tmp_path):
    assert resolve(None) == ASSETS / "mini-sd"
    assert resolve(str(ASSETS / "mini-sd"), "main", "fp16") == ASSETS / "mini-sd"


def test_folder_under_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(INDEX))
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "a folder without model_index.json"),
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "a None, which ti_jax does not read"),
        (json.dumps({"_class_name": "FluxPipeline"}), "a FluxPipeline, which ti_jax does not read; it reads Stable"),
        (json.dumps({"_class_name": "StableDiffusion3Pipeline"}), "a StableDiffusion3Pipeline, which"),
        (json.dumps(INDEX | {"vae": [None, None]}), "without vae"),
        (json.dumps(INDEX | {"_class_name": "StableDiffusionXLPipeline"}), "without text_encoder_2, tokenizer_2"),
    ],
)
def test_folders_of_something_else(tmp_path, index, said):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputError) as error:
        resolve(str(tmp_path))
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_single_file_and_not_an_id(tmp_path):
    file = tmp_path / "v1-5-pruned.safetensors"
    file.touch()
    assert resolve(str(file)) == file
    for flag in ("revision", "variant"):
        with pytest.raises(InputError, match=f"--{flag} fp16: .*is a single file and has only one; leave it out"):
            resolve(str(file), **{flag: "fp16"})
    # The hub is not asked for it.
    for name in ("v1-5-pruned.safetensors", "models/v1-5-pruned.ckpt"):
        with pytest.raises(InputError, match="no such file; check the path"):
            resolve(name)
    for name in (str(tmp_path / "nothing"), "./here", "a/b/c", "two words/x"):
        with pytest.raises(InputError, match="no such folder, and not a hub id either"):
            resolve(name)
    for name in ("", " "):
        with pytest.raises(InputError, match="the model's name is empty"):
            resolve(name)


def test_component_configs(tmp_path):
    assert read_component_config(ASSETS / "mini-sd", "scheduler")["_class_name"] == "DDIMScheduler"
    assert read_component_config(ASSETS / "mini-sd", "unet")["cross_attention_dim"] == 192
    with pytest.raises(InputError, match=r"unet/config\.json: no such file"):
        read_component_config(tmp_path, "unet")
    (tmp_path / "unet" / "config.json").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_component_config(tmp_path, "unet")


# -- the hub


def test_only_what_is_read_comes_down(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS, *FP16, *PICKLES, *OTHER]
    assert files_in(run("owner/sd")) == sorted([*READ, *SAFETENSORS])
    assert files_in(run("owner/sd", variant="fp16")) == sorted([*READ, *SAFETENSORS, *FP16])


def test_pickles_where_there_is_nothing_else(hub, run):
    hub.repositories["owner/sd"] = [*READ, *PICKLES, *OTHER]
    assert files_in(run("owner/sd")) == sorted([*READ, *PICKLES])


def test_sdxl_in_shards(hub, run):
    hub.index = XL_INDEX
    second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"]
    shards = [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    of_variant = [
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
    ]
    hub.repositories["owner/xl"] = [*READ, *second, *shards, *of_variant, *SAFETENSORS[::2], *OTHER]
    files = files_in(run("owner/xl"))
    assert [file for file in files if file.startswith("unet/")] == sorted([*shards, "unet/config.json"])
    assert set(second) < set(files) and set(OTHER).isdisjoint(files)


def test_revision_token_and_faults(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    assert OLDER_COMMIT in run("owner/sd", revision="old")
    assert "InputError: owner/sd at revision new: the hub repository has no such branch" in run("owner/sd", "new")
    for token in ("", "hf_wrong"):
        said = run("owner/nothing", token=token)
        assert said.startswith("InputError: owner/nothing: no such folder, and no such repository on the hub")
    hub.gated.add("owner/sd")
    said = run("owner/sd")
    assert "InputError: owner/sd: gated; accept its conditions at https://huggingface.co/owner/sd" in said


def test_variant_that_is_not_there_is_said_before_the_download(hub, run):
    hub.repositories["owner/sd"] = [*READ, *FP16]
    said = run("owner/sd")
    assert "InputError: owner/sd: text_encoder: no weights without a variant; there are: fp16; choose" in said
    assert not any("fp16" in request for request in hub.requests)


def test_another_pipeline_costs_one_small_file(hub, run):
    hub.index = {"_class_name": "FluxPipeline"}
    hub.repositories["owner/flux"] = [*READ, *SAFETENSORS]
    assert "InputError: owner/flux: a FluxPipeline, which ti_jax does not read" in run("owner/flux")
    assert {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request} == {"model_index.json"}
    hub.repositories["owner/lora"] = ["README.md", "lora.safetensors"]
    assert "InputError: owner/lora: no model_index.json on the hub" in run("owner/lora")


# -- without network


def test_from_the_cache_once_downloaded(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS, *PICKLES, *OTHER]
    online = run("owner/sd")
    hub.requests.clear()
    assert run("owner/sd", HF_HUB_OFFLINE="1") == online
    assert not hub.requests
    assert run("owner/sd", HF_ENDPOINT="http://127.0.0.1:1") == online  # nobody listens there
    hub.down = True
    assert run("owner/sd") == online
    said = run("owner/sd", variant="fp16", HF_HUB_OFFLINE="1")
    assert "and its copy in the cache is not complete:" in said and "no weights of variant fp16" in said


def test_taken_down_since_it_was_downloaded(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    online = run("owner/sd")
    hub.repositories.clear()
    assert run("owner/sd") == online
    assert "no weights of variant fp16" in run("owner/sd", variant="fp16")
    assert "no such repository on the hub" in run("owner/sd", revision="old")


def test_cache_that_cannot_be_written(hub, run, tmp_path):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    (tmp_path / "file").touch()
    said = run("owner/sd", HF_HUB_CACHE=str(tmp_path / "file" / "cache"))
    assert said.startswith("InputError: owner/sd: cannot be stored in the hub's cache (")


def test_nothing_in_the_cache(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        said = run("owner/sd", **environment)
        assert said.startswith(
            "InputError: owner/sd: no such folder, not in the hub's cache either, and the hub cannot"
        )


def cache_entry(folder: Path, files: list[str], index: dict = INDEX) -> Path:
    """A repository in the hub's cache as huggingface_hub lays it out; returns the snapshot."""
    repository = folder / "hub" / "models--owner--sd"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(files):
        blob = repository / "blobs" / f"{number:040x}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_text(json.dumps(index) if file == "model_index.json" else "{}")
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    return snapshot


def test_a_cache_that_another_program_filled(run, tmp_path):
    snapshot = cache_entry(tmp_path / "cache", [*READ, *SAFETENSORS, *OTHER])
    assert run("owner/sd", HF_HUB_OFFLINE="1") == str(snapshot)
    assert run("owner/sd", revision=COMMIT, HF_HUB_OFFLINE="1") == str(snapshot)
    assert "not in the hub's cache either" in run("owner/sd", revision="old", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("lost", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_cache_that_is_not_complete(run, tmp_path, lost):
    snapshot = cache_entry(tmp_path / "cache", [*READ, *SAFETENSORS])
    (snapshot / lost).unlink()
    said = run("owner/sd", HF_HUB_OFFLINE="1")
    assert said.startswith("InputError: ") and Path(lost).parent.name in said


# -- a hub that fails, or something else in its place


def page(handler):
    """The login page of a hotel's network."""
    handler.send(200, b"<html>log in</html>", {"Content-Type": "text/html"})


def redirect(handler):
    if handler.path == "/login.html":
        return page(handler)
    handler.send(302, b"", {"Location": "/login.html"})


def half(handler):
    handler.send(200, b'{"id": "owner/sd", "sha"', {"Content-Length": "4000"})
    handler.close_connection = True


def silence(handler):
    time.sleep(3)


def status(number, headers=None):
    return lambda handler: handler.send(number, b"{}", headers)


# What answers -> what is said.
FAILING = {
    "page": (page, "does not answer as the hub does"),
    "redirect": (redirect, "does not answer as the hub does"),
    "other json": (lambda handler: handler.send(200, b"[1]"), "does not answer as the hub does"),
    "no fields": (lambda handler: handler.send(200, b"{}"), "does not answer as the hub does"),
    "circle": (lambda handler: handler.send(302, b"", {"Location": handler.path}), "the hub cannot be reached"),
    "cut": (half, "the hub cannot be reached"),
    "silence": (silence, "the hub cannot be reached"),
    "401": (status(401, {"X-Error-Message": "Invalid user token"}), "the hub refuses access"),
    "403": (status(403), "the hub refuses access"),
    "gated": (status(403, {"X-Error-Code": "GatedRepo"}), "gated; accept its conditions"),
    "429": (status(429), "too many requests for the hub"),
    "500": (status(500), "the hub cannot be reached"),
}


@pytest.fixture
def run_both(hub, script, tmp_path):
    """As `run`, with what is said on stderr."""

    def resolve_there(**environment: str) -> tuple[str, str]:
        usual = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "*"}
        usual |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
        done = script(["owner/sd"], os.environ | usual | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.strip()

    return resolve_there


@pytest.mark.parametrize("kind", FAILING)
def test_a_hub_that_fails(hub, run_both, tmp_path, kind):
    hub.failing, said = FAILING[kind]
    patience = {"HF_HUB_ETAG_TIMEOUT": "1"} if kind == "silence" else {}
    out, err = run_both(**patience)
    assert out.startswith("InputError: owner/sd: ") and said in out and "\n" not in out and not err
    assert out.count("; ") >= 1, "a remedy"
    snapshot = cache_entry(tmp_path / "cache", [*READ, *SAFETENSORS])
    out, err = run_both(**patience)
    assert out == str(snapshot)
    assert err.startswith("owner/sd: ") and err.endswith("going on with the copy in the cache") and "\n" not in err


@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:1"},  # the package for it may be there or not
        {"ALL_PROXY": "nonsense://127.0.0.1:1"},
        {"ALL_PROXY": "http://127.0.0.1:1"},
        {"HF_ENDPOINT": "no-scheme"},
    ],
)
def test_a_proxy_that_does_not_work(hub, run_both, tmp_path, environment):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    environment = {"NO_PROXY": "", "no_proxy": "", **environment}
    out, err = run_both(**environment)
    assert out.startswith("InputError: owner/sd: no such folder, not in the hub's cache either, and ") and not err
    snapshot = cache_entry(tmp_path / "cache", [*READ, *SAFETENSORS])
    out, err = run_both(**environment)
    assert out == str(snapshot)
    assert err.endswith("going on with the copy in the cache") and "\n" not in err


def test_a_mirror_whose_files_are_pages(hub, run_both):
    """It knows the repository, and every file of it is a login page."""
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    hub.content = lambda file: b"<html>"

    class Pages(HubHandler):
        def send(self, number, content, headers=None):
            if "/resolve/" in self.path:
                content, headers = b"<html>", None
            super().send(number, content, headers)

    hub.RequestHandlerClass = Pages
    out, _ = run_both()
    assert out.startswith("InputError: owner/sd: ") and "\n" not in out


def test_a_token_opens_a_gated_repository(hub, run):
    hub.repositories["owner/sd"] = [*READ, *SAFETENSORS]
    hub.gated.add("owner/sd")
    hub.tokens.add("Bearer hf_right")
    assert "gated; accept its conditions" in run("owner/sd", token="hf_wrong")
    assert "HF_TOKEN; train.py also takes --hub_token" in run("owner/sd")
    assert COMMIT in run("owner/sd", token="hf_right")


# Several commands in one process: it takes seconds to import JAX.
COMMANDS = """
import json, sys
from ti_jax.cli.main import main
for command in json.loads(sys.argv[1]):
    print(f"<{main(command)}>", file=sys.stderr)
"""


def test_the_token_of_a_run_reaches_the_hub(hub, pictures, tmp_path):
    """A gated model: --hub_token gets past the gate (to files that are no model, which ends it)."""
    hub.tokens.add("Bearer hf_right")
    flags = ["--train_data_dir", str(pictures), "--placeholder_token", "<new>", "--initializer_token", "toy"]
    flags += ["--output_dir", str(tmp_path / "out")]
    cases = [(command, token) for command in ("train", "plan") for token in ("hf_wrong", "hf_right")]
    commands = []
    for command, token in cases:
        model = f"owner/{command}_{token}"  # what one has in the cache is nothing to another
        hub.repositories[model] = [*READ, *SAFETENSORS]
        hub.gated.add(model)
        commands.append([command, "--pretrained_model_name_or_path", model, "--hub_token", token, *flags])
    environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "*", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, rest = re.split(r"^<(\d+)>\n", done.stderr, flags=re.MULTILINE)
    assert not rest
    for (_, token), told, status in zip(cases, said[::2], said[1::2], strict=True):
        assert status == "2"
        assert ("parts of different models" if token == "hf_right" else "gated; accept") in told.splitlines()[-1]


def test_a_pipeline_with_code_of_its_own(tmp_path):
    """diffusers saves the class of such a pipeline as [module, class]."""
    for class_name, read in (
        (["pipeline_custom", "StableDiffusionPipeline"], True),
        (["pipeline_custom", "MyPipeline"], False),
        (["StableDiffusionPipeline"], False),
        ({"a": "b"}, False),
        ([["StableDiffusionPipeline"], []], False),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(INDEX | {"_class_name": class_name}))
        if read:
            assert resolve(str(tmp_path)) == tmp_path
        else:
            with pytest.raises(InputError, match="which ti_jax does not read"):
                resolve(str(tmp_path))


def test_no_network_is_noticed_soon(run):
    start = time.monotonic()
    run("owner/sd", HF_ENDPOINT="http://127.0.0.1:1")
    assert time.monotonic() - start < 15
