"""The hub, played by a small server on this machine: pinning, hashes, resumption, the cache, refusals."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest
import torch
from safetensors.torch import save

from invdiff import InvdiffError, priors
from invdiff.networks.adm import ADMConfig
from invdiff.priors.hub import Address, parse, selection
from tests.unit.test_formats_adm import weights

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

CONFIG = ADMConfig(inputs=1, outputs=1, width=32, multipliers=(1.0,), blocks=1, head_channels=16)
COMMIT, OTHER = "a" * 40, "b" * 40
REPO = "physics/waves"


class Hub(http.server.ThreadingHTTPServer):
    """What the hub answers about one repository.

    Args:
        files: Contents by name.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.requests, self.refs = files, [], {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}
        self.breaks = 0  # how many answers still break off in the middle
        self.status = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            return self.send(hub.status[0], b"{}", {"X-Error-Code": hub.status[1]}, body)
        if path.startswith(f"/api/models/{REPO}/revision/"):
            commit = hub.refs.get(path.rsplit("/", 1)[1])
            if commit is None:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            held = [{"rfilename": name, **self.about(content)} for name, content in hub.files.items()]
            return self.send(200, json.dumps({"id": REPO, "sha": commit, "siblings": held}).encode(), {}, body)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "oid": "0" * 40, "path": name, **self.about(c)} for name, c in hub.files.items()
            ]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in hub.files:
            code = "EntryNotFound" if path.startswith(f"/{REPO}/") else "RepoNotFound"
            return self.send(404, b"{}", {"X-Error-Code": code}, body)
        return self.file(hub.files[name], body)

    @staticmethod
    def about(content):
        digest = hashlib.sha256(content).hexdigest()
        return {
            "size": len(content),
            "lfs": {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130},
        }

    def file(self, content, body):
        tag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        start, code = 0, 200
        if (wanted := self.headers.get("Range")) is not None and body:
            start, code = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        if body and self.server.breaks and len(rest) > 1000:
            self.server.breaks -= 1
            self.send(code, rest, headers, body, cut=len(rest) // 2)
            self.close_connection = True
            return None
        return self.send(code, rest, headers, body)

    def send(self, code, content, headers, body, cut=None):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
            self.wfile.flush()


@pytest.fixture(scope="module")
def state():
    return weights(CONFIG)


@pytest.fixture
def hub(tmp_path, monkeypatch, state):
    server = Hub({"waves.safetensors": save(state), "README.md": b"# Waves", ".gitattributes": b""})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


PINNED = f"hf://{REPO}@{COMMIT}"


def load(address=PINNED, **declared):
    return priors.load(address, check=False, head_channels=16, **declared)


def asked(hub, name):
    return [(command, span) for command, path, span in hub.requests if path.endswith(name)]


def test_addresses():
    assert parse("hf://a/b") == Address("a/b", "main", "")
    assert parse("hf://a/b@v1/unet/") == Address("a/b", "v1", "unet")
    assert parse("hf://a/b/c/d.pt") == Address("a/b", "main", "c/d.pt")
    assert parse("hf://a/b@refs%2Fpr%2F3").revision == "refs/pr/3"
    assert parse(PINNED).pinned and not parse("hf://a/b@main").pinned
    for wrong in ("hf://a", "hf://a/b@", "hf://a/b@v1@v2", "hf://a/b/../../etc", "hf://a/b/c@v1"):
        with pytest.raises(InvdiffError, match="no address on the hub"):
            parse(wrong)


def test_a_pinned_commit(hub, state):
    prior = load()
    digest = hashlib.sha256(hub.files["waves.safetensors"]).hexdigest()
    assert prior.card["source"] == PINNED and prior.card["files"] == {"waves.safetensors": digest}
    assert prior.card["sha256"] == digest
    assert torch.equal(prior.denoiser.network.state_dict()["out.2.weight"], state["out.2.weight"])
    assert not asked(hub, "README.md"), "only weights and configurations are fetched"
    before = len(asked(hub, "waves.safetensors"))
    load()
    assert all(command == "HEAD" for command, _ in asked(hub, "waves.safetensors")[before:]), "cached"


def test_a_branch_is_resolved_and_told(hub):
    with pytest.warns(UserWarning, match=rf"main is commit {COMMIT} today; load {PINNED} "):
        assert load(f"hf://{REPO}").card["source"] == PINNED
    with pytest.warns(UserWarning, match="v1 is commit"):
        load(f"hf://{REPO}@v1")


def test_a_wrong_hash_is_refused(hub):
    digest = hashlib.sha256(hub.files["waves.safetensors"]).hexdigest()
    load(sha256=digest.upper())
    load(sha256={"waves.safetensors": digest})
    with pytest.raises(InvdiffError, match="was demanded; it is another file"):
        load(sha256="0" * 64)
    with pytest.raises(InvdiffError, match=r"no file 'other\.pt' to hash"):
        load(sha256={"other.pt": digest})


def test_a_damaged_cache_is_noticed(hub, tmp_path):
    load()
    (blob,) = [p for p in (tmp_path / "cache").rglob("*") if p.parent.name == "blobs" and p.stat().st_size > 9999]
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(content))
    with pytest.raises(InvdiffError, match="damaged: its SHA-256"):
        load()


def test_a_broken_download_resumes(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is written at once
    hub.breaks = 2
    load()
    spans = [span for command, span in asked(hub, "waves.safetensors") if command == "GET"]
    starts = [0 if span is None else int(span.removeprefix("bytes=").rstrip("-")) for span in spans]
    size = len(hub.files["waves.safetensors"])
    assert starts[0] == 0 and 0.4 * size < starts[1] < starts[2] < size


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvdiffError, match=r"not in the cache, and the hub is offline \(HF_HUB_OFFLINE\)"):
        load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.warns(UserWarning, match="is commit"):
        load(f"hf://{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked_before = len(hub.requests)
    assert load().card["source"] == PINNED
    with pytest.warns(UserWarning, match="is commit"):
        assert load(f"hf://{REPO}").card["source"] == PINNED
    with pytest.raises(InvdiffError, match="not in the cache"):
        load(f"hf://{REPO}@{OTHER}")
    assert len(hub.requests) == asked_before


def test_a_server_that_is_gone(hub, monkeypatch):
    """Without a connection, what is in the cache serves as it does offline."""
    load()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    )
    assert load().card["source"] == PINNED
    with pytest.raises(InvdiffError, match="cannot be reached"):
        load(f"hf://{REPO}@{OTHER}")


def test_what_the_hub_refuses(hub):
    with pytest.raises(InvdiffError, match="no revision 'v9'"):
        load(f"hf://{REPO}@v9")
    with pytest.raises(InvdiffError, match="no physics/none on the hub"):
        hub.status = (404, "RepoNotFound")
        load("hf://physics/none")
    hub.status = (403, "GatedRepo")
    with pytest.raises(InvdiffError, match="accept them on its page"):
        load(f"hf://{REPO}@v1")


def test_files_that_make_up_a_checkpoint():
    here = Address(REPO)
    pipeline = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "a/b/c.json"]
    safe, old = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"
    found = selection(here, [*pipeline, safe, old, "unet/x.msgpack", "README.md"])
    assert found == sorted([*pipeline[:3], safe]), "torch files only where no safetensors lie beside them"
    assert old in selection(here, [*pipeline, old])
    half = safe.replace(".safe", ".fp16.safe")
    assert half not in selection(here, [*pipeline, safe, half]) and half in selection(here, [*pipeline, half])
    extra = ["v1-5-pruned.safetensors", "safety_checker/model.safetensors", "safety_checker/config.json"]
    words = ["tokenizer/merges.txt", "tokenizer/vocab.json"]
    assert selection(here, [*pipeline, safe, *extra, *words]) == sorted([*found, *words])
    assert selection(here, extra[:1]) == extra[:1], (
        "where there is no pipeline, weights of the root are what is meant"
    )
    part = selection(Address(REPO, file="unet"), [*pipeline, safe, old])
    assert part == sorted(["unet/config.json", safe, "scheduler/scheduler_config.json"])
    assert selection(Address(REPO, file="b.pt"), ["a.pt", "b.pt", "b.json"]) == ["b.pt", "b.json"]
    with pytest.raises(InvdiffError, match=r"several checkpoints; name one of a\.pt, b\.pt"):
        selection(here, ["a.pt", "b.pt"])
    with pytest.raises(InvdiffError, match="no weights"):
        selection(here, ["README.md"])
    with pytest.raises(InvdiffError, match=r"has no c\.pt"):
        selection(Address(REPO, file="c.pt"), ["a.pt"])


def test_one_of_several_files(hub, state, tmp_path):
    torch.save(state, tmp_path / "other.pt")
    hub.files["old/other.pt"] = (tmp_path / "other.pt").read_bytes()
    prior = load(f"{PINNED}/old/other.pt")
    assert prior.card["source"] == f"{PINNED}/old/other.pt" and list(prior.card["files"]) == ["old/other.pt"]
    with pytest.raises(InvdiffError, match="several checkpoints"):
        load(PINNED)


def test_a_pipeline_of_diffusers(hub, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "made")
    hub.files = {
        p.relative_to(tmp_path / "made").as_posix(): p.read_bytes()
        for p in (tmp_path / "made").rglob("*")
        if p.is_file()
    }
    hub.files["pipeline.py"] = b"raise RuntimeError"
    prior = priors.load(PINNED, check=False)
    assert prior.card["format"] == "diffusers UNet2DModel" and prior.card["source"] == PINNED
    assert "unet/diffusion_pytorch_model.safetensors" in prior.card["files"]
    assert not asked(hub, "pipeline.py"), "no code is fetched"
    part = priors.load(f"{PINNED}/unet", check=False)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(part.denoiser(x, 1.0), prior.denoiser(x, 1.0))


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvdiffError, match=r"pip install 'invdiff\[hub\]'"):
        load()


def test_the_librarys_own_variables(hub, tmp_path):
    """``HF_ENDPOINT`` and ``HF_HOME`` in the environment of a fresh program."""
    program = (
        f"from invdiff import priors\nprint(priors.load({PINNED!r}, check=False, head_channels=16).card['source'])"
    )
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **own}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == PINNED and (tmp_path / "home" / "hub").is_dir()


def test_hash_of_a_local_file(tmp_path, state):
    path = tmp_path / "waves.pt"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(path, sha256=digest).card["sha256"] == digest
    with pytest.raises(InvdiffError, match="was demanded; it was not loaded"):
        load(path, sha256="0" * 64)
    with pytest.raises(InvdiffError, match="the hash of one file"):
        load(tmp_path, sha256=digest)
